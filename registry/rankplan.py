"""The part of a plan that one process carries out, and what it needs of others for that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import evolve, frozen

from registry.errors import ArgumentError
from registry.groups import Coding
from registry.planning import Copies, Plan, Values
from registry.prepare import Prepared
from registry.rows import DTYPE, unrepeated
from registry.states import MASTER, PREFIX, is_state, state_name
from registry.storage import FilePlan, Laid, Piece, Rank, Slot


def as_held(prepared: Prepared, pieces: Sequence[Piece]) -> Prepared:
    """The target as the ranks' own tensors: every piece is written as it is, under the name that the format has.

    Where state lies in rows, a weight without a copy of itself is its own (see `registry.rows.flat_rules`).
    """
    spec, begins = prepared.spec, {state: ways[0] for state, ways in prepared.spec.states.items()}
    rows = spec.flat is not None and spec.flat.written
    pairs: list[tuple[Slot, int]] = []
    stepped: dict[tuple[Rank | None, str], set[str]] = {}
    for i, piece in enumerate(pieces):
        name, dtype = piece.name, piece.dtype
        if 0 in piece.shape and piece.shape != (piece.whole or piece.shape):
            continue  # more ranks than rows
        if not spec.boxes and piece.origin is not None and piece.shape != piece.whole:
            raise ArgumentError(
                "a tensor sharded by DTensor has no file of its own in this format", found=piece.name,
                hint="save to a format with global tensors",
            )  # fmt: skip
        if is_state(piece.name):
            state, _, weight = piece.name.removeprefix(PREFIX).partition(".")
            stepped.setdefault((piece.rank, weight), set()).add(state)
            name, dtype = state_name(begins[state], weight), DTYPE if rows else dtype
        pairs.append((Slot(name, dtype, piece.shape, piece.rank or Rank(), piece.origin, piece.whole), i))
    for i, piece in enumerate(pieces):
        if rows and MASTER not in stepped.get((piece.rank, piece.name), {MASTER}):
            pairs.append((Slot(begins[MASTER] + piece.name, DTYPE, piece.shape, piece.rank or Rank()), i))
    if rows:
        keep = unrepeated(spec, prepared.source.model, prepared.parallel, [slot for slot, _ in pairs])
        pairs = [pair for pair, kept in zip(pairs, keep, strict=True) if kept]
    copies = [_whole(pieces[i], slot, i, n) for n, (slot, i) in enumerate(pairs)]
    target = evolve(prepared.target, slots=[slot for slot, _ in pairs])
    return evolve(prepared, plan=Plan([one for one in copies if one is not None]), target=target)


def _whole(piece: Piece, slot: Slot, source: int, target: int) -> Copies | None:
    """A piece copied into a slot, in one go."""
    size = int(np.prod(piece.shape, dtype=np.int64))
    zero = np.zeros(1, dtype=np.int64)
    values = Values(piece.dtype, slot.dtype, Coding(), Coding())
    at, to = np.array([source], dtype=np.int64), np.array([target], dtype=np.int64)
    return Copies(piece.name, (size,), (1,), (1,), values, at, zero, to, zero) if size else None


def owners(plan: Plan, pieces: Sequence[Piece], slots: Sequence[Slot]) -> list[int]:
    """A piece for each slot whose process is to write it; -1 where a slot holds padding only."""
    found = np.full(len(slots), -1, dtype=np.int64)
    for copies in plan.copies:
        found[copies.target[::-1]] = copies.source[::-1]
    return [int(i) for i in found]


def one_a_file(laid: Laid, writer: Sequence[int]) -> list[int]:
    """Each slot's process, where one process writes all of a file: that of the file's first slot.

    Formats without ranks have tensors of several in one file, which network file systems let only one host write.
    """
    first: dict[int, int] = {}
    return [first.setdefault(file, who) for (file, _), who in zip(laid.places, writer, strict=True)]


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
