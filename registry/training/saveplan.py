"""What each rank of a training run writes of a checkpoint: planned alike on all ranks, from what each says it holds."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from registry import catalog
from registry.errors import ArgumentError, MappingError
from registry.model import config_map
from registry.parallel import Parallel
from registry.places import PathLike
from registry.plain import packed
from registry.prepare import Prepared, fitted, prepare, request
from registry.problems import collapse
from registry.rankplan import Part, as_held, one_a_file, owners, part, shipped
from registry.source import understood
from registry.states import MASTER, is_state
from registry.storage import Laid, ObjectSlot, Opened, Rank, Request
from registry.training.announce import Announcement, Joined, joined
from registry.training.local import Key, Memory, OptimizerTensors, Shard
from registry.training.manager import RELEASE, Iteration, place
from registry.training.rankwise import pad_options, padded_axes, ranks_spec, widened

if TYPE_CHECKING:
    import torch

#: What is ours in the common state: Megatron's readers leave it alone.
OURS = "registry"
RANDOM = "rng_state"


@frozen(eq=False)
class Run:
    """The arguments of one save that say what is saved, and how; `args` and `common` are plain data."""

    goal: Path
    iteration: Iteration
    format: str
    names: str
    parallel: Parallel
    config: PathLike | Mapping[str, Any] | None
    args: dict[str, Any]
    architecture: str | None
    options: Mapping[str, Any]
    target: Parallel | None
    dtype: str | None
    common: dict[str, Any]


def arguments(args: Any, consumed_samples: int | None) -> dict[str, Any]:
    """The arguments of a run as plain data, without those that are not: enumerations and the like."""
    found: dict[str, Any] = {}
    for name, value in (dict(args) if isinstance(args, Mapping) else vars(args) if args is not None else {}).items():
        try:
            found[name] = packed(value)
        except ArgumentError:
            continue
    return found if consumed_samples is None else {**found, "consumed_train_samples": consumed_samples}


def common_state(state: OptimizerTensors | None, scheduler: Any, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """What lies beside the tensors, under Megatron's names."""
    common: dict[str, Any] = {OURS: {"extra": packed(dict(extra or {}))}, "num_floating_point_operations_so_far": 0}
    if scheduler is not None:
        state_dict = getattr(scheduler, "state_dict", None)
        common["opt_param_scheduler"] = packed(state_dict() if state_dict else scheduler, "scheduler")
    if state is None:
        return common
    groups = [packed(group, f"param_groups[{i}]") for i, group in enumerate(state.groups)]
    if state.members:  # Megatron's formats leave them out
        groups = [{**group, "params": names} for group, names in zip(groups, state.members, strict=True)]
    step = state.step
    if MASTER in state.tensors:  # the form of a distributed optimizer
        groups = [{**group, **({} if step is None else {"step": int(step)})} for group in groups]
        common["optimizer"] = {
            "optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"
        }  # fmt: skip
    else:
        import torch

        counted = step is None or any("step" in group for group in groups)
        inner = {} if counted else {"common_step": packed(torch.tensor(float(step or 0)))}
        common["optimizer"] = {"state": inner, "param_groups": groups}
    return common


@frozen(eq=False)
class Work:
    """All that one rank does of a save. `nested`: the format itself has a folder for each iteration."""

    opened: Opened
    holders: Sequence[int]
    ship: dict[int, dict[int, int]]
    part: Part
    laid: Laid
    nested: bool
    notes: tuple[str, ...]


def planned(said: Sequence[Announcement], run: Run, shards: Mapping[Key, Shard], me: int) -> Work:
    """The plan, which is the same on every rank, and this rank's part of it."""
    together, spec = joined(said, run.parallel), catalog.format_spec(run.format)
    holders = together.suppliers(spread=spec.boxes)
    prepared, options = _prepared(together, holders, run, shards, me)
    asked, _ = request(prepared, options, run.dtype)
    if spec.apart:
        laid = catalog.container(spec.container).lay_out(asked)
        slots, writer = list(asked.slots), [file % len(said) for file, _ in laid.places]
    else:
        asked, writer = _placed(asked, prepared, together, holders, run)
        payloads = _random(said, run.parallel, spec.ranked)
        beside = spec.rules_from != "format" and run.args  # where they are not the format's own config
        asked = evolve(
            asked, objects=[*asked.objects, *payloads], payloads=payloads,
            common={**run.common, "args": Namespace(**run.args)} if beside else run.common,
            iteration=None if run.iteration == RELEASE else run.iteration,
        )  # fmt: skip
        laid = catalog.container(spec.container).lay_out(asked)
        slots, writer = list(asked.slots), one_a_file(laid, writer)
    folder = f"{place(run.iteration)}/"
    nested = all(file.path.startswith(folder) for file in laid.files)
    if nested:  # what lies beside the folder is the tracker, which has its time
        laid = evolve(
            laid, files=[evolve(file, path=file.path.removeprefix(folder)) for file in laid.files],
            small={n.removeprefix(folder): small for n, small in laid.small.items() if n.startswith(folder)},
            copies={n.removeprefix(folder): path for n, path in laid.copies.items()}, home="",
        )  # fmt: skip
    ship = shipped(prepared.plan, holders, writer)
    own = part(prepared.plan, slots, laid, writer, me)
    return Work(prepared.source.opened, holders, ship, own, laid, nested, prepared.notes)


