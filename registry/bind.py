"""Bind a source: which of its stored tensors each rule names, and where in each of them every logical box lies."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from fnmatch import translate
from typing import Any, NamedTuple

import numpy as np
from attrs import define, field

from registry import boxes
from registry.boxes import Box, Fragment
from registry.errors import MappingError, RegistryError
from registry.groups import Group, Spelling, coding, holds, replicated, sharded, spellings, template_of, without
from registry.layout import Axis, Layout, parse
from registry.model import Kind, LogicalModel, rules_spec
from registry.parallel import Parallel, Stage
from registry.problems import collapse, unclaimed
from registry.specs import FormatSpec, Ignored
from registry.states import is_state
from registry.storage import Opened, Piece, Rank
from registry.tensor_rules import Rule, named_axes


@define
class Bound:
    """Every group of a checkpoint, and what was found beside them."""

    groups: list[Group] = field(factory=list)
    missing: list[str] = field(factory=list)
    left_out: dict[str, str] = field(factory=dict)
    variants: dict[str, str] = field(factory=dict)
    padded: dict[str, int] = field(factory=dict)
    absent: list[str] = field(factory=list)


def local_stages(opened: Opened, patterns: Iterable[str]) -> list[Stage]:
    """The stages of a ranked checkpoint, from how many layers each file and model chunk holds.

    Counting what is there gets every uneven split right, whatever arguments made it.
    """
    heads = {expand_head(pattern) for pattern in patterns if sharded(pattern, "pp")}
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


class _Alike(NamedTuple):
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
    stretch: tuple[int, int] | None


def _alike(piece: Piece, single: Mapping[int, str], at: tuple[int, ...]) -> tuple[_Alike, tuple[int, ...]]:
    """What a piece shares with others, and its index along each lone dimension."""
    if piece.origin is None:
        return _Alike(piece.dtype, piece.shape, piece.strides, piece.whole, None, (), at, piece.stretch), ()
    lone = tuple(d for d in single if piece.shape[d : d + 1] == (1,))
    origin = tuple(0 if d in lone else o for d, o in enumerate(piece.origin))
    alike = _Alike(piece.dtype, piece.shape, piece.strides, piece.whole, origin, lone, at, piece.stretch)
    return alike, tuple(piece.origin[d] for d in lone)


class _Reader:
    """Matches the pieces of a source to rules."""

    def __init__(self, opened: Opened, spec: FormatSpec, model: LogicalModel, env: Mapping[str, Any]) -> None:
        self.opened, self.spec, self.model, self.env = opened, spec, model, env
        self.owner = rules_spec(spec, model.architecture)
        self.parallel = opened.parallel or Parallel()
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
        # part of the model that may be absent -> names that should be there, and whether any is
        self.lacking: dict[str, list[str]] = defaultdict(list)
        self.having: set[str] = set()

    def chosen(self, rules: Sequence[tuple[str, Rule]]) -> dict[str, str]:
        """Variant -> the choice that most names on disk show, for variants that decide which rules hold.

        Names that show nothing leave it to what the checkpoint says of itself, and to the default.
        """
        choices: dict[str, str] = {}
        for variant, named in self.owner.variants.items():
            limited = {choice: {p for p, r in rules if r.choice == choice} for choice in named}
            if any(limited.values()):
                votes = Counter(
                    choice
                    for pattern, rule in rules
                    for name, choice in _telling(pattern, rule, limited)
                    if self.shown(name, rule)
                )
                said = self.env.get(variant)
                choices[variant] = max(named, key=lambda choice: (votes[choice], choice == said))
                self.bound.variants |= {variant: choices[variant]} if votes else {}
        return choices

    def shown(self, name: str, rule: Rule) -> bool:
        """Is there any tensor of this name?"""
        plain = rule.model_copy(update={"names": {}, "aliases": []})
        return any(
            indices
            for kind in self.model.kinds(name)
            if kind.present.intersection(rule.parsed.tensors)
            for spelling in self.spelled(name, plain)
            for _, _, _, indices in self.find(spelling, kind)
        )

    def take(self, pattern: str, rule: Rule, kind: Kind) -> None:
        """Find every piece of one rule, at the indices of one kind."""
        tensors = [tensor for tensor in rule.parsed.tensors if tensor in kind.present]
        if not tensors or any(self.model.sizes[named.axis] == 0 for named in named_axes(pattern)):
            return
        part = rule.optional or next((self.model.optional[t] for t in tensors if t in self.model.optional), None)
        for spelling in self.spelled(pattern, rule):
            found = list(self.find(spelling, kind))
            if any(indices for _, _, _, indices in found):
                break
        else:
            if any(tensor in self.model.tensors and not is_state(tensor) for tensor in tensors):
                first = self.spelled(pattern, rule)[0]
                names = [name for _, name, _, _ in self.find(first, kind)] or [pattern]
                (self.bound.missing if part is None else self.lacking[part]).extend(names)
            return
        for variant, choice in spelling.choices:
            self.bound.variants.setdefault(variant, choice)
        missing = [name for _, name, _, indices in found if not indices]
        if part is not None:
            self.having.add(part)
            self.lacking[part] += missing
        elif not all(tensor in self.model.ties for tensor in tensors):
            self.bound.missing += missing
        self.group(pattern, rule, spelling, found, kind)

    def spelled(self, pattern: str, rule: Rule) -> list[Spelling]:
        return spellings(self.owner, pattern, rule, self.model)

    def find(self, spelling: Spelling, kind: Kind) -> Iterable[Found]:
        """Every name that the spelling gives, in every file that may hold it."""
        template, axes = template_of(spelling.pattern), named_axes(spelling.pattern)
        expected_everywhere = sharded(spelling.pattern, "pp")
        chosen = frozenset(kind.indices)
        for rank, names in self.table.items():
            at, shown = [], []
            for axis, plus, shard in axes:
                first, count = self.span(axis, shard, rank)
                held = [i for i in range(first, first + count) if axis != kind.axis or i in chosen]
                at.append(held)
                shift = (self.env[plus] if plus else 0) - (first if rank is not None else 0)
                shown.append([i + shift for i in held])
            # Must this rank's file have it? Only the layers say so; what sits on one stage is checked by coverage.
            expected = rank is None or expected_everywhere
            for values, local in zip(itertools.product(*at), itertools.product(*shown), strict=True):
                name = template % local
                piece = names.get(name)
                if piece is None:
                    if expected:
                        yield rank, name, values, ()
                elif self.further:
                    yield rank, name, values, (piece, *self.further.get((rank, name), ()))
                else:
                    yield rank, name, values, (piece,)

    def span(self, axis: str, shard: str | None, rank: Rank | None) -> tuple[int, int]:
        """(first, count) of a named axis in one file."""
        size = self.model.sizes[axis]
        if rank is None or shard is None:
            return 0, size
        if shard == "pp":
            stage = next((s for s in self.stages if (s.pp, s.vpp) == (rank.pp, rank.vpp)), None)
            return (stage.first, stage.count) if stage else (0, 0)
        return boxes.interval(size, self.at(rank, shard), self.parallel.size(shard), f"{axis}@{shard}")

    def at(self, rank: Rank, dim: str) -> int:
        return self.parallel.index(dim, rank.tp, rank.ep)

    def group(self, pattern: str, rule: Rule, spelling: Spelling, found: list[Found], kind: Kind) -> None:
        """Sort the pieces of one rule into groups."""
        layout = spelling.layout
        single = {
            d: dim.name for d, dim in enumerate(layout.dims) if isinstance(dim, Axis) and dim.name not in rule.pad
        }
        shards = sorted(layout.sharded_over() - {"pp"})
        kinds: dict[_Alike, tuple[list[int], list[tuple[int, ...]]]] = {}
        pieces, last = self.opened.pieces, None
        for rank, _, values, indices in found:
            at = tuple([self.at(rank, dim) for dim in shards]) if rank is not None else ()
            for i in indices:
                piece = pieces[i]
                same = (piece.shape, piece.dtype, piece.strides, piece.whole, piece.origin, piece.stretch, at)
                if same != last or piece.origin is not None:  # most are as the one before them
                    last = same
                    alike, lone = _alike(piece, single, at)
                    members, index = kinds.setdefault(alike, ([], []))
                members.append(i)
                index.append((*values, *lone) if lone else values)
        named = [n.axis for n in named_axes(spelling.pattern)]
        own = {a for t in rule.parsed.tensors if t in kind.present for a in self.model.tensors[self.model.home(t)]}
        for alike, (members, index) in kinds.items():
            self.claimed[members] = True
            try:
                fragments = self.fragments(rule, layout, alike, dict(zip(shards, alike.at, strict=False)), kind)
            except RegistryError as error:
                why = f"{error.problem}; expected {error.expected}, found {error.found}"
                self.problems += [f"{self.opened.pieces[i].name}: {why}" for i in members]
                continue
            axes = [*named, *(single[d] for d in alike.lone)]
            columns = np.array(index, dtype=np.int64).reshape(len(members), len(axes))
            self.bound.groups.append(
                Group(
                    pattern, rule.layout, coding(rule, self.env), alike.dtype, alike.shape,
                    tuple(without(f, axes) for f in fragments), np.array(members, dtype=np.int64),
                    {axis: columns[:, k] for k, axis in enumerate(axes) if not rule.replica or axis in own},
                )
            )  # fmt: skip

    def fragments(self, rule: Rule, layout: Layout, alike: _Alike, at: Mapping[str, int], kind: Kind) -> list[Fragment]:
        """The fragments of pieces that are alike, on the rank at index `at` of each sharded dimension."""
        stored = alike.shape if alike.whole is None else alike.whole
        ranks = {dim: (i, self.parallel.size(dim)) for dim, i in at.items()}
        sizes = dict(kind.sizes)
        for d, dim in enumerate(layout.dims):
            if isinstance(dim, Axis) and dim.name in rule.pad and d < len(stored):
                sizes[dim.name] = stored[d] * ranks.get(dim.shard or "", (0, 1))[1]
                self.bound.padded[dim.name] = max(sizes[dim.name], self.bound.padded.get(dim.name, 0))
        for axis, size in sizes.items():
            if size < kind.sizes[axis]:
                raise MappingError("too short", expected=f"at least {kind.sizes[axis]} along {axis}", found=size)
        box = Box(sizes, kind.present, ranks, replicated(self.spec), kind.sizes if rule.pad else {})
        shown = layout if rule.shape is None else parse(rule.shape)
        expected = boxes.shape(shown, box)
        if stored != expected:
            raise MappingError("shape disagrees with the config", expected=f"{expected} ({shown})", found=stored)
        if rule.shape is not None and (alike.origin is not None or alike.strides is not None):
            raise MappingError(
                "the bytes are not in the order of the layout", expected="a whole tensor", found="a part"
            )
        piece = None if alike.origin is None else list(zip(alike.origin, alike.shape, strict=True))
        found = boxes.fragments(layout, box, piece=piece, strides=alike.strides)
        return found if alike.stretch is None else [f for whole in found for f in boxes.stretch(whole, *alike.stretch)]

    def finish(self, ignored: Sequence[Ignored], rules: Sequence[tuple[str, Rule]]) -> Bound:
        """Everything must be claimed, or left out for a declared reason."""
        for part, names in self.lacking.items():
            if part in self.having:
                self.bound.missing += names
            else:
                self.bound.absent.append(part)
        reasons = [(re.compile(translate(entry.name)), entry.reason) for entry in ignored]
        unknown = []
        for i in np.flatnonzero(~self.claimed):
            piece = self.opened.pieces[i]
            reason = next((reason for matcher, reason in reasons if matcher.match(piece.name)), None)
            if reason is None:
                unknown.append((piece.name, f" {list(piece.shape)}"))
            else:
                self.bound.left_out[piece.name] = reason
        for name in self.opened.entries:
            reason = next((reason for matcher, reason in reasons if matcher.match(name)), None)
            self.bound.left_out[name] = reason or "an entry without a tensor that no rule names"
        if unknown or self.problems:
            name = self.model.architecture.name
            details = [*unclaimed(unknown, rules, self.model), *collapse(self.problems)]
            details += [f"missing: {line}" for line in collapse(self.bound.missing, 8)]
            raise MappingError(
                f"{self.opened.path} does not fit {name} in format {self.spec.name}",
                details=details[:24] + ([f"and {len(details) - 24} more"] if len(details) > 24 else []),
                hint=f"check that the config belongs to these tensors; a relative of {name} needs a spec of its own: "
                f"registry.register() a YAML file with `extends: {name}` and the rules that differ (docs/notation.md)",
            )
        return self.bound


def _telling(pattern: str, rule: Rule, limited: Mapping[str, Container[str]]) -> Iterator[tuple[str, str]]:
    """(name, choice) of the names that only one choice of a variant has."""
    own = {choice: name for choice, name in rule.names.items() if choice in limited}
    rest = [choice for choice in limited if choice not in own]
    if own:
        yield from ((name, choice) for choice, name in own.items())
        if len(rest) == 1:
            yield pattern, rest[0]
    elif rule.choice is not None and [c for c, patterns in limited.items() if pattern in patterns] == [rule.choice]:
        for name in (pattern, *rule.aliases):
            yield name, rule.choice


def _unplaced(model: LogicalModel, named: Container[str]) -> list[str]:
    """The parts that a model may lack and that a format has no place for, where `named` are the tensors that it has."""
    parts: dict[str, bool] = dict.fromkeys(model.architecture.optional, False)
    for tensor, part in model.optional.items():
        parts[part] = parts[part] or tensor in named or tensor not in model.tensors
    return [part for part, placed in parts.items() if not placed and part not in model.without]


def bind_source(
    opened: Opened,
    spec: FormatSpec,
    rules: Iterable[tuple[str, Rule]],
    model: LogicalModel,
    options: Mapping[str, Any],
    ignored: Sequence[Ignored],
) -> Bound:
    """Match every tensor of an opened checkpoint to the model. Raises MappingError listing every problem."""
    env = {**options, **model.facts, **(opened.parallel or Parallel()).env(), **model.functions}
    reader = _Reader(opened, spec, model, env)
    rules = list(rules)
    if spec.ranked:
        reader.stages = local_stages(opened, (s.pattern for p, r in rules for s in reader.spelled(p, r)))
    choices = reader.chosen(rules)
    env |= {name: choice for name, choice in choices.items() if name not in model.facts}
    named: set[str] = set()
    for pattern, rule in rules:
        for kind in model.kinds(pattern):
            if rule.optional not in model.without and holds(rule, kind, env, choices):
                reader.take(pattern, rule, kind)
                named.update(rule.parsed.tensors)
    if spec.rules_from == "format":
        reader.bound.absent += _unplaced(model, named)
    return reader.finish(ignored, rules)
