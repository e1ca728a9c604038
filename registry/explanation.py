"""explain(): what a stored tensor is made of, logical box by logical box, and where each lies in another format."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from attrs import asdict, field, frozen

from registry import catalog
from registry.boxes import Fragment, contiguous
from registry.errors import MappingError
from registry.groups import Group
from registry.model import LogicalModel
from registry.parallel import Parallel
from registry.pictures.geometry import position
from registry.pictures.page import page
from registry.pictures.scene import Side, scene
from registry.places import is_path
from registry.prepare import fitted, merged_options, prepare_target
from registry.source import Source
from registry.storage import Opened, Piece, Rank, Slot
from registry.tables import Shown, Table

Box = dict[str, tuple[int, int]]


@frozen
class Place:
    """Where a logical box, or what overlaps it, lies on the other side: `box` of it begins at the element `first`."""

    name: str
    rank: dict[str, int] | None
    box: Box
    first: tuple[int, ...]


@frozen
class Part:
    """A logical box that a stored tensor holds: axis -> [low, high). It begins at the element `first` of the tensor."""

    tensor: str
    box: Box
    first: tuple[int, ...]
    places: tuple[Place, ...] = ()


@frozen
class Stored:
    """One stored tensor (or chunk of one, which begins at `origin` of a tensor of shape `whole`)."""

    name: str
    format: str
    rank: dict[str, int] | None
    dtype: str
    shape: tuple[int, ...]
    origin: tuple[int, ...] | None
    whole: tuple[int, ...] | None
    file: str | None
    begin: int | None
    rule: str
    layout: str
    values: str | None
    parts: tuple[Part, ...]


@frozen(repr=False)
class Explanation(Shown):
    """Every stored tensor of a name, or that holds a logical tensor; `to` is the other format, if one was asked for."""

    path: str
    tensor: str
    stored: tuple[Stored, ...]
    to: str | None = None
    _sides: tuple[Side, ...] = field(default=(), repr=False, eq=False)
    _model: LogicalModel | None = field(default=None, repr=False, eq=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self, filter=lambda attribute, _: not attribute.name.startswith("_"))

    def html(self) -> str:
        """A page that draws these stored tensors, source beside target: open it in any browser."""
        assert self._model is not None
        facts = [("checkpoint", self.path), ("tensor", self.tensor), *([("in terms of", self.to)] if self.to else [])]
        return page(scene(f"{self.tensor}: where it lies", facts, self._sides, self._model))

    def table(self) -> Table:
        """Every logical box, and where it lies on the other side."""
        rows = [
            (one.name + _spoken(one.rank), part.tensor, _shown(part.box), "; ".join(at.name for at in part.places))
            for one in self.stored
            for part in one.parts
        ]
        against = f", and in {self.to}" if self.to else ""
        return Table(f"{self.tensor} in {self.path}{against}", ("stored", "holds", "box", "other side"), rows)

    def __str__(self) -> str:
        return "\n".join(line for one in self.stored for line in _lines(one))


def _lines(one: Stored) -> Iterator[str]:
    yield f"{one.name}{_spoken(one.rank)}  in {one.format}"
    shape = f"{one.dtype} {list(one.shape)}"
    if one.origin is not None:
        shape += f", from {list(one.origin)} of {list(one.whole or ())}"
    yield f"  stored  {shape}" + (f"; {one.file} at byte {one.begin}" if one.file else "")
    yield f"  rule    {one.rule}: {one.layout}" + (f"   ({one.values})" if one.values else "")
    for part in one.parts:
        yield f"  holds   {part.tensor}  {_shown(part.box)}  from element {list(part.first)}"
        for place in part.places:
            box = "" if place.box == part.box else f"  {_shown(place.box)}"
            yield f"            {place.name}{_spoken(place.rank)}{box}  from element {list(place.first)}"


def _shown(box: Box) -> str:
    return ", ".join(f"{axis} {lo}" if hi == lo + 1 else f"{axis} {lo}..{hi - 1}" for axis, (lo, hi) in box.items())


def _spoken(rank: Mapping[str, int] | None) -> str:
    return "" if rank is None else " (" + " ".join(f"{dim} {at}" for dim, at in rank.items()) + ")"


@frozen(eq=False)
class _Side:
    """A source or a target: its groups, and the pieces or slots that are their members."""

    format: str
    groups: Sequence[Group]
    entries: Sequence[Piece | Slot]
    model: LogicalModel
    ranked: bool
    opened: Opened | None = None

    def named(self, name: str) -> list[tuple[Group, int]]:
        return [
            (group, k)
            for group in self.groups
            for k, member in enumerate(group.members.tolist())
            if self.entries[member].name == name
        ]

    def holding(self, tensor: str) -> list[tuple[Group, int]]:
        """The members that hold a logical tensor, `mlp.up.weight`, or of it one index of each first axis."""
        found = []
        for group in self.groups:
            for fragment in group.fragments:
                home = self.model.home(fragment.tensor)
                if tensor != home and not tensor.startswith(f"{home}."):
                    continue
                rest = tensor[len(home) :].lstrip(".")
                if not all(step.isdecimal() for step in rest.split(".") if rest):
                    continue
                at = [int(step) for step in rest.split(".") if step]
                wanted = {axis: (n, n + 1) for axis, n in zip(self.model.tensors[home], at, strict=False)}
                found += [(group, k) for k, _ in _overlaps(group, fragment, wanted)]
        return list(dict.fromkeys(found))

    def rank(self, entry: Piece | Slot) -> dict[str, int] | None:
        if not self.ranked:
            return None
        rank = entry.rank or Rank()
        return {dim: at for dim, at in rank._asdict().items() if at or dim in ("tp", "pp")}

    def stored(self, group: Group, k: int, other: _Side | None) -> Stored:
        entry = self.entries[int(group.members[k])]
        file = begin = None
        if self.opened is not None and isinstance(entry, Piece):
            path = self.opened.files[entry.file]
            if is_path(path):
                file, begin = os.path.relpath(path, self.opened.path), entry.begin
        parts = []
        for fragment in group.fragments:
            box = self.box(group, fragment, k)
            places = tuple(other.places(fragment.tensor, box)) if other is not None else ()
            parts.append(Part(fragment.tensor, box, _element(fragment.offset, entry), places))
        return Stored(
            entry.name, self.format, self.rank(entry), entry.dtype, entry.shape, entry.origin, entry.whole, file,
            begin, group.pattern, group.layout, str(group.coding) or None, tuple(parts),
        )  # fmt: skip

    def box(self, group: Group, fragment: Fragment, k: int) -> Box:
        """The logical box of a fragment in one member, in the order of the tensor's axes."""
        spans = {axis: (int(column[k]), int(column[k]) + 1) for axis, column in group.index.items()}
        ends = zip(fragment.lo, fragment.size, strict=True)
        spans |= {axis: (lo, lo + n) for axis, (lo, n) in zip(fragment.axes, ends, strict=True)}
        order = self.model.tensors.get(self.model.home(fragment.tensor), ())
        return {axis: spans[axis] for axis in dict.fromkeys([*(a for a in order if a in spans), *spans])}

    def places(self, tensor: str, box: Box) -> Iterator[Place]:
        """Everywhere that a part of a logical box lies."""
        for group, fragment, k, common in self.overlapping(tensor, box):
            entry = self.entries[int(group.members[k])]
            inner = zip(fragment.axes, fragment.lo, fragment.stride, strict=True)
            offset = fragment.offset + sum((common[a][0] - lo) * step for a, lo, step in inner)
            ordered = {axis: common[axis] for axis in box if axis in common}
            yield Place(entry.name, self.rank(entry), ordered, _element(offset, entry))

    def overlapping(self, tensor: str, box: Box) -> Iterator[tuple[Group, Fragment, int, Box]]:
        """Every member with a fragment that has something in common with a logical box, and what."""
        for group in self.groups:
            for fragment in group.fragments:
                if self.model.home(fragment.tensor) == self.model.home(tensor):
                    for k, common in _overlaps(group, fragment, box):
                        yield group, fragment, k, common

    def drawn(self, members: Iterable[tuple[Group, int]], title: str) -> Side:
        """These members as one side of a page."""
        picks: dict[int, tuple[Group, list[int]]] = {}
        for group, k in dict.fromkeys(members):
            picks.setdefault(id(group), (group, []))[1].append(k)
        return Side(
            title, self.format, self.ranked, self.entries, [(group, np.array(ks)) for group, ks in picks.values()]
        )


