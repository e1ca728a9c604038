"""Write a target so that a crash at any point leaves what was there before, or the whole new checkpoint.

Everything is written into a hidden directory beside the target, synced, and renamed into place at the end. The directory
is locked while it is written, so that of two runs to one target one is refused; what a dead run left is removed by the
next.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from registry.errors import TargetError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse a target that is the source, inside it, around it, or not empty. Raises TargetError."""
    a, b = source.resolve(), target.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise TargetError(
            "source and target overlap", where=target, found=f"source {source}", hint="choose a target outside the source"
        )
    if target.exists() and not target.is_dir():
        raise TargetError("the target is a file", where=target, hint="name a directory")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise TargetError("the target is not empty", where=target, hint="choose another, or give overwrite=True (--overwrite)")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_space(parent: Path, needed: int) -> None:
    """Refuse what cannot fit before anything is written. Raises TargetError."""
    stat = os.statvfs(parent)
    free = stat.f_bavail * stat.f_frsize
    if needed > free:
        raise TargetError(
            "the disk is too full", where=parent, expected=f"{needed} bytes free", found=f"{free} bytes free",
            hint="free space or choose another target",
        )  # fmt: skip


@contextmanager
def staged(target: Path, *, needed: int, durable: bool) -> Iterator[Path]:
    """A directory to write into, which becomes `target` if the block ends well and is removed if it does not."""
    parent = target.absolute().parent
    stage = parent / f".{target.name}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        check_space(parent, needed)
        stage.mkdir(exist_ok=True)
        lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _failed(target, error) from error
    try:
        _lock(lock, stage, target)
        try:
            _empty(stage)
            yield stage
            _install(stage, target, durable)
        except BaseException as error:
            shutil.rmtree(stage, ignore_errors=True)
            if isinstance(error, OSError):
                raise _failed(target, error) from error
            raise
    finally:
        os.close(lock)


def _failed(target: Path, error: OSError) -> TargetError:
    return TargetError(
        "the target cannot be written", where=error.filename or target, found=error.strerror or str(error),
        hint="free space, check the permissions, or choose another target; what was there before is untouched",
    )  # fmt: skip


def _lock(lock: int, stage: Path, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TargetError("another run is writing this target", where=target, hint="wait for it to end") from None
    # The run that held the lock before may have renamed the directory away between our open and our lock.
    if not stage.exists() or os.fstat(lock).st_ino != stage.stat().st_ino:
        raise TargetError("another run has just written this target", where=target, hint="look at it, then try again")


def _empty(stage: Path) -> None:
    for path in stage.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _install(stage: Path, target: Path, durable: bool) -> None:
    if durable:
        for directory, _, _ in os.walk(stage, topdown=False):
            sync_directory(Path(directory))
    if target.is_dir() and any(target.iterdir()):
        _exchange(stage, target)
        if durable:
            sync_directory(target.absolute().parent)
        shutil.rmtree(stage)
    else:
        os.replace(stage, target)
    if durable:
        sync_directory(target.absolute().parent)


def _exchange(stage: Path, target: Path) -> None:
    """Swap the two directories in one step where the system can, in two where it cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        call = None
    if call is not None:
        if call(_AT_FDCWD, os.fsencode(stage), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(target))
    aside = stage.with_name(stage.name + ".old")
    os.replace(target, aside)
    os.replace(stage, target)
    os.replace(aside, stage)


def write_small(root: Path, small: Mapping[str, bytes], copies: Mapping[str, Path], *, durable: bool) -> int:
    """Write the small files and copy those that travel along. Returns their bytes."""
    total = 0
    for name, data in small.items():
        total += len(data)
        _write(root / name, data, durable)
    for name, path in copies.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        total += target.stat().st_size
        if durable:
            fd = os.open(target, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    return total


def _write(path: Path, data: bytes, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
