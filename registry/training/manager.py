"""The directory of a training run: which iteration to resume from, which to keep, and a crash at any point harmless.

    <root>/iter_0001200/  <root>/release/                 one checkpoint each, whole from the moment it can be seen
    <root>/latest_checkpointed_iteration.txt              the tracker: which of them is the latest
    <root>/.iter_0001200.partial  .iter_0001100.deleted   what a dead run left; the next save removes it

The names are Megatron's. How one checkpoint is written is the caller's business.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from attrs import evolve, frozen

from registry import catalog
from registry.commit import failed, locked, make_directory, staged, sync_directory, sync_file
from registry.errors import AnotherRunError, ArgumentError, CheckpointError, RegistryError, TargetError
from registry.places import PathLike, local_path
from registry.source import detect_format
from registry.training import leftovers
from registry.training.retention import Pruned, Retention

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE: Final = "release"
_LOCK = ".checkpoints.lock"
_NAME = re.compile(r"iter_(\d{7,})|release")

#: Why a directory is no whole checkpoint, or None if it is one.
Check = Callable[[Path], str | None]
Iteration = int | Literal["release"]


@frozen
class Found:
    """A whole checkpoint to resume from. `notes` say where the choice was not the plain one: show them as warnings."""

    path: Path
    iteration: Iteration
    persistent: bool = True
    notes: tuple[str, ...] = ()


def openable(path: Path) -> str | None:
    """Why no container can open what is at `path`, or None. Finds missing and cut files, not bad bytes."""
    try:
        spec = detect_format(path)
        catalog.container(spec.container).open(path, spec.name)
    except RegistryError as error:
        return f"{error.problem} ({error.where})" if error.where not in (None, path) else error.problem
    except OSError as error:
        return f"{error.strerror or error} ({error.filename or path})"
    return None


def place(iteration: Iteration) -> str:
    """The name of an iteration's directory."""
    return RELEASE if iteration == RELEASE else f"iter_{iteration:07d}"


