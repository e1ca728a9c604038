"""What dead runs leave among checkpoints: the stage of a save, what it took away, half a deletion, a lock of nobody.

Each is under the lock of its checkpoint (registry/commit.py), so that nothing of a run that lives is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from registry.commit import locked, remove, sync_directory, sync_names
from registry.errors import AnotherRunError

_LEFTOVER = re.compile(r"\.(iter_\d{7,}|release)\.(?:partial|partial\.old|deleted|lock)")


def _leftovers(root: Path) -> list[tuple[Path, Path]]:
    """(the checkpoint, the leftover) of each."""

    def found() -> Iterator[tuple[Path, Path]]:
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            match = _LEFTOVER.fullmatch(path.name)
            if match:
                yield root / match[1], path

    return list(found())


def _lock(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.lock")


def aside(checkpoint: Path) -> Path:
    """What a checkpoint is called from the moment that it goes away."""
    return checkpoint.with_name(f".{checkpoint.name}.deleted")


def discard(checkpoint: Path, *, durable: bool) -> None:
    """Remove a checkpoint so that half of it is never seen.

    Raises OSError, AnotherRunError where a run writes it, and TargetError where the removal may not be durable.
    """
    with locked(_lock(checkpoint), checkpoint):
        checkpoint.rename(aside(checkpoint))
        if durable:
            sync_names(checkpoint.parent)
        remove(aside(checkpoint))


def restore(root: Path) -> None:
    """Put back what a run took away to put something else there and died (where directories cannot be swapped)."""
    for checkpoint, path in _leftovers(root):
        if not path.name.endswith(".old") or checkpoint.exists():
            continue
        try:
            with locked(_lock(checkpoint), checkpoint):
                if path.exists() and not checkpoint.exists():
                    path.rename(checkpoint)
                    sync_directory(root)
        except (OSError, AnotherRunError):
            continue  # another run is at it; or nothing may be written here, and what is here is all there is


def sweep(root: Path) -> list[str]:
    """Remove what dead runs left. Notes on what could not be."""
    restore(root)
    notes = []
    for checkpoint, path in _leftovers(root):
        try:
            with locked(_lock(checkpoint), checkpoint):
                if checkpoint.exists() or not path.name.endswith(".old"):
                    remove(path)
        except AnotherRunError:
            notes.append(f"{path.name} is left alone: another run holds its lock")
        except OSError as error:
            notes.append(f"{path.name} cannot be removed: {error.strerror or error}")
    return notes
