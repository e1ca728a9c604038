"""What binding a source and a target share: groups of stored tensors, and how their names are spelled.

The members of a group have the same shape, type and fragments; they differ only along `index` axes, where each member
holds a single index: the layer and expert that a name spells, or a chunk of one layer of a stacked tensor. That is what
keeps planning fast: a hundred thousand tensors are a few dozen groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from registry import expressions
from registry.boxes import Fragment
from registry.errors import MappingError
from registry.layout import Axis, Layout
from registry.model import Kind, LogicalModel
from registry.specs import FormatSpec, Spec
from registry.tensor_rules import AXIS, Rule, named_axes

Ints = NDArray[np.int64]


class Coding(NamedTuple):
    """How stored values stand for logical ones: encode(logical * scale + offset).

    With `via`, the logical value is rounded to that type before anything else is done to it.
    """

    scale: float = 1.0
    offset: float = 0.0
    codec: str | None = None
    via: str | None = None

    def __str__(self) -> str:
        """What is not as plain values have it, or nothing."""
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items() if value not in (None, 1.0, 0.0))


def coding(rule: Rule, env: Mapping[str, Any], dtype: str | None = None) -> Coding:
    """The coding of one rule for one model, where weights are cast to `dtype`. Raises MappingError for an offset that
    is no number."""
    offset = expressions.parse(rule.offset)(env)
    if isinstance(offset, bool) or not isinstance(offset, int | float):
        raise MappingError("an offset is no number", where=f"{rule.layout}: {rule.offset}", found=repr(offset))
    changed = bool(offset or rule.codec or rule.dtype)
    via = dtype if dtype is not None and changed and expressions.parse(rule.cast_first)(env) else None
    return Coding(rule.scale, float(offset), rule.codec, via)


def holds(rule: Rule, kind: Kind, env: Mapping[str, Any], choices: Mapping[str, str]) -> bool:
    """Does a rule hold at indices of one kind, under these choices of variants?"""
    if rule.choice is not None and rule.choice not in choices.values():
        return False
    return rule.when is None or bool(expressions.parse(rule.when)(kind.env(env)))


@frozen(eq=False)
class Group:
    """Stored tensors of one shape and type that differ only along `index` axes.

    `members` are indices into the pieces of a source or the slots of a target. `index[axis]` gives each member's index
    along an axis; the fragments leave those axes out.
    """

    pattern: str
    layout: str
    coding: Coding
    dtype: str
    shape: tuple[int, ...]
    fragments: tuple[Fragment, ...]
    members: Ints
    index: dict[str, Ints]


def template_of(pattern: str) -> str:
    """The pattern as a %-format, which the indices of its axes fill."""
    return AXIS.sub("%d", pattern.replace("%", "%%"))


def fold(pattern: str, layout: Layout, axis: str) -> tuple[str, Layout]:
    """Take `.{axis}` out of a name and make it the leading dimension of the tensor."""
    shard = next(named.shard for named in named_axes(pattern) if named.axis == axis)
    mark = f"{{{axis}@{shard}}}" if shard else f"{{{axis}}}"
    return pattern.replace(f".{mark}", "", 1), layout.prepend(Axis(axis, shard))


@frozen
class Spelling:
    """One way that a rule's tensor may be named and dimensioned on disk, and the variant choices that it shows."""

    pattern: str
    layout: Layout
    choices: tuple[tuple[str, str], ...]


def spellings(spec: Spec, pattern: str, rule: Rule, model: LogicalModel) -> list[Spelling]:
    """Every spelling of one rule, the one written by default first. An axis whose indices differ is never folded."""
    folds = [
        (variant, choice, v.fold)
        for variant, choices in spec.variants.items()
        for choice, v in choices.items()
        if v.fold and v.fold not in model.varying
    ]
    named = [(pattern, ())] + [
        (name, ((variant, choice),))
        for choice, name in rule.names.items()
        for variant, choices in spec.variants.items()
        if choice in choices
    ]
    named += [(alias, ()) for alias in rule.aliases]
    named += [
        (begun, (*others, (variant, choice)))
        for name, others in named
        for variant, choices in spec.variants.items()
        for choice, v in choices.items()
        if (begun := v.spell(name)) is not None
    ]
    found = []
    for name, choices in named:
        ways = [Spelling(name, rule.parsed, choices)]
        for variant, choice, axis in reversed(folds):
            if any(n.axis == axis for n in named_axes(name)):
                other = next((c for c, v in spec.variants[variant].items() if not v.fold), "")
                folded = [Spelling(*fold(w.pattern, w.layout, axis), (*w.choices, (variant, choice))) for w in ways]
                ways = folded + [Spelling(w.pattern, w.layout, (*w.choices, (variant, other))) for w in ways]
        found += ways
    return found


def sharded(pattern: str, dim: str) -> bool:
    """Does a parallel dimension shard an axis of the name?"""
    return any(named.shard == dim for named in named_axes(pattern))


def replicated(spec: FormatSpec) -> dict[str, frozenset[str]]:
    """Parallel dimension -> axes that are repeated where they are shorter than it."""
    return {dim: frozenset(axes) for dim, axes in spec.replicate.items()}


def without(fragment: Fragment, axes: Sequence[str]) -> Fragment:
    """The fragment without axes along which every member holds one index."""
    keep = [k for k, axis in enumerate(fragment.axes) if axis not in axes]
    return Fragment(
        fragment.tensor,
        tuple(fragment.axes[k] for k in keep),
        tuple(fragment.lo[k] for k in keep),
        tuple(fragment.size[k] for k in keep),
        tuple(fragment.stride[k] for k in keep),
        fragment.offset,
    )
