"""Carry out a plan: read each source byte once, write each target byte once, through small reused buffers.

The engine here knows nothing of models. Target files are written in tiles of a few MiB, small tensors and the literal
bytes between them together; a tile is assembled in a buffer that stays in the cache, summed there and written. Work is
done in the order of the source, which is read ahead best and once; two threads write the same file only if they must,
for the system lets one writer into a file at a time.
"""

from __future__ import annotations

import bisect
import math
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from attrs import define, field

from registry import casts
from registry.assemble import Assembler, Op, array, assembler, box, copy_strided
from registry.crc import combine, crc32
from registry.dtypes import ITEMSIZE
from registry.errors import MappingError, TargetError
from registry.files import SourceFiles, TargetFiles
from registry.losses import Watch
from registry.planning import Plan
from registry.storage import FilePlan, Laid, Opened, Piece, Slot, cut, slot_bytes

__all__ = [
    "TILE",
    "Assembler",
    "Progress",
    "array",
    "assembler",
    "check_replicas",
    "copy_strided",
    "default_threads",
    "execute",
]

#: Smaller tiles mean more steps in Python, larger ones leave the cache.
TILE = 2 << 20
#: Tiles of a large slot that are one job, and jobs that are looked through for one whose file nobody writes.
_PART = 16
_LOOK = 32

Progress = Callable[[int, int], None]


class Job(NamedTuple):
    """A stretch of one target file that one worker writes: the slots `first` to `stop` in order, or a part of one."""

    file: int
    begin: int
    end: int
    first: int
    stop: int


class _Places(NamedTuple):
    """The slots that hold anything, in the order of their places."""

    slots: list[int]
    files: list[int]
    begins: list[int]
    sizes: list[int]


def _places(laid: Laid, nbytes: np.ndarray) -> _Places:
    place = np.array(laid.places, dtype=np.int64).reshape(-1, 2)
    order = np.lexsort((place[:, 1], place[:, 0]))
    order = order[nbytes[order] > 0]
    return _Places(order.tolist(), place[order, 0].tolist(), place[order, 1].tolist(), nbytes[order].tolist())


def _jobs(places: _Places) -> Iterator[Job]:
    """Stretches of files, in order: runs of small slots together, a large slot alone and in parts."""
    _, files, begins, sizes = places
    start, count = 0, len(files)
    while start < count:
        file, begin = files[start], begins[start]
        end, stop = begin + sizes[start], start + 1
        while stop < count and files[stop] == file and begins[stop] + sizes[stop] - begin <= TILE:
            end, stop = begins[stop] + sizes[stop], stop + 1
        alone = stop == start + 1
        for at, to in _cuts(begin, end, TILE * _PART) if alone else [(begin, end)]:
            yield Job(file, at, to, start, stop)
        start = stop


