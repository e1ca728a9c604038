"""Bind a spec to a model: which stored tensors there are, and where in each of them every logical box lies.

Bound tensors come in groups. The members of a group have the same shape, type and fragments; they differ only along
`index` axes, where each member holds a single index: the layer and expert that a name spells, or a chunk of one layer
of a stacked tensor. That is what keeps planning fast: a hundred thousand tensors are a few dozen groups.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from typing import Any, NamedTuple

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from registry import boxes, expressions
from registry.boxes import Box, Fragment
from registry.errors import MappingError, RegistryError
from registry.layout import Axis, Layout
from registry.model import LogicalModel, rules_spec
from registry.parallel import Parallel, Stage
from registry.specs import AXIS, FormatSpec, Ignored, Rule, Spec
from registry.storage import Opened, Piece, Rank

Ints = NDArray[np.int64]


@frozen(eq=False)
class Group:
    """Stored tensors of one shape and type that differ only along `index` axes.

    `members` are indices into the pieces of a source or the slots of a target. `index[axis]` gives each member's index
    along an axis; the fragments leave those axes out.
    """

    pattern: str
    rule: Rule
    dtype: str
    shape: tuple[int, ...]
    fragments: tuple[Fragment, ...]
    members: Ints
    index: dict[str, Ints]


@define
class Bound:
    """Every group of a checkpoint, and what was found beside them."""

    groups: list[Group] = field(factory=list)
    missing: list[str] = field(factory=list)
    left_out: dict[str, str] = field(factory=dict)
    variants: dict[str, str] = field(factory=dict)
    padded: dict[str, int] = field(factory=dict)


def named_axes(pattern: str) -> list[tuple[str, str | None]]:
    """The (axis, parallel dimension) of a name pattern, in order."""
    return [(axis, dim or None) for axis, dim in AXIS.findall(pattern)]


def template_of(pattern: str) -> tuple[str, list[str]]:
    """The pattern as a %-format, and the axes that fill it."""
    return AXIS.sub("%d", pattern.replace("%", "%%")), [axis for axis, _ in named_axes(pattern)]


def fold(pattern: str, layout: Layout, axis: str) -> tuple[str, Layout]:
    """Take `{axis}` out of a name and make it the leading dimension of the tensor."""
    shard = dict(named_axes(pattern))[axis]
    mark = f"{{{axis}@{shard}}}" if shard else f"{{{axis}}}"
    return pattern.replace(f".{mark}", "", 1), layout.prepend(Axis(axis, shard))


@frozen
class Spelling:
    """One way that a rule's tensor may be named and dimensioned on disk, and the variant choices that it shows."""

    pattern: str
    layout: Layout
    choices: tuple[tuple[str, str], ...]


def spellings(spec: Spec, pattern: str, rule: Rule) -> list[Spelling]:
    """Every spelling of one rule, the one written by default first."""
    folds = [
        (variant, choice, v.fold)
        for variant, choices in spec.variants.items()
        for choice, v in choices.items()
        if v.fold
    ]
    named = [(pattern, ())] + [
        (name, ((variant, choice),))
        for choice, name in rule.names.items()
        for variant, choices in spec.variants.items()
        if choice in choices
    ]
    named += [(alias, ()) for alias in rule.aliases]
    found = []
    for name, choices in named:
        for variant, choice, axis in folds:
            if axis in dict(named_axes(name)):
                found.append(Spelling(*fold(name, rule.parsed, axis), (*choices, (variant, choice))))
                other = next((c for c, v in spec.variants[variant].items() if not v.fold), "")
                choices = (*choices, (variant, other))
        found.append(Spelling(name, rule.parsed, choices))
    return found


def local_stages(opened: Opened, patterns: Iterable[str]) -> list[Stage]:
    """The stages of a ranked checkpoint, from how many layers each file and model chunk holds.

    Counting what is there gets every uneven split right, whatever arguments made it.
    """
    heads = {expand_head(pattern) for pattern in patterns if "pp" in dict(named_axes(pattern)).values()}
    matchers = [re.compile(head) for head in sorted(heads)]
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for piece in opened.pieces:
        rank = piece.rank or Rank()
        key = (rank.vpp, rank.pp)
        counts[key] += 0
        for matcher in matchers:
            if match := matcher.match(piece.name):
                counts[key] = max(counts[key], int(match[1]) + 1)
                break
    stages, first = [], 0
    for (vpp, pp), count in sorted(counts.items()):
        stages.append(Stage(pp, vpp, first, count))
        first += count
    return stages


def expand_head(pattern: str) -> str:
    """A regular expression for the part of a name up to and including its pipeline-sharded index."""
    head = re.split(r"\{\w+@pp\}", pattern)[0]
    return re.escape(head) + r"(\d+)(?:\.|$)"


#: (rank, name, global index of each named axis, pieces) of one expected name.
Found = tuple[Rank | None, str, tuple[int, ...], tuple[int, ...]]


