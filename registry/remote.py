"""Paths at URLs, over fsspec: as much of pathlib as formats use, answered from one listing of each directory.

A path looks at its directories once, so that opening a checkpoint takes few requests and sees one state of it;
`RemotePath.again` looks anew. fsspec's file systems bring their own retries, and credentials from where their programs
have them.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import stat
from collections.abc import Iterator, Sequence
from datetime import datetime
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NoReturn, Self
from urllib.parse import urlsplit

from registry.errors import CheckpointError
from registry.redaction import hide, redacted
from registry.store import Info, Store, asking

#: Bytes that the small reads of a header get at a time, and at which separate wanted stretches are one request.
_BLOCK = 64 << 10
_NEAR = 16 << 10
#: As many connections as we have threads, and a server that says nothing is given up sooner: s3fs asks five times,
#: botocore five times in each of these, and each waits for 15 seconds.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "max_pool_connections": 64, "read_timeout": 10, "retries": {"mode": "standard", "total_max_attempts": 2},
        }
    }
}  # fmt: skip
#: What file systems call that which changes with an object's content.
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "generation", "version_id", "checksum")
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")


if TYPE_CHECKING:
    _Path = Path
else:
    _Path = object


class RemotePath(_Path):
    """A file or directory at a URL. It has the part of a Path's interface that formats use, and is one for mypy."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key

    def again(self) -> RemotePath:
        """The same place, as it is from now on."""
        return RemotePath(Store(self.store.fs, self.store.url, self.store.root), self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.store.url, self.key)

    def __str__(self) -> str:
        return self.store.shown(self.key)

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (self.key, self.store.fs) == (other.key, other.store.fs)

    def __hash__(self) -> int:
        return hash(self.key)

    def __lt__(self, other: Any) -> bool:
        return bool(self.key < other.key)

    def __truediv__(self, name: Any) -> Self:
        return type(self)(self.store, f"{self.key.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.key.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Self:
        return type(self)(self.store, self.key.rpartition("/")[0])

    @property
    def parents(self) -> Sequence[Self]:
        found = [self.parent]
        while found[-1].key.strip("/"):
            found.append(found[-1].parent)
        return [*found, *found[-1:] * 2]  # there is always one more above, as above a root

    def with_name(self, name: str) -> Self:
        return self.parent / name

    def as_posix(self) -> str:
        return str(self)

    def relative_to(self, *other: Any) -> PurePosixPath:  # type: ignore[override]
        return PurePosixPath(self.key).relative_to(other[0].key)

    def is_relative_to(self, *other: Any) -> bool:
        return isinstance(other[0], RemotePath) and (self.key + "/").startswith(other[0].key.rstrip("/") + "/")

    def absolute(self) -> Self:
        return self

    def resolve(self, strict: bool = False) -> Self:
        return self

    def is_symlink(self) -> bool:
        return False

    def is_mount(self) -> bool:
        return False

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.store.kind(self.key) is not None

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self.store.kind(self.key) == "directory"

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self.store.kind(self.key) == "file"

    def iterdir(self) -> Iterator[Self]:  # type: ignore[override]
        found = self.store.children(self.key)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return iter([self / name for name in sorted(found)])

    def glob(self, pattern: str, **_: Any) -> Iterator[Self]:  # type: ignore[override]
        assert "/" not in pattern
        names = self.store.children(self.key) or {}
        return iter([self / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)])

    def rglob(self, pattern: str, **_: Any) -> Iterator[Self]:  # type: ignore[override]
        for path in self.iterdir():
            if fnmatch.fnmatchcase(path.name, pattern):
                yield path
            if path.is_dir():
                yield from path.rglob(pattern)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        size = int(self.store.info(self.key)["size"] or 0)
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, size, 0, 0, 0))

    def open(  # type: ignore[override]
        self, mode: str = "r", *, encoding: str | None = None, errors: str | None = None
    ) -> IO[Any]:
        if set(mode) & set("wax+"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        raw = io.BufferedReader(_File(RemoteReader(self)))
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding=encoding or "utf-8", errors=errors)

    def seen(self) -> tuple[int, int, int] | None:
        """The file's stamp as it was when its directory was looked at, if that was."""
        info = (self.store.seen(self.key.rpartition("/")[0]) or {}).get(self.name)
        return None if info is None else stamp(info)

    def stamp_now(self) -> tuple[int, int, int]:
        """The file's stamp as it is now. Raises OSError."""
        with asking(self):
            self.store.fs.invalidate_cache(self.key)
            return stamp(self.store.fs.info(self.key))

    def read_bytes(self) -> bytes:
        return self.fetch(0, self.stat().st_size)

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def fetch(self, offset: int, nbytes: int) -> bytes:
        """Exactly these bytes, in one request. Raises OSError."""
        if not nbytes:
            return b""
        with asking(self):
            found = self.store.fs.cat_file(self.key, start=offset, end=offset + nbytes)
        if len(found) != nbytes:
            self._short(f"{len(found)} bytes came where {nbytes} from offset {offset} were asked for")
        return bytes(found)

    def _short(self, text: str) -> NoReturn:
        raise OSError(errno.EIO, text, str(self))


