"""Runs the mutants of specs in a few processes, each with the specs of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import catalog
from registry.errors import SpecError
from tests.mutants import battery, cases
from tests.mutants.specs import Mutant, mutants


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: `by` noticed it, or nothing did of so many cases that go through what it changed."""

    mutant: str
    kind: str
    by: str | None
    tried: int
    said: str = ""


def all_mutants(only: Sequence[str] = ()) -> list[Mutant]:
    """The mutants of every built-in spec, or of some."""
    named = [(kind, name) for kind in catalog.KINDS for name in catalog._files(kind) if not only or name in only]
    return [mutant for kind, name in named for mutant in mutants(kind, name)]


#: What each process has of its own.
_battery: list[battery.Battery] = []
_originals: dict[tuple[str, str], dict[str, Any]] = {}


def run(chosen: Sequence[Mutant], workers: int = 2) -> Iterator[Outcome]:
    """The outcome of each mutant, as they come."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as root:
        if workers == 1:
            _begin(root)
            yield from map(_outcome, chosen)
            return
        # Processes that start afresh: torch's threads do not outlive a fork.
        with multiprocessing.get_context("spawn").Pool(workers, _begin, (root,)) as pool:
            yield from pool.imap_unordered(_outcome, chosen)


def _begin(root: str) -> None:
    quiet()
    for kind in catalog.KINDS:
        _originals.update({(kind, name): catalog._read_yaml(path) for name, path in catalog._files(kind).items()})
    for key in _originals:
        catalog._load(*key)  # while nothing is registered that a spec could extend in another's place
    _battery[:] = [battery.Battery(cases.cases(cases.Models(Path(root))), Path(root))]


def quiet() -> None:
    """Nothing but our own lines on the terminal, and one thread in each process."""
    import torch
    import transformers

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _outcome(mutant: Mutant) -> Outcome:
    try:
        return _killed(mutant)
    finally:
        battery.unregister()


def _killed(mutant: Mutant) -> Outcome:
    try:
        affected = battery.affected_by(mutant, _originals)
    except SpecError as error:
        return Outcome(str(mutant), mutant.kind, "registration", 0, error.problem)
    if catalog._registered[mutant.spec].source() == catalog._load(*mutant.spec).source():
        return Outcome(str(mutant), mutant.kind, None, 0, "says what is said elsewhere: the line is not needed")
    case, tried, said = _battery[0].kill(mutant, affected)
    return Outcome(str(mutant), mutant.kind, case and case.kind, tried, f"{case.name}: {said}" if case else "")