def _placed(
    asked: Request, prepared: Prepared, together: Joined, holders: Sequence[int], run: Run
) -> tuple[Request, list[int]]:
    """The request with each slot at a rank of its own process, and that process; and with the run's own arguments."""
    spec = prepared.spec
    writer, slots = [], []
    for slot, piece in zip(asked.slots, owners(prepared.plan, together.pieces, asked.slots), strict=True):
        rank = slot.rank if spec.ranked or piece < 0 else together.pieces[piece].rank or Rank()
        rank = rank if rank._replace(vpp=0) in together.writers else Rank()
        writer.append(together.writers[rank._replace(vpp=0)])
        if spec.boxes and piece >= 0:  # every process has a file of its own
            writer[-1] = holders[piece]
            rank = Rank(tp=writer[-1])
        slots.append(slot._replace(rank=rank._replace(vpp=slot.rank.vpp)))
    document = _document(asked.document, prepared, run) if spec.rules_from == "format" else asked.document
    return evolve(asked, slots=slots, document=document), writer


def _prepared(
    together: Joined, holders: Sequence[int], run: Run, shards: Mapping[Key, Shard], me: int
) -> tuple[Prepared, dict[str, Any]]:
    """The shards of all ranks bound as a source, and the target planned."""
    kinds = sorted({piece.name.split(".")[1] for piece in together.pieces if is_state(piece.name)})
    spec, target = ranks_spec(run.names, kinds, run.parallel), catalog.format_spec(run.format)
    if unknown := [kind for kind in kinds if kind not in target.states]:
        raise ArgumentError(
            f"{target.name} has no place for this optimizer's state", found=", ".join(unknown),
            expected=", ".join(target.states) or "no optimizer state",
            hint="save to a format that has one, or without optimizer=",
        )  # fmt: skip
    layout, _ = fitted(spec, run.parallel)
    files = [
        Memory(run.goal, _held(shards, piece.rank, piece.name) if holder == me else None)
        for piece, holder in zip(together.pieces, holders, strict=True)
    ]
    document = run.args if run.config is None else {}  # the config says more than arguments do
    pieces = together.pieces if spec.ranked else [piece._replace(rank=None) for piece in together.pieces]
    opened = Opened(
        run.goal, spec.name, files, pieces, document, parallel=layout
    )  # fmt: skip
    try:
        source = understood(opened, spec, config=run.config, architecture=run.architecture, states=bool(kinds))
    except MappingError as error:
        raise MappingError(
            "the model is not what its config says, in these names", expected=f"a model in {spec.name}'s names",
            found=error.problem, details=error.details,
            hint=f"check names={run.names!r}, which says whose names the shards have, config=, parallel= and rank=",
        ) from error  # fmt: skip
    kept = padded_axes(target, source.architecture)
    source = widened(source, {axis: n for axis, n in source.bound.padded.items() if axis in kept})
    found, has = source.bound.variants, target.options
    options: dict[str, Any] = {k: v for k, v in found.items() if k in has and v in has[k].choices}
    options |= pad_options(target, source.architecture, source.bound.padded, run.parallel)
    options |= run.options
    prepared = prepare(source, run.format, parallel=run.target or run.parallel, options=options, dtype=run.dtype)
    if made := prepared.source.opened.pieces[len(together.pieces) :]:
        raise ArgumentError(
            "this export computes tensors of others, of which each process has a part only",
            found=", ".join(collapse(sorted({piece.name for piece in made}), 4)),
            hint="save a training checkpoint, and convert that",
        )  # fmt: skip
    alike = target.boxes and spec.rules_from == target.rules_from == "architecture"
    if alike or (run.format == run.names and target.ranked):
        prepared = as_held(prepared, together.pieces)
    return prepared, options


def _held(shards: Mapping[Key, Shard], rank: Rank | None, name: str) -> torch.Tensor:
    """The memory of a tensor of this process, in rows on the CPU."""
    return shards[Key((rank or Rank()).vpp, name)].tensor.cpu().contiguous()


def _document(written: Mapping[str, Any], prepared: Prepared, run: Run) -> dict[str, Any]:
    """The run's own arguments, but for those that say what the model and the layout are."""
    fields = config_map(prepared.spec, prepared.source.architecture)
    ours = {path for name in fields.facts for path in fields.paths(name)} | fields.write.keys()
    own = {name: value for name, value in run.args.items() if name not in ours or name not in written}
    return {**written, **own}


def _random(said: Sequence[Announcement], parallel: Parallel, ranked: bool) -> dict[ObjectSlot, Any]:
    """The random states of each pipeline and tensor rank: a list of those of its data-parallel ranks."""
    found: dict[ObjectSlot, Any] = {}
    if said[0].random is None:
        return found
    for one in said:
        own = [other.random for other in said if (other.rank.tp, other.rank.pp) == (one.rank.tp, one.rank.pp)]
        if ranked:
            found[ObjectSlot(RANDOM, one.rank)] = own
        else:
            at = Rank(one.rank.tp, one.rank.pp)
            found[ObjectSlot(RANDOM, at, (at.pp, at.tp), (parallel.pp, parallel.tp))] = own
    return found
