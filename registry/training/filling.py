"""Fill the tensors of one training process from a source: plan what it needs, and read that into its own memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import define, field

from registry.assemble import Assembler, assembler
from registry.dtypes import torch_dtype
from registry.errors import ArgumentError, CheckpointError, MappingError
from registry.files import SourceFiles
from registry.parallel import Parallel
from registry.plain import unpacked
from registry.planning import make_plan
from registry.prepare import bound_target, fitted, merged_options
from registry.problems import collapse
from registry.source import Source
from registry.specs import FormatSpec
from registry.states import MASTER
from registry.storage import Rank, Slot, slot_bytes
from registry.target import Target, kept
from registry.training import local
from registry.training.local import Key
from registry.training.rankwise import NO_MASTER, pad_options, padded_sizes, ranks_spec, widened, without_master
from registry.training.wrapped import groups_of, matched, stepped

if TYPE_CHECKING:
    import torch


@define
class Rankwise:
    """What one process is to read: `tensors[key]` from slot `at[key]`."""

    source: Source
    tensors: dict[Key, torch.Tensor]
    at: dict[Key, int]
    slots: list[Slot]
    filler: Assembler
    fresh: dict[int, dict[str, Any]] = field(factory=dict)
    notes: list[str] = field(factory=list)

    def fill(self) -> None:
        """Read every tensor. Raises CheckpointError and MappingError."""
        import torch

        with torch.no_grad():
            for key, tensor in self.tensors.items():
                self._fill(self.at[key], tensor)

    def _fill(self, at: int, tensor: torch.Tensor) -> None:
        import torch

        slot, part = self.slots[at], local.shard(tensor)
        target, size = part.tensor, slot_bytes(self.slots[at])
        same = target.dtype == torch_dtype(slot.dtype) and tuple(target.shape) == slot.shape
        if same and target.is_contiguous() and target.device.type == "cpu":
            if not self.filler.table.full[at]:  # the checkpoint has no such rows of padding
                target.zero_()
            self.filler.fill(local.as_bytes(target), at, 0, 0, size)
            return
        # Of a box that DTensor holds the rows are read that it has a part in.
        first, count = (part.origin[0], target.shape[0]) if part.origin else (0, slot.shape[0] if slot.shape else 1)
        rows = torch.zeros((count, *slot.shape[1:]) if slot.shape else (), dtype=torch_dtype(slot.dtype))
        if rows.numel():
            row = size // (slot.shape[0] if slot.shape else 1)
            self.filler.fill(local.as_bytes(rows), at, 0, first * row, (first + count) * row)
        if part.origin is not None:
            inner = zip(part.origin[1:], target.shape[1:], strict=True)
            rows = rows[(slice(None), *(slice(o, o + n) for o, n in inner))] if part.origin else rows
        target.copy_(rows)


def rankwise(
    source: Source, names: str, parallel: Parallel, rank: Rank, weights: Mapping[Key, torch.Tensor], optimizer: Any,
    options: Mapping[str, Any] | None,
) -> Rankwise:  # fmt: skip
    """Plan what one process needs. Raises MappingError where its tensors are not those of the checkpoint's model."""
    tensors = dict(weights)
    fresh: dict[int, dict[str, Any]] = {}
    if optimizer is not None:
        states = _optimizer_tensors(source, optimizer, weights, fresh)
        tensors |= {
            Key(k.chunk, local.stored_name(kind, k.name)): t for kind, own in states.items() for k, t in own.items()
        }
        source = source if MASTER in states else without_master(source)
    spec = ranks_spec(names, source.model.states if optimizer is not None else (), parallel)
    layout, _ = fitted(spec, parallel)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    padded = padded_sizes(spec, source.architecture, shapes, layout)
    source = widened(source, {a: n for a, n in source.bound.padded.items() if padded.get(a) == n})
    given = pad_options(spec, source.architecture, padded, layout) | dict(options or {})
    target = _best(source, spec, layout, rank, shapes, given)
    target = kept(target, np.array([slot.rank._replace(vpp=0) == rank for slot in target.slots], dtype=bool))
    slots, groups = target.slots, target.groups
    at = {Key(slot.rank.vpp, slot.name): i for i, slot in enumerate(slots)}
    if MASTER not in source.model.states:  # copies of weights that were stepped themselves
        at |= {k: at[w] for k in tensors if (w := _weight_of(k)) is not None and w in at}
    _check(source, tensors, at, slots)
    plan = make_plan(source.bound, source.opened, groups, slots, source.model)
    filler = assembler(plan, source.opened, SourceFiles(source.opened.files, source.opened.stamps), slots)
    own = {key: tensor for key, tensor in tensors.items() if key in at}
    cast = sorted({f"{slots[at[k]].dtype} -> {str(t.dtype).removeprefix('torch.')}" for k, t in own.items()
                   if torch_dtype(slots[at[k]].dtype) != t.dtype})  # fmt: skip
    notes = [f"values are cast on the way: {', '.join(cast)}"] if cast else []
    if short := sorted({key.name for key in own if not filler.table.full[at[key]] and slot_bytes(slots[at[key]])}):
        notes.append(f"padding that the checkpoint does not have is zeros: {', '.join(collapse(short, 4))}")
    notes += [note for note in source.notes if note == NO_MASTER]
    return Rankwise(source, own, at, slots, filler, fresh, notes)


