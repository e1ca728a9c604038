"""Plan the copies that make a target out of a source, and prove that they are complete.

Both sides are groups of fragments: boxes of logical tensors at affine positions. For each target group and each source
group of the same tensor, the fixed axes overlap in one box and the index axes are joined; that gives a `Copies`: one
strided copy, repeated at many places. Nothing here reads data.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from attrs import define, field, frozen

from registry.bind import Bound
from registry.boxes import Fragment
from registry.dtypes import ITEMSIZE
from registry.errors import MappingError
from registry.groups import Coding, Group, Ints
from registry.model import LogicalModel
from registry.problems import collapse
from registry.storage import Opened, Piece, Slot


@frozen(eq=False)
class Values:
    """What happens to the values on the way: None of it for a plain copy of bytes."""

    source_dtype: str
    target_dtype: str
    source: Coding
    target: Coding

    @property
    def plain(self) -> bool:
        """Do the bytes travel as they are?"""
        return self.source_dtype == self.target_dtype and self.source == self.target


@frozen(eq=False)
class Copies:
    """One strided copy, repeated.

    `size` are the extents of the box, outermost first, and `source_stride` and `target_stride` its strides in elements.
    Copy k reads member `source[k]` of the source's pieces from element `source_offset[k]` and writes slot `target[k]`
    from element `target_offset[k]`.
    """

    tensor: str
    size: tuple[int, ...]
    source_stride: tuple[int, ...]
    target_stride: tuple[int, ...]
    values: Values
    source: Ints
    source_offset: Ints
    target: Ints
    target_offset: Ints

    @property
    def volume(self) -> int:
        """Elements that one copy moves."""
        return math.prod(self.size)


@define
class Plan:
    """Every copy of a conversion. `replicas` are pairs of source boxes that must hold the same bytes."""

    copies: list[Copies] = field(factory=list)
    replicas: list[Copies] = field(factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that will be written from the source."""
        return sum(c.volume * len(c.source) * ITEMSIZE[c.values.target_dtype] for c in self.copies)


