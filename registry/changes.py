"""Has a checkpoint changed while it was read? Every file's size, time and inode are compared with what they were."""

from __future__ import annotations

import os
from pathlib import Path

from registry.errors import CheckpointError
from registry.problems import collapse
from registry.storage import Opened

Stamp = tuple[int, int, int]


def stamps(root: Path) -> dict[Path, Stamp]:
    """Every file below a directory, links followed, as it is now."""
    found: dict[Path, Stamp] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if (stamp := _stamp(path)) is not None:
                found[path] = stamp
    return found


def _stamp(path: Path) -> Stamp | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def check_unchanged(opened: Opened) -> None:
    """Raises CheckpointError for a file that was changed, replaced or removed. New files do not matter."""
    changed = [path for path, stamp in opened.stamps.items() if _stamp(path) != stamp]
    if changed:
        names = collapse([path.relative_to(opened.path).as_posix() for path in changed], 8)
        raise CheckpointError(
            "the source changed while it was read", where=opened.path, expected="files that stay as they are",
            found=", ".join(names), hint="wait until its writer is done, and run this again; the target is untouched",
        )  # fmt: skip
