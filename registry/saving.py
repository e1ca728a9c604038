"""save(): every rank of a training run writes the boxes that it owns, and all of them appear at once or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from registry import catalog, local, rng
from registry.announce import Announcement, Joined, announcement, joined, named
from registry.commit import staged, sync_directory, write_small
from registry.dtypes import dtype_name
from registry.errors import ArgumentError, TargetError
from registry.execute import execute
from registry.local import Memory, OptimizerTensors
from registry.model import config_map
from registry.parallel import Parallel
from registry.plain import packed, unpacked
from registry.prepare import Prepared, fitted, prepare, request
from registry.problems import collapse
from registry.rankplan import Part, identity, owners, part, shipped
from registry.ranks import Team, own_rank, team
from registry.rankwise import pad_options, ranks_spec, widened
from registry.source import PathLike, local_path, understood
from registry.states import MASTER, is_state
from registry.storage import Laid, ObjectSlot, Opened, Rank, Request, Slot, small_bytes

if TYPE_CHECKING:
    import torch

#: What is ours in the common state: Megatron's readers leave it alone.
OURS = "registry"
RANDOM = "rng_state"


@frozen
class Saved:
    """What a save wrote: `nbytes` by this rank, in `seconds`."""

    path: str
    iteration: int
    format: str
    nbytes: int
    seconds: float
    notes: tuple[str, ...] = field(default=())


@frozen(eq=False)
class _Run:
    """The arguments of one save that say what is saved, and how."""

    goal: Path
    iteration: int
    format: str
    names: str
    parallel: Parallel
    config: PathLike | Mapping[str, Any] | None
    args: Any
    architecture: str | None
    options: Mapping[str, Any]
    target: Parallel | None
    dtype: str | None
    common: dict[str, Any]
    consumed_samples: int | None


def save(
    path: PathLike,
    *,
    model: Any,
    iteration: int,
    optimizer: Any = None,
    scheduler: Any = None,
    parallel: Parallel | None = None,
    rank: Rank | None = None,
    format: str = "megatron",
    names: str = "megatron-legacy",
    config: PathLike | Mapping[str, Any] | None = None,
    args: Any = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    target: Parallel | None = None,
    dtype: str | torch.dtype | None = None,
    random_states: bool = True,
    trackers: rng.Trackers = None,
    consumed_samples: int | None = None,
    extra: Mapping[str, Any] | None = None,
    group: Any = None,
    overwrite: bool = False,
    durable: bool = True,
    threads: int | None = None,
) -> Saved:
    """Save a training run as iteration `iteration` below `path`. Every rank calls it with its own shards.

    model: a module or a state dict of local shards, or a list of them, one for each virtual pipeline stage.
    optimizer: a torch optimizer, or {"state": {name: {"exp_avg": ...}}, "param_groups": [...]}.
    scheduler: an object with state_dict(), or plain data. extra: plain data, rank 0's.
    parallel, rank: the layout, and this rank's place in it (default: Megatron's order of ranks).
    names: the format whose names the shards have. config, args, architecture: what says the model's sizes.
    target, dtype: the layout and type that are written, in a format that is no training checkpoint but made for others
    to read, a file a rank (TensorRT-LLM). Its files are dealt out to the processes, and each is sent what it writes.
    trackers: random generators by name, or an object with get_states().
    group: the process group of all ranks of the run (default: all processes).

    Raises RegistryError on every rank if anything is wrong on any of them; what was there before is then untouched.
    """
    start = time.perf_counter()
    everyone = team(group)
    mine: list[tuple[dict[local.Key, torch.Tensor], _Run]] = []

    def announce() -> Announcement:
        if type(iteration) is not int or iteration < 0:
            raise ArgumentError("iteration is a whole number of at least 0", found=repr(iteration))
        layout = parallel or Parallel()
        weights = local.model_tensors(model)
        state = local.optimizer_tensors(optimizer, weights) if optimizer is not None else OptimizerTensors()
        here = rank or own_rank(layout, everyone.rank, everyone.size)
        common = _common(state if optimizer is not None else None, scheduler, extra)
        goal = Path(os.path.realpath(local_path(path)))
        run = _Run(
            goal, iteration, format, names, layout, config, args, architecture, dict(options or {}), target,
            None if dtype is None else dtype_name(dtype), common, consumed_samples,
        )  # fmt: skip
        if not catalog.format_spec(format).apart and (target, dtype) != (None, None):
            raise ArgumentError(
                f"{format} is written as it is, in the layout and type of the run", found="target= or dtype=",
                hint="leave them out, and convert what was saved",
            )  # fmt: skip
        tensors = named(weights, state)
        mine.append((tensors, run))
        agreed = [
            ("the path", str(goal)), ("the iteration", iteration), ("the format", format), ("the layout", layout),
            ("the names", names), ("overwrite", overwrite), ("the target's layout", target), ("dtype", run.dtype),
        ]  # fmt: skip
        return announcement(agreed, here, tensors, state, rng.states(trackers) if random_states else None)

    said = everyone.together(announce)
    tensors, run = mine[0]
    work: list[_Work] = []
    everyone.together(lambda: work.append(_planned(said, run, tensors, everyone.rank)))
    _exchange(work[0], everyone)
    return _write(work[0], run, everyone, overwrite, durable, threads, start)


def _common(state: OptimizerTensors | None, scheduler: Any, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """What lies beside the tensors, under Megatron's names."""
    common: dict[str, Any] = {OURS: {"extra": packed(dict(extra or {}))}, "num_floating_point_operations_so_far": 0}
    if scheduler is not None:
        state_dict = getattr(scheduler, "state_dict", None)
        common["opt_param_scheduler"] = packed(state_dict() if state_dict else scheduler, "scheduler")
    if state is None:
        return common
    groups = [packed(group, f"param_groups[{i}]") for i, group in enumerate(state.groups)]
    step = state.step
    if MASTER in state.tensors:  # the form of a distributed optimizer
        groups = [{**group, **({} if step is None else {"step": int(step)})} for group in groups]
        common["optimizer"] = {
            "optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"
        }  # fmt: skip
    else:
        import torch

        inner = {} if step is None else {"common_step": packed(torch.tensor(float(step)))}
        common["optimizer"] = {"state": inner, "param_groups": groups}
    return common