def _overlaps(group: Group, fragment: Fragment, box: Box) -> Iterator[tuple[int, Box]]:
    """(member, what its fragment has in common with a logical box), for those that have anything."""
    common: Box = {}
    for axis, lo, n in zip(fragment.axes, fragment.lo, fragment.size, strict=True):
        low, high = box.get(axis, (lo, lo + n))
        common[axis] = (max(lo, low), min(lo + n, high))
    if any(lo >= hi for lo, hi in common.values()):
        return
    keep = np.ones(len(group.members), dtype=bool)
    for axis, column in group.index.items():
        if axis in box:
            keep &= (column >= box[axis][0]) & (column < box[axis][1])
    for k in np.flatnonzero(keep).tolist():
        yield k, {axis: (int(column[k]), int(column[k]) + 1) for axis, column in group.index.items()} | common


def _element(offset: int, entry: Piece | Slot) -> tuple[int, ...]:
    """The index in the whole stored tensor of the element that lies at an offset of the piece."""
    strides, (begin, _) = getattr(entry, "strides", None), getattr(entry, "stretch", None) or (0, 0)
    index = position(offset + begin, entry.shape, contiguous(entry.shape) if strides is None else strides)
    return tuple(at + first for at, first in zip(index, entry.origin or (0,) * len(index), strict=True))


