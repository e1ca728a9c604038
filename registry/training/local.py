"""The tensors that one training process holds: its modules', and its optimizer's by the names of the parameters."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from attrs import define, field, frozen

from registry.assemble import array
from registry.errors import ArgumentError, MappingError
from registry.files import SourceFiles
from registry.problems import collapse
from registry.states import MASTER, PREFIX
from registry.training.wrapped import copies, groups_of, stepped

if TYPE_CHECKING:
    import torch

#: What optimizers call the copy of the weights that they step.
_MASTERS = ("master", "param", "fp32_param", "master_param")
_EXTRA = "_extra_state"


class Key(NamedTuple):
    """A tensor of this process: the model chunk that it is in, and its name there."""

    chunk: int
    name: str


@frozen(eq=False)
class Shard:
    """The part of a tensor that this process holds: all of it, or with DTensor a box at `origin` of `whole`."""

    tensor: torch.Tensor
    origin: tuple[int, ...] | None = None
    whole: tuple[int, ...] | None = None

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")


def shard(tensor: torch.Tensor) -> Shard:
    """What is here of a tensor, which may be a DTensor."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")  # slow to import, and without it there is none
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        of: Any = tensor
        shape, origin = compute_local_shape_and_global_offset(of.shape, of.device_mesh, of.placements)
        return Shard(of.to_local().detach().reshape(shape), tuple(origin), tuple(of.shape))
    return Shard(tensor.detach())


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffer


@frozen(eq=False)
class Memory:
    """A tensor in memory as the file that it would be in; None for one that another process holds.

    See `registry.files.Virtual`.
    """

    path: Path
    tensor: torch.Tensor | None

    def _bytes(self) -> memoryview:
        assert self.tensor is not None, "a tensor of another process"
        return as_bytes(self.tensor)

    def read_into(self, files: SourceFiles, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        buffer[:] = self._bytes()[offset : offset + len(buffer)]

    def boxes(
        self, files: SourceFiles, offset: int, size: Sequence[int], stride: Sequence[int]
    ) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
        """A strided box from `offset`, as a view."""
        assert self.tensor is not None, "a tensor of another process"
        yield (...,), array(self._bytes(), self.tensor.element_size(), size, stride, offset)


def model_tensors(model: Any) -> dict[Key, torch.Tensor]:
    """The tensors of a module or of a state dict, or of a list of them: one for each virtual pipeline stage."""
    import torch

    chunks = list(model) if isinstance(model, list | tuple | torch.nn.ModuleList) else [model]
    found: dict[Key, torch.Tensor] = {}
    strange = []
    for chunk, part in enumerate(chunks):
        if isinstance(part, torch.nn.Module):
            state: Mapping[str, Any] = part.state_dict(keep_vars=True)
        elif isinstance(part, Mapping):
            state = part
        else:
            raise ArgumentError(
                "no model", expected="a module, a state dict, or a list of them", found=type(part).__name__
            )
        for name, value in state.items():
            if str(name).endswith(_EXTRA) and (value is None or _empty(value)):
                continue
            if isinstance(value, torch.Tensor) and not str(name).endswith(_EXTRA):
                found[Key(chunk, str(name))] = value
            else:
                strange.append(f"{name}: {type(value).__name__}")
    if strange:
        raise MappingError(
            "the model holds what is no weight", expected="tensors, and extra state that is empty",
            found=f"{len(strange)} others", details=collapse(strange), hint="leave it out of the state dict",
        )  # fmt: skip
    if not found:
        raise ArgumentError("the model has no tensors", expected="weights", found="none")
    return found


def _empty(value: Any) -> bool:
    numel = getattr(value, "numel", None)
    if numel is not None:
        return bool(numel() == 0)
    getvalue = getattr(value, "getvalue", None)
    return getvalue is not None and not getvalue()


@define
class OptimizerTensors:
    """The optimizer's tensors by kind and weight, and the rest of its state as plain data."""

    tensors: dict[str, dict[Key, torch.Tensor]] = field(factory=dict)
    groups: list[dict[str, Any]] = field(factory=list)
    members: list[list[str]] = field(factory=list)  # the weights of each group, where they are known
    step: float | None = None


def kind_of(name: str) -> str:
    """The kind of state that an optimizer calls so."""
    return MASTER if name in _MASTERS else name


def stored_name(kind: str, name: str) -> str:
    """What the state of a weight is called beside the weights."""
    return f"{PREFIX}{kind}.{name}"


def parameter_keys(optimizer: Any, weights: Mapping[Key, torch.Tensor]) -> dict[int, Key]:
    """id of each parameter that an optimizer steps -> its key. Raises ArgumentError for those of another model."""
    by_id = {id(tensor): key for key, tensor in reversed(list(weights.items()))} | copies(weights)
    parameters = [id(parameter) for one in stepped(optimizer) for parameter in one.parameters()]
    keys = {parameter: by_id[parameter] for parameter in parameters if parameter in by_id}
    if strangers := len(parameters) - len(keys):
        raise ArgumentError(
            "the optimizer steps parameters that the model does not have", found=f"{strangers} parameters",
            expected="the parameters of model=, which a state dict has only with keep_vars=True",
            hint="give the model that the optimizer was made for, set main_param on a weight to the copy that is "
            "stepped in its place, or give optimizer= as {'state': {name: {'exp_avg': ...}}, 'param_groups': [...]}",
        )  # fmt: skip
    return keys


def optimizer_tensors(optimizer: Any, weights: Mapping[Key, torch.Tensor]) -> OptimizerTensors:
    """The state of an optimizer (see `wrapped`), or of a mapping {"state": {name: {kind: tensor}}, ...}."""
    found = OptimizerTensors(groups=[{k: v for k, v in g.items() if k != "params"} for g in _groups(optimizer)])
    found.members = _members(optimizer, weights)
    steps: dict[float, Key] = {}
    strange = []
    for key, entries in _entries(optimizer, weights):
        for name, value in entries.items():
            if name == "step":
                steps.setdefault(float(value), key)
            elif hasattr(value, "shape") and tuple(value.shape) == tuple(weights[key].shape):
                found.tensors.setdefault(kind_of(name), {})[key] = value
            elif value is not None:
                strange.append(f"{key.name}: {name}")
    if strange:
        raise ArgumentError(
            "optimizer state that is not of its weight's shape", expected="tensors like the weights, and a step",
            found=f"{len(strange)} others", details=collapse(strange),
        )  # fmt: skip
    if len(steps) > 1:
        raise ArgumentError(
            "the weights were stepped different numbers of times", expected="one step count, as the formats have",
            found="; ".join(f"{step:g} ({key.name})" for step, key in list(steps.items())[:4]),
            hint="leave parameters without gradients out of the optimizer",
        )  # fmt: skip
    counts = (float(group["step"]) for group in found.groups if group.get("step") is not None)
    found.step = next(itertools.chain(steps, counts), None)
    return found


def _groups(optimizer: Any) -> Sequence[Mapping[str, Any]]:
    return optimizer.get("param_groups", ()) if isinstance(optimizer, Mapping) else groups_of(optimizer)


def _members(optimizer: Any, weights: Mapping[Key, torch.Tensor]) -> list[list[str]]:
    groups = _groups(optimizer)
    if isinstance(optimizer, Mapping):
        return [list(group["params"]) for group in groups] if all("params" in group for group in groups) else []
    keys = parameter_keys(optimizer, weights)
    if any(id(parameter) not in keys for group in groups for parameter in group["params"]):
        return []  # slices of flat buffers
    return [[keys[id(parameter)].name for parameter in group["params"]] for group in groups]


def _entries(optimizer: Any, weights: Mapping[Key, Any]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    if not isinstance(optimizer, Mapping):
        keys = parameter_keys(optimizer, weights)
        for one in stepped(optimizer):
            if one.flat is not None:
                yield from ((keys[id(parameter)], entries) for parameter, entries in one.gathered())
                continue
            for parameter in one.parameters():
                key = keys[id(parameter)]
                copy = {} if parameter is weights[key] else {MASTER: parameter}
                yield key, {**one.inner.state.get(parameter, {}), **copy}
        return
    for name, entries in optimizer.get("state", {}).items():
        key = Key(*name) if isinstance(name, tuple) else Key(0, name)
        if key not in weights:
            raise ArgumentError(
                "optimizer state of a weight that the model does not have", found=str(name),
                expected="the names of model=, or (chunk, name) where there are several chunks",
            )  # fmt: skip
        yield key, entries
