"""Fill buffers with the bytes of target slots: which copies write each slot, and how the source of each is best read.

Long runs are read straight into the buffer. A strided box that lies densely in its file is read as one stretch into a
reused buffer that stays in the cache, and gathered from there; only a box that lies thinly is gathered from the mapped
file. Fresh memory, page faults and many small system calls are what make a naive copy slow. A file that is on no disk
cannot be mapped: it gives its boxes itself.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from attrs import field, frozen

from registry import boxes
from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError
from registry.files import SourceFiles
from registry.losses import Watch
from registry.planning import Copies, Plan
from registry.storage import Opened, Slot, slot_bytes
from registry.values import Note, convert

#: Runs of at least so many bytes are read one by one: a system call costs what copying a few KiB does.
RUN = 32 << 10
#: A stretch of the source is read whole where no more than this times what is wanted, and no more than so many bytes.
DENSE = 1.5
SCRATCH = 8 << 20
#: Of a remote file, runs are read one by one, and the rest in stretches, from so many bytes on.
STRETCH = (1 << 20) - 1
_BLOCK = 256

_UINT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def array(buffer: Any, itemsize: int, size: Sequence[int], stride: Sequence[int], offset: int) -> np.ndarray:
    """A strided view of `buffer`; numpy refuses one that leaves it. Strides in elements, offset in bytes."""
    return np.ndarray(size, _UINT[itemsize], buffer, offset, [s * itemsize for s in stride])


def mapped(
    sources: SourceFiles, file: int, itemsize: int, size: Sequence[int], stride: Sequence[int], offset: int
) -> np.ndarray:
    """A strided view of a mapped source file. Raises CheckpointError where it leaves the file.

    What cannot be mapped, because it lies at a URL, is read in stretches: a new array.
    """
    if sources.is_remote(file):
        found = np.empty(size, _UINT[itemsize])
        _gather(sources, file, found, stride, offset)
        return found
    try:
        return array(sources.mapped(file), itemsize, size, stride, offset)
    except (ValueError, TypeError):
        raise CheckpointError(
            "a tensor lies outside its file", where=sources.path(file), found=f"offset {offset}"
        ) from None


def _gather(sources: SourceFiles, file: int, into: np.ndarray, stride: Sequence[int], offset: int) -> None:
    """Fill `into` from a strided box, halved until a half lies densely, or so near that one request is quicker."""
    size, item = into.shape, into.itemsize
    extent = _extent(size, stride) * item
    if not into.size:
        return
    if extent <= max(min(DENSE * into.nbytes, SCRATCH), STRETCH):
        scratch = sources.scratch("stretch", extent)
        sources.read_into(file, offset, scratch)
        into[...] = array(scratch, item, size, stride, 0)
        return
    axis = max(range(len(size)), key=lambda axis: (size[axis] - 1) * stride[axis])
    half = size[axis] // 2
    low, high = (slice(None),) * axis + (slice(half),), (slice(None),) * axis + (slice(half, None),)
    _gather(sources, file, into[low], stride, offset)
    _gather(sources, file, into[high], stride, offset + half * stride[axis] * item)


def rows_of(
    sources: SourceFiles, file: int, itemsize: int, rows: np.ndarray, columns: int, stride: int, offset: int
) -> np.ndarray:
    """`columns` elements of each of these rows of a source file, which lie `stride` elements apart: a copy."""
    if not sources.is_remote(file):
        return np.asarray(mapped(sources, file, itemsize, (int(rows[-1]) + 1, columns), (stride, 1), offset)[rows])
    found = np.empty((len(rows), columns), _UINT[itemsize])
    for i, row in enumerate(rows.tolist()):
        _gather(sources, file, found[i], (1,), offset + row * stride * itemsize)
    return found


def box(
    sources: SourceFiles, file: int, itemsize: int, size: Sequence[int], stride: Sequence[int], offset: int
) -> np.ndarray:
    """A strided box of a source file: a view of the mapped file, or a copy from one that is on no disk."""
    virtual = sources.virtual(file)
    if virtual is None:
        return mapped(sources, file, itemsize, size, stride, offset)
    found = np.empty(size, _UINT[itemsize])
    for part, values in virtual.boxes(sources, offset, size, stride):
        found[part] = values
    return found


def copy_strided(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, in blocks that fit the cache where rows of one are columns of the other."""
    if target.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    inner = min(range(source.ndim), key=lambda axis: source.strides[axis])
    if inner == source.ndim - 1 or min(target.shape[inner], target.shape[-1]) < 8:
        target[...] = source
        return
    target, source = np.moveaxis(target, inner, -2), np.moveaxis(source, inner, -2)
    rows, columns = target.shape[-2:]
    for at in itertools.product(*map(range, target.shape[:-2])):
        to, of = target[at], source[at]
        for i in range(0, rows, _BLOCK):
            for j in range(0, columns, _BLOCK):
                to[i : i + _BLOCK, j : j + _BLOCK] = of[i : i + _BLOCK, j : j + _BLOCK]


