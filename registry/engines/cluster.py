"""Conversions on a Ray cluster: the files in tasks of about equal size, which Ray places, watches and runs again.

A worker process opens the source and plans everything when it gets its first task, and keeps that for the next ones.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from attrs import define, field, frozen

from registry import catalog, encoding
from registry.engines.work import SHARED, Crew, Done, Order, Work, carry_out, check_there, deal, made
from registry.errors import ArgumentError, CheckpointError, RegistryError, TargetError
from registry.execute import Progress

T = TypeVar("T")

#: Tasks for each that can run at a time: where some are slower than others, nobody waits long for the last one.
_TASKS = 4
#: Seconds between two looks at the workers; for a new directory to be seen on other machines; for killed tasks to end.
_LOOK = 0.2
_SEEN = 5.0
_ENDED = 60.0


@frozen(eq=False)
class _Errand:
    """What all tasks of one conversion share: `owners` says which task each file is of. `run` names the conversion."""

    run: str
    order: Order
    folder: Path
    added: catalog.Added
    encodings: dict[str, encoding.Codec]
    digest: str
    owners: list[int]
    stage: Path
    threads: int
    durable: bool


class Tally:
    """An actor that knows how many bytes each task has done."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def tell(self, task: int, done: int) -> None:
        """A task has done so many bytes; one that runs again has those of the first time, until it is farther."""
        self._done[task] = max(done, self._done.get(task, 0))

    def told(self) -> int:
        """Bytes of all tasks."""
        return sum(self._done.values())


#: The conversion that this worker process has planned, with the name of its run.
_planned: tuple[str, Work] | None = None


def run_task(errand: _Errand, task: int, tally: Any) -> Done:
    """Write the files of one task. Runs in a worker process, perhaps a second time.

    Raises RegistryError, also for a worker that sees another file system than the one that leads.
    """
    _see(errand)
    work = _plan(errand)
    own = work.share(errand.owners, task, 1 + max(errand.owners))
    work.check(errand.threads, task, 1 + max(errand.owners))
    due = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due or done == total:
            due = now + _LOOK
            tally.tell.remote(task, own.nbytes if done == total else done)

    progress = None if tally is None else tell
    return carry_out(work, own, errand.stage, threads=errand.threads, durable=errand.durable, progress=progress)


def _plan(errand: _Errand) -> Work:
    global _planned
    if _planned is None or _planned[0] != errand.run:
        _planned = None  # two plans would take twice the memory
        catalog.add(errand.added)
        for name, codec in errand.encodings.items():
            encoding.register_encoding_codec(name, codec)
        before = Path.cwd()
        with suppress(OSError):  # only options with relative paths need it
            os.chdir(errand.folder)
        try:
            work = made(errand.order)
        finally:
            os.chdir(before)
        if work.digest() != errand.digest:
            raise CheckpointError(
                "a worker plans something else", where=errand.order.source, found=f"another plan on {_host()}",
                expected="the same source, and the same release of this library, on every machine", hint=SHARED,
            )  # fmt: skip
        _planned = errand.run, work
    return _planned[1]


def _see(errand: _Errand) -> None:
    """Refuse a machine without the source, or without the stage that the leader has just made."""
    deadline = time.monotonic() + _SEEN
    while not errand.stage.is_dir():
        if time.monotonic() > deadline:
            raise TargetError(
                "a worker does not see the target", where=errand.stage, expected="what the leader has begun",
                found=f"nothing, on {_host()}", hint=SHARED,
            )  # fmt: skip
        time.sleep(_LOOK)
    if not errand.order.source.exists():
        raise CheckpointError(
            "a worker does not see the source", where=errand.order.source, expected="the same as the leader sees",
            found=f"nothing, on {_host()}", hint=SHARED,
        )  # fmt: skip


def _host() -> str:
    return f"host {socket.gethostname()}"


@define(eq=False)
class _Told:
    """What the tally says, told to the caller. It may be lost: the conversion goes on without it."""

    ray: Any
    tally: Any
    progress: Progress | None
    total: int
    asked: Any = None
    last: int = -1

    def look(self) -> None:
        """Tell what is new, without waiting for it."""
        if self.progress is None:
            return
        if self.asked is not None and self.ray.wait([self.asked], timeout=0)[0]:
            with suppress(self.ray.exceptions.RayError):
                self._tell(min(self.ray.get(self.asked), self.total))
            self.asked = None
        if self.asked is None:
            self.asked = self.tally.told.remote()

    def end(self) -> None:
        """Tell that all is done."""
        self._tell(self.total)

    def _tell(self, done: int) -> None:
        if self.progress is not None and done > self.last:
            self.last = done
            self.progress(done, self.total)


