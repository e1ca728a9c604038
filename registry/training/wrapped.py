"""Optimizers inside others, as Megatron's are, seen by what they have and not by their class.

    chained_optimizers             several optimizers, one after the other
    optimizer                      the torch optimizer inside
    weight.main_param              on a weight of the model: the float32 copy that is stepped in its place
    get_parameter_state_dp_zero    state in flat buffers, of which every data-parallel rank has a slice
Source: megatron/core/optimizer/{optimizer,distrib_optimizer}.py of 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from registry.errors import ArgumentError
from registry.states import MASTER

if TYPE_CHECKING:
    import torch

#: What a flat buffer calls the copy of the weights.
_PARAM = "param"
#: What tells the groups of one optimizer apart; those of experts have the hyperparameters of dense ones.
_MARKS = ("wd_mult", "lr_mult", "is_decoupled_lr")
_EXPERTS = "is_expert_parallel"


@frozen(eq=False)
class Stepped:
    """A torch optimizer, and what holds its state in flat buffers, if anything does."""

    inner: Any
    flat: Any = None

    def parameters(self) -> list[torch.Tensor]:
        """What is stepped: weights, or copies of them; of flat buffers the weights that are in them."""
        if self.flat is not None:
            return [parameter for buffer in self.flat.buffers for parameter in buffer.param_index_map]
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    @property
    def step_in_groups(self) -> bool:
        """Are steps counted in the groups, as Apex and Transformer Engine do, or for each parameter, as torch does?"""
        if any("step" in group for group in self.inner.param_groups):
            return True
        kinds = [(base.__module__, base.__name__) for base in type(self.inner).__mro__]
        return not any(module.startswith("torch.optim.") and name != "Optimizer" for module, name in kinds)

    def gathered(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Each weight of the flat buffers with its whole state. Every data-parallel rank takes part."""
        found = self.flat.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        for i, buffer in enumerate(self.flat.buffers):
            (rows,) = found[i].values()
            for parameter, (first, last, _) in buffer.param_index_map.items():
                own = {kind: row[first:last] for kind, row in rows.items() if hasattr(row, "shape")}
                yield parameter, {kind: row.view(parameter.shape) for kind, row in own.items()}

    def put(self, states: Mapping[int, Mapping[str, torch.Tensor]], step: float) -> None:
        """Give flat buffers the whole state of each of their weights, by its id."""
        import torch

        whole = {}
        for i, parameter in enumerate(self.parameters()):
            own = states[id(parameter)]
            whole[i] = {_PARAM if kind == MASTER else kind: tensor for kind, tensor in own.items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.inner.param_groups]
        with torch.no_grad():
            self.flat.load_state_dict(
                {
                    "optimizer": {"param_groups": [{**group, "step": int(step)} for group in groups]},
                    "param_state": whole, "param_state_sharding_type": "fully_reshardable",
                }
            )  # fmt: skip


def stepped(optimizer: Any) -> list[Stepped]:
    """The torch optimizers in an optimizer, in order. Raises ArgumentError for what is none."""
    if hasattr(optimizer, "chained_optimizers"):
        return [one for part in optimizer.chained_optimizers for one in stepped(part)]
    if hasattr(optimizer, "get_parameter_state_dp_zero"):
        if not hasattr(optimizer, "buffers"):
            raise ArgumentError(
                "an optimizer of Megatron's FSDP", found=type(optimizer).__name__, expected="one with flat buffers",
                hint="give optimizer= as {'state': {name: {'exp_avg': ...}}, 'param_groups': [...]}",
            )  # fmt: skip
        return [Stepped(optimizer.optimizer, optimizer)] if optimizer.optimizer is not None else []
    if hasattr(optimizer, "optimizer"):
        return stepped(optimizer.optimizer) if optimizer.optimizer is not None else []
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise ArgumentError(
            "no optimizer", found=type(optimizer).__name__,
            expected="a torch optimizer, one inside another, or {'state': {name: ...}, 'param_groups': [...]}",
        )  # fmt: skip
    return [Stepped(optimizer)]


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups of all optimizers in an optimizer."""
    return [group for one in stepped(optimizer) for group in one.inner.param_groups]


def copies(weights: Mapping[Any, torch.Tensor]) -> dict[int, Any]:
    """id of the copy that is stepped in a weight's place -> the weight's key."""
    found = {}
    for key, weight in weights.items():
        copy = getattr(weight, "main_param", None)
        if copy is not None and copy.shape == weight.shape:
            found[id(copy)] = key
    return found


def matched(own: Sequence[Mapping[str, Any]], stored: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The stored group for each of an optimizer's own: by Megatron's marks where all have them, else by position.

    None where they do not correspond. There are groups of experts only where those are spread over ranks: then they may
    be those of dense weights once more.
    """
    if not all(mark in group for group in (*own, *stored) for mark in (*_MARKS, _EXPERTS)):
        dense = [group for group in stored if not group.get(_EXPERTS)]
        return next((groups for groups in (list(stored), dense) if len(groups) == len(own)), None)
    found = []
    for group in own:
        alike = [other for other in stored if all(other[mark] == group[mark] for mark in _MARKS)]
        if not alike:
            return None
        best = next((other for other in alike if other[_EXPERTS] == group[_EXPERTS]), alike[0])
        found.append({**best, _EXPERTS: group[_EXPERTS]})
    return found