def explain(
    source: Source, tensor: str, to: str | None, parallel: Parallel | None, dtype: str | None,
    options: Mapping[str, Any] | None,
) -> Explanation:  # fmt: skip
    """Where a tensor's parts come from. `tensor` is a stored name of the source, a logical tensor, or, with `to`, a
    name of the target. Raises MappingError, which lists names that are near, for a tensor that is not there."""
    own = _Side(
        source.spec.name, source.bound.groups, source.opened.pieces, source.model, source.spec.ranked, source.opened
    )  # fmt: skip
    other = None
    if to is not None:
        spec = catalog.format_spec(to)
        layout, _ = fitted(spec, parallel or Parallel())
        made, target, _, _ = prepare_target(
            source, spec, layout, merged_options(spec, source.architecture, options), dtype
        )
        own = _Side(own.format, made.bound.groups, made.opened.pieces, made.model, own.ranked, made.opened)
        other = _Side(to, target.groups, target.slots, made.model, spec.ranked)
    sides = [(own, other), *([(other, own)] if other else [])]
    members = [(side, far, *member) for side, far in sides for member in side.named(tensor)]
    members = members or [(own, other, *member) for member in own.holding(tensor)]
    if not members:
        names = dict.fromkeys(entry.name for side, _ in sides for entry in side.entries)
        raise MappingError(
            f"there is no tensor {tensor!r}", where=source.opened.path, expected="a stored or logical tensor",
            found=", ".join(get_close_matches(tensor, [*names, *source.model.tensors], 3)) or "nothing like it",
            hint="give a name as registry inspect, or registry view with a pattern, shows it",
        )  # fmt: skip
    stored = tuple(side.stored(group, k, far) for side, far, group, k in members)
    titles = ["source", "target"] if other else ["stored"]
    drawn = tuple(side.drawn(_beside(side, members), title) for (side, _), title in zip(sides, titles, strict=True))
    return Explanation(str(source.opened.path), tensor, stored, to, drawn, own.model)


def _beside(side: _Side, members: Sequence[tuple[_Side, _Side | None, Group, int]]) -> Iterator[tuple[Group, int]]:
    """Of these members those of one side, and those of it that hold what the other side's do."""
    for own, far, group, k in members:
        if own is side:
            yield group, k
        elif far is side:
            for fragment in group.fragments:
                for found, _, at, _ in far.overlapping(fragment.tensor, own.box(group, fragment, k)):
                    yield found, at
