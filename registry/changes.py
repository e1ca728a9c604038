"""Has a checkpoint changed while it was read? Every file's size, time and inode are compared with what they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry import remote
from registry.errors import CheckpointError
from registry.places import UNFINISHED, is_remote
from registry.problems import collapse
from registry.storage import Opened

Stamp = tuple[int, int, int]


@contextmanager
def reading(where: Path) -> Iterator[None]:
    """What the system says while a checkpoint is looked at becomes an error of ours."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "the checkpoint cannot be read", where=error.filename or where, expected="to read it",
            found=error.strerror or error, hint="check the path and its permissions",
        ) from error  # fmt: skip


def check_finished(path: Path) -> None:
    """Refuse what somebody is still uploading, or never ended to. Raises CheckpointError."""
    if (path / UNFINISHED).is_file():
        raise CheckpointError(
            "an upload of this checkpoint has not ended", where=path, expected="a whole checkpoint", found=UNFINISHED,
            hint="wait until it ends; if its process is gone, write it again with overwrite=True (--overwrite)",
        )  # fmt: skip


def stamps(root: Path) -> dict[Path, Stamp]:
    """Every file below a directory, links followed, as it is now."""
    if is_remote(root):
        return _stamps_as_seen(root)
    found: dict[Path, Stamp] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if (stamp := _stamp(path)) is not None:
                found[path] = stamp
    return found


def _stamps_as_seen(root: remote.RemotePath) -> dict[Path, Stamp]:
    """The stamps of a remote directory. Raises CheckpointError where they are others than when it was looked at."""
    found = remote.stamps(root)
    seen = {path: path.seen() for path in found if is_remote(path)}
    if changed := [str(path) for path, stamp in seen.items() if stamp not in (None, found[path])]:
        raise CheckpointError(
            "the source changed while it was opened", where=root, expected="files that stay as they are",
            found=", ".join(collapse(changed, 8)), hint="open it again, when its writer is done",
        )  # fmt: skip
    return found


def _stamp(path: Path) -> Stamp | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stamp_of(stat)


def stamp_of(stat: os.stat_result) -> Stamp:
    """What tells a file from another, and from what it was before."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def directories(root: Path) -> dict[Path, int]:
    """A directory and those in it -> inode: a checkpoint is replaced by another directory of its name."""
    with os.scandir(root) as entries:
        below = {Path(entry): entry.inode() for entry in entries if entry.is_dir(follow_symlinks=False)}
    return {root: root.stat().st_ino, **below}


def check_unchanged(opened: Opened) -> None:
    """Raises CheckpointError for a file that was changed, replaced or removed. New files do not matter."""
    now = remote.stamps(opened.path) if is_remote(opened.path) else None
    changed = [
        path for path, stamp in opened.stamps.items() if (_stamp(path) if now is None else now.get(path)) != stamp
    ]
    if changed:
        names = collapse([path.relative_to(opened.path).as_posix() for path in changed], 8)
        raise CheckpointError(
            "the source changed while it was read", where=opened.path, expected="files that stay as they are",
            found=", ".join(names), hint="wait until its writer is done, and run this again; the target is untouched",
        )  # fmt: skip
