"""The stored tensors of a source and a target as plain data, from which a page draws them.

What members of a group have in common is said once, and names and indices are columns of numbers that groups share: a
hundred thousand tensors are about a megabyte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from attrs import field, frozen

from registry.groups import Group, Ints
from registry.model import LogicalModel
from registry.pictures.geometry import Picture, picture
from registry.storage import Piece, Rank, Slot

#: Stored tensors, and groups of them, that one side of a page has at most.
MOST_TENSORS = 500_000
MOST_GROUPS = 4_000

_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")


@frozen(eq=False)
class Side:
    """One side of a page: which members, by their positions, of which groups. `entries` are all pieces or slots."""

    title: str
    format: str
    ranked: bool
    entries: Sequence[Piece | Slot]
    picks: Sequence[tuple[Group, Ints]]


def everything(groups: Sequence[Group]) -> list[tuple[Group, Ints]]:
    """All members of all groups."""
    return [(group, np.arange(len(group.members))) for group in groups]


def spoken(rank: Rank) -> str:
    """A rank in words, `tp 1 pp 0`; of the dimensions beside these two only those along which it is not the first."""
    return " ".join(f"{dim} {at}" for dim, at in rank._asdict().items() if at or dim in ("tp", "pp"))


@frozen(eq=False)
class _Tables:
    """What groups share, each thing once, in the order in which it was first met."""

    model: LogicalModel
    axes: dict[str, int] = field(factory=dict)
    tensors: dict[str, int] = field(factory=dict)
    ranks: dict[Rank, int] = field(factory=dict)
    pictures: dict[tuple[Any, ...], int] = field(factory=dict)
    drawn: list[Any] = field(factory=list)
    columns: dict[bytes, int] = field(factory=dict)

    def axis(self, name: str) -> int:
        return self.axes.setdefault(name, len(self.axes))

    def tensor(self, name: str) -> int:
        self.tensors.setdefault(self.model.home(name), len(self.tensors))
        return self.tensors.setdefault(name, len(self.tensors))

    def column(self, values: Ints) -> int | list[int]:
        """A column: its one value, or in a list the number of the column in the table."""
        if len(values) and (values == values[0]).all():
            return int(values[0])
        return [self.columns.setdefault(np.asarray(values, dtype=np.int64).tobytes(), len(self.columns))]

    def picture(self, drawn: Picture) -> int:
        """The number of a picture. Ranks hold the same picture of other boxes, so the boxes are not part of it."""
        axes = [[[self.axis(a.axis), a.size, a.rows, a.columns] for a in part.axes] for part in drawn.parts]
        parts = [[part.row, part.column, own] for part, own in zip(drawn.parts, axes, strict=True)]
        key = (drawn.shape, drawn.rows, drawn.columns, drawn.begin, str(parts))
        if key not in self.pictures:
            self.pictures[key] = len(self.drawn)
            self.drawn.append([drawn.shape, drawn.rows, drawn.columns, drawn.begin, drawn.shown, parts])
        return self.pictures[key]


def scene(title: str, facts: Iterable[tuple[str, str]], sides: Sequence[Side], model: LogicalModel) -> dict[str, Any]:
    """All that a page shows, as plain data; see page.js for what reads it."""
    tables = _Tables(model)
    kept, left_out = _capped(sides)
    shown = []
    for side, picks in zip(sides, kept, strict=True):
        groups = [group for pick in picks for group in _groups(side, *pick, tables)]
        shown.append({"title": side.title, "format": side.format, "groups": groups})
    homes = {name: model.home(name) for name in tables.tensors}
    labels = _labels(list(homes))
    return {
        "title": title,
        "facts": list(facts),
        "leftOut": left_out,
        "sides": shown,
        "tensors": [
            [name, labels[name], tables.tensors[home], [tables.axis(axis) for axis in model.tensors.get(home, ())]]
            for name, home in homes.items()
        ],
        "axes": list(tables.axes),
        "ranks": [spoken(rank) for rank in tables.ranks],
        "pictures": tables.drawn,
        "columns": [np.frombuffer(column, dtype=np.int64).tolist() for column in tables.columns],
    }


def _groups(side: Side, group: Group, chosen: Ints, tables: _Tables) -> Iterator[dict[str, Any]]:
    """One group, cut where names, whole shapes or ranks cannot be said as columns of numbers."""
    entries = [side.entries[member] for member in group.members[chosen].tolist()]
    alike: dict[tuple[Any, ...], list[int]] = {}
    numbers = []
    for k, entry in enumerate(entries):
        texts = _NUMBER.split(entry.name)
        numbers.append([int(text) for text in texts[1::2]])
        alike.setdefault((*texts[::2], entry.whole), []).append(k)
    first = entries[0]
    drawn = picture(
        group.shape, group.fragments, strides=getattr(first, "strides", None), stretch=getattr(first, "stretch", None)
    )
    number = tables.picture(drawn)
    for (*texts, whole), where in alike.items():
        names = np.array([numbers[k] for k in where], dtype=np.int64).reshape(len(where), len(texts) - 1)
        spelled: list[Any] = [texts[0]]
        for d, text in enumerate(texts[1:]):
            spelled += [tables.column(names[:, d]), text]
        found = [entries[k] for k in where]
        made: dict[str, Any] = {
            "n": len(where), "name": spelled, "rule": group.pattern, "layout": group.layout, "dtype": group.dtype,
            "values": str(group.coding), "picture": number, "tensors": [tables.tensor(p.tensor) for p in drawn.parts],
            "lo": [[a.lo for a in p.axes] for p in drawn.parts],
            "index": [[tables.axis(a), tables.column(column[chosen][where])] for a, column in group.index.items()],
        }  # fmt: skip
        if side.ranked:
            ranks = [tables.ranks.setdefault(entry.rank or Rank(), len(tables.ranks)) for entry in found]
            made["rank"] = tables.column(np.array(ranks, dtype=np.int64))
        if whole is not None and first.origin is not None:
            origins = np.array([entry.origin for entry in found], dtype=np.int64)
            made |= {"whole": whole, "origin": [tables.column(origins[:, d]) for d in range(origins.shape[1])]}
        yield made


def _labels(names: Sequence[str]) -> dict[str, str]:
    """A short label for each tensor: the last steps of its name that no other one has."""
    steps = {name: name.removesuffix(".weight").split(".") for name in names}
    labels = {}
    for name, own in steps.items():
        n = next((n for n in range(1, len(own)) if sum(o[-n:] == own[-n:] for o in steps.values()) == 1), len(own))
        labels[name] = ".".join(own[-n:])
    return labels


def _firsts(group: Group, chosen: Ints) -> Ints:
    """Each member's index along the first axis that tells members apart."""
    return next(iter(group.index.values()))[chosen] if group.index else np.zeros(len(chosen), dtype=np.int64)


