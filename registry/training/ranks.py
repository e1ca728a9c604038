"""The processes of a training run: what they tell each other, and who of them holds which shards.

An error on one rank is raised on all of them, so that none waits for another that has given up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from attrs import define, frozen

from registry import errors
from registry.errors import ArgumentError, RegistryError
from registry.parallel import Parallel
from registry.storage import Rank

T = TypeVar("T")


@frozen
class _Failure:
    """An error, as it travels to the other ranks."""

    kind: str
    problem: str
    where: str | None
    expected: str | None
    found: str | None
    hint: str | None
    details: tuple[str, ...]

    @staticmethod
    def of(error: Exception) -> _Failure:
        if isinstance(error, RegistryError):
            where, expected, found = (None if x is None else str(x) for x in (error.where, error.expected, error.found))
            kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
            return _Failure(kind, error.problem, where, expected, found, error.hint, error.details)
        return _Failure("RegistryError", f"{type(error).__name__}: {error}", None, None, None, None, ())

    def error(self, who: str) -> RegistryError:
        kind = getattr(errors, self.kind, RegistryError)
        made: RegistryError = kind(
            who + self.problem, where=self.where, expected=self.expected, found=self.found, hint=self.hint,
            details=self.details,
        )  # fmt: skip
        return made


@define
class Team:
    """The ranks that save or load together; one process without torch.distributed is a team too."""

    group: Any
    rank: int
    size: int

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks. Raises RegistryError where a rank is gone."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self.group)
        except RuntimeError as error:
            raise _gone(self.size, error) from error
        return found

    def collect(self, value: T, at: int) -> list[T] | None:
        """Every rank's value, on one rank alone."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.rank == at else None
        world = at if self.group is None else dist.get_global_rank(self.group, at)
        try:
            dist.gather_object(value, found, dst=world, group=self.group)
        except RuntimeError as error:
            raise _gone(self.size, error) from error
        return found

    def together(self, call: Callable[[], T]) -> list[T]:
        """Every rank's result of its own call. If any failed, all raise the same error."""
        if self.size == 1:
            return [call()]
        failure, result, cause = None, None, None
        try:
            result = call()
        except Exception as error:
            failure, cause = _Failure.of(error), error
        outcomes = self.gather((failure, result))
        failed = {i: found for i, (found, _) in enumerate(outcomes) if found is not None}
        if not failed:
            return [found for _, found in outcomes]  # type: ignore[misc]
        first, same = next(iter(failed.values())), len(set(failed.values())) == 1
        if same and len(failed) == self.size:
            who = ""
        else:
            who = f"rank{'s' if same and len(failed) > 1 else ''} {_listed(failed) if same else next(iter(failed))}: "
        raise first.error(who) from cause


def _gone(size: int, error: RuntimeError) -> RegistryError:
    return RegistryError(
        "a rank is gone", expected=f"{size} ranks", found=str(error).splitlines()[0][:300],
        hint="see the other ranks' logs; what was on disk before is untouched",
    )  # fmt: skip


def _listed(ranks: Any) -> str:
    shown = [str(i) for i in itertools.islice(ranks, 8)]
    return ", ".join(shown) + (", ..." if len(ranks) > len(shown) else "")


_gloo: dict[tuple[Any, bool], Any] = {}


def team(group: Any = None, *, apart: bool = False) -> Team:
    """The ranks of a process group (default: all). Objects travel over gloo, which needs no device.

    `apart`: over connections of their own, which a thread may use while the training uses the others.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return Team(None, 0, 1)
    if apart or (group is None and "gloo" not in dist.get_backend()):
        key = dist.group.WORLD if group is None else group, apart
        if key not in _gloo:
            ranks = None if group is None else dist.get_process_group_ranks(group)
            _gloo[key] = dist.new_group(ranks, backend="gloo", use_local_synchronization=group is not None)
        group = _gloo[key]
    return Team(group, dist.get_rank(group), dist.get_world_size(group))


def own_rank(parallel: Parallel, rank: int, size: int) -> Rank:
    """The shards of the process number `rank` of `size`, in Megatron's order: tp, cp, ep, dp, then pp.

    Raises ArgumentError for a number of processes that the layout does not divide.
    """
    etp = parallel.size("etp")
    dense, experts = parallel.tp * parallel.cp * parallel.pp, etp * parallel.ep * parallel.pp
    fixed = dense * parallel.dp if parallel.dp > 1 else None
    if size % dense or (parallel.ep > 1 and size % experts) or fixed not in (None, size):
        needed = f"{fixed}" if fixed else f"a multiple of {dense}" + (f" and {experts}" if parallel.ep > 1 else "")
        raise ArgumentError(
            "the number of processes does not match the layout", expected=f"{needed} processes for {parallel}",
            found=size, hint="start another number of processes, or give the layout that the model is built at",
        )  # fmt: skip
    stage = size // parallel.pp
    within = rank % stage
    return Rank(tp=within % parallel.tp, pp=rank // stage, ep=within // etp % parallel.ep)


def check_ranks(parallel: Parallel, held: Sequence[Rank]) -> None:
    """Every rank that holds weights of its own must be there. Raises ArgumentError."""
    every = {Rank(at["tp"], pp, at["ep"]) for at in parallel.expert_ranks() for pp in range(parallel.pp)}
    if set(held) != every:
        missing, strange = sorted(every - set(held)), sorted(set(held) - every)
        raise ArgumentError(
            "the processes do not hold the whole layout", expected=f"{len(every)} different ranks for {parallel}",
            found=f"{len(set(held))}",
            details=[f"nobody holds {_shown(r)}" for r in missing[:8]]
            + [f"no part of the layout: {_shown(r)}" for r in strange[:8]],
            hint="check parallel= and rank= of every process",
        )  # fmt: skip
    times = {rank: held.count(rank) for rank in every}
    if len(set(times.values())) > 1:
        raise ArgumentError(
            "some shards have more replicas than others", expected=f"as many processes for each rank of {parallel}",
            found="; ".join(f"{n} for {_shown(rank)}" for rank, n in sorted(times.items())[:8]),
            hint="check parallel= and rank= of every process",
        )  # fmt: skip


def _shown(rank: Rank) -> str:
    return f"tp {rank.tp}, pp {rank.pp}, ep {rank.ep}"
