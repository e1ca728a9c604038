"""The part of a plan that one process carries out, and what it needs of others for that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import evolve, frozen

from registry.errors import ArgumentError
from registry.groups import Coding
from registry.planning import Copies, Plan, Values
from registry.storage import FilePlan, Laid, Piece, Slot


def identity(pieces: Sequence[Piece]) -> Plan:
    """Every piece is written as it is: piece i into slot i."""
    copies = []
    for i, piece in enumerate(pieces):
        if piece.origin is not None and piece.shape != piece.whole:
            raise ArgumentError(
                "a tensor sharded by DTensor has no file of its own in this format", found=piece.name,
                hint="save to a format with global tensors",
            )  # fmt: skip
        values = Values(piece.dtype, piece.dtype, Coding(), Coding())
        size = (int(np.prod(piece.shape, dtype=np.int64)),)
        if size == (0,):
            continue
        at, zero = np.array([i], dtype=np.int64), np.zeros(1, dtype=np.int64)
        copies.append(Copies(piece.name, size, (1,), (1,), values, at, zero, at, zero))
    return Plan(copies)


def owners(plan: Plan, pieces: Sequence[Piece], slots: Sequence[Slot]) -> list[int]:
    """A piece for each slot whose process is to write it; -1 where a slot holds padding only."""
    found = np.full(len(slots), -1, dtype=np.int64)
    for copies in plan.copies:
        found[copies.target[::-1]] = copies.source[::-1]
    return [int(i) for i in found]


def shipped(plan: Plan, holders: Sequence[int], writer: Sequence[int]) -> dict[int, dict[int, int]]:
    """Process that writes -> {piece that it needs: the process that holds it}."""
    found: dict[int, dict[int, int]] = {}
    for copies in plan.copies:
        for source, target in zip(copies.source.tolist(), copies.target.tolist(), strict=True):
            if holders[source] != writer[target]:
                found.setdefault(writer[target], {})[source] = holders[source]
    return found


@frozen(eq=False)
class Part:
    """The slots and files of one process, and the copies that fill them."""

    plan: Plan
    slots: list[Slot]
    laid: Laid

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.laid.files)


def part(plan: Plan, slots: Sequence[Slot], laid: Laid, writer: Sequence[int], me: int) -> Part:
    """What process `me` writes, where slot i is written by process `writer[i]`. A file has one writer."""
    by_file = [0] * len(laid.files)
    for (file, _), who in zip(laid.places, writer, strict=True):
        by_file[file] = who
    files = [i for i, who in enumerate(by_file) if who == me]
    new_file = {old: new for new, old in enumerate(files)}
    mine = [i for i, who in enumerate(writer) if who == me]
    renumber = np.full(len(slots), -1, dtype=np.int64)
    renumber[mine] = np.arange(len(mine))
    own: list[FilePlan] = [laid.files[i] for i in files]
    places = [(new_file[laid.places[i][0]], laid.places[i][1]) for i in mine]

    def seal(crcs: Sequence[int]) -> list[tuple[int, int, bytes]]:
        assert laid.seal is not None
        every = [0] * len(slots)
        for i, crc in zip(mine, crcs, strict=True):
            every[i] = crc
        return [(new_file[file], at, data) for file, at, data in laid.seal(every) if file in new_file]

    return Part(
        Plan([some for copies in plan.copies if (some := _some(copies, renumber)) is not None]),
        [slots[i] for i in mine],
        Laid(own, places, seal=seal if laid.seal else None),
    )


def _some(copies: Copies, renumber: np.ndarray) -> Copies | None:
    """The repetitions of a copy that write slots with a new number."""
    target = renumber[copies.target]
    keep = target >= 0
    if not keep.any():
        return None
    return evolve(
        copies, source=copies.source[keep], source_offset=copies.source_offset[keep], target=target[keep],
        target_offset=copies.target_offset[keep],
    )  # fmt: skip