class Kind(NamedTuple):
    """What the repetitions of one `Copies` share. `item` and `width` are bytes of a source and a target element."""

    copies: Copies
    item: int
    width: int
    plain: bool
    whole: bool
    span: int


def _kind(copies: Copies) -> Kind:
    item, width = ITEMSIZE[copies.values.source_dtype], ITEMSIZE[copies.values.target_dtype]
    plain = copies.values.plain
    whole = plain and copies.source_stride in ((), (1,)) and copies.target_stride in ((), (1,))
    return Kind(copies, item, width, plain, whole, _extent(copies.size, copies.target_stride) * width)


def _extent(size: Sequence[int], stride: Sequence[int]) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


class Op(NamedTuple):
    """One repetition of one strided copy: bytes from the start of the source file, and of the target slot."""

    kind: Kind
    file: int
    source: int
    target: int


@frozen(eq=False)
class Table:
    """Every operation of a plan as columns, ordered by slot: slot i is written by those in `bounds[i] : bounds[i + 1]`.

    `full` says which slots are written from end to end, without padding.
    """

    kinds: list[Kind]
    kind: np.ndarray
    file: np.ndarray
    source: np.ndarray
    target: np.ndarray
    bounds: np.ndarray
    full: np.ndarray


def table(plan: Plan, opened: Opened, slots: Sequence[Slot], nbytes: np.ndarray) -> Table:
    """The operations of a plan, by slot."""
    kinds = [_kind(copies) for copies in plan.copies]
    count = len(opened.pieces)
    begin = np.fromiter((piece.begin for piece in opened.pieces), np.int64, count)
    files = np.fromiter((piece.file for piece in opened.pieces), np.int64, count)
    written = np.zeros(len(slots), dtype=np.int64)
    columns: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.int64)] for _ in range(5)]
    for i, (copies, kind) in enumerate(zip(plan.copies, kinds, strict=True)):
        np.add.at(written, copies.target, copies.volume * kind.width)
        source = begin[copies.source] + copies.source_offset * kind.item
        values = (
            copies.target, np.full(len(source), i), files[copies.source], source, copies.target_offset * kind.width,
        )  # fmt: skip
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    owner, *rest = (np.concatenate(column) for column in columns)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(len(slots) + 1))
    kind_of, file, start, place = (column[order] for column in rest)
    return Table(kinds, kind_of, file, start, place, bounds, written == nbytes)


