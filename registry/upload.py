"""A conversion whose target lies at a URL, where nothing can be renamed and nobody can go back in a file.

Every file is made from its first byte to its last, in parts that are put together in memory, and sent as it is made;
several files at a time. A small object says that the upload has not ended, and readers refuse what has it. It is put
first; the manifest comes last, and then that object goes. Where anything fails, all that was sent is removed again.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise

from attrs import define, field

from registry import manifest
from registry.assemble import Assembler, assembler
from registry.changes import check_unchanged
from registry.crc import combine, crc32
from registry.engines.work import Work
from registry.errors import AnotherRunError, CheckpointError, TargetError
from registry.execute import TILE, Progress, check_replicas, default_threads
from registry.files import SourceFiles
from registry.losses import Watch
from registry.manifest import FileSum, Sums
from registry.places import UNFINISHED, is_remote
from registry.problems import collapse
from registry.reading import reading
from registry.remote import RemotePath
from registry.sending import PART, Upload, part_size
from registry.storage import cut, slot_bytes, small_bytes

#: Files that are sent at a time: each has up to four parts in memory, two of them fsspec's.
_FILES = 4


def check_target(source: object, target: RemotePath, overwrite: bool) -> set[str]:
    """The keys of what is at the target. Raises TargetError for a target that is the source, or not empty."""
    if is_remote(source) and (source.is_relative_to(target) or target.is_relative_to(source)):
        raise TargetError(
            "source and target overlap", where=target, expected="two directories, neither inside the other",
            found=f"source {source}", hint="choose a target outside the source",
        )  # fmt: skip
    with _writing(target):
        there = set(target.store.tree(target.key))
    if there and not overwrite:
        names = sorted(key[len(target.key) + 1 :] for key in there)
        begun = any(name.rpartition("/")[2] == UNFINISHED for name in names)
        raise TargetError(
            "the target holds an upload that has not ended" if begun else "the target is not empty", where=target,
            expected="nothing there yet", found=", ".join(collapse(names, 8)),
            hint="choose another, or give overwrite=True (--overwrite)",
        )  # fmt: skip
    return there


@contextmanager
def _writing(target: RemotePath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TargetError(
            "the target cannot be written", where=error.filename or target, expected="to write there",
            found=error.strerror or str(error),
            hint="check the URL, the credentials and the connection; docs/remote.md",
        ) from None  # fmt: skip


def upload(
    work: Work, target: RemotePath, *, overwrite: bool, threads: int | None = None, progress: Progress | None = None
) -> Watch:
    """Carry out a conversion to a URL. Raises RegistryError; then what was sent has been removed.

    With `overwrite`, what was there is gone too, for nothing can take its place at once.
    """
    opened, laid = work.prepared.source.opened, work.laid
    there = check_target(opened.path, target, overwrite)
    homes = ("", f"{laid.home}/") if laid.home else ("",)
    watch = Watch()
    with ThreadPoolExecutor(_FILES) as senders:
        up = Upload(target, homes, senders)
        with _writing(target), _undone(up, there):
            up.mark()
            up.remove(key for key in there if manifest.is_manifest(key.rpartition("/")[2]))
            sums = {**_data(work, up, watch, threads, progress), **_small(work, up)}
            check_unchanged(opened)
            up.check_mark()
            home = homes[-1]
            own = {name.removeprefix(home): found for name, found in sums.items() if name.startswith(home)}
            up.put(f"{home}{manifest.NAME}", manifest.text(own))
            up.remove(there - set(up.sent) - {(target / f"{one}{UNFINISHED}").key for one in homes})
            up.unmark()
    return watch


@contextmanager
def _undone(up: Upload, there: set[str]) -> Iterator[None]:
    """If the block fails, remove what was sent; the mark stays where something else stays."""
    try:
        yield
    except AnotherRunError:
        raise  # what is there may be the other's
    except BaseException:
        up.remove(up.sent)
        if not there - set(up.sent):
            up.unmark()
        raise


def _small(work: Work, up: Upload) -> Sums:
    """Send what travels along, and the small files: those that make a directory a checkpoint come last."""
    sums: Sums = {}
    for name, path in work.laid.copies.items():
        try:
            with reading(path) as file, up.sending(name, file.size) as sender:
                for begin in range(0, file.size, PART):
                    sender.send(memoryview(file.pread(min(PART, file.size - begin), begin)))
        except OSError as error:
            if error.filename != str(path):
                raise
            raise CheckpointError(
                "a file cannot be read", where=path, expected="to read it", found=error.strerror or str(error),
            ) from None  # fmt: skip
        sums[name] = FileSum(size=file.size, crc32=f"{sender.crc:08x}")
    for name, content in work.laid.small.items():
        data = small_bytes(content)
        up.put(name, data)
        sums[name] = FileSum(size=len(data), crc32=f"{crc32(data):08x}")
    return sums


def _data(work: Work, up: Upload, watch: Watch, threads: int | None, progress: Progress | None) -> Sums:
    """Send the data files, several at a time."""
    laid, slots, plan = work.laid, work.prepared.target.slots, work.prepared.plan
    opened = work.prepared.source.opened
    held: list[list[tuple[int, int, int]]] = [[] for _ in laid.files]
    for slot, (file, begin) in enumerate(laid.places):
        held[file].append((begin, slot_bytes(slots[slot]), slot))
    with SourceFiles(opened.files, opened.stamps) as sources:
        check_replicas(plan, opened, sources)
        filler = assembler(plan, opened, sources, slots, watch)
        count = threads or default_threads(sources.remote)
        with ThreadPoolExecutor(count) as makers, ThreadPoolExecutor(_FILES) as files:
            run = _Run(work, filler, up, makers, progress, [0] * len(slots))
            waiting = [files.submit(_File(run, number, sorted(own)).send) for number, own in enumerate(held)]
            try:
                wait(waiting, return_when=FIRST_EXCEPTION)
            finally:
                run.stop.set()
                for future in waiting:
                    future.cancel()
        failed = [error for future in waiting if not future.cancelled() and (error := future.exception())]
        for error in sorted(failed, key=lambda error: isinstance(error, _Stopped)):
            raise error
    tensors = manifest.tensor_sums(laid, slots, plan, run.crcs)
    return {
        planned.path: FileSum(size=planned.size, crc32=f"{future.result():08x}", tensors=tuple(own))
        for planned, future, own in zip(laid.files, waiting, tensors, strict=True)
    }


class _Stopped(Exception):
    """Another file has failed."""


@define(eq=False)
class _Run:
    """The data files of one upload. `crcs` are those of the slots that have been made."""

    work: Work
    filler: Assembler
    up: Upload
    makers: ThreadPoolExecutor
    progress: Progress | None
    crcs: list[int]
    done: int = 0
    stop: threading.Event = field(factory=threading.Event)
    lock: threading.Lock = field(factory=threading.Lock)

    def seals(self, number: int) -> list[tuple[int, bytes]]:
        """The last literals of a file, as far as its bytes have been made."""
        laid = self.work.laid
        if laid.seal_file is not None:
            return laid.seal_file(number, self.crcs)
        return [(at, data) for file, at, data in laid.seal(self.crcs) if file == number] if laid.seal else []

    def told(self, nbytes: int) -> None:
        """So many bytes more have been made."""
        if self.progress:
            with self.lock:
                self.done += nbytes
                self.progress(self.done, self.work.nbytes)


@define(eq=False)
class _File:
    """One data file, which holds these (begin, bytes, slot), in order."""

    run: _Run
    number: int
    held: list[tuple[int, int, int]]
    parts: dict[int, list[tuple[int, int, int]]] = field(factory=dict)  # slot -> (begin, CRC32, bytes)
    sealed: dict[int, bytes] = field(factory=dict)

    def send(self) -> int:
        """Make it and send it. Returns its CRC32."""
        planned = self.run.work.laid.files[self.number]
        with self.run.up.sending(planned.path, planned.size) as sender:
            for begin, end in pairwise(_ends(planned.size, self.held)):
                if self.run.stop.is_set():
                    raise _Stopped
                buffer = memoryview(bytearray(end - begin))
                self._fill(buffer, begin, end)
                self._surround(buffer, begin, end, planned.literals)
                sender.send(buffer)
                self.run.told(end - begin)
            if any(self.sealed.get(at) != data for at, data in self.run.seals(self.number)):
                raise TargetError(
                    "files of this format cannot be written in order", where=planned.path,
                    expected="sums that lie behind what they sum", found="sums before it",
                    hint="convert to a local disk, and copy that",
                )  # fmt: skip
        return sender.crc

    def _fill(self, buffer: memoryview, begin: int, end: int) -> None:
        """The slots' bytes in [begin, end), several stretches at a time."""
        first = max(bisect.bisect_right(self.held, (begin, 1 << 63, 0)) - 1, 0)
        last = bisect.bisect_left(self.held, (end, 0, 0))
        own = [(at, n, slot) for at, n, slot in self.held[first:last] if at + n > begin]
        jobs = [
            self.run.makers.submit(self._tile, buffer[low - begin : high - begin], slot, at, low)
            for at, n, slot in own for low, high in _tiles(at, max(at, begin), min(at + n, end))
        ]  # fmt: skip
        wait(jobs, return_when=FIRST_EXCEPTION)
        for job in jobs:
            job.cancel()
        wait([job for job in jobs if not job.cancelled()])  # an error must not leave somebody else at work
        for error in (job.exception() for job in jobs if not job.cancelled()):
            if error is not None:
                raise error
        for at, n, slot in own:
            if at + n <= end:
                self.run.crcs[slot] = combine((crc, nbytes) for _, crc, nbytes in sorted(self.parts.pop(slot, [])))

    def _tile(self, tile: memoryview, slot: int, at: int, low: int) -> None:
        """The bytes from `low` on of a slot that begins at `at`."""
        self.run.filler.fill(tile, slot, at, low, low + len(tile))
        crc = crc32(tile)
        with self.run.lock:
            self.parts.setdefault(slot, []).append((low, crc, len(tile)))

    def _surround(self, buffer: memoryview, begin: int, end: int, literals: list[tuple[int, bytes]]) -> None:
        """What lies around the slots in [begin, end)."""
        seals = [(at, data) for at, data in self.run.seals(self.number) if at < end and at + len(data) > begin]
        self.sealed.update(seals)
        for low, high, data in (*cut(literals, begin, end), *cut(seals, begin, end)):
            buffer[low - begin : high - begin] = data


def _ends(size: int, held: list[tuple[int, int, int]]) -> Iterator[int]:
    """Where the parts of a file begin and end: never within an element."""
    part, end = part_size(size), 0
    yield 0
    while end < size:
        end += part
        if end >= size:
            yield size
            return
        at, nbytes, _ = held[bisect.bisect_right(held, (end, 1 << 63, 0)) - 1] if held else (end, 0, 0)
        if at < end < at + nbytes:
            end -= (end - at) % 16
        yield end


def _tiles(at: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    """[low, high) of a slot that begins at `at`, in steps of whole elements."""
    while low < high:
        stop = min(high, low + TILE - (low - at) % TILE)
        yield low, stop
        low = stop