def _weight_of(key: Key) -> Key | None:
    """The weight that this is a copy of."""
    begin = local.stored_name(MASTER, "")
    return Key(key.chunk, key.name.removeprefix(begin)) if key.name.startswith(begin) else None


def _best(
    source: Source,
    spec: FormatSpec,
    parallel: Parallel,
    rank: Rank,
    shapes: Mapping[Key, Any],
    given: Mapping[str, Any],
) -> Target:
    """The target whose spelling of names is that of this process."""
    free = {
        name: spec.options[name].choices
        for name in spec.variants
        if name in spec.options and name not in given and spec.options[name].choices
    }
    best: tuple[int, Target] | None = None
    for choice in itertools.product(*free.values()):
        chosen = merged_options(spec, source.architecture, {**given, **dict(zip(free, choice, strict=True))})
        target = bound_target(source, spec, parallel, chosen, None)
        names = {Key(s.rank.vpp, s.name) for s in target.slots if s.rank._replace(vpp=0) == rank}
        odd = len(names ^ shapes.keys())
        if best is None or odd < best[0]:
            best = odd, target
        if not odd:
            break
    assert best is not None
    return best[1]


def _check(source: Source, tensors: Mapping[Key, torch.Tensor], at: Mapping[Key, int], slots: Sequence[Slot]) -> None:
    """Every tensor here is one of the model's, of its shape, and every one of the model's is here."""
    memory = {_place(tensor) for key, tensor in tensors.items() if key in at}
    details = [
        f"no tensor of this model: {line}"
        for line in collapse([k.name for k, t in tensors.items() if k not in at and _place(t) not in memory])
    ]
    details += [f"not in the model here: {line}" for line in collapse([k.name for k in at if k not in tensors])]
    details += [
        f"{key.name}: {tuple(tensor.shape)} here, {slots[at[key]].shape} by the checkpoint at this layout"
        for key, tensor in tensors.items()
        if key in at and tuple(tensor.shape) != slots[at[key]].shape
    ]
    if details:
        raise MappingError(
            "the model is not the checkpoint's at this layout", where=source.opened.path,
            expected=f"a {source.architecture.name} model in the names of a rank", found=f"{len(details)} differences",
            details=details[:24],
            hint="check that names=, config=, parallel= and rank= are those of the model that was built",
        )  # fmt: skip


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return local.shard(tensor).tensor.data_ptr(), tuple(tensor.shape)


