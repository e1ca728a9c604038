"""Carry out a plan: read each source byte once, write each target byte once, through small reused buffers.

The engine here knows nothing of models. A target file is written in tiles of a few MiB, small tensors and the literal
bytes between them together. A tile is assembled in a buffer that stays in the cache: long runs are read straight into it,
strided boxes are gathered from the mapped source. Fresh memory, page faults of mapped writes and many small system calls
are what make a naive copy slow, and none of them occurs.
"""

from __future__ import annotations

import bisect
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from attrs import define, field, frozen

from registry import boxes
from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError, MappingError, TargetError
from registry.files import SourceFiles, TargetFiles
from registry.planning import Copies, Plan
from registry.storage import Laid, Opened, Piece, Slot, slot_bytes
from registry.values import convert

TILE = 2 << 20
_BLOCK = 256

Progress = Callable[[int, int], None]


class Op(NamedTuple):
    """One repetition of one strided copy: positions in bytes within the source and target files."""

    copies: Copies
    file: int
    source: int
    target: int


class Job(NamedTuple):
    """A stretch of one target file that one worker writes."""

    file: int
    begin: int
    end: int
    slots: range


_UINT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def array(buffer: Any, itemsize: int, size: Sequence[int], stride: Sequence[int], offset: int) -> np.ndarray:
    """A strided view of `buffer`; numpy refuses one that leaves it. Strides in elements, offset in bytes."""
    return np.ndarray(size, _UINT[itemsize], buffer, offset, [s * itemsize for s in stride])


