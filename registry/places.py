"""From what a user calls a place to the path that is worked with: on this machine's disks, or at a URL."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from registry.errors import CheckpointError
from registry.remote import RemotePath, remote_path

if TYPE_CHECKING:
    from typing_extensions import TypeIs

PathLike = str | os.PathLike[str]
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)

#: In a checkpoint that is being uploaded. It comes first and goes last, for at a URL nothing can be renamed as a whole.
UNFINISHED = ".registry-unfinished"


def is_remote(path: object) -> TypeIs[RemotePath]:
    """Does this path lie at a URL?"""
    return isinstance(path, RemotePath)


def is_path(file: object) -> TypeIs[Path]:
    """Is this a path, and no file that is made up (see `registry.files.Virtual`)?"""
    return isinstance(file, os.PathLike)


def local_path(path: PathLike) -> Path:
    """A path on this machine. Raises CheckpointError for a URL of any other place."""
    if isinstance(path, RemotePath) or not isinstance(found := _parsed(path), Path):
        raise CheckpointError(
            "only local paths can be used here", where=path, expected="a directory", found="a URL",
            hint="save to a local disk; registry.convert copies from there to a URL, and back",
        )  # fmt: skip
    return found


def place(path: PathLike) -> Path:
    """The path that a user means: a local one, or a `RemotePath` that looks at what is there now.

    Raises CheckpointError for what is neither, and where what is needed for such URLs is not installed.
    """
    if isinstance(path, RemotePath):
        return path.again()
    found = _parsed(path)
    return found if isinstance(found, Path) else remote_path(found)


def _parsed(path: Any) -> Path | str:
    text: str = os.fspath(path)
    if "\0" in text:
        raise CheckpointError(
            "not a path", where=repr(text), expected="a directory", found="a null character", hint="correct the path"
        )
    if "://" not in text:
        return Path(text)
    match = _URL.fullmatch(text)
    scheme, rest = (match[1].lower(), match[2]) if match else ("", "")
    if scheme == "local" or (scheme == "file" and rest.startswith(("/", "localhost/"))):
        return Path(unquote(rest.removeprefix("localhost")) if scheme == "file" else rest)
    if scheme == "file" or not rest.strip("/") or set("?#") & set(text):
        raise CheckpointError(
            "not the URL of a directory", where=text, expected="such as s3://bucket/directory, without a query",
            hint="correct it; what else has to be said of the place goes into fsspec's configuration (docs/remote.md)",
        )  # fmt: skip
    return text
