"""A file system of fsspec, seen once: what lies below one URL, by one listing of each directory.

Whatever a file system raises becomes an OSError that names the place and shows no secret.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attrs import define, field

from registry.errors import CheckpointError
from registry.redaction import redacted

_NUMBERS: dict[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, OSError: errno.EIO,
}  # fmt: skip
#: What fsspec tells of a file: its name, type, size and what else the file system knows.
Info = dict[str, Any]


@contextmanager
def asking(where: object) -> Iterator[None]:
    """Every error of a file system as an OSError without secrets. An OSError keeps its kind: not found, not allowed."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        kind = next((k for k in (FileNotFoundError, PermissionError) if isinstance(error, k)), OSError)
        number = getattr(error, "errno", None) or _NUMBERS[kind]
        said = redacted(str(getattr(error, "strerror", None) or error)).strip()
        known = isinstance(error, OSError) and said
        text = said if known else f"{type(error).__name__}: {said}".removesuffix(": ")
        failed = kind(number, text[:500], str(where))
    else:
        return
    raise failed from None  # the first error may hold what must not be shown


@define(eq=False)
class Store:
    """A file system and what has been seen of it below one directory."""

    fs: Any
    url: str
    root: str
    _seen: dict[str, dict[str, Info] | None] = field(factory=dict)

    def shown(self, key: str) -> str:
        """The URL of a key, for messages."""
        return redacted(self.url).rstrip("/") + key[len(self.root) :]

    def kind(self, key: str) -> str | None:
        """One of "directory" and "file"; None for what is not there."""
        if key == self.root or not key.startswith(f"{self.root}/"):
            found = self.children(key)
            return "directory" if found else None
        parent, _, name = key.rpartition("/")
        info = (self.children(parent) or {}).get(name)
        return None if info is None else "directory" if info["type"] == "directory" else "file"

    def info(self, key: str) -> Info:
        """What is known of a file. Raises FileNotFoundError."""
        parent, _, name = key.rpartition("/")
        found = (self.children(parent) or {}).get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.shown(key))
        return found

    def children(self, key: str) -> dict[str, Info] | None:
        """Name -> what is known of each entry of a directory; None where there is no such directory."""
        if key not in self._seen:
            above = key.startswith(f"{self.root}/") and self.kind(key) != "directory"
            self._seen[key] = None if above else self._listed(key)
        return self._seen[key]

    def seen(self, key: str) -> dict[str, Info] | None:
        """The entries of a directory, if it has been looked at."""
        return self._seen.get(key)

    def _listed(self, key: str) -> dict[str, Info] | None:
        with asking(self.shown(key)):
            self.fs.invalidate_cache(key)
            try:
                entries = self.fs.ls(key, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return None
        found = {}
        for entry in entries:
            path = entry["name"].rstrip("/")
            if path != key.rstrip("/"):  # an object of the directory's own name marks it, or is a file and none
                found[path.rpartition("/")[2]] = entry
        return found

    def tree(self, key: str) -> dict[str, Info]:
        """Every file below a directory, by its key, as it is now."""
        with asking(self.shown(key)):
            self.fs.invalidate_cache(key)
            try:
                found = self.fs.find(key, detail=True)
            except FileNotFoundError:
                return {}
        return {name: info for name, info in found.items() if name != key and not name.endswith("/")}