def _unpickled(url: str, key: str) -> RemotePath:
    return RemotePath(remote_path(url).store, key)


def stamp(info: Info) -> tuple[int, int, int]:
    """What tells an object's content from another: size and the tag of its content, or its time where it has none."""
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), None)
    when = next((info[name] for name in _TIMES if info.get(name)), None) if tag is None else None
    when = when.timestamp() if isinstance(when, datetime) else when
    # A listing and a look at one object may give a time as another type, and with other digits behind the second.
    text = tag or str(int(when) if isinstance(when, float) else when)
    return int(info["size"] or 0), 0, int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")


def stamps(root: RemotePath) -> dict[Path, tuple[int, int, int]]:
    """Every file below a directory as it is now."""
    return {RemotePath(root.store, key): stamp(info) for key, info in root.store.tree(root.key).items()}


class _File(io.RawIOBase):
    """A reader as a file object."""

    def __init__(self, reader: RemoteReader) -> None:
        self._reader, self._at = reader, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._reader.size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._reader.pread(len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class RemoteReader:
    """A file at a URL, for headers: see `registry.reading.Reader`."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self.size = path, path.stat().st_size
        self._blocks: dict[int, bytes] = {}
        self._wanted: dict[int, bytes] = {}

    def pread(self, nbytes: int, offset: int) -> bytes:
        """As in `Reader`."""
        nbytes = max(0, min(nbytes, self.size - offset))
        known = self._wanted.get(offset)
        if known is not None and len(known) >= nbytes:
            return known[:nbytes]
        if nbytes > _BLOCK:
            return self.path.fetch(offset, nbytes)
        parts = []
        for block in range(offset // _BLOCK, -(-(offset + nbytes) // _BLOCK)):
            if block not in self._blocks:
                begin = block * _BLOCK
                self._blocks[block] = self.path.fetch(begin, min(_BLOCK, self.size - begin))
            low = max(offset - block * _BLOCK, 0)
            parts.append(self._blocks[block][low : offset + nbytes - block * _BLOCK])
        return b"".join(parts)

    def want(self, spans: Sequence[tuple[int, int]]) -> None:
        """As in `Reader`. What lies near each other is one request."""
        spans = sorted({(at, min(n, self.size - at)) for at, n in spans if 0 <= at < self.size and n > 0})
        runs: list[list[tuple[int, int]]] = []
        for at, nbytes in spans:
            if runs and at <= runs[-1][-1][0] + runs[-1][-1][1] + _NEAR and at - runs[-1][0][0] < _BLOCK:
                runs[-1].append((at, nbytes))
            else:
                runs.append([(at, nbytes)])
        begins = [run[0][0] for run in runs]
        ends = [max(at + nbytes for at, nbytes in run) for run in runs]
        if not runs:
            return
        with asking(self.path):
            found = self.path.store.fs.cat_ranges([self.path.key] * len(runs), begins, ends, on_error="raise")
        for run, begin, end, data in zip(runs, begins, ends, found, strict=True):
            if len(data) != end - begin:
                self.path._short(f"{len(data)} bytes came where {end - begin} from offset {begin} were asked for")
            self._wanted.update({at: data[at - begin : at - begin + nbytes] for at, nbytes in run})

    def close(self) -> None:
        """As in `Reader`."""
        self._blocks.clear()
        self._wanted.clear()


def remote_path(url: str) -> RemotePath:
    """The path of a URL. Raises CheckpointError where its file system is not installed or cannot be set up."""
    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs
    except ImportError:
        raise CheckpointError(
            "URLs need fsspec", where=url, expected="fsspec, and what it needs for this one", found="none of it",
            hint="pip install 'checkpoint-registry[remote]'",
        ) from None  # fmt: skip
    parts = urlsplit(url)
    for secret in (parts.password, parts.username if parts.password is None else None):
        hide(secret)
    options = {k: v for k, v in _OPTIONS.get(parts.scheme, {}).items() if k not in conf.get(parts.scheme, {})}
    failed: tuple[str, str] | None = None
    try:
        fs, key = url_to_fs(url, **options)
    except ImportError as error:
        failed = str(error), f"install what fsspec needs for {parts.scheme}:// (s3fs for s3://, gcsfs for gs://)"
    except Exception as error:
        failed = str(error), "correct the URL, or fsspec's configuration; docs/remote.md"
    if failed is not None:
        raise CheckpointError(
            "the URL's file system cannot be used", where=url, expected="a URL that fsspec can open",
            found=redacted(failed[0]), hint=failed[1],
        )  # fmt: skip
    for name in ("secret", "token", "password", "key", "account_key", "sas_token"):
        hide(fs.storage_options.get(name))
    key = key.rstrip("/")
    return RemotePath(Store(fs, url.rstrip("/"), key), key)
