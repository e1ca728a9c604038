"""Optimizer state beside the weights: for every weight a tensor of each kind, of the same axes, by another name.

A format says in `states` how the names of each kind begin; the rules are those of the weights. So whatever moves a
weight to another layout moves its moments and its master copy too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from registry.errors import MappingError
from registry.specs import FormatSpec, Spec, Variant
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


def state_name(way: str, name: str) -> str:
    """What a format that names state in this way calls that of one weight."""
    return way.replace("*", name, 1) if "*" in way else way + name


def _named(way: str, name: str) -> bool:
    """Is this the name of state in this way?"""
    head, _, tail = way.partition("*")
    return len(name) > len(head) + len(tail) and name.startswith(head) and name.endswith(tail)


def held_states(opened: Opened, spec: FormatSpec) -> tuple[str, ...]:
    """The kinds of state of which a checkpoint has any tensor."""
    known = {way: state for state, ways in spec.states.items() for way in ways}
    found = {state for way, state in known.items() if any(_named(way, piece.name) for piece in opened.pieces)}
    return tuple(state for state in spec.states if state in found)


def check_states(opened: Opened, spec: FormatSpec, bound: Bound, kinds: Iterable[str], held: Collection[str]) -> None:
    """Every state belongs to a weight, and a weight that has one has all. Raises MappingError.

    A weight without any is one that was not trained; one in float32 needs no copy of itself.
    """
    known = [way for ways in spec.states.values() for way in ways]
    if strange := sorted(name for name in bound.left_out if any(_named(way, name) for way in known)):
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
    rules: Sequence[tuple[str, Rule]], spec: FormatSpec, states: Iterable[str], owner: Spec | None = None
) -> Iterator[tuple[str, Rule]]:
    """The rules of the weights, and those of every kind of state; `owner` is the spec that the rules are of."""
    variants = (owner or spec).variants
    spelled = {choice: v for choices in variants.values() for choice, v in choices.items() if v.begin}
    yield from rules
    for state in states:
        ways = spec.states[state]
        for pattern, rule in rules:
            yield state_name(ways[0], pattern), _again(pattern, rule, state, ways, spelled)


def _again(pattern: str, rule: Rule, state: str, ways: Sequence[str], spelled: Mapping[str, Variant]) -> Rule:
    begun = {choice: name for choice, v in spelled.items() if (name := v.spell(pattern)) is not None}
    names = {**begun, **rule.names}
    others = [pattern, *rule.aliases, *(n for v in spelled.values() for a in rule.names.values() if (n := v.spell(a)))]
    aliases = [state_name(way, name) for way in ways for name in others]
    aliases += [state_name(way, name) for way in ways[1:] for name in names.values()]
    change: Mapping[str, object] = {
        "layout": str(rule.parsed.relabel(lambda label: state_tensor(state, label))),
        "names": {choice: state_name(ways[0], name) for choice, name in names.items()},
        "aliases": [name for name in aliases if name != state_name(ways[0], pattern)],
        "dtype": None,
        "scale": rule.scale if state == MASTER else 1.0,
        "offset": rule.offset if state == MASTER else "0",
    }
    return rule.model_copy(update=change)