class _Kind(NamedTuple):
    """What the members of a group have in common.

    `lone` are the dimensions along which each piece holds a single index of a plain axis; `at` the indices of the rank
    along the dimensions that the layout shards over.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    whole: tuple[int, ...] | None
    origin: tuple[int, ...] | None
    lone: tuple[int, ...]
    at: tuple[int, ...]


def _kind(piece: Piece, single: Mapping[int, str], at: tuple[int, ...]) -> tuple[_Kind, tuple[int, ...]]:
    """The kind of a piece, and its index along each lone dimension."""
    if piece.origin is None:
        return _Kind(piece.dtype, piece.shape, piece.strides, piece.whole, None, (), at), ()
    lone = tuple(d for d in single if piece.shape[d : d + 1] == (1,))
    origin = tuple(0 if d in lone else o for d, o in enumerate(piece.origin))
    kind = _Kind(piece.dtype, piece.shape, piece.strides, piece.whole, origin, lone, at)
    return kind, tuple(piece.origin[d] for d in lone)


class _Reader:
    """Matches the pieces of a source to rules."""

    def __init__(self, opened: Opened, spec: FormatSpec, model: LogicalModel, parallel: Parallel) -> None:
        self.opened, self.spec, self.model, self.parallel = opened, spec, model, parallel
        self.table: dict[Rank | None, dict[str, int]] = defaultdict(dict)
        self.further: dict[tuple[Rank | None, str], list[int]] = defaultdict(list)
        for i, piece in enumerate(opened.pieces):
            names = self.table[piece.rank]
            if names.setdefault(piece.name, i) != i:  # further chunks of a tensor
                self.further[piece.rank, piece.name].append(i)
        self.claimed = np.zeros(len(opened.pieces), dtype=bool)
        self.bound = Bound()
        self.problems: list[str] = []
        self.stages: list[Stage] = []

    def take(self, pattern: str, rule: Rule) -> None:
        """Find every piece of one rule."""
        if not self.model.present.intersection(rule.parsed.tensors):
            return
        for spelling in self.spelled(pattern, rule):
            found = list(self.find(spelling))
            if any(indices for _, _, _, indices in found):
                break
        else:
            if not rule.optional and any(t in self.model.tensors for t in rule.parsed.tensors):
                first = self.spelled(pattern, rule)[0]
                self.bound.missing += [name for _, name, _, _ in self.find(first)] or [pattern]
            return
        for variant, choice in spelling.choices:
            self.bound.variants.setdefault(variant, choice)
        self.bound.missing += [name for _, name, _, indices in found if not indices and self.must(rule)]
        self.group(pattern, rule, spelling, found)

    def spelled(self, pattern: str, rule: Rule) -> list[Spelling]:
        return spellings(rules_spec(self.spec, self.model.architecture), pattern, rule)

    def must(self, rule: Rule) -> bool:
        return not rule.optional and not all(tensor in self.model.ties for tensor in rule.parsed.tensors)

    def find(self, spelling: Spelling) -> Iterable[Found]:
        """Every name that the spelling gives, in every file that may hold it."""
        template, axes = template_of(spelling.pattern)
        shards = dict(named_axes(spelling.pattern))
        for rank, names in self.table.items():
            spans = [self.span(axis, shards[axis], rank) for axis in axes]
            at = list(itertools.product(*(range(first, first + count) for first, count in spans)))
            local = list(itertools.product(*(range(count) for _, count in spans))) if rank is not None else at
            expected = rank is None or self.expected_on(rank, spelling)
            for values, name in zip(at, [template % shown for shown in local], strict=True):
                piece = names.get(name)
                if piece is None:
                    if expected:
                        yield rank, name, values, ()
                elif self.further:
                    yield rank, name, values, (piece, *self.further.get((rank, name), ()))
                else:
                    yield rank, name, values, (piece,)

    def expected_on(self, rank: Rank, spelling: Spelling) -> bool:
        """Must this rank's file have it? Only the layers say so; what sits on one stage is checked by coverage."""
        return "pp" in dict(named_axes(spelling.pattern)).values()

    def span(self, axis: str, shard: str | None, rank: Rank | None) -> tuple[int, int]:
        """(first, count) of a named axis in one file."""
        size = self.model.sizes[axis]
        if rank is None or shard is None:
            return 0, size
        if shard == "pp":
            stage = next((s for s in self.stages if (s.pp, s.vpp) == (rank.pp, rank.vpp)), None)
            return (stage.first, stage.count) if stage else (0, 0)
        return boxes.interval(size, getattr(rank, shard), self.parallel.size(shard), f"{axis}@{shard}")

    def group(self, pattern: str, rule: Rule, spelling: Spelling, found: list[Found]) -> None:
        """Sort the pieces of one rule into groups."""
        layout = spelling.layout
        single = {
            d: dim.name for d, dim in enumerate(layout.dims) if isinstance(dim, Axis) and dim.name not in rule.pad
        }
        shards = sorted(layout.sharded_over() - {"pp"})
        kinds: dict[_Kind, tuple[list[int], list[tuple[int, ...]]]] = {}
        for rank, _, values, indices in found:
            at = tuple(getattr(rank, dim) for dim in shards) if rank is not None else ()
            for i in indices:
                kind, lone = _kind(self.opened.pieces[i], single, at)
                members, index = kinds.setdefault(kind, ([], []))
                members.append(i)
                index.append((*values, *lone))
        named = [axis for axis, _ in named_axes(spelling.pattern)]
        for kind, (members, index) in kinds.items():
            self.claimed[members] = True
            try:
                fragments = self.fragments(rule, layout, kind, dict(zip(shards, kind.at, strict=False)))
            except RegistryError as error:
                why = f"{error.problem}; expected {error.expected}, found {error.found}"
                self.problems += [f"{self.opened.pieces[i].name}: {why}" for i in members]
                continue
            axes = [*named, *(single[d] for d in kind.lone)]
            columns = np.array(index, dtype=np.int64).reshape(len(members), len(axes))
            self.bound.groups.append(
                Group(
                    pattern, rule, kind.dtype, kind.shape, tuple(without(f, axes) for f in fragments),
                    np.array(members, dtype=np.int64), {axis: columns[:, k] for k, axis in enumerate(axes)},
                )
            )  # fmt: skip

    def fragments(self, rule: Rule, layout: Layout, kind: _Kind, at: Mapping[str, int]) -> list[Fragment]:
        """The fragments of the pieces of one kind, on the rank at index `at` of each sharded dimension."""
        stored = kind.shape if kind.whole is None else kind.whole
        ranks = {dim: (i, self.parallel.size(dim)) for dim, i in at.items()}
        sizes = dict(self.model.sizes)
        for d, dim in enumerate(layout.dims):
            if isinstance(dim, Axis) and dim.name in rule.pad and d < len(stored):
                sizes[dim.name] = stored[d] * ranks.get(dim.shard or "", (0, 1))[1]
                self.bound.padded[dim.name] = max(sizes[dim.name], self.bound.padded.get(dim.name, 0))
        for axis, size in sizes.items():
            if size < self.model.sizes[axis]:
                raise MappingError("too short", expected=f"at least {self.model.sizes[axis]} along {axis}", found=size)
        box = Box(sizes, self.model.present, ranks, replicated(self.spec), self.model.sizes if rule.pad else {})
        expected = boxes.shape(layout, box)
        if stored != expected:
            raise MappingError("shape disagrees with the config", expected=f"{expected} ({layout})", found=stored)
        piece = None if kind.origin is None else list(zip(kind.origin, kind.shape, strict=True))
        return boxes.fragments(layout, box, piece=piece, strides=kind.strides)

    def finish(self, ignored: Sequence[Ignored]) -> Bound:
        """Everything must be claimed, or left out for a declared reason."""
        reasons = [(re.compile(translate(entry.name)), entry.reason) for entry in ignored]
        unknown = []
        for i in np.flatnonzero(~self.claimed):
            piece = self.opened.pieces[i]
            reason = next((reason for matcher, reason in reasons if matcher.match(piece.name)), None)
            if reason is None:
                unknown.append(f"{piece.name} {list(piece.shape)}")
            else:
                self.bound.left_out[piece.name] = reason
        for name in self.opened.entries:
            reason = next((reason for matcher, reason in reasons if matcher.match(name)), None)
            self.bound.left_out[name] = reason or "an entry without a tensor that no rule names"
        if unknown or self.problems:
            details = [*collapse(self.problems), *(f"no rule claims {name}" for name in collapse(unknown))]
            raise MappingError(
                f"{self.opened.path} does not fit {self.model.architecture.name} in format {self.spec.name}",
                details=details,
                hint="check the config and the architecture, or register a spec with rules for these tensors",
            )
        return self.bound


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