def _capped(sides: Sequence[Side]) -> tuple[list[list[tuple[Group, Ints]]], list[str]]:
    """What fits on a page, the same indices on both sides, and what was left out, in words."""
    kept, said, end = [], [], None
    for side in sides:
        picks = list(side.picks)
        if len(picks) > MOST_GROUPS:
            picks.sort(key=lambda pick: side.entries[int(pick[0].members[0])].rank or Rank())
        kept.append(picks[:MOST_GROUPS])
        counts = np.bincount(np.concatenate([_firsts(*pick) for pick in kept[-1]] or [np.zeros(0, np.int64)]))
        if counts.sum() > MOST_TENSORS:
            fitting = max(int(np.searchsorted(np.cumsum(counts), MOST_TENSORS, "right")), 1)
            end = fitting if end is None else min(end, fitting)
    for n, (side, picks) in enumerate(zip(sides, kept, strict=True)):
        if end is not None:
            cut = [(group, chosen[_firsts(group, chosen) < end]) for group, chosen in picks]
            kept[n] = [(group, chosen[:MOST_TENSORS]) for group, chosen in cut if len(chosen)]
        there, here = (sum(len(chosen) for _, chosen in of) for of in (side.picks, kept[n]))
        if here < there:
            said.append(f"{side.title}: {here:,} of {there:,} stored tensors are drawn, of the first indices and ranks")
    return kept, said
