"""What the ranks of a training run say that they hold, put together: one source of which each rank has a part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from attrs import frozen

from registry.errors import ArgumentError
from registry.parallel import Parallel
from registry.plain import packed
from registry.problems import collapse
from registry.storage import Piece, Rank, slot_bytes
from registry.training.local import Key, OptimizerTensors, Shard, stored_name
from registry.training.ranks import check_ranks

if TYPE_CHECKING:
    import torch


class Entry(NamedTuple):
    """A tensor, or a box of one, that a rank holds."""

    chunk: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: tuple[int, ...] | None
    whole: tuple[int, ...] | None


@frozen
class Announcement:
    """All that the others need to know of one rank. `agreed` are (what, value) that must be the same everywhere."""

    agreed: tuple[tuple[str, Any], ...]
    rank: Rank
    entries: tuple[Entry, ...]
    groups: tuple[dict[str, Any], ...]
    step: float | None
    random: Any


def announcement(
    agreed: Sequence[tuple[str, Any]], rank: Rank, shards: Mapping[Key, Shard], state: OptimizerTensors,
    random: Any,
) -> Announcement:  # fmt: skip
    """What this rank holds: `shards` by the names that they have beside each other."""
    entries = tuple(
        Entry(key.chunk, key.name, part.dtype, tuple(part.tensor.shape), part.origin, part.whole)
        for key, part in shards.items()
    )
    groups = tuple(packed(group, f"param_groups[{i}]") for i, group in enumerate(state.groups))
    return Announcement(tuple(agreed), rank, entries, groups, state.step, packed(random, "random states"))


def named(weights: Mapping[Key, torch.Tensor], state: OptimizerTensors) -> dict[Key, torch.Tensor]:
    """Weights and optimizer state under one kind of names."""
    states = {
        Key(key.chunk, stored_name(kind, key.name)): tensor
        for kind, tensors in state.tensors.items()
        for key, tensor in tensors.items()
    }
    return {**weights, **states}


@frozen(eq=False)
class Joined:
    """All ranks' tensors: piece i is held by the processes `held[i]`; `writers` is the first process of each rank."""

    pieces: list[Piece]
    held: list[list[int]]
    writers: dict[Rank, int]
    step: float | None

    def suppliers(self, *, spread: bool) -> list[int]:
        """The process that each piece is taken from: the first that holds it, or such that all have as much to do."""
        if not spread:
            return [processes[0] for processes in self.held]
        found, load = [0] * len(self.pieces), [0] * (1 + max(map(max, self.held), default=0))
        sizes = [slot_bytes(piece) for piece in self.pieces]
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            found[i] = min(self.held[i], key=load.__getitem__)
            load[found[i]] += sizes[i]
        return found


def joined(said: Sequence[Announcement], parallel: Parallel) -> Joined:
    """Every tensor once. Raises ArgumentError where the ranks disagree, or do not hold the whole layout."""
    _check(said)
    check_ranks(parallel, [one.rank for one in said])
    writers: dict[Rank, int] = {}
    first: dict[tuple[Rank, str, tuple[int, ...] | None], tuple[list[int], Entry]] = {}
    differ: list[str] = []
    for i, one in enumerate(said):
        writers.setdefault(one.rank, i)
        for entry in one.entries:
            key = one.rank._replace(vpp=entry.chunk), entry.name, entry.origin
            held, other = first.setdefault(key, ([], entry))
            held.append(i)
            if other != entry:
                differ.append(
                    f"{entry.name}: {other.dtype} {other.shape} on rank {held[0]}, {entry.dtype} {entry.shape} on {i}"
                )
    _check_replicas(said, differ)
    pieces = [
        Piece(e.name, e.dtype, e.shape, n, 0, rank, e.origin, e.whole)
        for n, ((rank, _, _), (_, e)) in enumerate(first.items())
    ]
    steps = {one.step for one in said if one.step is not None}
    return Joined(pieces, [held for held, _ in first.values()], writers, next(iter(steps), None))


def _check(said: Sequence[Announcement]) -> None:
    """What is one thing for the whole run."""
    for i, (what, value) in enumerate(said[0].agreed):
        _agree(what, [one.agreed[i][1] for one in said], value)
    _agree("the hyperparameters of the optimizer", [one.groups for one in said], said[0].groups)
    steps = [one.step for one in said if one.step is not None]
    _agree("the optimizer's step count", steps, steps[0] if steps else None)


def _agree(what: str, values: Sequence[Any], value: Any) -> None:
    if any(other != value for other in values):
        shown: dict[str, list[int]] = defaultdict(list)
        for i, other in enumerate(values):
            shown[str(other)].append(i)
        raise ArgumentError(
            f"the ranks disagree on {what}", expected="one value on all ranks",
            found="; ".join(f"{text[:200]} on rank {', '.join(map(str, ranks[:8]))}" for text, ranks in shown.items()),
            hint="every rank of a run saves and loads the same",
        )  # fmt: skip


def _check_replicas(said: Sequence[Announcement], differ: Sequence[str]) -> None:
    """Processes at the same place of the layout hold the same tensors."""
    names: dict[Rank, set[tuple[int, str]]] = {}
    problems = list(differ)
    for i, one in enumerate(said):
        own = {(e.chunk, e.name) for e in one.entries}
        odd = own ^ names.setdefault(one.rank, own)
        problems += [f"rank {i}: {line}, unlike its replica" for line in collapse(sorted(name for _, name in odd))]
    if problems:
        raise ArgumentError(
            "replicas hold different tensors", expected="the same names, types and shapes", found=f"{len(problems)}",
            details=problems[:24], hint="check parallel= and rank= of every process",
        )  # fmt: skip
