"""load(): every rank of a training run fills its own tensors from a checkpoint at any layout, in any format."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from registry.errors import ArgumentError, CheckpointError
from registry.model import config_map, loose_facts, read_facts
from registry.parallel import Parallel
from registry.places import PathLike, local_path
from registry.plain import unpacked
from registry.source import Source
from registry.source import load as open_source
from registry.storage import Rank
from registry.training import background, filling, local, rng
from registry.training.filling import Rankwise
from registry.training.manager import RELEASE, TRACKER, Checkpoints, Found
from registry.training.ranks import check_ranks, own_rank, team
from registry.training.saveplan import OURS


@frozen
class Loaded:
    """What a load found beside the tensors. `notes` say what was not restored, and why; they are warnings too."""

    path: str
    format: str
    iteration: int
    args: argparse.Namespace
    consumed_samples: int | None
    extra: dict[str, Any]
    random_states: bool
    persistent: bool = True
    notes: tuple[str, ...] = field(default=())


def load(
    path: PathLike,
    *,
    model: Any,
    iteration: int | None = None,
    non_persistent: PathLike | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    parallel: Parallel | None = None,
    rank: Rank | None = None,
    names: str = "megatron-legacy",
    config: PathLike | Mapping[str, Any] | None = None,
    args: Any = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    random_states: bool = True,
    trackers: rng.Trackers = None,
    finetune: bool = False,
    group: Any = None,
) -> Loaded:
    """Fill the model, optimizer, scheduler and random generators of every rank from the checkpoint at `path`.

    Every tensor of the model and, where one is given, of the optimizer is filled, or it is an error: nothing stays at
    its initial values. The checkpoint may be of any format and layout; each rank reads the bytes that it needs.

    path: a checkpoint, or the directory of a run: then the iteration that is asked for, else the one that the tracker
    names, else, with a warning, the newest that is whole.
    non_persistent: a second directory of the run's checkpoints; the newer of both is taken.
    model, optimizer, scheduler, parallel, rank, names, trackers, group: as in `save`.
    args: this run's arguments; where they describe another model than the checkpoint's, every difference is reported.
    finetune: weights only, and from iteration 0. random_states=False leaves the generators alone.

    Raises RegistryError on every rank if anything is wrong on any of them.
    """
    background.finish()
    everyone, layout = team(group), parallel or Parallel()
    found = everyone.together(lambda: None if everyone.rank else _found(path, iteration, non_persistent))[0]
    assert found is not None
    held: list[tuple[Source, Rankwise]] = []

    def prepare() -> Rank:
        here = rank or own_rank(layout, everyone.rank, everyone.size)
        weights = local.model_tensors(model)
        wants = optimizer is not None and not finetune
        source = open_source(found.path, config=config, architecture=architecture, states=wants)
        if args is not None and not finetune:
            check_args(source, args)
        if wants and not source.model.states:
            raise CheckpointError(
                "the checkpoint has no optimizer state", where=source.opened.path, expected="moments of every weight",
                found="weights only", hint="load it without optimizer=, or with finetune=True",
            )  # fmt: skip
        planned = filling.rankwise(source, names, layout, here, weights, optimizer if wants else None, options)
        held.append((source, planned))
        return here

    ranks = everyone.together(prepare)
    source, rankwise = held[0]
    me = ranks[everyone.rank]
    peers = [i for i, other in enumerate(ranks) if (other.tp, other.pp) == (me.tp, me.pp)]
    states: list[tuple[Loaded, dict[str, Any]]] = []

    def fill() -> int:
        if everyone.size > 1 or rank is None:  # one process may take the shards of any one rank
            check_ranks(layout, ranks)
        rankwise.fill()
        beside = _beside(source, ranks[everyone.rank], layout)
        notes = list(rankwise.notes)
        if optimizer is not None and not finetune:
            filling.restore_groups(optimizer, rankwise, beside.get("optimizer"), source.opened.path)
        if scheduler is not None and not finetune:
            _restore_scheduler(scheduler, beside, source)
        loaded = _loaded(source, found, beside, finetune)
        states.append((evolve(loaded, notes=(*found.notes, *notes)), beside))
        return loaded.iteration

    iterations = everyone.together(fill)
    if len(set(iterations)) > 1:
        shown = "; ".join(f"{it} on rank {i}" for i, it in enumerate(iterations))
        raise CheckpointError(
            "the ranks found different iterations", where=source.opened.path, expected="one iteration",
            found=shown[:300], hint="give every rank the same path, on a file system that all see",
        )  # fmt: skip
    loaded, beside = states[0]
    restored = False
    notes: list[str] = []
    if random_states and not finetune:
        restored, notes = _restore_random(
            beside, source, layout, peers.index(everyone.rank), len(peers), trackers
        )  # fmt: skip
    for note in (*loaded.notes, *notes):
        warnings.warn(note, stacklevel=2)
    return evolve(loaded, random_states=restored, notes=(*loaded.notes, *notes))


def _found(path: PathLike, iteration: int | None, non_persistent: PathLike | None) -> Found:
    """The checkpoint that is meant. Raises CheckpointError where there is none that is whole."""
    root = Path(os.path.realpath(local_path(path)))
    run = Checkpoints(root)
    second = None if non_persistent is None else Checkpoints(non_persistent)
    if iteration is None and second is None and not run.present() and not (root / TRACKER).exists():
        return Found(root, 0)
    found = run.resume(iteration, non_persistent=second)
    assert found is not None  # nothing to resume from is an error
    return found


def check_args(source: Source, args: Any) -> None:
    """A run's arguments must describe the checkpoint's model. Raises ArgumentError with every difference."""
    given = dict(args) if isinstance(args, Mapping) else vars(args)
    document = {**source.opened.document, **given}
    fields = config_map(source.spec, source.architecture)
    if source.spec.rules_from == "architecture":
        return  # the arguments are in no format of this checkpoint
    loose = loose_facts(fields) | loose_facts(source.architecture.config)
    wrong = []
    for name, value in read_facts(document, fields).items():
        known = source.model.facts.get(name)
        said = fields.facts[name].field or [name]
        if name not in loose and value is not None and known is not None and value != known and said[0] in given:
            wrong.append(f"{said[0]}: {value!r} here, {known!r} in the checkpoint")
    if wrong:
        raise ArgumentError(
            "the arguments are those of another model", where=source.opened.path, expected="the checkpoint's model",
            found=f"{len(wrong)} differences", details=wrong, hint="correct the arguments, or load with finetune=True",
        )  # fmt: skip


def _beside(source: Source, rank: Rank, layout: Parallel) -> dict[str, Any]:
    """What the checkpoint keeps beside its tensors; with what is this rank's own, where there is such a rank."""
    training, saved = source.opened.training, source.opened.parallel or Parallel()
    if training is None:
        return {}
    fits = rank.tp < saved.tp and rank.pp < saved.pp and rank.ep < saved.ep
    return training(rank if fits else None)