def merge(
    size: Sequence[int], a: Sequence[int], b: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The same strided copy in the fewest dimensions, ordered by falling `b` stride."""
    dims = sorted(((sb, n, sa) for n, sa, sb in zip(size, a, b, strict=True) if n != 1), reverse=True)
    merged: list[tuple[int, int, int]] = []
    for sb, n, sa in dims:
        if merged and merged[-1][0] == sb * n and merged[-1][2] == sa * n:
            merged[-1] = (sb, merged[-1][1] * n, sa)
        else:
            merged.append((sb, n, sa))
    return tuple(n for _, n, _ in merged), tuple(s for _, _, s in merged), tuple(s for s, _, _ in merged)


@frozen(eq=False)
class _Side:
    """One fragment of one group: fixed axes as intervals, index axes as columns."""

    group: Group
    fragment: Fragment
    lo: dict[str, int]
    size: dict[str, int]
    stride: dict[str, int]

    @property
    def tensor(self) -> str:
        return self.fragment.tensor


def _sides(groups: Iterable[Group], model: LogicalModel) -> dict[str, list[_Side]]:
    """Every fragment under its tensor. Raises MappingError for a layout over other axes than its tensor has."""
    found: dict[str, list[_Side]] = defaultdict(list)
    for group in groups:
        for f in group.fragments:
            axes = {*f.axes, *group.index}
            if axes != set(model.tensors[model.home(f.tensor)]):
                raise MappingError(
                    f"a layout disagrees about the axes of {f.tensor}", where=f"{group.pattern}: {group.layout}",
                    expected=" ".join(model.tensors[model.home(f.tensor)]), found=" ".join(sorted(axes)),
                    hint="correct the spec",
                )  # fmt: skip
            side = _Side(
                group, f, dict(zip(f.axes, f.lo, strict=True)), dict(zip(f.axes, f.size, strict=True)),
                dict(zip(f.axes, f.stride, strict=True)),
            )  # fmt: skip
            found[model.home(f.tensor)].append(side)
    return found


def _overlap(target: _Side, source: _Side) -> dict[str, tuple[int, int]] | None:
    """The fixed axes that both sides have, as (lo, size) of their overlap; None if there is none."""
    box = {}
    for axis, lo in target.lo.items():
        if axis in source.lo:
            first = max(lo, source.lo[axis])
            size = min(lo + target.size[axis], source.lo[axis] + source.size[axis]) - first
            if size <= 0:
                return None
            box[axis] = (first, size)
    return box


def _join(target: _Side, source: _Side, sizes: dict[str, int]) -> tuple[Ints, Ints]:
    """Positions (in the target's members, in the source's) of members whose index axes agree."""
    t, s = target.group, source.group
    keep_t = np.ones(len(t.members), dtype=bool)
    keep_s = np.ones(len(s.members), dtype=bool)
    key_t = np.zeros(len(t.members), dtype=np.int64)
    key_s = np.zeros(len(s.members), dtype=np.int64)
    for axis, column in t.index.items():
        if axis in s.index:
            key_t, key_s = key_t * sizes[axis] + column, key_s * sizes[axis] + s.index[axis]
        elif axis in source.lo:
            keep_t &= (column >= source.lo[axis]) & (column < source.lo[axis] + source.size[axis])
    for axis, column in s.index.items():
        if axis not in t.index and axis in target.lo:
            keep_s &= (column >= target.lo[axis]) & (column < target.lo[axis] + target.size[axis])
    at_t, at_s = np.flatnonzero(keep_t), np.flatnonzero(keep_s)
    order = at_s[np.argsort(key_s[at_s], kind="stable")]
    left = np.searchsorted(key_s[order], key_t[at_t], "left")
    counts = np.searchsorted(key_s[order], key_t[at_t], "right") - left
    starts = np.repeat(left - np.concatenate(([0], np.cumsum(counts)[:-1])), counts) if len(counts) else left
    return np.repeat(at_t, counts), order[starts + np.arange(counts.sum())]


def _copies(target: _Side, source: _Side, model: LogicalModel) -> Copies | None:
    box = _overlap(target, source)
    if box is None:
        return None
    at_t, at_s = _join(target, source, model.sizes)
    if not len(at_t):
        return None
    source_offset = np.full(len(at_t), source.fragment.offset, dtype=np.int64)
    target_offset = np.full(len(at_t), target.fragment.offset, dtype=np.int64)
    for axis, (lo, _) in box.items():
        source_offset += (lo - source.lo[axis]) * source.stride[axis]
        target_offset += (lo - target.lo[axis]) * target.stride[axis]
    for axis, column in target.group.index.items():
        if axis in source.lo:
            source_offset += (column[at_t] - source.lo[axis]) * source.stride[axis]
    for axis, column in source.group.index.items():
        if axis in target.lo:
            target_offset += (column[at_s] - target.lo[axis]) * target.stride[axis]
    axes = list(box)
    size, source_stride, target_stride = merge(
        [box[a][1] for a in axes], [source.stride[a] for a in axes], [target.stride[a] for a in axes]
    )
    values = Values(source.group.dtype, target.group.dtype, source.group.coding, target.group.coding)
    return Copies(
        target.tensor, size, source_stride, target_stride, values,
        source.group.members[at_s], source_offset, target.group.members[at_t], target_offset,
    )  # fmt: skip


def _boxes(side: _Side, axes: Sequence[str]) -> Ints:
    """A row a member: (lo, size) along every axis of the tensor."""
    columns = []
    for axis in axes:
        index = side.group.index.get(axis)
        lo = np.full(len(side.group.members), side.lo[axis]) if index is None else index
        columns += [lo, np.full(len(lo), side.size.get(axis, 1))]
    return np.stack(columns, axis=1) if columns else np.zeros((len(side.group.members), 0), dtype=np.int64)


def _primaries(
    sides: list[_Side], axes: Sequence[str], whole: int, model: LogicalModel
) -> tuple[list[_Side], list[_Side], int]:
    """The sides with every element once, those with the repeats, and the volume of what is kept."""
    rows = np.concatenate([_boxes(side, axes) for side in sides])
    _, first = np.unique(rows, axis=0, return_index=True)
    is_first = np.zeros(len(rows), dtype=bool)
    is_first[first if rows.shape[1] else [0]] = True
    kept: list[_Side] = []
    repeats: list[_Side] = []
    start = 0
    for side in sides:
        mask = is_first[start : start + len(side.group.members)]
        start += len(mask)
        for chosen, into in ((mask, kept), (~mask, repeats)):
            if chosen.any():
                into.append(_subset(side, chosen))
    volume = sum(side.fragment.volume * len(side.group.members) for side in kept)
    return (kept, repeats, volume) if volume <= whole else _nested(kept, repeats, model)


def _overlapping(sides: list[_Side], axes: Sequence[str]) -> bool:
    """Do any two of the boxes share an element? Equal volumes prove nothing: a hole may be as large as an overlap.

    The boxes are counted on the grid that all of their edges make, by differences at their corners.
    """
    rows = np.concatenate([_boxes(side, axes) for side in sides])
    low, high, shape = [], [], []
    for k in range(len(axes)):
        begin, end = rows[:, 2 * k], rows[:, 2 * k] + rows[:, 2 * k + 1]
        edges = np.unique(np.concatenate((begin, end)))
        if len(edges) > 2:
            low.append(np.searchsorted(edges, begin))
            high.append(np.searchsorted(edges, end))
            shape.append(len(edges))
    if math.prod(shape) > 64 * len(rows) + 4096:  # no program cuts a tensor like this
        return True
    counts = np.zeros(shape, dtype=np.int64)
    for corner in itertools.product((0, 1), repeat=len(shape)):
        at = tuple(high[k] if c else low[k] for k, c in enumerate(corner))
        np.add.at(counts, at, -1 if sum(corner) % 2 else 1)
    for k in range(len(shape)):
        np.cumsum(counts, axis=k, out=counts)
    return bool(counts.max() > 1) if shape else len(rows) > 1


def _nested(sides: list[_Side], repeats: list[_Side], model: LogicalModel) -> tuple[list[_Side], list[_Side], int]:
    """Where boxes differ and overlap (a whole embedding beside its shards), what earlier ones cover is a repeat."""
    kept: list[_Side] = []
    for side in sides:
        covered = np.zeros(len(side.group.members), dtype=np.int64)
        for other in kept:
            copies = _copies(side, other, model)
            if copies is not None:
                np.add.at(covered, _positions(side.group.members, copies.target), copies.volume)
        mask = covered >= side.fragment.volume
        for chosen, into in ((mask, repeats), (~mask, kept)):
            if chosen.any():
                into.append(_subset(side, chosen))
    return kept, repeats, sum(side.fragment.volume * len(side.group.members) for side in kept)


def _positions(members: Ints, wanted: Ints) -> Ints:
    """Where each wanted member stands among the members, which are in any order."""
    order = np.argsort(members, kind="stable")
    return order[np.searchsorted(members[order], wanted)]


def _subset(side: _Side, mask: np.ndarray) -> _Side:
    if mask.all():
        return side
    g = side.group
    group = Group(
        g.pattern,
        g.layout,
        g.coding,
        g.dtype,
        g.shape,
        g.fragments,
        g.members[mask],
        {a: c[mask] for a, c in g.index.items()},
    )
    return _Side(group, side.fragment, side.lo, side.size, side.stride)


def _names(sides: Iterable[_Side], entries: Sequence[Piece] | Sequence[Slot]) -> Iterator[str]:
    for side in sides:
        for member in side.group.members:
            yield entries[member].name


def make_plan(
    source: Bound, opened: Opened, target: Sequence[Group], slots: Sequence[Slot], model: LogicalModel
) -> Plan:
    """Plan every copy. Raises MappingError unless each target element is written exactly once and nothing is lost."""
    plan, problems = Plan(), []
    sources, targets = _sides(source.groups, model), _sides(target, model)
    for tensor, axes in model.tensors.items():
        whole = model.volume(tensor)
        if not whole:
            continue
        if tensor not in sources:
            if tensor not in model.architecture.spare:
                problems.append(f"{tensor}: the source lacks it")
            continue
        kept, repeats, volume = _primaries(sources[tensor], axes, whole, model)
        if volume != whole or _overlapping(kept, axes):
            names = sorted(set(_names(kept, opened.pieces)))
            what = "holds only" if volume < whole else "holds overlapping pieces:"
            problems.append(
                f"{tensor}: the source {what} {volume} of {whole} elements, in {'; '.join(collapse(names, 3))}"
            )
            continue
        for side in targets.get(tensor, []):
            made = [copies for other in kept if (copies := _copies(side, other, model)) is not None]
            problems += _uncovered(side, made, slots)
            plan.copies += made
        for repeat in repeats:
            plan.replicas += [copies for other in kept if (copies := _copies(repeat, other, model)) is not None]
    if source.missing and problems:
        problems += [f"missing from the source: {name}" for name in collapse(source.missing)]
    if problems:
        raise MappingError(
            "the source does not fill the target",
            where=opened.path,
            details=problems,
            hint="check that no file is missing and that the config belongs to these tensors",
        )
    return plan


def _uncovered(side: _Side, made: Sequence[Copies], slots: Sequence[Slot]) -> list[str]:
    """Members of a target group that are not written exactly once."""
    members = side.group.members
    written = np.zeros(len(members), dtype=np.int64)
    for copies in made:
        np.add.at(written, _positions(members, copies.target), copies.volume)
    wrong = np.flatnonzero(written != side.fragment.volume)
    if not len(wrong):
        return []
    names = collapse(sorted({slots[members[i]].name for i in wrong}), 3)
    return [f"{side.tensor}: {written[wrong[0]]} of {side.fragment.volume} elements written in {'; '.join(names)}"]
