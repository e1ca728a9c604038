"""A short run of every fuzzer; `make fuzz` is the long one."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.errors import RegistryError
from tests.fuzz.mutations import mutate
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_raised_but_errors_of_ours(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    seeds, read = target.prepare(tmp_path)
    for seed in seeds:
        read(seed)  # real files are read

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(range(len(seeds))), st.integers(0, 2**32), st.none() | st.binary(max_size=200))
    def run(seed: int, how: int, raw: bytes | None) -> None:
        data = mutate(seeds[seed], target.kind, random.Random(how)) if raw is None or how % 4 else raw
        with contextlib.suppress(RegistryError):
            read(data)

    run()


def test_a_parser_that_breaks_is_found() -> None:
    """The damage does reach what is behind the first check: a reader that trusts what it finds fails soon."""

    def trusting(data: bytes) -> None:
        try:
            found = json.loads(data)
        except ValueError as error:
            raise RegistryError("no JSON") from error
        bytes(found["size"])

    wrong = set()
    for how in range(300):
        try:
            trusting(mutate(b'{"size": 4, "name": "a"}', "json", random.Random(how)))
        except RegistryError:
            continue
        except Exception as error:
            wrong.add(type(error))
    assert {KeyError, TypeError, ValueError} <= wrong
