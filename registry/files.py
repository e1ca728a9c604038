"""Open files of a run: sources that are read and mapped, targets that are written and synced."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from registry.errors import CheckpointError
from registry.storage import FilePlan

#: Open descriptors at a time; a checkpoint may have thousands of files.
_LIMIT = 128


class SourceFiles:
    """The files of an opened checkpoint, opened when first read and closed when many others were since."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._open: OrderedDict[int, _Source] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def path(self, file: int) -> Path:
        """Where a file is, for messages."""
        return self._paths[file]

    def _get(self, file: int) -> _Source:
        with self._lock:
            found = self._open.get(file)
            if found is None:
                found = self._open[file] = _Source(self._paths[file])
                if len(self._open) > _LIMIT:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(file)
            return found

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. Raises CheckpointError where the file ends early."""
        source = self._get(file)
        while len(buffer):
            n = os.preadv(source.fd, [buffer], offset)
            if n == 0:
                raise CheckpointError(
                    "a file ends early",
                    where=self._paths[file],
                    expected=f"{len(buffer)} more bytes from offset {offset}",
                    hint="the file is truncated, or changed while it was read; copy it again",
                )
            buffer, offset = buffer[n:], offset + n

    def mapped(self, file: int) -> mmap.mmap:
        """The whole file, mapped for reading."""
        return self._get(file).map()


class _Source:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def map(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                self._map = mmap.mmap(self.fd, 0, prot=mmap.PROT_READ)
            return self._map

    def __del__(self) -> None:
        os.close(self.fd)


def _start_writeback() -> ctypes._NamedFuncPointer | None:
    """Linux's sync_file_range, which begins to write dirty pages out without waiting for them."""
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call  # type: ignore[no-any-return]


_SYNC_FILE_RANGE_WRITE = 2


class TargetFiles:
    """The data files of a target. A file is synced as soon as its last job is done, beside the jobs of others."""

    def __init__(self, root: Path, plans: Sequence[FilePlan], jobs: Sequence[int], *, durable: bool) -> None:
        self._paths = [root / plan.path for plan in plans]
        self._sizes = [plan.size for plan in plans]
        self._left = Counter(jobs)
        self._durable = durable
        self._fds: OrderedDict[int, int] = OrderedDict()
        self._created: set[int] = set()
        self._lock = threading.Lock()
        self._writeback = _start_writeback() if durable else None
        self._users: Counter[int] = Counter()

    def __enter__(self) -> Self:
        for file in range(len(self._paths)):
            self._release(self._acquire(file))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _acquire(self, file: int) -> int:
        with self._lock:
            if file not in self._fds:
                path = self._paths[file]
                if file not in self._created:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                    os.ftruncate(fd, self._sizes[file])
                    self._created.add(file)
                else:
                    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                self._fds[file] = fd
                self._evict()
            self._fds.move_to_end(file)
            self._users[file] += 1
            return file

    def _release(self, file: int) -> None:
        with self._lock:
            self._users[file] -= 1

    def _evict(self) -> None:
        for file in list(self._fds)[:-1]:
            if len(self._fds) <= _LIMIT:
                return
            if not self._users[file]:
                os.close(self._fds.pop(file))

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""
        self._acquire(file)
        try:
            fd, begin, total = self._fds[file], offset, len(data)
            while len(data):
                n = os.pwrite(fd, data, offset)
                data, offset = data[n:], offset + n
            if self._writeback is not None and total >= 1 << 20:
                self._writeback(fd, begin, total, _SYNC_FILE_RANGE_WRITE)
        finally:
            self._release(file)

    def finished(self, file: int) -> None:
        """One job of a file is done; the last one syncs it."""
        with self._lock:
            self._left[file] -= 1
            last = not self._left[file]
        if last and self._durable:
            self._acquire(file)
            try:
                os.fsync(self._fds[file])
            finally:
                self._release(file)

    def sync(self) -> None:
        """Sync every file (again, after late literals). A failed sync is a failed write."""
        if self._durable:
            for file in range(len(self._paths)):
                self._acquire(file)
                try:
                    os.fsync(self._fds[file])
                finally:
                    self._release(file)