def copy_strided(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, in blocks that fit the cache where rows of one are columns of the other."""
    if target.ndim < 2 or source.strides[-1] == source.itemsize or min(target.shape[-2:]) < 8:
        target[...] = source
        return
    rows, columns = target.shape[-2:]
    if abs(source.strides[-2]) > abs(source.strides[-1]):
        target[...] = source
        return
    for i in range(0, rows, _BLOCK):
        for j in range(0, columns, _BLOCK):
            target[..., i : i + _BLOCK, j : j + _BLOCK] = source[..., i : i + _BLOCK, j : j + _BLOCK]


def _offset(starts: Sequence[int], strides: Sequence[int]) -> int:
    return sum(i * s for i, s in zip(starts, strides, strict=True))


@define
class _Layout:
    """The plan by target slot: which copies write each slot, and which slots need zeros below them."""

    order: np.ndarray
    bounds: np.ndarray
    ops: list[tuple[Copies, int]]
    full: np.ndarray


def _by_slot(plan: Plan, slots: Sequence[Slot], nbytes: Sequence[int]) -> _Layout:
    ops: list[tuple[Copies, int]] = []
    owners = []
    written = np.zeros(len(slots), dtype=np.int64)
    for copies in plan.copies:
        ops += [(copies, k) for k in range(len(copies.target))]
        owners.append(copies.target)
        np.add.at(written, copies.target, copies.volume * ITEMSIZE[copies.values.target_dtype])
    owner = np.concatenate(owners) if owners else np.zeros(0, dtype=np.int64)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(len(slots) + 1))
    return _Layout(order, bounds, ops, written == np.asarray(nbytes, dtype=np.int64))


@frozen(eq=False)
class Assembler:
    """Fills buffers with the bytes of target slots."""

    pieces: Sequence[Piece]
    sources: SourceFiles
    layout: _Layout

    def ops(self, slot: int, at: int) -> Iterator[Op]:
        """The copies that write one slot, whose bytes begin at `at`."""
        low, high = self.layout.bounds[slot : slot + 2]
        for position in self.layout.order[low:high]:
            copies, k = self.layout.ops[position]
            piece = self.pieces[int(copies.source[k])]
            source = piece.begin + int(copies.source_offset[k]) * ITEMSIZE[piece.dtype]
            target = at + int(copies.target_offset[k]) * ITEMSIZE[copies.values.target_dtype]
            yield Op(copies, piece.file, source, target)

    def fill(self, buffer: memoryview, slot: int, at: int, begin: int, end: int) -> None:
        """Write the part in [begin, end) of a slot that begins at `at` into `buffer`, whose first byte is `begin`."""
        for op in self.ops(slot, at):
            self.copy(op, buffer, begin, end)

    def copy(self, op: Op, buffer: memoryview, begin: int, end: int) -> None:
        copies = op.copies
        width = ITEMSIZE[copies.values.target_dtype]
        plain = copies.values.plain
        if plain and copies.size[:-1] == () and copies.source_stride in ((), (1,)) and copies.target_stride in ((), (1,)):
            first, last = max(op.target, begin), min(op.target + copies.volume * width, end)
            if first < last:
                self.sources.read_into(op.file, op.source + first - op.target, buffer[first - begin : last - begin])
            return
        low, high = -(-(begin - op.target) // width), (end - op.target) // width
        mapped = None
        for box in boxes.clip(0, copies.size, copies.target_stride, low, high):
            starts, size = [s for s, _ in box], [n for _, n in box]
            at = op.target + _offset(starts, copies.target_stride) * width - begin
            target = array(buffer, width, size, copies.target_stride, at)
            mapped = self.sources.mapped(op.file) if mapped is None else mapped
            item = ITEMSIZE[copies.values.source_dtype]
            origin = op.source + _offset(starts, copies.source_stride) * item
            try:
                source = array(mapped, item, size, copies.source_stride, origin)
            except (ValueError, TypeError):
                raise CheckpointError(
                    "a tensor lies outside its file", where=self.sources.path(op.file), found=f"offset {origin}"
                ) from None
            if plain:
                copy_strided(target, source)
            else:
                convert(target, source, copies.values)


def _jobs(places: Sequence[tuple[int, int]], nbytes: Sequence[int], order: Sequence[int], whole: bool) -> Iterator[Job]:
    """Stretches of files, in order: runs of small slots together, a large slot alone (in parts, unless `whole`)."""
    start = 0
    while start < len(order):
        file, begin = places[order[start]]
        stop = start + 1
        end = begin + nbytes[order[start]]
        while stop < len(order) and places[order[stop]][0] == file:
            further = places[order[stop]][1] + nbytes[order[stop]]
            if further - begin > TILE:
                break
            end, stop = further, stop + 1
        if stop == start + 1 and not whole and end - begin > 16 * TILE:
            for at in range(begin, end, 16 * TILE):
                yield Job(file, at, min(at + 16 * TILE, end), range(start, stop))
        else:
            yield Job(file, begin, end, range(start, stop))
        start = stop


@define
class _Run:
    """One execution: shared state of the workers."""

    assembler: Assembler
    targets: TargetFiles
    laid: Laid
    nbytes: list[int]
    order: list[int]
    progress: Progress | None
    total: int
    crcs: list[int]
    starts: list[list[int]]
    done: int = 0
    stop: threading.Event = field(factory=threading.Event)
    lock: threading.Lock = field(factory=threading.Lock)
    local: threading.local = field(factory=threading.local)

    def work(self, job: Job) -> None:
        """Write one stretch, tile by tile."""
        if not hasattr(self.local, "buffer"):
            self.local.buffer = memoryview(bytearray(TILE))
        for begin in range(job.begin, job.end, TILE):
            if self.stop.is_set():
                return
            end = min(begin + TILE, job.end)
            tile = self.local.buffer[: end - begin]
            self.assemble(job, tile, begin, end)
            self.targets.write(job.file, begin, tile)
            with self.lock:
                self.done += end - begin
                if self.progress:
                    self.progress(self.done, self.total)
        self.targets.finished(job.file)

    def assemble(self, job: Job, tile: memoryview, begin: int, end: int) -> None:
        slots = [self.order[i] for i in job.slots]
        if len(slots) > 1 or not self.assembler.layout.full[slots[0]]:
            np.frombuffer(tile, np.uint8)[:] = 0
        for slot in slots:
            self.assembler.fill(tile, slot, self.laid.places[slot][1], begin, end)
        literals = self.laid.files[job.file].literals
        i = max(bisect.bisect_right(self.starts[job.file], begin) - 1, 0)
        for offset, data in literals[i:]:
            if offset >= end:
                break
            low, high = max(offset, begin), min(offset + len(data), end)
            if low < high:
                tile[low - begin : high - begin] = data[low - offset : high - offset]
        if self.laid.seal:
            for slot in slots:
                at = self.laid.places[slot][1]
                low, high = max(at, begin), min(at + self.nbytes[slot], end)
                if low < high:
                    self.crcs[slot] = zlib.crc32(tile[low - begin : high - begin], self.crcs[slot])


def execute(
    plan: Plan, opened: Opened, laid: Laid, slots: Sequence[Slot], root: Path, *,
    threads: int | None = None, progress: Progress | None = None, durable: bool = True,
) -> int:  # fmt: skip
    """Write every data file of a target below `root`. Returns the bytes written.

    Raises MappingError where replicas in the source differ, CheckpointError for a source that ends early, TargetError
    where the target cannot be written.
    """
    nbytes = [slot_bytes(slot) for slot in slots]
    order = sorted((i for i in range(len(slots)) if nbytes[i]), key=lambda i: laid.places[i])
    with SourceFiles(opened.files) as sources:
        check_replicas(plan, opened, sources)
        assembler = Assembler(opened.pieces, sources, _by_slot(plan, slots, nbytes))
        jobs = list(_jobs(laid.places, nbytes, order, whole=laid.seal is not None))
        total = sum(job.end - job.begin for job in jobs)
        with TargetFiles(root, laid.files, [job.file for job in jobs], durable=durable) as targets:
            run = _Run(
                assembler, targets, laid, nbytes, order, progress, total, [0] * len(slots),
                [[offset for offset, _ in plan_.literals] for plan_ in laid.files],
            )  # fmt: skip
            _write_outer_literals(laid, jobs, targets)
            _run_all(run, jobs, threads or min(8, os.cpu_count() or 1))
            if laid.seal:
                for file, offset, data in laid.seal(run.crcs):
                    targets.write(file, offset, memoryview(data))
            targets.sync()
    return total


def _write_outer_literals(laid: Laid, jobs: Sequence[Job], targets: TargetFiles) -> None:
    """Literals that no job's stretch covers: headers, trailers, files without tensors."""
    covered: dict[int, tuple[list[int], list[int]]] = {}
    for job in jobs:
        begins, ends = covered.setdefault(job.file, ([], []))
        begins.append(job.begin)
        ends.append(job.end)
    for file, planned in enumerate(laid.files):
        begins, ends = covered.get(file, ([], []))
        for offset, data in planned.literals:
            i = bisect.bisect_right(begins, offset) - 1
            if i < 0 or offset + len(data) > ends[i]:
                targets.write(file, offset, memoryview(data))


def _run_all(run: _Run, jobs: Sequence[Job], threads: int) -> None:
    try:
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(run.work, job) for job in jobs]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((f.exception() for f in done if f.exception()), None)
            if failed is not None:
                run.stop.set()
                pool.shutdown(cancel_futures=True)
                raise failed
    except OSError as error:
        raise TargetError(
            "the target cannot be written", where=error.filename, found=error.strerror or str(error),
            hint="free space or choose another target; what was there before is untouched",
        ) from error  # fmt: skip
    except BaseException:
        run.stop.set()
        raise


