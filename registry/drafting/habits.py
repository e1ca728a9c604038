"""Habits of naming: what the known architectures call their tensors, and which of it fits tensors of an unknown one.

Stored names become templates, in which each index is `{}`; a rule of a known spec is a habit, and its last segments are
compared with a template's. A habit fits where its layout gives the very shapes that are stored, on sizes that the
unknown config says in the fields of the habit's own spec.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from attrs import field, frozen

from registry import catalog, expressions
from registry.boxes import Box, shape
from registry.config_rules import ConfigMap, FactMap
from registry.errors import RegistryError
from registry.layout import parse
from registry.model import read_facts
from registry.specs import ArchitectureSpec
from registry.tensor_rules import AXIS, Rule, named_axes

Shape = tuple[int, ...]
#: Names that end alike in fewer segments than this say nothing about each other.
_ALIKE = 2
#: An index of so few values, each with tensors of its own, is part of the name: `layer.0`, `layer.1`.
_FEW = 4
_HOLE = "{}"


@frozen(eq=False)
class Template:
    """Tensors whose names differ by indices alone: their shapes by index, in the order of the holes."""

    name: str
    shapes: Mapping[tuple[int, ...], Shape]

    @property
    def segments(self) -> list[str]:
        """The name, taken apart at its dots."""
        return self.name.split(".")

    @property
    def holes(self) -> int:
        """How many indices the names have."""
        return self.segments.count(_HOLE)

    def counts(self, hole: int) -> list[int]:
        """The values of one index, sorted."""
        return sorted({index[hole] for index in self.shapes})


def templates(tensors: Mapping[str, Shape], layers: int | None = None) -> list[Template]:
    """The templates of stored names, in the order in which they first appear.

    Of layers beyond the last one, where the config says how many there are, the number is part of the name.
    """
    literal = _literal(tensors)
    found: dict[str, dict[tuple[int, ...], Shape]] = defaultdict(dict)
    for name, size in tensors.items():
        segments: list[str] = name.split(".")
        index: list[int] = []
        for i, segment in enumerate(segments):
            beyond = not index and layers is not None and segment.isdecimal() and int(segment) >= layers > 0
            if segment.isdecimal() and not beyond and _holed(segments[:i]) not in literal:
                index.append(int(segment))
                segments[i] = _HOLE
        found[".".join(segments)][tuple(index)] = size
    return [Template(name, shapes) for name, shapes in found.items()]


def _holed(segments: Iterable[str]) -> str:
    return ".".join(_HOLE if segment.isdecimal() else segment for segment in segments)


def _literal(names: Iterable[str]) -> set[str]:
    """Beginnings of names after which a number is no index: each of the few has tensors of its own."""
    below: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        segments = name.split(".")
        for i, segment in enumerate(segments):
            if segment.isdecimal() and any(before.isdecimal() for before in segments[:i]):
                below[_holed(segments[:i])][segment].add(_holed(segments[i + 1 :]))
    return {
        head
        for head, inside in below.items()
        if 1 < len(inside) <= _FEW and len(set.intersection(*inside.values())) * 2 < max(map(len, inside.values()))
    }


@frozen(eq=False)
class Known:
    """A known architecture, asked about an unknown model: its facts by the model's config, and the sizes they give.

    `entries` are where the facts are read: in its own fields, or where the config has none of those, in another's.
    """

    spec: ArchitectureSpec
    facts: Mapping[str, Any]
    entries: Mapping[str, FactMap]
    _sizes: dict[tuple[str, int], int | None] = field(factory=dict)

    def size(self, axis: str, layer: int) -> int | None:
        """The size of an axis, at one index of the axis that it differs along; None where the facts do not say."""
        key = axis, layer
        if key not in self._sizes:
            self._sizes[key] = evaluated_size(self.spec.axes.get(axis, "none"), self.spec.axes, self.facts, layer)
        return self._sizes[key]

    def names(self, text: str) -> list[str]:
        """The facts that an expression reads: a fact may be called as its axis is."""
        own = self.spec.axes.keys() - self.spec.facts.keys() - self.spec.config.facts.keys()
        return sorted(expressions.parse(text).names - own)

    def expected(self) -> set[str]:
        """The templates that a model of this architecture would have, as far as the facts say."""
        return {
            AXIS.sub(_HOLE, pattern)
            for pattern, rule in self.spec.rules()
            if rule.optional is None and not rule.replica and rule.choice is None and self.holds(rule, 0)
        }

    def holds(self, rule: Rule, layer: int) -> bool | None:
        """Is the condition of a rule true of a layer? None where the facts do not say."""
        if rule.when is None:
            return True
        axes = dict.fromkeys(self.spec.axes, layer)  # below the facts: those may be called the same
        try:
            return bool(expressions.parse(rule.when)({**axes, **self.facts}))
        except RegistryError:
            return None


def evaluated_size(text: str, axes: Iterable[str], facts: Mapping[str, Any], layer: int) -> int | None:
    """What an axis' expression gives at an index of whichever axis it names, or None."""
    try:
        size = expressions.parse(text)({**dict.fromkeys(axes, layer), **facts})
    except RegistryError:
        return None
    return size if type(size) is int and size >= 0 else None


