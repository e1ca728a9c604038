"""Saving beside the training: it waits while its state is copied, and the copy is written meanwhile.

At most one save is in flight. What goes wrong in the background is raised by the next call and by `close`.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Literal

from registry.board import Board, Notes
from registry.errors import ArgumentError, RegistryError, TargetError
from registry.manager import Checkpoints, Iteration
from registry.retention import Pruned, Retention

#: Writes one rank's part of a checkpoint into the directory that it is given.
Write = Callable[[Path], object]
_PR_SET_PDEATHSIG = 1


class AsyncSaver:
    """Saves in the background, on every rank alike: the n-th `save` of each rank belongs to one checkpoint.

    With `processes`, what `snapshot` returns is pickled and run in a process of its own, which costs the training no
    interpreter lock; a script that uses it must guard its main part by `if __name__ == "__main__"`. With several ranks
    (`world`), `board` is where they agree. `timeout` is how long one waits for another, in seconds.
    """

    def __init__(
        self, *, rank: int = 0, world: int = 1, board: Board | None = None, processes: bool = False,
        busy: Literal["wait", "refuse"] = "wait", timeout: float = 1800, poll: float = 0.05,
    ) -> None:  # fmt: skip
        if world > 1 and board is None:
            raise ArgumentError(
                "several ranks need something to agree by", where="board", expected="a board", found="None",
                hint="give registry.board.StoreBoard(store), or a FileBoard",
            )  # fmt: skip
        self._rank, self._world, self._board = rank, world, board
        self._processes, self._busy, self._timeout, self._poll = processes, busy, timeout, poll
        self._number = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pruned = Pruned()
        self._closed = False
        atexit.register(_last_words, weakref.ref(self))

    # --- what the training calls ---

    @property
    def in_flight(self) -> bool:
        """Is a save being written?"""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, checkpoints: Checkpoints, iteration: Iteration, snapshot: Callable[[], Write], *,
        finalize: Write | None = None, retention: Retention | None = None, needed: int = 0,
    ) -> None:  # fmt: skip
        """Call `snapshot` now, and what it returns in the background, with the directory to write into.

        `finalize` runs on rank 0 when every rank has written, before the checkpoint can be seen. Raises what went wrong
        in the save before, and TargetError where that is still in flight and not to be waited for.
        """
        self._number += 1
        notes = Notes(self._board, self._number, timeout=self._timeout, poll=self._poll) if self._board else None
        try:
            self._ready()
            write = snapshot()
            if not callable(write):
                raise ArgumentError(
                    "the snapshot gave nothing to run", where="snapshot", expected="a function that writes it",
                    found=type(write).__name__, hint="return a function of the directory to write into",
                )  # fmt: skip
        except BaseException as error:
            self._tell(notes, iteration, error)
            raise
        if self._processes:
            write = _InProcess(write)

        def job() -> None:
            if self._rank:
                assert notes is not None
                self._follow(notes, iteration, write)
                return
            with _Ending(notes), checkpoints.saving(iteration, needed=needed, retention=retention) as (stage, pruned):
                self._lead(notes, iteration, stage, write)
                if finalize is not None:
                    finalize(stage)
            self._pruned.removed += pruned.removed
            self._pruned.notes += pruned.notes

        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save of {iteration}")
        self._thread.start()

    def wait(self) -> Pruned:
        """Wait until nothing is in flight. Returns what retention did since the last call; raises what went wrong."""
        self._join()
        pruned, self._pruned = self._pruned, Pruned()
        return pruned

    def close(self) -> Pruned:
        """As `wait`; nothing can be saved afterwards."""
        self._closed = True
        return self.wait()

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except BaseException as later:
            if error is None:
                raise
            error.add_note(f"A save in the background failed too: {later}")

    def _ready(self) -> None:
        if self._closed:
            raise ArgumentError(
                "this saver is closed", where="AsyncSaver", expected="an open one", found="one after close()",
                hint="make another",
            )  # fmt: skip
        if self.in_flight and self._busy == "refuse":
            raise TargetError(
                "a save is still in flight", where="AsyncSaver", expected="one at a time",
                found=self._thread.name if self._thread else None, hint="save less often, or let this one wait",
            )  # fmt: skip
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    # --- in the background ---

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def _lead(self, notes: Notes | None, iteration: Iteration, stage: Path, write: Write) -> None:
        """Rank 0: write, and wait for everybody, also where something failed: none may write on when the lock goes."""
        if notes is None:
            write(stage)
            return
        names = [f"rank{rank}" for rank in range(1, self._world)]
        notes.clear(["open", *names])  # not "end": a rank may be late to read it
        notes.post("open", iteration=iteration, stage=str(stage))
        failed: BaseException | None = None
        try:
            write(stage)
        except BaseException as error:
            failed = error
        said = {}
        for name in names:
            try:
                said[name] = notes.wait(name)[1]["error"]
            except TargetError as error:
                said[name] = str(error)
        if failed is not None:
            raise failed
        bad = [f"{name}: {error}" for name, error in said.items() if error is not None]
        if bad:
            raise TargetError(
                "not every rank could write its part", where=stage, expected=f"{self._world} ranks",
                found=f"{len(bad)} that failed", details=bad,
                hint="see the message of each; the latest checkpoint is the one before",
            )  # fmt: skip

    def _follow(self, notes: Notes, iteration: Iteration, write: Write) -> None:
        """Any other rank: write when rank 0 has opened the directory, say so, and hear how it ended."""
        what, said = notes.wait("end", "open")
        try:
            if what == "open":
                if said["iteration"] != iteration:
                    raise TargetError(
                        "the ranks disagree on the iteration", where=f"rank {self._rank}",
                        expected=f"{said['iteration']}, as on rank 0", found=iteration,
                        hint="resume all ranks from the same checkpoint, and call save on all of them",
                    )  # fmt: skip
                write(Path(said["stage"]))
        except BaseException as error:
            self._tell(notes, iteration, error)
            raise
        if what == "open":
            notes.post(f"rank{self._rank}", error=None)
            _, said = notes.wait("end")
        if said["error"] is not None:
            raise TargetError(
                "the save failed on rank 0", where=f"iteration {iteration}", expected="a checkpoint",
                found=said["error"], hint="the latest checkpoint is the one before",
            )  # fmt: skip

    def _tell(self, notes: Notes | None, iteration: Iteration, error: BaseException) -> None:
        if notes is not None:
            notes.post(f"rank{self._rank}" if self._rank else "end", error=_words(error))


def _last_words(saver: weakref.ref[AsyncSaver]) -> None:
    """A program that ends without `close` must not lose the error of its last save."""
    live = saver()
    if live is not None and live._error is not None:
        traceback.print_exception(live._error)


class _Ending:
    """Tells the others how a save ended on rank 0, when all of it has, the lock too."""

    def __init__(self, notes: Notes | None) -> None:
        self._notes = notes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._notes is not None:
            self._notes.post("end", error=None if error is None else _words(error))


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}"


# --- a process that writes --------------------------------------------------------------------------------------------


class _InProcess:
    """Runs a writer in a fresh process and waits for it. It dies with us, so that none writes when the lock is gone."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def __call__(self, stage: Path) -> None:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(os.getpid(), self._write, stage, sender), daemon=True)
        process.start()
        sender.close()
        try:
            outcome = receiver.recv()
        except EOFError:
            outcome = "it ended before it had written"
        finally:
            process.join()
            receiver.close()
        if outcome is not None:
            raise TargetError(
                "the process that writes has failed", where=stage, expected="exit status 0",
                found=f"exit status {process.exitcode}", details=str(outcome).splitlines(),
                hint="what was there before is untouched",
            )  # fmt: skip


def _child(parent: int, write: Write, stage: Path, sender: Connection[str | None, None]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    try:
        write(stage)
    except BaseException:
        sender.send(traceback.format_exc())
    else:
        sender.send(None)
