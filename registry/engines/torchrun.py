"""Conversions on the ranks that torchrun has started: each takes its share of the files, and the first one commits."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from attrs import define, frozen

from registry.engines.work import SHARED, Crew, Done, Work, carry_out, check_there, deal
from registry.errors import ArgumentError, CheckpointError, RegistryError, TargetError
from registry.execute import Progress, default_threads
from registry.training.ranks import Team

T = TypeVar("T")

#: Seconds between two looks at what the others have done.
_LOOK = 0.2
#: One rank may have to wait as long for another as that writes. Those that die are noticed by their connections.
_PATIENCE = timedelta(days=30)
_runs = itertools.count()


class _Stopped(Exception):
    """Another rank has failed."""


@define(eq=False)
class _Board:
    """What the ranks tell each other while they write: bytes done, and that one has failed."""

    store: Any
    said: int = 0
    due: float = 0.0
    broken: Exception | None = None

    def __call__(self, done: int, total: int) -> None:
        """A rank's progress. Raises _Stopped where another has failed."""
        now = time.monotonic()
        if now >= self.due or done == total:
            self.due = now + _LOOK
            self.store.add("done", done - self.said)
            self.said = done
            if self.store.check(["failed"]):
                raise _Stopped

    def fail(self) -> None:
        """Tell the others."""
        with suppress(RuntimeError):  # the store is gone: so are they
            self.store.set("failed", "1")

    @contextmanager
    def shown(self, progress: Progress | None, total: int) -> Iterator[None]:
        """Tell `progress` what all ranks have done, as long as the block lasts. What it raises stops them."""
        if progress is None:
            yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._show, args=(progress, total, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _show(self, progress: Progress, total: int, over: threading.Event) -> None:
        last = -1
        while not over.wait(_LOOK):
            try:
                done = min(self.store.add("done", 0), total)
            except RuntimeError:
                return  # the store is gone, which the next step finds too
            if done > last:
                try:
                    progress(done, total)
                except Exception as error:
                    self.broken = error
                    self.fail()
                    return
                last = done


@frozen
class Torchrun:
    """This rank and the others."""

    team: Team
    threads: int
    board: _Board

    @property
    def leads(self) -> bool:
        """As in `Crew`."""
        return self.team.rank == 0

    def every(self, call: Callable[[], T]) -> T:
        """As in `Crew`."""
        own: list[T] = []
        self.team.together(lambda: own.append(call()))
        return own[0]

    def lead(self, call: Callable[[], str]) -> str:
        """As in `Crew`."""
        return self.team.together(lambda: call() if self.leads else "")[0]

    def check(self, work: Work) -> None:
        """As in `Crew`."""
        work.check(self.threads, self.team.rank, self.team.size)

    def carry_out(self, work: Work, stage: Path, durable: bool, progress: Progress | None) -> list[Done]:
        """As in `Crew`. Raises CheckpointError where the ranks have not planned the same."""
        if len(set(self.team.gather(work.digest()))) > 1:
            raise CheckpointError(
                "the ranks do not plan the same", where=work.prepared.source.opened.path, found="different plans",
                expected="the same source, arguments and release of this library on every rank", hint=SHARED,
            )  # fmt: skip

        def own() -> Done | None:
            try:
                if not stage.is_dir():
                    raise TargetError(
                        "this rank does not see the target", where=stage, expected="what the first rank has begun",
                        found="nothing", hint=SHARED,
                    )  # fmt: skip
                mine = work.share(deal(work.laid, self.team.size), self.team.rank, self.team.size)
                return carry_out(work, mine, stage, threads=self.threads, durable=durable, progress=self.board)
            except _Stopped:
                return None  # whoever failed says why
            except BaseException:
                self.board.fail()
                raise

        with self.board.shown(progress if self.leads else None, work.nbytes):
            found = self.team.together(own)

        def end() -> str:
            if self.board.broken is not None:
                raise self.board.broken
            check_there(work, stage)
            if progress is not None:
                progress(work.nbytes, work.nbytes)
            return ""

        self.lead(end)
        return [done for done in found if done is not None]


@contextmanager
def on_torchrun(threads: int | None) -> Iterator[Crew]:
    """The ranks of this run. Raises ArgumentError outside one."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
    from torch.distributed.rendezvous import rendezvous

    run, group = f"registry/{next(_runs)}", None
    began = not dist.is_initialized()
    if began:
        if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ArgumentError(
                "engine torchrun needs processes that torchrun has started", expected="its environment variables",
                found=f"no {', '.join(missing)}",
                hint="torchrun --nproc-per-node 2 -m registry convert SRC DST --to FORMAT --engine torchrun",
            )  # fmt: skip
        # In keys of their own: what a group before has left in the store would lead the next one astray.
        store, rank, size = next(rendezvous("env://"))
        store = PrefixStore(run, store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    else:
        store = PrefixStore(run, _get_default_store())
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    team = Team(group, dist.get_rank(), dist.get_world_size())
    try:
        yield Torchrun(team, threads or max(1, default_threads() // local), _Board(store))
    except Exception:
        _settle(team)
        raise
    else:
        _settle(team)
    finally:
        dist.destroy_process_group(group)


def _settle(team: Team) -> None:
    """Wait for the others: the first rank that ends with an error has torchrun end the rest, and the one that leads may
    still be putting away what it had begun.
    """
    with suppress(RegistryError):
        team.gather(None)