def _loaded(source: Source, found: Found, beside: Mapping[str, Any], finetune: bool) -> Loaded:
    args = beside.get("args")
    args = unpacked(args) if isinstance(args, argparse.Namespace) else argparse.Namespace()
    consumed = getattr(args, "consumed_train_samples", None)
    ours = beside.get(OURS) or {}
    return Loaded(
        str(source.opened.path), source.spec.name,
        0 if finetune or found.iteration == RELEASE else found.iteration or source.opened.iteration or 0, args,
        0 if finetune else consumed, unpacked(ours.get("extra") or {}), False, found.persistent,
    )  # fmt: skip


def _restore_scheduler(scheduler: Any, beside: Mapping[str, Any], source: Source) -> None:
    found = next((beside[key] for key in ("opt_param_scheduler", "lr_scheduler") if beside.get(key) is not None), None)
    if found is None:
        raise CheckpointError(
            "the checkpoint has no scheduler state", where=source.opened.path, expected="opt_param_scheduler",
            found=", ".join(map(str, beside)) or "nothing beside the tensors", hint="load it without scheduler=",
        )  # fmt: skip
    if hasattr(scheduler, "load_state_dict"):
        scheduler.load_state_dict(unpacked(found))
    elif isinstance(scheduler, dict):
        scheduler.clear()
        scheduler.update(unpacked(found))
    else:
        raise ArgumentError("no scheduler", expected="load_state_dict(), or a dict", found=type(scheduler).__name__)


def _restore_random(
    beside: Mapping[str, Any], source: Source, layout: Parallel, replica: int, replicas: int, trackers: rng.Trackers
) -> tuple[bool, list[str]]:
    """Put this rank's own random states back, if the checkpoint has them; say why not, if it does not."""
    saved, rows = source.opened.parallel or Parallel(), beside.get("rng_state")
    if source.opened.training is None:
        return False, []
    if (saved.tp, saved.pp, saved.ep) != (layout.tp, layout.pp, layout.ep):
        return False, [
            f"random states are not restored: they were saved at {saved}, and this run is at {layout}; every rank goes"
            " on with the states that it has"
        ]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return False, ["random states are not restored: the checkpoint has none"]
    if len(rows) not in (1, replicas):
        return False, [
            f"random states are not restored: {len(rows)} data-parallel ranks saved them, {replicas} are here"
        ]
    row = rows[replica] if len(rows) == replicas else rows[0]
    return True, rng.restore(unpacked(row), trackers)
