"""Write a target so that a crash at any point leaves what was there before, or the whole new checkpoint.

Everything is written into a hidden directory beside the target, synced, and renamed into place at the end. A lock file
beside it keeps two runs from one target; what a dead run left is removed by the next.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.errors import AnotherRunError, CheckpointError, RegistryError, TargetError
from registry.places import is_remote
from registry.storage import Small, small_bytes

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
#: Some file systems have no locks (Lustre without `flock`, many FUSE ones): there nothing keeps two runs apart.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse a target that is the source, inside it, around it, a mount point, or not empty. Raises TargetError."""
    try:
        a, b = (Path(os.path.realpath(path)) for path in (source, target))
        if is_remote(source):  # which overlaps with nothing here, whatever its name looks like
            a = Path()
        if a == b or a in b.parents or b in a.parents:
            raise TargetError(
                "source and target overlap", where=target, expected="two directories, neither inside the other",
                found=f"source {source}", hint="choose a target outside the source",
            )  # fmt: skip
        if target.exists() and not target.is_dir():
            raise TargetError(
                "the target is no directory", where=target, expected="a directory, or nothing yet", found="a file",
                hint="name a directory",
            )  # fmt: skip
        if not overwrite:
            _check_empty(target)
        if target.is_mount():
            raise TargetError(
                "the target is a mount point, which cannot be replaced as a whole", where=target,
                expected="a directory inside a file system", found="its root",
                hint=f"choose a directory below {target}",
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise failed(target, error) from error


def _check_empty(target: Path) -> None:
    if target.is_dir() and (names := sorted(path.name for path in target.iterdir())):
        raise TargetError(
            "the target is not empty", where=target, expected="an empty directory, or nothing yet",
            found=", ".join(names[:8]), hint="choose another, or give overwrite=True (--overwrite)",
        )  # fmt: skip


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    _sync(path, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    _sync(path, os.O_NOFOLLOW)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path, durable: bool) -> None:
    """Make a directory and those above it that are missing; all of their names are made durable."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing if durable else ():
        sync_directory(each.parent)


def check_space(parent: Path, needed: int) -> None:
    """Refuse what cannot fit before anything is written. Raises TargetError."""
    stat = os.statvfs(parent)
    free = stat.f_bavail * stat.f_frsize
    if needed > free:
        raise TargetError(
            "the disk is too full", where=parent, expected=f"{needed} bytes free", found=f"{free} bytes free",
            hint="free space or choose another target; what was there before is untouched",
        )  # fmt: skip


@contextmanager
def staged(target: Path, *, needed: int, durable: bool, overwrite: bool = True) -> Iterator[Path]:
    """A directory to write into, which becomes `target` if the block ends well and is removed if it does not."""
    target = Path(os.path.realpath(target))  # what a link points to is replaced, not the link
    parent = target.parent
    stage, aside = parent / f".{target.name}.partial", parent / f".{target.name}.partial.old"
    try:
        make_directory(parent, durable)
        with locked(parent / f".{target.name}.lock", target):
            if aside.exists() and not target.exists():  # a run died between the two steps of `_exchange`
                aside.rename(target)
            remove(aside)
            remove(stage)
            if not overwrite:
                _check_empty(target)  # another run may have been faster
            check_space(parent, needed)
            stage.mkdir()
            try:
                yield stage
                _install(stage, target, durable, overwrite)
            finally:  # what was not finished; or what was at the target before
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise failed(target, error, stage) from error


def failed(target: Path, error: OSError | ValueError, stage: Path | None = None) -> RegistryError:
    name = getattr(error, "filename", None)
    found = getattr(error, "strerror", None) or str(error)
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else target
    ours = stage is None or path in stage.parents or path.is_relative_to(stage) or path.is_relative_to(target)
    if not (ours or path.name.startswith(f".{target.name}.")):
        return CheckpointError(
            "a file cannot be read", where=path, expected="to read it", found=found,
            hint="check its permissions and that nothing changes it meanwhile; the target is untouched",
        )  # fmt: skip
    return TargetError(
        "the target cannot be written", where=path, expected="to write there", found=found,
        hint="free space, check the permissions, or choose another target; what was there before is untouched",
    )  # fmt: skip


@contextmanager
def locked(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock file at `path`, which goes away with the lock. Raises AnotherRunError if another run holds it.

    A file, and open for writing: NFS locks no directory, and nothing that is only read.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _flock(fd, target)
            # Whoever held it before us may have removed the file after we opened it.
            if _is_at(path, fd):
                try:
                    yield
                finally:
                    with suppress(OSError):  # a file that stays is in nobody's way, and is the next run's lock file
                        path.unlink()
                return
        finally:
            with suppress(OSError):  # closed and unlocked all the same, and nothing was written
                os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def _flock(fd: int, target: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AnotherRunError(
            "another run is writing this target", where=target, expected="one run at a time", found="its lock is held",
            hint="wait for it to end, or choose another target",
        ) from None  # fmt: skip
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _install(stage: Path, target: Path, durable: bool, overwrite: bool) -> None:
    if durable:
        for directory, _, _ in os.walk(stage, topdown=False):
            sync_directory(Path(directory))
    if overwrite and target.is_dir() and any(target.iterdir()):
        _exchange(stage, target)
    else:
        stage.replace(target)
    if durable:
        sync_names(target.parent)


def sync_names(directory: Path) -> None:
    """Make the names that new files have just got durable. Raises TargetError: a failed sync is a failed write."""
    try:
        sync_directory(directory)
    except OSError as error:
        raise TargetError(
            "what is new is in place, but may be gone after a power failure", where=directory,
            expected="to sync the directory", found=error.strerror or error,
            hint="check the disk; verify what is there, or write it again",
        ) from error  # fmt: skip


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
    target.rename(aside)
    try:
        stage.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(stage)


def write_small(root: Path, small: Mapping[str, Small], copies: Mapping[str, Path], *, durable: bool) -> int:
    """Write the small files and copy those that travel along. Returns their bytes."""
    total = 0
    for name, content in small.items():
        data = small_bytes(content)
        total += len(data)
        write_file(root / name, data, durable)
    for name, path in copies.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            with path.open("rb") as file, target.open("wb") as new:
                shutil.copyfileobj(file, new, 1 << 20)
        else:
            shutil.copyfile(path, target)
        total += target.stat().st_size
        if durable:
            sync_file(target)
    return total


def write_file(path: Path, data: bytes, durable: bool) -> None:
    """Write a new file, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