def _iteration(name: str) -> Iteration | None:
    """What a directory of this name holds. None where it is no checkpoint's, or not as it would be written."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] is None:
        return None if match is None else RELEASE
    return int(match[1]) if place(int(match[1])) == name else None


def valid(iteration: Iteration) -> Iteration:
    """The iteration itself. Raises ArgumentError for what is none."""
    if iteration == RELEASE or (type(iteration) is int and iteration >= 0):
        return iteration
    raise ArgumentError(
        "not an iteration", where="iteration", expected="0 and more, or 'release'", found=repr(iteration),
        hint="give the number of the training step",
    )  # fmt: skip


def _age(iteration: Iteration) -> int:
    """For sorting. A release comes before every iteration: training from it begins at zero."""
    return -1 if iteration == RELEASE else int(iteration)


class _NoneWhole(CheckpointError):
    """There are checkpoints, and none is whole."""


class Checkpoints:
    """The checkpoints below one directory.

    `check` decides what is whole (a save becomes visible whole, but others write here too, and copies are cut short).
    Saving, retention and the tracker are under one lock: a second run in the same directory is refused.
    """

    def __init__(self, root: PathLike, *, check: Check = openable, durable: bool = True) -> None:
        self.root = Path(os.path.realpath(local_path(root)))
        self._check, self._durable = check, durable
        self._whole: set[tuple[Iteration, int, int]] = set()

    # --- which one to resume from ---

    def present(self) -> list[Iteration]:
        """What has a directory here, whole or not, newest first."""
        try:
            found = [_iteration(path.name) for path in self.root.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        return sorted((i for i in found if i is not None), key=_age, reverse=True)

    def tracked(self) -> Iteration | None:
        """What the tracker names; None where there is no tracker. Raises CheckpointError if it names nothing."""
        where = self.root / TRACKER
        try:
            with where.open("rb") as file:
                text = file.read(64).decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        found: Iteration | None = RELEASE if text == RELEASE else None
        if text.isascii() and text.isdigit():
            found = int(text)
        if found is None or not (self.root / place(found)).is_dir():
            raise CheckpointError(
                "the tracker file names no checkpoint", where=where,
                expected=f"one of {self._listed()}", found=repr(text),
                hint="name the iteration to resume from, or remove the tracker file to take the newest whole one",
            )  # fmt: skip
        return found

    def torn(self, iteration: Iteration) -> str | None:
        """Why an iteration's directory is no whole checkpoint, or None if it is one."""
        try:
            return self._check(self.root / place(iteration))
        except OSError as error:
            return error.strerror or str(error)

    def resume(
        self, iteration: Iteration | None = None, *, fresh: bool = False, non_persistent: Checkpoints | None = None
    ) -> Found | None:
        """The checkpoint to resume from: the one asked for, else the tracker's, else the newest that is whole.

        With `non_persistent` checkpoints in a second place, the newer of both. None, which means to begin from initial
        values, only with `fresh` and where there is nothing at all. Raises CheckpointError.
        """
        try:
            if iteration is not None:
                return self._exactly(valid(iteration), non_persistent)
            found = self._latest() if non_persistent is None else self._newer(non_persistent)
            if found is None:
                self._nothing(fresh)
            return found
        except OSError as error:
            raise _unreadable(self.root, error) from error

    def _exactly(self, iteration: Iteration, second: Checkpoints | None) -> Found:
        reasons = []
        for home, persistent in ((self, True), (second, False)):
            if home is None:
                continue
            leftovers.restore(home.root)
            path = home.root / place(iteration)
            reason = home.torn(iteration) if iteration in home.present() else "no such directory"
            if reason is None:
                return Found(path, iteration, persistent)
            reasons.append(f"{path}: {reason}")
        raise CheckpointError(
            f"there is no whole checkpoint of iteration {iteration}", where=self.root,
            expected=place(iteration), found=self._listed(), details=reasons,
            hint="name another iteration, or none to take the latest",
        )  # fmt: skip

    def _latest(self) -> Found | None:
        leftovers.restore(self.root)
        named, present = self.tracked(), self.present()
        notes, reasons = [], []
        if named is None and present:
            notes.append(f"{self.root} has no {TRACKER}: taking the newest whole checkpoint")
        for iteration in [i for i in (named,) if i is not None] + [i for i in present if i != named]:
            reason = self.torn(iteration)
            if reason is None:
                newer = [place(i) for i in present if named == iteration and _age(i) > _age(named)]
                if newer:
                    notes.append(f"the tracker names {place(iteration)}, although newer ones exist: {', '.join(newer)}")
                elif iteration != named and named is not None:
                    notes.append(f"resuming from {place(iteration)}, the newest whole one, not from {place(named)}")
                return Found(self.root / place(iteration), iteration, notes=tuple(notes))
            notes.append(f"{place(iteration)} is not whole: {reason}")
            reasons.append(notes[-1])
        if reasons:
            raise _NoneWhole(
                "no checkpoint here is whole", where=self.root, expected="one that can be opened",
                found=self._listed(), details=reasons,
                hint="get one of them again; to begin anew, move them and the tracker file away",
            )  # fmt: skip
        return None

    def _newer(self, second: Checkpoints) -> Found | None:
        """The newer of both places' latest; of two as new, the second's. What is wrong there alone is only a note."""
        first, notes = None, []
        torn: _NoneWhole | None = None
        try:
            first = self._latest()
        except _NoneWhole as error:
            torn, notes = error, [str(error)]
        try:
            other = second._latest()
            if other is not None and other.iteration == RELEASE:
                raise CheckpointError(
                    "a non-persistent checkpoint is no release", where=other.path, expected="iter_*", found=RELEASE,
                    hint="name the directory that non-persistent checkpoints are saved to",
                )  # fmt: skip
        except (CheckpointError, OSError) as error:
            if first is None:
                raise torn or error from None
            return evolve(first, notes=(*first.notes, f"{second.root} is ignored: {error}"))
        if other is not None and (first is None or _age(other.iteration) >= _age(first.iteration)):
            return evolve(other, persistent=False, notes=(*(first.notes if first else notes), *other.notes))
        if torn is not None:
            raise torn
        return first

    def _nothing(self, fresh: bool) -> None:
        """Refuse to begin anew, unless that was allowed and this is not a checkpoint by itself."""
        itself = self.root.is_dir() and self._check(self.root) is None
        if fresh and not itself:
            return
        raise CheckpointError(
            "this is one checkpoint, not a directory of iterations" if itself else "there is no checkpoint to resume",
            where=self.root, expected=f"{TRACKER} beside iter_* or {RELEASE}",
            found="a checkpoint" if itself else "nothing",
            hint="name the directory above it" if itself else "correct the path; or allow a fresh start explicitly",
        )  # fmt: skip

    def _listed(self) -> str:
        return ", ".join(map(place, self.present()[:8])) or "nothing"

    # --- saving ---

    @contextmanager
    def saving(
        self, iteration: Iteration, *, needed: int = 0, retention: Retention | None = None, verify: bool = True
    ) -> Iterator[tuple[Path, Pruned]]:
        """A directory to write an iteration into, which becomes the latest checkpoint if the block ends well.

        An iteration that is there already is replaced as a whole. With `verify` it must pass the check before anybody
        sees it. Retention comes last; what it did is in the second value once the block has ended. Raises TargetError.
        """
        valid(iteration)
        pruned = Pruned()
        with self._alone():
            pruned.notes += leftovers.sweep(self.root)
            name = place(iteration)
            with staged(self.root / name, needed=needed, durable=self._durable) as stage:
                yield stage, pruned
                self._before_commit(stage, verify)
            self._track(name)
            if verify:
                self._whole.add(self._seen(iteration))
            if retention is not None:
                self._prune(retention, pruned)

    def save(
        self, iteration: Iteration, write: Callable[[Path], object], *,
        needed: int = 0, retention: Retention | None = None, verify: bool = True,
    ) -> Pruned:  # fmt: skip
        """Save an iteration by a function that writes it into the directory it is given."""
        with self.saving(iteration, needed=needed, retention=retention, verify=verify) as (stage, pruned):
            write(stage)
        return pruned

    def prune(self, retention: Retention) -> Pruned:
        """Remove what retention does not keep and what dead runs left. Raises TargetError while a save is running."""
        pruned = Pruned()
        if self.root.is_dir():
            with self._alone():
                pruned.notes += leftovers.sweep(self.root)
                self._prune(retention, pruned)
        return pruned

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            make_directory(self.root, self._durable)
            with locked(self.root / _LOCK, self.root):
                yield
        except OSError as error:
            raise failed(self.root, error) from error

    def _before_commit(self, stage: Path, verify: bool) -> None:
        reason = self._check(stage) if verify else None if any(stage.iterdir()) else "nothing was written"
        if reason is not None:
            raise TargetError(
                "what was written is no whole checkpoint", where=stage, expected="one that can be opened",
                found=reason, hint="nothing was replaced; the latest checkpoint is the one before",
            )  # fmt: skip
        if self._durable:  # whoever wrote them, other ranks too; what is on the disk already costs nothing
            for folder, _, names in os.walk(stage):
                for path in (Path(folder, name) for name in names):
                    if path.is_file() and not path.is_symlink():
                        sync_file(path)

    def _track(self, name: str) -> None:
        fresh = self.root / f".{TRACKER}.partial"
        fresh.unlink(missing_ok=True)
        text = name if name == RELEASE else str(int(name.removeprefix("iter_")))
        with fresh.open("x", encoding="ascii") as file:
            file.write(text)
            file.flush()
            if self._durable:
                os.fsync(file.fileno())
        fresh.replace(self.root / TRACKER)
        if self._durable:
            sync_directory(self.root)

    # --- what goes away ---

    def _prune(self, retention: Retention, pruned: Pruned) -> None:
        try:
            named = self.tracked()
        except CheckpointError as error:
            pruned.notes.append(f"nothing is removed: {error}")
            return
        latest = named if isinstance(named, int) and self._remembered(named) is None else None
        numbers = [i for i in self.present() if isinstance(i, int)]
        for iteration in retention.expendable(numbers, latest, self._remembered, pruned.notes):
            path = self.root / place(iteration)
            try:
                if path.is_symlink():
                    raise OSError(errno.ELOOP, "it is a link to somewhere else")
                leftovers.discard(path, durable=self._durable)
            except (OSError, AnotherRunError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                pruned.notes.append(f"{path.name} cannot be removed: {why}")
            else:
                pruned.removed.append(iteration)

    def _remembered(self, iteration: int) -> str | None:
        """As `torn`, but what was whole once is looked at again only if its directory has changed."""
        seen = self._seen(iteration)
        reason = None if seen in self._whole else self.torn(iteration)
        if reason is None:
            self._whole.add(seen)
        return reason

    def _seen(self, iteration: Iteration) -> tuple[Iteration, int, int]:
        stat = (self.root / place(iteration)).stat()
        return iteration, stat.st_ino, stat.st_mtime_ns


def _unreadable(root: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        "the directory of checkpoints cannot be read", where=error.filename or root, expected="to read it",
        found=error.strerror or error, hint="check its permissions and that it is a directory",
    )  # fmt: skip
