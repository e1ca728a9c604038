"""Sizes of an unknown model: which field of its config holds which fact, by the numbers, where the names are unknown.

The tensors say much by themselves: how many layers and experts are counted, how long the rows of an embedding are. A
field of the config that holds such a number, and no other field does, is the fact's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import define, field

from registry.drafting.habits import Habits, Known, Template
from registry.layout import Axis, parse
from registry.specs import ArchitectureSpec

#: Facts without which no model has sizes, and the axis that each one is the size of.
_PLAIN = {
    "layers": "layer", "vocab_size": "vocab", "hidden_size": "hidden", "experts": "expert", "ffn_size": "ffn",
    "moe_ffn_size": "moe_ffn",
}  # fmt: skip


@define
class Guesses:
    """fact -> (field, or how it is read, and value), and what there is to say of those that are not certain."""

    facts: dict[str, tuple[str | dict[str, str], int]] = field(factory=dict)
    doubts: dict[str, str] = field(factory=dict)

    @property
    def values(self) -> dict[str, int]:
        """fact -> value."""
        return {fact: value for fact, (_, value) in self.facts.items()}


def number_fields(document: Mapping[str, Any], those: Sequence[ArchitectureSpec]) -> dict[str, int]:
    """The whole numbers of a config, those in fields that no known architecture reads first."""
    read = {path.rpartition(".")[2] for spec in those for fact in spec.config.facts for path in spec.config.paths(fact)}
    numbers = {name: value for name, value in document.items() if type(value) is int and value > 0}
    found = {name: value for name, value in numbers.items() if name.isidentifier() and not name.endswith("_id")}
    return dict(sorted(found.items(), key=lambda field: field[0] in read))


def guess(fields: Mapping[str, int], found: Sequence[Template], those: Sequence[Known]) -> Guesses:
    """The facts that the tensors call for, and that no known architecture reads from the config as they have them."""
    guesses, free, habits = Guesses(), dict(fields), Habits(those)
    sizes = _sizes(found, habits)
    for fact, axis in _PLAIN.items():
        if not any(one.facts.get(fact) == sizes.get(axis) for one in those):
            _take(guesses, fact, sizes.get(axis), free)
    if not any(_reads(one, fields, "heads") for one in those):
        _heads(guesses, free, _rows(found, habits, "attention.q.weight"), _rows(found, habits, "attention.k.weight"))
    return guesses


def _reads(one: Known, fields: Mapping[str, int], fact: str) -> bool:
    """Does a known architecture read a fact from one of these fields?"""
    return fact in one.spec.config.facts and any(path in fields for path in one.spec.config.paths(fact))


def _take(guesses: Guesses, fact: str, size: int | None, free: dict[str, int]) -> None:
    named = [name for name, value in free.items() if value == size]
    if size is None or not named:
        return
    guesses.facts[fact] = (named[0], size)
    if len(named) > 1:
        guesses.doubts[fact] = f"{', '.join(named)} are all {size}"
    del free[named[0]]


def _sizes(found: Sequence[Template], habits: Habits) -> dict[str, int]:
    """The sizes of axes that are dimensions, or indices, by themselves, as most tensors have them."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for template in found:
        for axis, size in set(_said(template, habits)):
            votes[axis][size] += 1
    for hole, axis in ((0, "layer"), (1, "expert")):
        counted = [len(t.counts(hole)) for t in found if t.holes > hole]
        if counted:
            votes[axis] = Counter({max(counted): len(counted)})
    return {axis: count.most_common(1)[0][0] for axis, count in votes.items()}


def _said(template: Template, habits: Habits) -> Iterator[tuple[str, int]]:
    size = next(iter(template.shapes.values()))
    for habit in habits.like(template):
        dims = parse(habit.rule.layout).dims
        if len(dims) == len(size):
            yield from ((dim.name, n) for dim, n in zip(dims, size, strict=True) if isinstance(dim, Axis))


def _rows(found: Sequence[Template], habits: Habits, tensor: str) -> int | None:
    """The rows of a tensor that is stored by itself, as HuggingFace's linear layers are."""
    for template in found:
        for habit in habits.like(template):
            if parse(habit.rule.layout).tensors == (tensor,):
                return next(iter(template.shapes.values()))[0]
    return None


def _heads(guesses: Guesses, free: dict[str, int], q: int | None, k: int | None) -> None:
    """Query and key heads: two numbers with which both matrices have heads of one size."""
    if q is None or k is None:
        return
    able = [
        (heads, groups)
        for heads, n in free.items()
        for groups, m in free.items()
        if q % n == 0 and k % (q // n) == 0 and k // (q // n) == m and n % m == 0 and (heads != groups or q == k)
    ]
    able.sort(key=lambda pair: ("head" not in pair[0], pair[0] == pair[1]))
    if not able:
        return
    heads, groups = able[0]
    guesses.facts["heads"] = (heads, free[heads])
    guesses.facts["kv_heads"] = (groups, free[groups])
    if len({pair for pair in able if pair[0] != pair[1]}) > 1:
        doubt = " or ".join(f"{a} and {b}" for a, b in able)
        guesses.doubts["heads"] = guesses.doubts["kv_heads"] = f"the shapes allow {doubt}"
    size = q // free[heads]
    named = [name for name, value in free.items() if value == size and name not in (heads, groups)]
    hidden = guesses.facts.get("hidden_size")
    if named:
        guesses.facts["head_dim"] = (named[0], size)
    elif hidden is not None and hidden[1] == size * free[heads]:
        guesses.facts["head_dim"] = ({"read": f"{hidden[0]} // {heads}"}, size)