@frozen(eq=False)
class _Work:
    """All that one rank does of a save."""

    opened: Opened
    holders: Sequence[int]
    ship: dict[int, dict[int, int]]
    part: Part
    laid: Laid
    place: str
    notes: tuple[str, ...]


def _planned(said: Sequence[Announcement], run: _Run, tensors: Mapping[local.Key, torch.Tensor], me: int) -> _Work:
    """The plan, which is the same on every rank, and this rank's part of it."""
    together = joined(said, run.parallel)
    prepared, options = _prepared(together, run, tensors, me)
    if prepared.spec.apart:
        return _exported(together, prepared, request(prepared, options, run.dtype)[0], me, len(said))
    asked, _ = request(prepared, options, None)
    asked = evolve(asked, document=_document(asked.document, prepared, run))
    first = owners(prepared.plan, together.pieces, asked.slots)
    writer, slots = [], []
    for slot, piece in zip(asked.slots, first, strict=True):
        rank = (together.pieces[piece].rank or Rank()) if piece >= 0 else slot.rank
        rank = rank if rank._replace(vpp=0) in together.writers else Rank()
        writer.append(together.writers[rank._replace(vpp=0)])
        slots.append(slot._replace(rank=rank._replace(vpp=slot.rank.vpp)))
    payloads = _random(said, run.parallel, prepared.spec.ranked)
    asked = evolve(
        asked, slots=slots, objects=[*asked.objects, *payloads], payloads=payloads, common=run.common,
        iteration=run.iteration,
    )  # fmt: skip
    laid = catalog.container(prepared.spec.container).lay_out(asked)
    place = laid.files[0].path.split("/")[0]
    inner = [evolve(file, path=file.path.removeprefix(f"{place}/")) for file in laid.files]
    ship = shipped(prepared.plan, together.holders, writer)
    own = part(prepared.plan, slots, evolve(laid, files=inner), writer, me)
    return _Work(prepared.source.opened, together.holders, ship, own, laid, place, prepared.notes)


def _exported(together: Joined, prepared: Prepared, asked: Request, me: int, processes: int) -> _Work:
    """The work where files are dealt out to the processes one by one."""
    if made := prepared.source.opened.pieces[len(together.pieces) :]:
        raise ArgumentError(
            "this export computes tensors of others, of which each process has a part only",
            found=", ".join(collapse(sorted({piece.name for piece in made}), 4)),
            hint="save a training checkpoint, and convert that",
        )  # fmt: skip
    laid = catalog.container(prepared.spec.container).lay_out(asked)
    writer = [file % processes for file, _ in laid.places]
    ship = shipped(prepared.plan, together.holders, writer)
    own = part(prepared.plan, asked.slots, laid, writer, me)
    return _Work(prepared.source.opened, together.holders, ship, own, laid, "", prepared.notes)


