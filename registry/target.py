"""Bind a target: every tensor that a format will hold of a model, chunk by chunk and rank by rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define, evolve, field, frozen

from registry import boxes, expressions
from registry.boxes import Box
from registry.dtypes import is_float
from registry.errors import MappingError, ParallelError
from registry.groups import (
    Group,
    Spelling,
    coding,
    holds,
    replicated,
    sharded,
    spellings,
    template_of,
    without,
)
from registry.layout import Axis, Node, Product, Sum, parse
from registry.model import Kind, LogicalModel, rules_spec
from registry.parallel import Parallel, Stage
from registry.specs import FormatSpec
from registry.states import is_state
from registry.storage import ObjectSlot, Rank, Slot
from registry.tensor_rules import Named, Rule, named_axes


@define
class Target:
    """What a target will hold."""

    groups: list[Group] = field(factory=list)
    slots: list[Slot] = field(factory=list)
    objects: list[ObjectSlot] = field(factory=list)
    homeless: list[str] = field(factory=list)


def kept(target: Target, keep: np.ndarray) -> Target:
    """The slots where `keep` holds, and the groups that they are in."""
    renumber = np.where(keep, np.cumsum(keep) - 1, -1)
    groups = []
    for group in target.groups:
        own = renumber[group.members] >= 0
        if own.any():
            index = {axis: column[own] for axis, column in group.index.items()}
            groups.append(evolve(group, members=renumber[group.members[own]], index=index))
    slots = [slot for slot, held in zip(target.slots, keep, strict=True) if held]
    return Target(groups, slots, target.objects, target.homeless)


@frozen
class _Writer:
    spec: FormatSpec
    model: LogicalModel
    parallel: Parallel
    env: Mapping[str, Any]
    choices: Mapping[str, str]
    dtype_of: Callable[[str], str]
    dtype: str | None
    stages: list[Stage]
    target: Target
    written: dict[tuple[str, tuple[int, ...]], str] = field(factory=dict)

    def spelling(self, pattern: str, rule: Rule) -> Spelling:
        """The spelling that the chosen variants call for."""
        return max(
            spellings(rules_spec(self.spec, self.model.architecture), pattern, rule, self.model),
            key=lambda s: sum(1 if self.choices.get(variant) == choice else -1 for variant, choice in s.choices),
        )

    def places(self, spelling: Spelling, rule: Rule | None) -> Iterator[tuple[Stage, range]]:
        """The stages that store an entry, each with the indices that it holds of the pipeline's axis."""
        if sharded(spelling.pattern, "pp") or any(
            isinstance(dim, Axis) and dim.shard == "pp" for dim in spelling.layout.dims
        ):
            for stage in self.stages:
                yield stage, range(stage.first, stage.first + stage.count)
        elif rule is not None and rule.stage in ("last", "ends") and self.spec.ranked:
            for stage in dict.fromkeys([*self.stages[:1][: rule.stage == "ends"], self.stages[-1]]):
                yield stage, range(0)
        elif rule is not None and rule.stage == "last":
            yield self.stages[-1], range(0)
        elif (rule is not None and rule.stage == "first") or not self.spec.ranked:
            yield self.stages[0], range(0)
        else:
            for stage in self.stages:
                if stage.vpp == 0:
                    yield stage, range(0)

    def shard_ranks(self) -> Iterator[dict[str, int]]:
        """One index for each parallel dimension but the pipeline's, of every rank that has files of its own."""
        if not self.spec.ranked:
            yield {}
            return
        for at in self.parallel.expert_ranks() if "ep" in self.spec.parallel else self.parallel.tensor_ranks():
            yield {dim: i for dim, i in at.items() if dim in self.spec.parallel}

    def stored_dtype(self, rule: Rule, kind: Kind) -> str:
        if rule.dtype:
            return rule.dtype
        found = {self.dtype_of(self.model.home(t)) for t in rule.parsed.tensors if t in kind.present}
        if self.dtype and not all(map(is_state, rule.parsed.tensors)):
            found = {self.dtype if is_float(name) else name for name in found}
        if len(found) > 1:
            raise MappingError(
                "parts of one stored tensor have different types",
                where=str(rule.parsed),
                expected="one type",
                found=", ".join(sorted(found)),
                hint="give dtype= to cast them to one",
            )
        return found.pop()

    def write(self, pattern: str, rule: Rule, kind: Kind) -> None:
        """Add every slot of one rule, at the indices of one kind."""
        spelling = self.spelling(pattern, rule)
        if (spelling.pattern, kind.indices) in self.written:
            raise MappingError(
                f"two rules of {self.spec.name} hold for {spelling.pattern}", where=f"{pattern}: {rule.layout}",
                expected="one rule for a name", found=self.written[spelling.pattern, kind.indices],
                hint="give them `when:` conditions",
            )  # fmt: skip
        self.written[spelling.pattern, kind.indices] = rule.layout
        sizes = dict(kind.sizes)
        for axis, text in rule.pad.items():
            multiple = expressions.parse(text)(self.env)
            sizes[axis] = -(-sizes[axis] // multiple) * multiple
        dtype = self.stored_dtype(rule, kind)
        limits = kind.sizes if rule.pad else {}
        box = Box(sizes, kind.present, {}, replicated(self.spec), limits)
        if not self.spec.ranked:
            self.chunks(spelling, rule, dtype, box, kind)
            return
        for at in self.shard_ranks():
            ranks = {dim: (i, self.parallel.size(dim)) for dim, i in at.items()}
            own = Box(sizes, kind.present, ranks, replicated(self.spec), limits)
            self.add(spelling, rule, dtype, own, at, None, None, kind)

    def chunks(self, spelling: Spelling, rule: Rule, dtype: str, box: Box, kind: Kind) -> None:
        """Slots of a global tensor: cut where the ranks' shards meet, one layer at a time."""
        layout = spelling.layout
        grid = [list(_grid(dim, box, self.parallel)) for dim in layout.dims]
        whole = boxes.shape(layout, box)
        if not self.spec.parallel:
            self.add(spelling, rule, dtype, box, {}, None, None, kind)
            return
        for cell in itertools.product(*grid):
            at = {dim: i for _, _, owner in cell for dim, i in owner.items()}
            self.add(spelling, rule, dtype, box, at, [(o, n) for o, n, _ in cell], whole, kind)

    def add(
        self, spelling: Spelling, rule: Rule, dtype: str, box: Box, at: Mapping[str, int],
        piece: list[tuple[int, int]] | None, whole: tuple[int, ...] | None, kind: Kind,
    ) -> None:  # fmt: skip
        """The slots of one cell of one rule, for every index of the axes in its name."""
        named, layout = named_axes(spelling.pattern), spelling.layout
        folded = [d for d, dim in enumerate(layout.dims) if isinstance(dim, Axis) and dim.shard == "pp"]
        if folded and piece is not None:
            piece = [(0, 1) if d in folded else span for d, span in enumerate(piece)]
        shown = layout if rule.shape is None else parse(rule.shape)
        shape = tuple(n for _, n in piece) if piece is not None else boxes.shape(shown, box)
        template = template_of(spelling.pattern)
        axes = [n.axis for n in named] + [str(layout.dims[d]).split("@")[0] for d in folded]
        first = len(self.target.slots)
        index: list[tuple[int, ...]] = []
        for stage, layers in self.places(spelling, rule):
            rank = _rank(at, stage, self.parallel)
            spans = [self.span(n, at, layers, kind) for n in named] + [layers for _ in folded]
            places = list(itertools.product(*spans))
            names = [template % local for local in itertools.product(*self.local(named, spans, at, layers))]
            # an axis that is folded into the tensor is in no name
            names = [name for name in names for _ in range(len(places) // len(names))]
            for values, name in zip(places, names, strict=True):
                origin = None
                if piece is not None:
                    origin = tuple([values[len(named)] if d in folded else o for d, (o, _) in enumerate(piece)])
                self.target.slots.append(Slot(name, dtype, shape, rank, origin, whole))
            index += places
        if not index:  # a model without layers
            return
        own = {a for t in rule.parsed.tensors if t in kind.present for a in self.model.tensors[self.model.home(t)]}
        fragments = boxes.fragments(layout, box, piece=piece)
        columns = np.array(index, dtype=np.int64).reshape(len(index), len(axes))
        self.target.groups.append(
            Group(
                spelling.pattern, rule.layout, coding(rule, self.env, self.dtype), dtype, shape,
                tuple(without(f, axes) for f in fragments), np.arange(first, len(self.target.slots), dtype=np.int64),
                {axis: columns[:, k] for k, axis in enumerate(axes) if not rule.replica or axis in own},
            )
        )  # fmt: skip

    def span(self, named: Named, at: Mapping[str, int], layers: range, kind: Kind) -> list[int]:
        """The indices of an axis of a name that one rank holds."""
        held = self.held(named, at, layers)
        chosen = frozenset(kind.indices)
        return [i for i in held if named.axis != kind.axis or i in chosen]

    def held(self, named: Named, at: Mapping[str, int], layers: range) -> range:
        if named.shard == "pp":
            return layers
        size = self.model.sizes[named.axis]
        if named.shard is None or named.shard not in at:
            return range(size)
        first, count = boxes.interval(size, at[named.shard], self.parallel.size(named.shard), str(named.axis))
        return range(first, first + count)

    def local(
        self, named: Sequence[Named], spans: Sequence[Sequence[int]], at: Mapping[str, int], layers: range
    ) -> list[list[int]]:
        """The indices that names spell: counted from the rank's first where every rank has files of its own."""
        shown = []
        for n, span in zip(named, spans, strict=False):
            shift = self.env[n.plus] if n.plus else 0
            if self.spec.ranked and n.shard:
                shift -= self.held(n, at, layers).start
            shown.append([i + shift for i in span])
        return shown

    def write_object(self, pattern: str, when: str) -> None:
        """Add every entry without data of one pattern."""
        rule = Rule.model_construct(layout="_:", names={}, aliases=[], shape=None)
        spelling = self.spelling(pattern, rule)
        named, folded = named_axes(spelling.pattern), [_named(dim) for dim in spelling.layout.dims]
        template = template_of(spelling.pattern)
        if "pp" not in {n.shard for n in (*named, *folded)}:
            rule = rule.model_copy(update={"stage": "last"})
        for kind in self.model.kinds(pattern) if all(n.axis in self.model.sizes for n in (*named, *folded)) else ():
            if not expressions.parse(when)(kind.env(self.env)):
                continue
            for at in self.shard_ranks():
                for stage, layers in self.places(spelling, rule):
                    spans = [self.span(n, at, layers, kind) for n in named]
                    whole, rank = tuple(self.model.sizes[n.axis] for n in folded), _rank(at, stage, self.parallel)
                    origins = list(itertools.product(*(self.span(n, at, layers, kind) for n in folded)))
                    for shown in itertools.product(*self.local(named, spans, at, layers)):
                        name = template % shown
                        self.target.objects += [ObjectSlot(name, rank, origin, whole) for origin in origins]


def _named(dim: Node) -> Named:
    """A folded dimension, as the axis of a name that it was."""
    assert isinstance(dim, Axis)
    return Named(dim.name, None, dim.shard)


def _rank(at: Mapping[str, int], stage: Stage, parallel: Parallel) -> Rank:
    """Whose file an entry is in; experts' shards lie with the rank that has their tensor-parallel index."""
    return Rank(at.get("tp", at.get("etp", 0)), stage.pp, 0 if parallel.nested else at.get("ep", 0), stage.vpp)


def _grid(dim: Node, box: Box, parallel: Parallel) -> Iterator[tuple[int, int, dict[str, int]]]:
    """(offset, size, owning rank) of the chunks of one stored dimension.

    Ranks own equal stretches; a sum is cut within each of its parts, as Megatron chunks [gate | up].
    """
    size = boxes.node_size(dim, box)
    if isinstance(dim, Sum) and not dim.cut:
        offset = 0
        for part in dim.parts:
            if box.has(part):
                for start, count, owner in _grid(Product(part.factors), box, parallel):
                    yield offset + start, count, owner
                offset += boxes.node_size(Product(part.factors), box)
        return
    shard = dim.shard if isinstance(dim, Axis) else dim.cut
    if shard is None and isinstance(dim, Product) and dim.factors:
        outer = dim.factors[0]
        shard = outer.shard if isinstance(outer, Axis) else outer.cut
    if shard in (None, "pp"):
        yield 0, size, {}
        return
    count = parallel.size(str(shard))
    for i in range(count):
        offset, length = boxes.interval(size, i, count, what=str(dim))
        yield offset, length, {str(shard): i}


def bind_target(
    spec: FormatSpec,
    rules: Iterable[tuple[str, Rule]],
    model: LogicalModel,
    parallel: Parallel,
    options: Mapping[str, Any],
    choices: Mapping[str, str],
    dtype_of: Callable[[str], str],
    dtype: str | None,
) -> Target:
    """Every slot of the target. Raises MappingError and ParallelError, each listing every problem.

    `dtype_of(tensor)` is the source's type of a logical tensor; `dtype` what floating-point tensors are cast to.
    """
    target = Target()
    rules = list(rules)
    staged = {n.axis for pattern, _ in rules for n in named_axes(pattern) if n.shard == "pp"} & set(model.sizes)
    stages = parallel.stages(model.sizes[staged.pop()]) if staged else [Stage(0, 0, 0, 0)]
    env = {**options, **choices, **model.facts, **parallel.env(), **model.functions}
    writer = _Writer(spec, model, parallel, env, choices, dtype_of, dtype, stages, target)
    problems: list[str] = []
    housed: set[tuple[str, tuple[int, ...]]] = set()
    for pattern, rule in rules:
        for kind in model.kinds(pattern):
            tensors = [t for t in rule.parsed.tensors if t in kind.present]
            if not tensors or rule.optional in model.without or not holds(rule, kind, env, choices):
                continue
            if all(t in model.ties for t in tensors) and not expressions.parse(rule.tied)(env):
                continue
            housed |= {(model.home(t), kind.indices) for t in tensors}
            try:
                writer.write(pattern, rule, kind)
            except ParallelError as error:
                problems.append(f"{pattern}: {error.problem}: {error.found}")
    if problems:
        raise ParallelError(
            f"the model does not divide over {parallel}", where=f"format {spec.name}", details=problems,
            hint="choose another parallel layout",
        )  # fmt: skip
    for pattern, when in spec.objects.items():
        writer.write_object(pattern, when)
    target.homeless = sorted(
        {t for t in model.tensors for kind, _ in model.parts(t) if (t, kind.indices) not in housed and model.volume(t)}
    )
    return target