def _cuts(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """[begin, end) in steps that end at round places of the file, as far as whole elements of the slot allow."""
    phase = begin % 16
    while begin < end:
        stop = min(end, (begin - phase) // step * step + step + phase)
        yield begin, stop
        begin = stop


def _by_source(jobs: list[Job], places: _Places, filler: Assembler) -> list[Job]:
    """Jobs in the order in which their bytes lie in the source."""
    t = filler.table
    first = t.bounds[np.array([places.slots[job.first] for job in jobs], dtype=np.int64)]
    at = np.minimum(first, max(len(t.file) - 1, 0))
    if not len(t.file):
        return jobs
    return [jobs[i] for i in np.lexsort((t.source[at], t.file[at])).tolist()]


class _Queue:
    """Jobs for several workers: the next one, or one soon after it whose target file nobody is writing."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._waiting = deque(jobs)
        self._busy: Counter[int] = Counter()
        self._lock = threading.Lock()

    def take(self) -> Job | None:
        """A job, or None where none is left."""
        with self._lock:
            if not self._waiting:
                return None
            near = range(min(_LOOK, len(self._waiting)))
            i = min(near, key=lambda i: (self._busy[self._waiting[i].file], i))
            job = self._waiting[i]
            del self._waiting[i]
            self._busy[job.file] += 1
            return job

    def done(self, job: Job) -> None:
        """The worker has left the job's file."""
        with self._lock:
            self._busy[job.file] -= 1


@define
class _Run:
    """One execution: shared state of the workers."""

    filler: Assembler
    targets: TargetFiles | _Sink
    laid: Laid
    places: _Places
    queue: _Queue
    progress: Progress | None
    total: int
    sums: dict[int, list[tuple[int, int, int]]] = field(factory=dict)
    done: int = 0
    stop: threading.Event = field(factory=threading.Event)
    lock: threading.Lock = field(factory=threading.Lock)

    def work(self) -> None:
        """One worker: jobs until none is left."""
        if self.filler.computes:
            casts.alone()
        buffer = memoryview(bytearray(TILE))
        while not self.stop.is_set() and (job := self.queue.take()) is not None:
            self.job(job, buffer)
            self.queue.done(job)

    def job(self, job: Job, buffer: memoryview) -> None:
        """Write one stretch, tile by tile."""
        ops = [self.filler.ops(slot) for slot in self.places.slots[job.first : job.stop]]
        zero = not self.covered(job)
        crc = 0
        for begin, end in _cuts(job.begin, job.end, TILE) if job.stop == job.first + 1 else [(job.begin, job.end)]:
            if self.stop.is_set():
                return
            tile = buffer[: end - begin]
            if zero:
                np.frombuffer(tile, np.uint8)[:] = 0
            self.assemble(job, ops, tile, begin, end)
            if job.stop == job.first + 1:
                crc = crc32(tile, crc)
            else:
                self.sum(job, tile)
            self.targets.write(job.file, begin, tile)
            if self.progress:
                with self.lock:
                    self.done += end - begin
                    self.progress(self.done, self.total)
        if job.stop == job.first + 1:
            self.sums.setdefault(self.places.slots[job.first], []).append((job.begin, crc, job.end - job.begin))

    def covered(self, job: Job) -> bool:
        """Is every byte of the stretch written by a copy or a literal?"""
        first, stop = job.first, job.stop
        full = self.filler.table.full
        if not all(full[slot] for slot in self.places.slots[first:stop]):
            return False
        if stop == first + 1:
            return True
        gaps = job.end - job.begin - sum(self.places.sizes[first:stop])
        between = cut(self.laid.files[job.file].literals, job.begin, job.end) if gaps else ()
        return gaps == sum(high - low for low, high, _ in between)

    def assemble(self, job: Job, ops: list[list[Op]], tile: memoryview, begin: int, end: int) -> None:
        for i, of_slot in enumerate(ops, job.first):
            at = self.places.begins[i]
            for op in of_slot:
                self.filler.copy(op, tile, at, begin, end)
        for low, high, data in cut(self.laid.files[job.file].literals, begin, end):
            tile[low - begin : high - begin] = data

    def sum(self, job: Job, tile: memoryview) -> None:
        for i in range(job.first, job.stop):
            low, size = self.places.begins[i] - job.begin, self.places.sizes[i]
            self.sums[self.places.slots[i]] = [(0, crc32(tile[low : low + size]), size)]


def execute(
    plan: Plan, opened: Opened, laid: Laid, slots: Sequence[Slot], root: Path, *,
    threads: int | None = None, progress: Progress | None = None, durable: bool = True, watch: Watch | None = None,
) -> list[int]:  # fmt: skip
    """Write every data file of a target below `root`, and let `watch` note what is lost. Returns every slot's CRC32.

    Raises MappingError where replicas in the source differ, CheckpointError for a source that ends early, TargetError
    where the target cannot be written.
    """
    places = _places(laid, np.fromiter(map(slot_bytes, slots), np.int64, len(slots)))
    with SourceFiles(opened.files, opened.stamps) as sources:
        check_replicas(plan, opened, sources)
        filler = assembler(plan, opened, sources, slots, watch)
        jobs = list(_jobs(places))
        total = sum(job.end - job.begin for job in jobs)
        queue = _Queue(_by_source(jobs, places, filler))
        try:
            with TargetFiles(root, laid.files, durable=durable) as targets:
                run = _Run(filler, targets, laid, places, queue, progress, total)
                _write_outer_literals(laid, jobs, targets)
                _run_all(run, threads or default_threads(sources.remote))
                crcs = [combine((crc, size) for _, crc, size in sorted(run.sums.get(i, []))) for i in range(len(slots))]
                for file, offset, data in laid.seal(crcs) if laid.seal else ():
                    targets.write(file, offset, memoryview(data))
                targets.sync()
        except OSError as error:
            raise TargetError(
                "the target cannot be written", where=error.filename or root, expected="to write there",
                found=error.strerror or str(error),
                hint="free space or choose another target; what was there before is untouched",
            ) from error  # fmt: skip
    return crcs


def sample(
    plan: Plan, opened: Opened, laid: Laid, slots: Sequence[Slot], root: Path, *,
    threads: int, seconds: float, most: int,
) -> tuple[int, float]:  # fmt: skip
    """Do a part of the work, spread over all of it, for so many seconds or bytes, with files at `root` to write to.

    The files lose their names at once, so that nothing of them is left whatever happens. Returns the bytes that were
    written and synced, and the seconds that it took.
    """
    places = _places(laid, np.fromiter(map(slot_bytes, slots), np.int64, len(slots)))
    jobs = list(_jobs(places))
    step = max(1, sum(job.end - job.begin for job in jobs) // most)
    files = [FilePlan(str(i), 0, []) for i in range(min(threads, len(laid.files)))]
    with SourceFiles(opened.files, opened.stamps) as sources, TargetFiles(root, files, durable=True) as targets:
        shutil.rmtree(root)
        filler = assembler(plan, opened, sources, slots)
        sink = _Sink(targets, [0] * len(files))
        run = _Run(filler, sink, laid, places, _Queue(_by_source(jobs[::step], places, filler)), None, 0)
        timer = threading.Timer(seconds, run.stop.set)
        start = time.perf_counter()
        timer.start()
        try:
            _run_all(run, threads)
            targets.sync()
        finally:
            timer.cancel()
        return sum(sink.ends), time.perf_counter() - start


@define
class _Sink:
    """Takes what is written to any file, and appends it to one of a few."""

    targets: TargetFiles
    ends: list[int]
    lock: threading.Lock = field(factory=threading.Lock)

    def write(self, file: int, offset: int, data: memoryview) -> None:
        file %= len(self.ends)
        with self.lock:
            end = self.ends[file]
            self.ends[file] += len(data)
        self.targets.write(file, end, data)


def default_threads(remote: bool = False) -> int:
    """How many threads do the work where the caller names no number; at a URL they are there to wait."""
    return 16 if remote else min(8, os.cpu_count() or 1)


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


def _run_all(run: _Run, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(run.work) for _ in range(threads)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            run.stop.set()  # the first error, or an interrupt, ends the others' work too
    for future in futures:
        future.result()


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
                    found="different bytes",
                    hint="the checkpoint is damaged, or its ranks belong to different runs",
                )


def _equal(
    sources: SourceFiles, a: Piece, a_offset: int, a_stride: Sequence[int],
    b: Piece, b_offset: int, b_stride: Sequence[int], size: Sequence[int],
) -> bool:  # fmt: skip
    width = ITEMSIZE[a.dtype]
    if not size:
        size, a_stride, b_stride = (1,), (1,), (1,)
    rows = max(1, TILE // max(1, math.prod(size[1:])))
    for i in range(0, size[0], rows):
        part = (min(rows, size[0] - i), *size[1:])
        left = box(sources, a.file, width, part, a_stride, a.begin + (a_offset + i * a_stride[0]) * width)
        right = box(sources, b.file, width, part, b_stride, b.begin + (b_offset + i * b_stride[0]) * width)
        # complex numbers with NaNs in them are not equal to themselves
        same = left.tobytes() == right.tobytes() if width == 16 else np.array_equal(left, right)
        if not same:
            return False
    return True
