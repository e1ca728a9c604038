"""Stretches of files, wherever those lie: on a disk by system calls, elsewhere by requests for ranges of bytes.

Headers are read in many small pieces. A reader of a remote file keeps what it has got in whole blocks, and gets what
it is told will be wanted in requests that are all under way together.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

from registry.remote import RemotePath, RemoteReader

T = TypeVar("T")
R = TypeVar("R")

PathLike = str | os.PathLike[str]
#: Bytes of one system call: more are refused by some systems.
_MOST = 1 << 30
#: Remote files whose headers are read at a time.
_AT_A_TIME = 16


class Reader(Protocol):
    """An open file that is read by offsets."""

    @property
    def size(self) -> int:
        """Bytes of the whole file, when it was opened."""

    def pread(self, nbytes: int, offset: int) -> bytes:
        """Bytes from `offset`: all that are wanted or that are left, or fewer, but never none. Raises OSError."""

    def want(self, spans: Sequence[tuple[int, int]]) -> None:
        """These (offset, bytes) will be asked for next. Raises OSError."""

    def close(self) -> None:
        """Let go of the file."""


class NotPlainError(OSError, ValueError):
    """What was to be read is a pipe, a device or a directory: one could wait for it forever."""

    def __init__(self, path: PathLike) -> None:
        super().__init__(errno.EINVAL, "not a plain file", os.fspath(path))

    def __str__(self) -> str:
        return "not a plain file"


class _Local:
    """A file on a disk."""

    def __init__(self, path: PathLike) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise NotPlainError(path)
        self.size = status.st_size

    def pread(self, nbytes: int, offset: int) -> bytes:
        return os.pread(self._fd, min(nbytes, _MOST), offset)

    def want(self, spans: Sequence[tuple[int, int]]) -> None:
        """The system reads ahead by itself."""

    def close(self) -> None:
        os.close(self._fd)


def open_reader(path: PathLike) -> Reader:
    """Open a plain file. Raises OSError, NotPlainError for what is no plain file."""
    return RemoteReader(path) if isinstance(path, RemotePath) else _Local(path)


@contextmanager
def reading(path: PathLike) -> Iterator[Reader]:
    """A plain file, open for the length of the block. Raises as `open_reader`."""
    reader = open_reader(path)
    try:
        yield reader
    finally:
        reader.close()


def read_all(reader: Reader, begin: int = 0, end: int | None = None) -> bytes:
    """A stretch of a file, or as much of it as there is. Raises OSError."""
    end = reader.size if end is None else min(end, reader.size)
    parts = []
    while begin < end and (part := reader.pread(end - begin, begin)):
        parts.append(part)
        begin += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def each(function: Callable[[T], R], things: Iterable[T], root: PathLike) -> list[R]:
    """What `function` says of each thing, in order; below a remote root, of several things at a time."""
    if not isinstance(root, RemotePath):
        return [function(thing) for thing in things]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(function, things))