@frozen(eq=False)
class Assembler:
    """Fills buffers with the bytes of target slots. Any number of threads may use one."""

    sources: SourceFiles
    table: Table
    watch: Watch | None = None
    _local: threading.local = field(factory=threading.local)

    @property
    def computes(self) -> bool:
        """Does it do more than copy bytes? Then torch is at work."""
        return bool(self.sources.computed) or not all(kind.plain for kind in self.table.kinds)

    def ops(self, slot: int) -> list[Op]:
        """The copies that write one slot."""
        t = self.table
        low, high = t.bounds[slot : slot + 2].tolist()
        columns = (column[low:high].tolist() for column in (t.kind, t.file, t.source, t.target))
        return [Op(t.kinds[kind], file, source, target) for kind, file, source, target in zip(*columns, strict=True)]

    def fill(self, buffer: memoryview, slot: int, at: int, begin: int, end: int) -> None:
        """Write the part in [begin, end) of a slot that begins at `at` into `buffer`, whose first byte is `begin`."""
        for op in self.ops(slot):
            self.copy(op, buffer, at, begin, end)

    def copy(self, op: Op, buffer: memoryview, at: int, begin: int, end: int) -> None:
        """The part of `fill` that one operation does."""
        kind = op.kind
        start = at + op.target
        first, last = max(start, begin), min(start + kind.span, end)
        if first >= last:
            return
        if kind.whole:
            self.sources.read_into(op.file, op.source + first - start, buffer[first - begin : last - begin])
            return
        copies, width = kind.copies, kind.width
        low, high = -(-(begin - start) // width), (end - start) // width
        for box in boxes.clip(0, copies.size, copies.target_stride, low, high):
            to = start - begin + sum(i * s for (i, _), s in zip(box, copies.target_stride, strict=True)) * width
            of = op.source + sum(i * s for (i, _), s in zip(box, copies.source_stride, strict=True)) * kind.item
            self._box(op, tuple(n for _, n in box), buffer, to, of)

    def _box(self, op: Op, size: tuple[int, ...], buffer: memoryview, to: int, of: int) -> None:
        kind, copies = op.kind, op.kind.copies
        unit = copies.source_stride[-1:] in ((), (1,)) and copies.target_stride[-1:] in ((), (1,))
        least = STRETCH if self.sources.is_remote(op.file) else RUN
        if kind.plain and unit and size[-1] * kind.width >= least:
            run = size[-1] * kind.width
            for there, here in _places(size[:-1], copies.source_stride, copies.target_stride):
                at = to + here * kind.width
                self.sources.read_into(op.file, of + there * kind.item, buffer[at : at + run])
            return
        target = array(buffer, kind.width, size, copies.target_stride, to)
        for part, source in self._sources(op, size, of):
            if kind.plain:
                copy_strided(target[part], source)
            else:
                convert(target[part], source, copies.values, self._note(copies))

    def _note(self, copies: Copies) -> Note | None:
        """What notes how far values are from what they were, where somebody watches and they may be."""
        if self.watch is None or not self.watch.rounds(copies.values):
            return None
        return partial(self.watch.note, copies.tensor, copies.values)

    def _sources(self, op: Op, size: tuple[int, ...], of: int) -> Iterable[tuple[tuple[Any, ...], np.ndarray]]:
        """A strided box of a source file, whole or in parts: (the part's index in the box, its elements)."""
        virtual = self.sources.virtual(op.file)
        if virtual is None:
            return [((...,), self._source(op, size, of))]
        return virtual.boxes(self.sources, of, size, op.kind.copies.source_stride)

    def _source(self, op: Op, size: tuple[int, ...], of: int) -> np.ndarray:
        """A strided box of a source file."""
        item, stride = op.kind.item, op.kind.copies.source_stride
        extent = _extent(size, stride) * item
        volume = item
        for n in size:
            volume *= n
        if extent <= min(DENSE * volume, SCRATCH):
            scratch = self._scratch(extent)
            self.sources.read_into(op.file, of, scratch)
            return array(scratch, item, size, stride, 0)
        return mapped(self.sources, op.file, item, size, stride, of)

    def _scratch(self, nbytes: int) -> memoryview:
        """This thread's own buffer, made once: fresh memory costs several times what a copy into it does."""
        have: memoryview | None = getattr(self._local, "scratch", None)
        if have is None or len(have) < nbytes:
            size = min(max(nbytes, 1 << (nbytes - 1).bit_length()), SCRATCH)
            have = self._local.scratch = memoryview(bytearray(size))
        return have[:nbytes]


def _places(size: Sequence[int], source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Every (source, target) position of the outer axes of a box, in elements."""
    for at in itertools.product(*map(range, size)):
        yield sum(map(_times, at, source)), sum(map(_times, at, target))


def _times(a: int, b: int) -> int:
    return a * b


def assembler(
    plan: Plan, opened: Opened, sources: SourceFiles, slots: Sequence[Slot], watch: Watch | None = None
) -> Assembler:
    """What fills buffers with the bytes of a plan's slots, one at a time (used by views and digests too)."""
    nbytes = np.fromiter(map(slot_bytes, slots), np.int64, len(slots))
    return Assembler(sources, table(plan, opened, slots, nbytes), watch)
