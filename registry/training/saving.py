"""save(): every rank of a training run writes the boxes that it owns, and all of them appear at once or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from registry import catalog, manifest
from registry.commit import failed, staged, write_small
from registry.dtypes import dtype_name
from registry.errors import ArgumentError, TargetError
from registry.execute import execute
from registry.parallel import Parallel
from registry.places import PathLike, local_path
from registry.plain import packed, unpacked
from registry.storage import Rank
from registry.training import background as beside
from registry.training import local, rng
from registry.training.announce import Announcement, announcement, named
from registry.training.background import Task
from registry.training.local import Key, Memory, OptimizerTensors, Shard
from registry.training.manager import RELEASE, Checkpoints, place, valid
from registry.training.ranks import Team, own_rank, team
from registry.training.retention import Pruned, Retention
from registry.training.saveplan import Run, Work, arguments, common_state, planned

if TYPE_CHECKING:
    import torch


@define
class Saved:
    """What a save wrote: `nbytes` by this rank, in `seconds`; for `blocked` of them the training waited.

    `removed` are the iterations that retention removed. Of a save in the background the rest is known when it is done.
    """

    path: str
    iteration: int | None
    format: str
    nbytes: int = 0
    seconds: float = 0.0
    blocked: float = 0.0
    removed: tuple[int | str, ...] = ()
    notes: tuple[str, ...] = ()
    _task: Task | None = field(default=None, repr=False, eq=False)

    @property
    def done(self) -> bool:
        """Is everything on disk, or has it failed?"""
        return self._task is None or self._task.done

    def wait(self) -> Saved:
        """Wait until everything is on disk. Raises what went wrong, on every rank."""
        if self._task is not None:
            self._task.wait()
        return self


@frozen(eq=False)
class _Own:
    """What this rank holds, and what it tells the others of it."""

    run: Run
    shards: Mapping[Key, Shard]
    said: Announcement


@frozen
class _How:
    """The arguments of one save that say how it is written."""

    overwrite: bool
    durable: bool
    threads: int | None
    retention: Retention | None


def save(
    path: PathLike,
    *,
    model: Any,
    iteration: int | None = None,
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
    retention: Retention | None = None,
    background: bool = False,
    group: Any = None,
    overwrite: bool = False,
    durable: bool = True,
    threads: int | None = None,
) -> Saved:
    """Save a training run as iteration `iteration` below `path`. Every rank calls it with its own shards.

    Without an iteration it is a release in Megatron's formats; in others, what is saved is at `path` itself.
    model: a module or a state dict of local shards, or a list of them, one for each virtual pipeline stage.
    optimizer: a torch optimizer, or {"state": {name: {"exp_avg": ...}}, "param_groups": [...]}.
    scheduler: an object with state_dict(), or plain data. extra: plain data, rank 0's.
    parallel, rank: the layout, and this rank's place in it (default: Megatron's order of ranks).
    names: the format whose names the shards have. config, args, architecture: what says the model's sizes.
    target, dtype: the layout and type that are written, in a format that is no training checkpoint but made for others
    to read, a file a rank (TensorRT-LLM). Its files are dealt out to the processes, and each is sent what it writes.
    trackers: random generators by name, or an object with get_states().
    retention: which older iterations go away afterwards.
    background: return when everything is copied to host memory, and write the copy beside the training. What goes wrong
    then is raised by the next save or load, or by `wait()` of what is returned. There is one save at a time: the next
    one waits. The copy's memory is kept for it.
    group: the process group of all ranks of the run (default: all processes).

    Raises RegistryError on every rank if anything is wrong on any of them; what was there before is then untouched.
    """
    start = time.perf_counter()
    beside.finish()
    everyone = team(group, apart=background)

    def prepare() -> _Own:
        goal = Path(os.path.realpath(local_path(path)))
        layout = parallel or Parallel()
        weights = local.model_tensors(model)
        state = local.optimizer_tensors(optimizer, weights) if optimizer is not None else OptimizerTensors()
        run = Run(
            goal, RELEASE if iteration is None else valid(iteration), format, names, layout, config,
            arguments(args, consumed_samples), architecture, dict(options or {}), target,
            None if dtype is None else dtype_name(dtype),
            common_state(state if optimizer is not None else None, scheduler, extra),
        )  # fmt: skip
        if not catalog.format_spec(format).apart and (target, dtype) != (None, None):
            raise ArgumentError(
                f"{format} is written as it is, in the layout and type of the run", found="target= or dtype=",
                hint="leave them out, and convert what was saved",
            )  # fmt: skip
        agreed = [
            ("the path", str(goal)), ("the iteration", run.iteration), ("the format", format), ("the layout", layout),
            ("the names", names), ("overwrite", overwrite), ("the target's layout", target), ("dtype", run.dtype),
        ]  # fmt: skip
        shards = {key: local.shard(tensor) for key, tensor in named(weights, state).items()}
        here = rank or own_rank(layout, everyone.rank, everyone.size)
        random = rng.states(trackers) if random_states else None
        said = announcement(agreed, here, shards, state, random)
        return _Own(run, beside.copied(shards) if background else shards, said)

    own = beside.now(prepare)  # an error here too is the others' affair: they wait for this rank
    if everyone.size == 1:
        own()
    saved = Saved(str(path), iteration, format)
    how = _How(overwrite, durable, threads, retention)
    if background:
        saved._task = beside.start(lambda: _together(own, everyone, how, saved, start), f"save to {path}")
        saved.blocked = time.perf_counter() - start
    else:
        _together(own, everyone, how, saved, start)
        saved.blocked = saved.seconds
    return saved


def _together(own: Any, everyone: Team, how: _How, saved: Saved, start: float) -> None:
    """All that follows when every rank knows what it holds."""
    said = everyone.together(lambda: own().said)
    run, shards = own().run, own().shards
    work: list[Work] = []
    everyone.together(lambda: work.append(planned(said, run, shards, everyone.rank)))
    _exchange(work[0], everyone)
    saved.path, pruned = _write(work[0], run, everyone, how)
    saved.nbytes, saved.removed = work[0].part.nbytes, tuple(pruned.removed)
    saved.notes = (*work[0].notes, *pruned.notes)
    saved.seconds = time.perf_counter() - start


def _exchange(work: Work, everyone: Team) -> None:
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


def _write(work: Work, run: Run, everyone: Team, how: _How) -> tuple[str, Pruned]:
    """Write into a hidden directory, all ranks at once, and make it visible when all are done."""
    in_run = work.nested or run.iteration != RELEASE
    goal = run.goal / place(run.iteration) if in_run else run.goal
    pruned: list[Pruned] = [Pruned()]
    with ExitStack() as stack:

        def begin() -> str | None:
            if everyone.rank:
                return None
            if _holds_anything(goal) and not how.overwrite:
                raise TargetError(
                    "this iteration has been saved already" if in_run else "the target is not empty", where=goal,
                    expected="nothing there yet", found="a checkpoint", hint="give overwrite=True to replace it",
                )  # fmt: skip
            needed = sum(file.size for file in work.laid.files)
            stage, pruned[0] = stack.enter_context(_stage(run, how, needed, in_run))
            write_small(stage, work.laid.small, work.laid.copies, durable=how.durable)
            return str(stage)

        stage = Path(str(everyone.together(begin)[0]))
        part = work.part

        def own() -> manifest.Sums:
            crcs = execute(
                part.plan, work.opened, part.laid, part.slots, stage, threads=how.threads, durable=how.durable
            )
            return manifest.data_sums(stage, part.laid, part.slots, part.plan, crcs)

        sums = {name: found for of_rank in everyone.together(own) for name, found in of_rank.items()}

        def end() -> None:
            if not everyone.rank:
                manifest.write(stage, work.laid, sums, durable=how.durable)
            stack.close()

        everyone.together(end)
    return str(goal), pruned[0]


def _holds_anything(path: Path) -> bool:
    try:
        return path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise failed(path, error) from error


@contextmanager
def _stage(run: Run, how: _How, needed: int, in_run: bool) -> Iterator[tuple[Path, Pruned]]:
    if in_run:
        checkpoints = Checkpoints(run.goal, durable=how.durable)
        with checkpoints.saving(run.iteration, needed=needed, retention=how.retention) as found:
            yield found
    else:
        with staged(run.goal, needed=needed, durable=how.durable) as stage:
            yield stage, Pruned()
