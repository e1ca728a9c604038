"""Optimizer state beside the weights: for every weight a tensor of each kind, of the same axes, by another name.

A format says in `states` how the names of each kind begin; the rules are those of the weights. So whatever moves a
weight to another layout moves its moments and its master copy too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from registry.errors import MappingError
from registry.specs import FormatSpec
from registry.storage import Opened
from registry.tensor_rules import Rule

if TYPE_CHECKING:
    from registry.bind import Bound

#: What the logical tensors of optimizer state begin with.
PREFIX = "optimizer."
#: The state that holds a copy of the weights themselves, and so takes a weight's offset and scale.
MASTER = "master"


def state_tensor(state: str, tensor: str) -> str:
    """The logical tensor of one kind of state of one weight."""
    return f"{PREFIX}{state}.{tensor}"


def is_state(tensor: str) -> bool:
    """Is this logical tensor optimizer state?"""
    return tensor.startswith(PREFIX)


def held_states(opened: Opened, spec: FormatSpec) -> tuple[str, ...]:
    """The kinds of state of which a checkpoint has any tensor."""
    begins = {begin: state for state, ways in spec.states.items() for begin in ways}
    found = {state for begin, state in begins.items() for piece in opened.pieces if piece.name.startswith(begin)}
    return tuple(state for state in spec.states if state in found)


def check_states(opened: Opened, spec: FormatSpec, bound: Bound, kinds: Iterable[str], held: Collection[str]) -> None:
    """Every state belongs to a weight, and a weight that has one has all. Raises MappingError.

    A weight without any is one that was not trained; one in float32 needs no copy of itself.
    """
    begins = tuple(begin for ways in spec.states.values() for begin in ways)
    if strange := sorted(name for name in bound.left_out if name.startswith(begins)):
        raise MappingError(
            "optimizer state of weights that the model does not have", where=opened.path, details=strange,
            hint="check that the config belongs to these tensors, or convert without it: options={'optimizer': 'none'}",
        )  # fmt: skip
    types = {f.tensor: group.dtype for group in bound.groups for f in group.fragments}
    has: dict[str, set[str]] = defaultdict(set)
    for name in held:
        state, _, tensor = name.removeprefix(PREFIX).partition(".")
        has[tensor].add(state)
    lacking = [
        state_tensor(state, tensor)
        for tensor, found in sorted(has.items())
        for state in kinds
        if state not in found and not (state == MASTER and types.get(tensor) == "float32")
    ]
    if lacking:
        raise MappingError(
            "optimizer state is missing", where=opened.path, details=lacking,
            hint="copy the checkpoint again, or convert without it: options={'optimizer': 'none'}",
        )  # fmt: skip


def with_states(
    rules: Sequence[tuple[str, Rule]], spec: FormatSpec, states: Iterable[str]
) -> Iterator[tuple[str, Rule]]:
    """The rules of the weights, and those of every kind of state."""
    yield from rules
    for state in states:
        ways = spec.states[state]
        for pattern, rule in rules:
            yield ways[0] + pattern, _again(pattern, rule, state, ways)


def _again(pattern: str, rule: Rule, state: str, ways: Sequence[str]) -> Rule:
    aliases = [way + name for way in ways for name in (pattern, *rule.aliases)]
    change: Mapping[str, object] = {
        "layout": str(rule.parsed.relabel(lambda label: state_tensor(state, label))),
        "names": {choice: ways[0] + name for choice, name in rule.names.items()},
        "aliases": [name for name in aliases if name != ways[0] + pattern],
        "dtype": None,
        "scale": rule.scale if state == MASTER else 1.0,
        "offset": rule.offset if state == MASTER else "0",
    }
    return rule.model_copy(update=change)