@define
class OnRay:
    """The process that leads: it makes the stage, has the tasks run, and commits. `threads` of each task."""

    ray: Any
    order: Order
    threads: int
    leads: bool = field(default=True, init=False)

    def every(self, call: Callable[[], T]) -> T:
        """As in `Crew`."""
        return call()

    def lead(self, call: Callable[[], str]) -> str:
        """As in `Crew`."""
        return call()

    def check(self, work: Work) -> None:
        """As in `Crew`; the tasks check, for it takes as long as they do."""

    def carry_out(self, work: Work, stage: Path, durable: bool, progress: Progress | None) -> list[Done]:
        """As in `Crew`. The first error of a task ends the others."""
        ray = self.ray
        at_a_time = max(1, int(ray.cluster_resources().get("CPU", 1)) // self.threads)
        owners = deal(work.laid, at_a_time * _TASKS)
        errand = ray.put(
            _Errand(
                uuid4().hex, self.order, Path.cwd(), catalog.added(), encoding.encoding_codecs(), work.digest(),
                owners, stage, self.threads, durable,
            )
        )  # fmt: skip
        tally = None if progress is None else ray.remote(Tally).options(num_cpus=0).remote()
        task = ray.remote(run_task).options(num_cpus=self.threads, name="registry.convert")
        pending = [task.remote(errand, i, tally) for i in sorted(set(owners))]
        found: list[Done] = []
        told = _Told(ray, tally, progress, work.nbytes)
        try:
            while pending:
                ready, pending = ray.wait(pending, timeout=_LOOK)
                found += [self._result(ref) for ref in ready]
                told.look()
        finally:
            self._end(pending)
            if tally is not None:
                ray.kill(tally)
        check_there(work, stage)
        told.end()
        return found

    def _result(self, ref: Any) -> Done:
        errors = self.ray.exceptions
        try:
            found: Done = self.ray.get(ref)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RegistryError | OSError):
                raise cause from None
            if isinstance(cause, ImportError):
                raise RegistryError(
                    "a worker cannot run this library", expected="it, and what it needs, on every machine", found=cause,
                    hint="install the same release of checkpoint-registry[ray] on all of them",
                ) from error  # fmt: skip
            raise
        except errors.RayError as error:
            raise RegistryError(
                "a part of the conversion has been lost, again and again", found=str(error).strip().splitlines()[0],
                expected="a worker that lives until its task is done",
                hint="see Ray's logs; RAY_TASK_MAX_RETRIES says how often a task is tried again",
            ) from error  # fmt: skip
        return found

    def _end(self, pending: list[Any]) -> None:
        """Kill what is left, and wait until nobody writes any more: the stage is removed next."""
        for ref in pending:
            self.ray.cancel(ref, force=True)
        if pending:
            self.ray.wait(pending, num_returns=len(pending), timeout=_ENDED)


@contextmanager
def on_ray(order: Order, threads: int | None) -> Iterator[Crew]:
    """The cluster that this process is connected to, that RAY_ADDRESS names, or that runs here; else one of its own.

    Raises ArgumentError without Ray, and RegistryError where the cluster cannot be reached.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise ArgumentError(
            "engine ray needs Ray", expected="Ray 2.9 or later, on all machines", found=error,
            hint="pip install 'checkpoint-registry[ray]'",
        ) from None  # fmt: skip
    began = not ray.is_initialized()
    if began:
        if "RAY_ADDRESS" not in os.environ:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is converted here is nobody else's business
        try:
            ray.init(logging_level="ERROR", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RegistryError(
                "no Ray cluster can be reached", where=os.environ.get("RAY_ADDRESS"), found=error,
                hint="start one with `ray start --head`, and set RAY_ADDRESS if it runs elsewhere",
            ) from error  # fmt: skip
    try:
        yield OnRay(ray, order.anywhere(), threads or 1)
    finally:
        if began:
            ray.shutdown()
