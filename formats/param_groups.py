"""The `optimizer` entry of Megatron's common state: parameter groups with their step, one part for each optimizer.

Optimizers with flat buffers keep groups here and tensors elsewhere; others have a `state` by the number of a parameter.
Source: megatron/core/optimizer/{optimizer,distrib_optimizer}.py (state_dict, sharded_state_dict); reference B1.4, B5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from registry.errors import CheckpointError
from registry.plain import TensorData

from .pickles import brief
from .torchzip import NewTensor

#: Says of a group whether its weights are those of experts, which have an optimizer of their own.
EXPERTS = "is_expert_parallel"


def parts(entry: Any) -> list[dict[str, Any]]:
    """The optimizers of an entry: one, or those of a chain, dense weights first."""
    if isinstance(entry, dict) and entry and all(type(key) is int for key in entry):
        entry = [entry[key] for key in sorted(entry)]
    return [dict(part) for part in (entry if isinstance(entry, list) else [entry]) if isinstance(part, dict)]


def inner(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """The torch optimizer's own state dict."""
    found = next((part[key] for key in ("optimizer", "optimizer_state_dict") if key in part), part)
    return found if isinstance(found, Mapping) else {}


def groups(own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups of a torch optimizer's state dict."""
    found = own.get("param_groups")
    return [dict(group) for group in found if isinstance(group, dict)] if isinstance(found, list) else []


def without_tensors(entry: Any) -> Any:
    """An entry with groups and step alone: without what belongs to single parameters."""
    found = [_bare(part) for part in parts(entry)]
    return found if isinstance(entry, list) else dict(enumerate(found)) if len(found) > 1 else next(iter(found), None)


def _bare(part: Mapping[str, Any]) -> dict[str, Any]:
    own = inner(part)
    count = next(_steps(own.get("state")), None)
    kept: dict[str, Any] = {"param_groups": _without_params(own)}
    if count is not None:
        kept["state"] = {"common_step": count}
    beside = {key: part[key] for key in ("grad_scaler", "param_state_sharding_type") if key in part}
    return {"optimizer": kept, **beside} if own is not part else kept


def _without_params(own: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups(own)]


def _steps(state: object) -> Iterator[Any]:
    for key, value in state.items() if isinstance(state, dict) else ():
        if key in ("common_step", "step"):
            yield value
        elif isinstance(value, Mapping) and "step" in value:
            yield value["step"]


def written(entry: Any, *, chained: bool | None, masters: bool, ranks: bool) -> Any:
    """An entry as Megatron's optimizers load it: in a chain where experts have one of their own, which `chained`
    says, or else the entry.

    With `masters` it is the distributed optimizer's, in files of ranks always (`ranks`); else that of float32 weights.
    """
    marked = [_with_groups(part, [_marked(group) for group in groups(inner(part))]) for part in parts(entry)]
    found = [_part(part, masters=masters or ranks, ranks=ranks) for part in _chain(marked, chained)]
    if len(found) < 2:
        return next(iter(found), None)
    return found if ranks else dict(enumerate(found))


def _marked(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the marks by which Megatron finds it again; other optimizers' groups have none.

    Source: megatron/core/optimizer/optimizer.py, param_group_identifier_keys.
    """
    decays = float(group.get("weight_decay") != 0)
    return {"wd_mult": decays, "lr_mult": 1.0, "is_decoupled_lr": False, EXPERTS: False, **group}


def _chain(found: list[dict[str, Any]], chained: bool | None) -> list[dict[str, Any]]:
    """One part for dense weights and one for experts; groups that do not say of what they are stay together."""
    every = [group for part in found for group in groups(inner(part))]
    if chained in (None, len(found) > 1) or not every or any(EXPERTS not in group for group in every):
        return found
    dense = [group for group in every if not group[EXPERTS]]
    if not chained:
        return [_with_groups(found[0], dense)]
    experts = [group for group in every if group[EXPERTS]] or [{**group, EXPERTS: True} for group in dense]
    return [_with_groups(found[0], dense), _with_groups(found[0], experts)]


def _with_groups(part: dict[str, Any], changed: list[dict[str, Any]]) -> dict[str, Any]:
    own = {**inner(part), "param_groups": changed}
    return {**part, "optimizer": own} if inner(part) is not part else own


def _part(part: dict[str, Any], *, masters: bool, ranks: bool) -> dict[str, Any]:
    bare = _without_params(inner(part))
    if not masters:
        return _with_groups(part, bare)
    count = step(part)
    bare = [group if count is None or "step" in group else {**group, "step": int(count)} for group in bare]
    beside = {"grad_scaler": part["grad_scaler"]} if "grad_scaler" in part else {}
    kind = {} if ranks else {"param_state_sharding_type": "fully_reshardable"}
    return {"optimizer": {"param_groups": bare}, **kind, **beside}


def step(part: Mapping[str, Any]) -> float | None:
    """How often an optimizer has stepped, if it says so."""
    own = inner(part)
    counts = [*_steps(own.get("state")), *(group.get("step") for group in groups(own))]
    return next((number(count) for count in counts if count is not None), None)


def number(count: Any) -> float:
    """A step count, which may be a tensor. Raises CheckpointError for what is no count."""
    tensor = count if isinstance(count, NewTensor | TensorData) else None
    try:
        found = float(np.frombuffer(tensor.data, tensor.dtype)[0] if tensor is not None else count)
        if not 0 <= found < 1 << 63:
            raise ValueError("out of range")
    except (TypeError, ValueError, LookupError, OverflowError):
        raise CheckpointError(
            "an optimizer's step is no count", expected="a number of steps", found=brief(count),
            hint="convert without it: options={'optimizer': 'none'}",
        ) from None  # fmt: skip
    return found