def check_replicas(plan: Plan, opened: Opened, sources: SourceFiles) -> None:
    """What a source holds several times must be the same bytes every time. Raises MappingError naming both places."""
    for copies in plan.replicas:
        for k in range(len(copies.target)):
            twin, first = opened.pieces[int(copies.target[k])], opened.pieces[int(copies.source[k])]
            same = twin.dtype == first.dtype and _equal(
                sources, first, int(copies.source_offset[k]), copies.source_stride, twin,
                int(copies.target_offset[k]), copies.target_stride, copies.size,
            )  # fmt: skip
            if not same:
                raise MappingError(
                    f"copies of {copies.tensor} differ",
                    where=f"{sources.path(first.file)}: {first.name} and {sources.path(twin.file)}: {twin.name}",
                    expected="equal bytes, for ranks hold replicas of it",
                    hint="the checkpoint is damaged, or its ranks belong to different runs",
                )


def _equal(
    sources: SourceFiles, a: Piece, a_offset: int, a_stride: Sequence[int],
    b: Piece, b_offset: int, b_stride: Sequence[int], size: Sequence[int],
) -> bool:  # fmt: skip
    width = ITEMSIZE[a.dtype]
    left = array(sources.mapped(a.file), width, size, a_stride, a.begin + a_offset * width)
    right = array(sources.mapped(b.file), width, size, b_stride, b.begin + b_offset * width)
    if not size:
        return bool(left.tobytes() == right.tobytes())
    rows = max(1, TILE // max(1, left[:1].size))
    steps = range(0, size[0], rows)
    if width == 16:
        return all(left[i : i + rows].tobytes() == right[i : i + rows].tobytes() for i in steps)
    return all(np.array_equal(left[i : i + rows], right[i : i + rows]) for i in steps)


def assembler(plan: Plan, opened: Opened, sources: SourceFiles, slots: Sequence[Slot]) -> Assembler:
    """What fills buffers with the bytes of a plan's slots, one at a time (used by views and digests too)."""
    return Assembler(opened.pieces, sources, _by_slot(plan, slots, [slot_bytes(slot) for slot in slots]))