def _prepared(
    together: Joined, run: _Run, tensors: Mapping[local.Key, torch.Tensor], me: int
) -> tuple[Prepared, dict[str, Any]]:
    """The shards of all ranks bound as a source, and the target planned."""
    kinds = sorted({piece.name.split(".")[1] for piece in together.pieces if is_state(piece.name)})
    spec, target = ranks_spec(run.names, kinds), catalog.format_spec(run.format)
    if unknown := [kind for kind in kinds if kind not in target.states]:
        raise ArgumentError(
            f"{target.name} has no place for this optimizer's state", found=", ".join(unknown),
            expected=", ".join(target.states) or "no optimizer state",
            hint="save to a format that has one, or without optimizer=",
        )  # fmt: skip
    layout, _ = fitted(spec, run.parallel)
    files = [
        Memory(run.goal, _held(tensors, piece.rank, piece.name) if holder == me else None)
        for piece, holder in zip(together.pieces, together.holders, strict=True)
    ]
    document = _arguments(run.args) if run.config is None else {}  # the config says more than arguments do
    opened = Opened(
        run.goal, spec.name, files, together.pieces, document, parallel=layout, iteration=run.iteration
    )  # fmt: skip
    source = understood(
        opened, spec, config=run.config, architecture=run.architecture, states=bool(kinds)
    )  # fmt: skip
    if not target.apart:
        source = widened(source, source.bound.padded)
    found, has = source.bound.variants, target.options
    options: dict[str, Any] = {k: v for k, v in found.items() if k in has and v in has[k].choices}
    options |= pad_options(target, source.architecture, source.bound.padded, run.parallel)
    options |= run.options
    prepared = prepare(source, run.format, parallel=run.target or run.parallel, options=options, dtype=run.dtype)
    if target.ranked and not target.apart:
        slots = [Slot(p.name, p.dtype, p.shape, p.rank or Rank()) for p in together.pieces]
        prepared = evolve(prepared, plan=identity(together.pieces), target=evolve(prepared.target, slots=slots))
    return prepared, options


def _held(tensors: Mapping[local.Key, torch.Tensor], rank: Rank | None, name: str) -> torch.Tensor:
    """The memory of a tensor of this process, in rows on the CPU."""
    return local.shard(tensors[local.Key((rank or Rank()).vpp, name)]).tensor.cpu().contiguous()


def _document(written: Mapping[str, Any], prepared: Prepared, run: _Run) -> dict[str, Any]:
    """The run's own arguments, but for those that say what the model and the layout are."""
    fields = config_map(prepared.spec, prepared.source.architecture)
    ours = {path for name in fields.facts for path in fields.paths(name)} | fields.write.keys()
    own = {name: value for name, value in _arguments(run.args).items() if name not in ours or name not in written}
    consumed = {} if run.consumed_samples is None else {"consumed_train_samples": run.consumed_samples}
    return {**written, **own, **consumed}


def _arguments(args: Any) -> dict[str, Any]:
    """The arguments of a run as plain data, without those that are not: enumerations and the like."""
    found: dict[str, Any] = {}
    for name, value in (dict(args) if isinstance(args, Mapping) else vars(args) if args is not None else {}).items():
        try:
            found[name] = packed(value)
        except ArgumentError:
            continue
    return found


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


def _exchange(work: _Work, everyone: Team) -> None:
    """Send what one process writes and another holds: boxes that the ranks cut otherwise than the format."""
    files: list[Any] = list(work.opened.files)
    for writer in sorted(work.ship):
        wanted = work.ship[writer]
        sent = {i: packed(files[i].tensor) for i, holder in wanted.items() if holder == everyone.rank}
        got = everyone.collect(sent, writer)
        for part_of in got or ():
            for i, data in part_of.items():
                files[i] = Memory(work.opened.path, unpacked(data))
    work.opened.files = files


def _write(
    work: _Work, run: _Run, everyone: Team, overwrite: bool, durable: bool, threads: int | None, start: float
) -> Saved:
    """Write into a hidden directory, all ranks at once, and make it visible when all are done."""
    goal = run.goal / work.place
    prefix = f"{work.place}/" if work.place else ""
    inside = {name.removeprefix(prefix): small for name, small in work.laid.small.items() if name.startswith(prefix)}
    after = {name: small for name, small in work.laid.small.items() if not name.startswith(prefix)}
    copies = {name.removeprefix(prefix): path for name, path in work.laid.copies.items()}
    with ExitStack() as stack:

        def begin() -> str | None:
            if everyone.rank:
                return None
            if goal.is_dir() and any(goal.iterdir()) and not overwrite:
                raise TargetError(
                    "this iteration has been saved already", where=goal, expected="nothing there yet",
                    found="a checkpoint", hint="give overwrite=True to replace it",
                )  # fmt: skip
            needed = sum(file.size for file in work.laid.files)
            stage = stack.enter_context(staged(goal, needed=needed, durable=durable))
            write_small(stage, inside, copies, durable=durable)
            return str(stage)

        stage = Path(str(everyone.together(begin)[0]))
        part = work.part
        everyone.together(
            lambda: execute(
                part.plan, work.opened, part.laid, part.slots, stage, threads=threads, durable=durable
            )
        )  # fmt: skip
        everyone.together(stack.close)
    everyone.together(lambda: _publish(run.goal, after, durable) if not everyone.rank else None)
    return Saved(str(goal), run.iteration, run.format, part.nbytes, time.perf_counter() - start, work.notes)


def _publish(root: Path, files: Mapping[str, Any], durable: bool) -> None:
    """Replace the files that say which checkpoint is the latest, now that it is whole."""
    for name, content in files.items():
        fresh = root / f".{name}.partial"
        with fresh.open("wb") as file:
            file.write(small_bytes(content))
            file.flush()
            if durable:
                os.fsync(file.fileno())
        fresh.replace(root / name)
    if durable:
        sync_directory(root)