def _optimizer_tensors(
    source: Source, optimizer: Any, weights: Mapping[Key, torch.Tensor], fresh: dict[int, dict[str, Any]]
) -> dict[str, dict[Key, torch.Tensor]]:
    """The tensors of an optimizer's state to fill, new where it has none yet."""
    import torch

    if isinstance(optimizer, Mapping):
        return local.optimizer_tensors(optimizer, weights).tensors
    found: dict[str, dict[Key, torch.Tensor]] = {}
    keys = local.parameter_keys(optimizer, weights)
    kinds = [kind for kind in source.model.states if kind != MASTER]
    for one, parameter in [(part, p) for part in stepped(optimizer) for p in part.parameters()]:
        key, plain = keys[id(parameter)], parameter.detach()
        state = {} if one.flat is not None else dict(one.inner.state.get(parameter, {}))
        for kind in kinds:
            state.setdefault(kind, torch.empty_like(plain, dtype=torch.float32 if one.flat is not None else None))
        if odd := [name for name, value in state.items() if name not in kinds and name != "step" and value is not None]:
            raise ArgumentError(
                "the checkpoint lacks state that this optimizer has", found=", ".join(odd), expected=", ".join(kinds)
            )
        fresh[id(parameter)] = state
        for kind in kinds:
            found.setdefault(kind, {})[key] = state[kind]
        if one.flat is not None:
            found.setdefault(MASTER, {})[key] = state[MASTER] = torch.empty_like(plain, dtype=torch.float32)
        elif parameter is not weights[key]:
            found.setdefault(MASTER, {})[key] = plain
    return found


def restore_groups(optimizer: Any, found: Rankwise, stored: Any, where: object) -> None:
    """Give an optimizer its filled state, its step count and the hyperparameters of its groups."""
    groups, step = _stored_groups(stored)
    own = optimizer.get("param_groups", []) if isinstance(optimizer, Mapping) else groups_of(optimizer)
    if (theirs := matched(own, groups)) is None:
        raise CheckpointError(
            "the optimizer has other parameter groups than the checkpoint", where=where,
            expected=f"{len(groups)} groups", found=f"{len(own)} groups",
            hint="build the optimizer with the groups that it was saved with",
        )  # fmt: skip
    if step is None and found.fresh:
        raise CheckpointError(
            "the checkpoint does not say how often the optimizer has stepped", where=where, expected="a step count",
            found="none", hint="load it without optimizer=",
        )  # fmt: skip
    for mine, stored_group in zip(own, theirs, strict=True):
        known = {k: v for k, v in stored_group.items() if k in mine and k != "params"}
        mine.update({k: tuple(v) if isinstance(mine[k], tuple) else v for k, v in known.items()})
    if isinstance(optimizer, Mapping):
        for entries in optimizer.get("state", {}).values():
            if "step" in entries and step is not None:
                _set_step(entries, step)
        return
    for one in stepped(optimizer):
        if one.flat is not None:
            one.put(found.fresh, step or 0.0)
            continue
        in_groups = one.step_in_groups
        for group in one.inner.param_groups if in_groups else ():
            group["step"] = int(step or 0)
        for parameter in one.parameters():
            state = found.fresh[id(parameter)]
            if not in_groups:
                _set_step(state, step or 0.0)
            one.inner.state[parameter] = state


def _set_step(state: dict[str, Any], step: float) -> None:
    import torch

    before = state.get("step")
    if isinstance(before, int):
        state["step"] = int(step)
    else:
        state["step"] = torch.tensor(float(step)) if before is None else torch.full_like(before, step)


def _stored_groups(stored: Any) -> tuple[list[dict[str, Any]], float | None]:
    """The parameter groups and the step count of the optimizer that Megatron or this library saved, chained or not."""
    parts = [stored]
    if isinstance(stored, list):
        parts = stored
    elif isinstance(stored, dict) and stored and all(isinstance(key, int) for key in stored):
        parts = [stored[key] for key in sorted(stored)]
    groups: list[dict[str, Any]] = []
    steps: list[float] = []
    for part in parts:
        inner = next(
            (part[k] for k in ("optimizer", "optimizer_state_dict") if isinstance(part, dict) and k in part), part
        )
        if isinstance(inner, dict):
            groups += [unpacked(group) for group in inner.get("param_groups", [])]
            steps += list(_steps(unpacked(inner.get("state") or {})))
    steps += [float(group["step"]) for group in groups if group.get("step") is not None]
    return groups, max(steps) if steps else None


def _steps(state: Mapping[Any, Any]) -> Iterator[float]:
    for key, value in state.items():
        if key in ("common_step", "step"):
            yield float(value)
        elif isinstance(value, dict) and "step" in value:
            yield float(value["step"])
