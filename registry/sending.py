"""Writing at a URL: whole objects, files that are sent in parts while they are made, and the mark of an upload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

from attrs import define, field

from registry.crc import crc32
from registry.errors import AnotherRunError
from registry.places import UNFINISHED
from registry.remote import RemotePath
from registry.store import asking

#: Bytes of a part, and how many there may be of one file (S3 takes 10,000).
PART = 12 << 20
_PARTS = 9000
#: Requests at a time for what is small.
_AT_A_TIME = 16


def part_size(nbytes: int) -> int:
    """Bytes of each part of a file."""
    return max(PART, -(-nbytes // _PARTS >> 20) + 1 << 20) if nbytes > PART * _PARTS else PART


@define(eq=False)
class Sender:
    """A file that is sent in order, one part behind the other; the last is under way while the next is made."""

    file: Any
    pool: ThreadPoolExecutor
    where: RemotePath
    crc: int = 0
    _pending: Future[Any] | None = None

    def send(self, data: memoryview) -> None:
        """The next bytes, at least a part or the last. They must stay as they are. Raises OSError."""
        self.crc = crc32(data, self.crc)
        self.wait()
        self._pending = self.pool.submit(self.file.write, data)

    def wait(self) -> None:
        """Until all that has been given is sent."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with asking(self.where):
                pending.result()

    def end(self) -> None:
        """Make the file appear."""
        self.wait()
        with asking(self.where):
            self.file.close()

    def drop(self) -> None:
        """Leave nothing of it: parts that nobody puts together would be paid for as long as the place lasts."""
        if self._pending is not None:
            with suppress(Exception):
                self._pending.result()
        with suppress(Exception):
            self.file.discard()
        with suppress(Exception):
            self.file.closed = True  # or it would be ended when it is collected


@define(eq=False)
class Upload:
    """What is sent to one directory at a URL. `homes` are where the mark has to be: readers may come to any of them."""

    root: RemotePath
    homes: tuple[str, ...]
    pool: ThreadPoolExecutor
    sent: list[str] = field(factory=list)
    token: bytes = field(factory=lambda: uuid4().hex.encode())

    @contextmanager
    def sending(self, name: str, nbytes: int) -> Iterator[Sender]:
        """A new file of so many bytes, which appears if the block ends well. Raises OSError."""
        path = self.root / name
        self.sent.append(path.key)
        with asking(path):
            # A little less than a part, so that every part is sent when it is given: parts end where elements do.
            file = path.store.fs.open(path.key, "wb", block_size=part_size(nbytes) - 16)
        sender = Sender(file, self.pool, path)
        try:
            yield sender
            sender.end()
        except BaseException:
            sender.drop()
            raise

    def put(self, name: str, data: bytes) -> None:
        """A small file, whole. Raises OSError."""
        path = self.root / name
        self.sent.append(path.key)
        with asking(path):
            path.store.fs.pipe_file(path.key, data)

    def mark(self) -> None:
        """Say that an upload has begun. Raises OSError."""
        for home in self.homes:
            path = self.root / f"{home}{UNFINISHED}"
            with asking(path):
                path.store.fs.pipe_file(path.key, self.token)

    def check_mark(self) -> None:
        """Raises AnotherRunError where another run has begun to write the same."""
        for home in self.homes:
            path = self.root / f"{home}{UNFINISHED}"
            with asking(path):
                found = path.store.fs.cat_file(path.key)
            if found != self.token:
                raise AnotherRunError(
                    "another run is writing this target", where=self.root, expected="one run at a time",
                    found="its mark", hint="wait for it to end, and write this to another place",
                )  # fmt: skip

    def unmark(self) -> None:
        """Say that it has ended. Raises OSError."""
        self.remove((self.root / f"{home}{UNFINISHED}").key for home in self.homes)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects, of which some may not be there. Raises OSError."""

        def one(key: str) -> None:
            with suppress(FileNotFoundError), asking(self.root):
                self.root.store.fs.rm_file(key)

        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            list(pool.map(one, list(keys)))