def collapse(names: Sequence[str], limit: int = 20) -> list[str]:
    """Names with their indices grouped: `layers.{0..31}.q_proj`. At most `limit` lines, then a count."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.|$)", name)
        grouped[name[: match.start()] + "\0" + name[match.end() :] if match else name].append(match[0] if match else "")
    lines = []
    for key, indices in grouped.items():
        numbers = sorted({int(i) for i in indices if i})
        runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
        text = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        lines.append(key.replace("\0", f"{{{text}}}" if len(numbers) > 1 else text))
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]


def bind_source(
    opened: Opened,
    spec: FormatSpec,
    rules: Iterable[tuple[str, Rule]],
    model: LogicalModel,
    options: Mapping[str, Any],
    ignored: Sequence[Ignored],
) -> Bound:
    """Match every tensor of an opened checkpoint to the model. Raises MappingError listing every problem."""
    parallel = opened.parallel or Parallel()
    env = {**model.facts, **parallel.env(), **options}
    active = [(p, r) for p, r in rules if r.when is None or expressions.parse(r.when)(env)]
    reader = _Reader(opened, spec, model, parallel)
    if spec.ranked:
        owner = rules_spec(spec, model.architecture)
        reader.stages = local_stages(opened, (s.pattern for p, r in active for s in spellings(owner, p, r)))
    for pattern, rule in active:
        reader.take(pattern, rule)
    return reader.finish(ignored)