def known(document: Mapping[str, Any], leave: Collection[str], facts: Mapping[str, Any]) -> list[Known]:
    """Every known architecture but those in `leave`; `facts` are certain, whatever their specs read.

    What the config says in a field of one family's takes the place of another family's default.
    """
    specs = [catalog.architecture(name) for name in catalog.names("architecture") if name not in leave]
    read = [_read(document, spec.config) for spec in specs]
    said: dict[str, Counter[str]] = defaultdict(Counter)
    entries: dict[str, tuple[Any, FactMap]] = {}
    for spec, own in zip(specs, read, strict=True):
        for name, entry in spec.config.facts.items():
            if own.get(name) is not None and mentions(document, spec, name):
                key = f"{own[name]!r} {entry!r}"
                said[name][key] += 1
                entries[key] = own[name], entry
    borrowed = {name: entries[votes.most_common(1)[0][0]] for name, votes in said.items()}
    found = []
    for spec, own in zip(specs, read, strict=True):
        mine = {k: (own.get(k), entry) for k, entry in spec.config.facts.items()}
        for name, (_, entry) in list(mine.items()):
            if name in borrowed and entry.read is None and not mentions(document, spec, name):
                mine[name] = borrowed[name]
        values = {name: value for name, (value, _) in mine.items() if value is not None}
        found.append(Known(spec, {**values, **spec.facts, **facts}, {name: entry for name, (_, entry) in mine.items()}))
    return found


def mentions(document: Mapping[str, Any], spec: ArchitectureSpec, fact: str) -> bool:
    """Does a config hold a field in which a spec looks for a fact?"""
    return any(_said(document, path) for path in spec.config.paths(fact))


def _said(document: Mapping[str, Any], path: str) -> bool:
    value: Any = document
    for step in path.split("."):
        if not isinstance(value, Mapping) or step not in value:
            return False
        value = value[step]
    return True


def _read(document: Mapping[str, Any], config: ConfigMap) -> dict[str, Any]:
    """The facts of a document that may be another family's: those that can be read."""
    with suppress(RegistryError):
        return read_facts(document, config)
    found: dict[str, Any] = {}
    for name, entry in config.facts.items():
        with suppress(RegistryError):
            found |= read_facts(document, config.model_copy(update={"facts": {name: entry}}))
    return found


@frozen(eq=False)
class Habit:
    """A rule of a known architecture, under one of its names."""

    known: Known
    pattern: str
    rule: Rule
    segments: tuple[str, ...]
    alike: int

    @property
    def axes(self) -> list[str]:
        """The axes in its name."""
        return [named.axis for named in named_axes(self.pattern)]

    @property
    def whole(self) -> bool:
        """Is the name the template's whole name?"""
        return self.alike == len(self.segments)


class Habits:
    """The rules of known architectures, by how their names end."""

    def __init__(self, those: Iterable[Known]) -> None:
        self._by_end: dict[str, list[Habit]] = defaultdict(list)
        for one in those:
            for pattern, rule in one.spec.rules():
                if rule.replica or any(named.plus for named in named_axes(pattern)):
                    continue
                for name in {pattern: None, **dict.fromkeys(rule.names.values())}:
                    segments = tuple(re.sub(AXIS, _HOLE, name).split("."))
                    self._by_end[segments[-1]].append(Habit(one, name, rule, segments, 0))

    def like(self, template: Template) -> Iterator[Habit]:
        """Rules of as many indices whose names end as the template's do."""
        own = template.segments
        for habit in self._by_end.get(own[-1], ()):
            alike = 0
            for a, b in zip(reversed(own), reversed(habit.segments), strict=False):
                if a != b:
                    break
                alike += 1
            whole = alike == len(own) == len(habit.segments)
            if (whole or alike >= _ALIKE) and habit.segments.count(_HOLE) == template.holes:
                yield Habit(habit.known, habit.pattern, habit.rule, habit.segments, alike if not whole else len(own))


def fits(habit: Habit, template: Template) -> bool:
    """Does the layout give every shape that is stored?"""
    for hole, axis in enumerate(habit.axes):
        size, count = habit.known.size(axis, 0) or 0, template.counts(hole)[-1] + 1
        if size < count or (hole and size > count):  # some layers have no such tensor; each of those has all experts
            return False
    layout = parse(habit.rule.shape or habit.rule.layout)
    axes = {axis for axes in layout.axes.values() for axis in axes}
    seen: set[tuple[int, Shape]] = set()
    for index, stored in template.shapes.items():
        layer = index[0] if index else 0
        if (layer, stored) in seen:
            continue
        seen.add((layer, stored))
        sizes = {axis: habit.known.size(axis, layer) for axis in axes}
        if None in sizes.values():
            return False
        try:
            if shape(layout, Box({axis: size or 0 for axis, size in sizes.items()})) != stored:
                return False
        except RegistryError:
            return False
    return True
