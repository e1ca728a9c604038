"""Rows of optimizer state to write: which slots of a target lie in which row of which rank, and where in it.

What `registry.flat` reads, the other way round: the same order of weights, one bucket behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import numpy as np

from registry.errors import ArgumentError
from registry.flat import order
from registry.model import LogicalModel
from registry.parallel import Parallel
from registry.specs import FormatSpec
from registry.states import MASTER, state_tensor
from registry.storage import Row, Slot
from registry.tensor_rules import Rule

#: The type that the state in rows has.
DTYPE = "float32"


def is_chained(spec: FormatSpec, parallel: Parallel, slots: Sequence[Slot]) -> bool:
    """Do experts have an optimizer of their own, as they do where they are spread over ranks?"""
    experts = spec.flat.experts if spec.flat is not None and parallel.ep > 1 else ""
    return bool(experts) and any(fnmatchcase(slot.name, experts) for slot in slots)


def flat_rules(spec: FormatSpec, rules: Sequence[tuple[str, Rule]], model: LogicalModel) -> Iterator[tuple[str, Rule]]:
    """The rules of a format that writes rows: all state of one type, and the copy of a weight that has none itself.

    A weight without a copy is stepped as it is: its copy is what it is.
    """
    begins = {ways[0]: state for state, ways in spec.states.items()}
    for pattern, rule in rules:
        state = next((state for begin, state in begins.items() if pattern.startswith(begin)), None)
        yield pattern, rule if state is None else rule.model_copy(update={"dtype": DTYPE})
        homes = {model.home(tensor) for tensor in rule.parsed.tensors}
        held = {kind for kind in model.states for home in homes if state_tensor(kind, home) in model.tensors}
        if state is None and held and MASTER not in held:
            begin = spec.states[MASTER][0]
            names = {choice: begin + name for choice, name in rule.names.items()}
            yield begin + pattern, rule.model_copy(update={"names": names, "aliases": [], "dtype": DTYPE})


def rows_of(spec: FormatSpec, model: LogicalModel, parallel: Parallel, slots: Sequence[Slot]) -> list[Row]:
    """Every row of every rank. Raises ArgumentError where a weight lacks one of the states that rows hold."""
    if spec.flat is None or not spec.flat.written:
        return []
    chained = is_chained(spec, parallel, slots)
    way = order(spec.flat, model, parallel, chained=chained)
    at = {(slot.rank, slot.name): i for i, slot in enumerate(slots)}
    begins = {name: spec.states[kind][0] for name, kind in spec.flat.states.items()}
    rows: list[Row] = []
    for (rank, chain), weights in way.made(_named(spec, slots)).items():
        for number, buffer in enumerate(way.buffers(weights)):
            starts, size = way.places(buffer.weights)
            for state, begin in begins.items():
                try:
                    members = [at[slot.rank, begin + slot.name] for slot in buffer.weights]
                except KeyError as error:
                    raise ArgumentError(
                        f"{spec.name} holds more of an optimizer's state than there is", found=f"no {error.args[0][1]}",
                        expected=", ".join(spec.flat.states), hint="save without it: options={'optimizer': 'none'}",
                    ) from None  # fmt: skip
                pairs = tuple(zip(members, starts, strict=True))
                rows.append(Row(rank, chain, number, buffer.dtype, state, size, pairs))
    return rows


def _named(spec: FormatSpec, slots: Sequence[Slot]) -> list[Slot]:
    """The weights that have state."""
    begins = tuple(ways[0] for ways in spec.states.values())
    held = {(slot.rank, slot.name[len(b) :]) for slot in slots for b in begins if slot.name.startswith(b)}
    return [slot for slot in slots if (slot.rank, slot.name) in held]


def unrepeated(spec: FormatSpec, model: LogicalModel, parallel: Parallel, slots: Sequence[Slot]) -> np.ndarray:
    """Which slots a target keeps: of state that several ranks hold, only that of the rank whose row has it."""
    placed = {i for row in rows_of(spec, model, parallel, slots) for i, _ in row.members}
    begins = tuple(ways[0] for ways in spec.states.values())
    return np.array([i in placed or not slot.name.startswith(begins) for i, slot in enumerate(slots)], dtype=bool)
