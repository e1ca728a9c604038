"""Open files of a run: sources that are read, mapped or made up, targets that are written and synced."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, Self

import numpy as np

from registry.blocks import Blocks
from registry.changes import Stamp, stamp_of
from registry.errors import CheckpointError
from registry.places import is_path, is_remote
from registry.remote import RemotePath
from registry.storage import FilePlan

#: Open descriptors at a time; a checkpoint may have thousands of files.
_LIMIT = 128
#: New bytes of a file that are worth starting to write out, and files that are synced at a time.
_FLUSH = 32 << 20
_SYNCING = 8
#: Bytes of one write: larger ones ask for larger stretches of memory, which are harder to come by.
_CHUNK = 1 << 20


class Virtual(Protocol):
    """A file that is on no disk: what it holds is made, when it is read, of what other files hold."""

    @property
    def path(self) -> Path:
        """The file that most of it is made of, for messages."""

    def read_into(self, files: SourceFiles, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""

    def boxes(
        self, files: SourceFiles, offset: int, size: Sequence[int], stride: Sequence[int]
    ) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
        """A strided box from `offset` in parts: (the part's index in the box, its elements until the next is taken)."""


class SourceFiles:
    """The files of an opened checkpoint, opened when first read and closed when many others were since.

    `stamps` are what they were when the checkpoint was opened: another checkpoint may have come in its place since.
    """

    def __init__(self, files: Sequence[Path | Virtual], stamps: Mapping[Path, Stamp] | None = None) -> None:
        self._stamps = stamps or {}
        self._paths = [file if is_path(file) else file.path for file in files]
        self._virtual = {i: file for i, file in enumerate(files) if not is_path(file)}
        self._remote = {i: path for i, path in enumerate(self._paths) if is_remote(path) and i not in self._virtual}
        self._sizes: dict[int, int] = {}
        self._looks = {file: threading.Lock() for file in self._remote}
        self._blocks = Blocks()
        self._open: dict[int, _Source] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    @property
    def remote(self) -> bool:
        """Does any of them lie at a URL? Then threads are there to wait, not to work."""
        return bool(self._remote)

    @property
    def computed(self) -> bool:
        """Is any of them on no disk?"""
        return bool(self._virtual)

    def path(self, file: int) -> Path:
        """Where a file is, for messages."""
        return self._paths[file]

    def _get(self, file: int) -> _Source:
        found = self._open.get(file)  # no lock: this is called for every read
        if found is not None:
            return found
        with self._lock:
            if file not in self._open:
                if len(self._open) >= _LIMIT:
                    del self._open[next(iter(self._open))]  # closed when its last reader lets go of it
                source = _Source(self._paths[file])
                self._check(source.path, source.stamp())
                self._open[file] = source
            return self._open[file]

    def _check(self, path: Path, now: Stamp) -> None:
        if self._stamps.get(path, now) != now:
            raise CheckpointError(
                "the source changed while it was read", where=path, found="another file in its place",
                expected="the file that was there when the checkpoint was opened",
                hint="open the checkpoint again, when its writer is done",
            )  # fmt: skip

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. Raises CheckpointError where the file ends early or cannot be read."""
        if file in self._virtual:
            self._virtual[file].read_into(self, offset, buffer)
            return
        if file in self._remote:
            self._fetch_into(file, self._remote[file], offset, buffer)
            return
        source = self._get(file)
        while len(buffer):
            try:
                n = os.preadv(source.fd, [buffer], offset)
            except OSError as error:
                raise _unreadable(self._paths[file], error) from error
            if n == 0:
                raise self._short(file, f"{len(buffer)} more bytes from offset {offset}")
            buffer, offset = buffer[n:], offset + n

    def _fetch_into(self, file: int, path: RemotePath, offset: int, buffer: memoryview) -> None:
        try:
            with self._looks[file]:
                if file not in self._sizes:
                    now = path.stamp_now()
                    self._check(path, now)
                    self._sizes[file] = now[0]
            if offset + len(buffer) > self._sizes[file]:
                raise self._short(file, f"{offset + len(buffer)} bytes")
            if len(buffer):
                self._blocks.read_into(path, self._sizes[file], offset, buffer)
        except OSError as error:
            raise _unreadable(path, error) from None

    def is_remote(self, file: int) -> bool:
        """Does the file lie at a URL? It cannot be mapped then, and every read takes a while."""
        return file in self._remote

    def virtual(self, file: int) -> Virtual | None:
        """The file, if it is on no disk; it cannot be mapped then."""
        return self._virtual.get(file)

    def scratch(self, name: str, nbytes: int) -> memoryview:
        """This thread's own buffer of that name, kept: fresh memory costs several times what a copy into it does."""
        have: memoryview | None = getattr(self._local, name, None)
        if have is None or len(have) < nbytes:
            have = memoryview(bytearray(max(nbytes, 1 << (nbytes - 1).bit_length())))
            setattr(self._local, name, have)
        return have[:nbytes]

    def mapped(self, file: int) -> mmap.mmap:
        """The whole file, mapped for reading. Raises CheckpointError where it has become shorter since."""
        assert file not in self._virtual and file not in self._remote
        source = self._get(file)
        mapped = source.map()
        # What lies beyond the end of a file that shrank is a fatal signal to touch.
        if source.stamp()[0] < len(mapped):
            raise self._short(file, f"{len(mapped)} bytes")
        return mapped

    def _short(self, file: int, expected: str) -> CheckpointError:
        return CheckpointError(
            "a file ends early", where=self._paths[file], expected=expected,
            hint="the file is truncated, or changed while it was read; copy it again",
        )  # fmt: skip


class _Source:
    """An open file. Its calls raise CheckpointError."""

    fd = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from error
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def map(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                try:
                    self._map = mmap.mmap(self.fd, 0, prot=mmap.PROT_READ)
                except OSError as error:
                    raise _unreadable(self.path, error) from error
            return self._map

    def stamp(self) -> Stamp:
        """Its size, time and inode, as they are now."""
        try:
            return stamp_of(os.fstat(self.fd))
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        "a file cannot be read", where=path, expected="to read it", found=error.strerror or str(error),
        hint="check its permissions, its disk, and that nothing changes it meanwhile; the target is untouched",
    )  # fmt: skip


def _start_writeback() -> ctypes._NamedFuncPointer | None:
    """Linux's sync_file_range, which begins to write dirty pages out without waiting for them."""
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


_SYNC_FILE_RANGE_WRITE = 2


class TargetFiles:
    """The data files of a target. While they are written, a thread of its own starts to carry them to the disk."""

    def __init__(self, root: Path, plans: Sequence[FilePlan], *, durable: bool) -> None:
        self._paths = [root / plan.path for plan in plans]
        self._sizes = [plan.size for plan in plans]
        self._durable = durable
        self._fds: OrderedDict[int, int] = OrderedDict()
        self._created: set[int] = set()
        self._lock = threading.Lock()
        self._users: Counter[int] = Counter()
        self._fresh: Counter[int] = Counter()
        self._flusher = _Flusher(self) if durable else None

    def __enter__(self) -> Self:
        for file in range(len(self._paths)):
            with self.descriptor(file):
                pass
        if self._flusher:
            self._flusher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._flusher:
            self._flusher.stop()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    @contextmanager
    def descriptor(self, file: int) -> Iterator[int]:
        """An open descriptor, which stays open for the length of the block."""
        with self._lock:
            if file not in self._fds:
                self._fds[file] = self._opened(file)
                self._evict()
            self._fds.move_to_end(file)
            self._users[file] += 1
            fd = self._fds[file]
        try:
            yield fd
        finally:
            with self._lock:
                self._users[file] -= 1

    def _opened(self, file: int) -> int:
        path = self._paths[file]
        if file in self._created:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.ftruncate(fd, self._sizes[file])
        self._created.add(file)
        return fd

    def _evict(self) -> None:
        for file in list(self._fds)[:-1]:
            if len(self._fds) <= _LIMIT:
                return
            if not self._users[file]:
                os.close(self._fds.pop(file))

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""
        total = len(data)
        with self.descriptor(file) as fd:
            while len(data):
                n = os.pwrite(fd, data[:_CHUNK], offset)
                data, offset = data[n:], offset + n
        if self._flusher:
            with self._lock:
                self._fresh[file] += total
                due = self._fresh[file] >= _FLUSH
                if due:
                    self._fresh[file] = 0
            if due:
                self._flusher.files.put(file)

    def sync(self) -> None:
        """Sync every file, several at a time, so that the journal takes them together."""
        if not self._durable:
            return
        if self._flusher:
            self._flusher.stop()
        with ThreadPoolExecutor(min(_SYNCING, max(len(self._paths), 1))) as pool:
            list(pool.map(self._sync, range(len(self._paths))))

    def _sync(self, file: int) -> None:
        with self.descriptor(file) as fd:
            os.fsync(fd)


class _Flusher(threading.Thread):
    """Begins to write out the dirty pages of files, beside the workers: it may have to wait for the disk's queue."""

    def __init__(self, targets: TargetFiles) -> None:
        super().__init__(daemon=True)
        self.files: SimpleQueue[int | None] = SimpleQueue()
        self._targets = targets
        self._begin = _start_writeback()
        self._stopped = False

    def run(self) -> None:
        """Until told to stop, take files and begin to write them out. An error is left for the fsync to find."""
        while (file := self.files.get()) is not None:
            if self._begin is not None and not self._stopped:
                with self._targets.descriptor(file) as fd:
                    self._begin(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)

    def stop(self) -> None:
        """Forget what is queued, and end."""
        if self.is_alive():
            self._stopped = True
            self.files.put(None)
            self.join()
