"""Shows damaged specs to the cases.

Each case is run once on the sound specs, to see that it passes and which rules of which specs it goes through; a
damaged rule is only shown to the cases that go through it.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from registry import bind, catalog, target
from tests.mutants.cases import Case
from tests.mutants.specs import Mutant

#: Seconds that one case may take; a damaged spec that hangs is noticed too.
LIMIT = 60
#: Round trips notice what cannot be bound or does not come back, which one does as well as another.
ROUND_TRIPS = 10


class TooLong(Exception):
    """A case that ran into the limit."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TooLong in the block after some seconds."""

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(case: Case, root: Path) -> str | None:
    """What a case says of the specs as they are: None where it passes, else the error in a line."""
    scratch = Path(tempfile.mkdtemp(dir=root))
    try:
        with limited(LIMIT):
            case.run(scratch)
    except pytest.skip.Exception:
        return None
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return None


def record(case: Case, root: Path) -> None:
    """Run a case on the sound specs, whatever is registered, and keep what it uses. Raises where it fails on them."""
    uses: set[tuple[str, str, str]] = set()
    group, write = bind._Reader.group, target._Writer.write

    def grouped(self: Any, pattern: str, rule: Any, *rest: Any) -> None:
        uses.add((*_owner(self), pattern))
        group(self, pattern, rule, *rest)

    def written(self: Any, pattern: str, rule: Any, kind: Any) -> None:
        uses.add((*_owner(self), pattern))
        write(self, pattern, rule, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bind._Reader, "group", grouped)
        patch.setattr(target._Writer, "write", written)
        patch.setattr(catalog, "_registered", {})
        failed = run(case, root)
    if failed:
        raise AssertionError(f"{case.name} fails without any damage: {failed}")
    case.uses = frozenset(uses)


def _owner(side: Any) -> tuple[str, str]:
    spec, architecture = side.spec, side.model.architecture
    return ("architecture", architecture.name) if spec.rules_from == "architecture" else ("format", spec.name)


def affected_by(mutant: Mutant, originals: dict[tuple[str, str], dict[str, Any]]) -> set[tuple[str, str]]:
    """Register a mutant and every spec that it changes by `extends`. Raises SpecError, as registration does."""
    catalog.register(mutant.data)
    changed = {mutant.spec}
    grown = True
    while grown:
        grown = False
        for key, data in originals.items():
            heir = key not in changed and key[0] == mutant.spec[0] and (key[0], data.get("extends")) in changed
            if heir and catalog._resolve(data, key[1]) != catalog._load(*key).source():
                catalog._registered[key] = catalog.build(data, key[1])
                changed.add(key)
                grown = True
    return changed


def unregister() -> None:
    """Back to the sound specs."""
    catalog._registered.clear()


class Battery:
    """All cases, and which of them killed what."""

    def __init__(self, every: Sequence[Case], root: Path) -> None:
        self.every, self.root = every, root
        self.killers: dict[tuple[tuple[str, str], str], list[Case]] = defaultdict(list)

    def kill(self, mutant: Mutant, affected: set[tuple[str, str]]) -> tuple[Case | None, int, str]:
        """The case that notices a mutant, how many were tried, and what it said. What killed one like it goes first."""
        known = self.killers[mutant.spec, mutant.pattern or ".".join(mutant.where.split(".")[:3])]
        tried = 0
        for case in self.relevant(mutant, affected, known):
            tried += 1
            if said := run(case, self.root):
                if case in known:
                    known.remove(case)
                known.insert(0, case)
                return case, tried, said
        return None, tried, ""

    def relevant(self, mutant: Mutant, affected: set[tuple[str, str]], known: Sequence[Case]) -> Iterator[Case]:
        """The cases that a mutant may show itself in: what killed one like it, what goes through its rule, the others.

        Each the fastest kind first, and not more round trips than some.
        """
        names = {mutant.pattern}
        for kind, name in affected if mutant.pattern is not None else ():
            spec = catalog.architecture(name) if kind == "architecture" else catalog.format_spec(name)
            repeats = (r for r in spec.repeats if str(mutant.pattern).startswith(r.of))
            names |= {str(mutant.pattern).replace(r.of, r.to, 1) for r in repeats}
        others: list[Case] = []
        trips = 0
        for case in dict.fromkeys((*known[:3], *self.every)):
            if self.touched(case, affected):
                if case.uses is None:
                    record(case, self.root)
                if (
                    case.kind == "refusal"
                    or case.name.endswith((" values", " words", " axes"))
                    or self.uses(case, affected, names)
                ):
                    trips += case.kind == "round trip"
                    if case.kind != "round trip" or trips <= ROUND_TRIPS:
                        yield case
                elif mutant.wide:
                    others.append(case)
        own = [case for case in others if case.architecture == mutant.spec[1] and case.kind != "round trip"]
        yield from own
        for kind in dict.fromkeys(case.kind for case in others):  # of all families, not only of the first
            rest = [case for case in others if case.kind == kind and case not in own]
            yield from rest[:: len(rest) // ROUND_TRIPS + 1 if kind == "round trip" else 1]

    def touched(self, case: Case, affected: set[tuple[str, str]]) -> bool:
        """Is a case about any of the specs that changed?"""
        return bool({("architecture", case.architecture), *(("format", to) for to in case.formats)} & affected)

    def uses(self, case: Case, affected: set[tuple[str, str]], names: set[str | None]) -> bool:
        """Does it go through one of these rules of the specs that changed?"""
        return any(use[:2] in affected and use[2] in names for use in case.uses or ())
