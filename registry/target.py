"""Bind a target: every tensor that a format will hold of a model, chunk by chunk and rank by rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define, field, frozen

from registry import boxes, expressions
from registry.bind import Group, Spelling, named_axes, replicated, spellings, template_of, without
from registry.boxes import Box
from registry.dtypes import is_float
from registry.errors import MappingError, ParallelError
from registry.layout import Axis, Layout, Node, Product, Sum
from registry.model import LogicalModel, rules_spec
from registry.parallel import Parallel, Stage
from registry.specs import FormatSpec, Rule
from registry.storage import ObjectSlot, Rank, Slot


@define
class Target:
    """What a target will hold."""

    groups: list[Group] = field(factory=list)
    slots: list[Slot] = field(factory=list)
    objects: list[ObjectSlot] = field(factory=list)
    homeless: list[str] = field(factory=list)


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
    written: dict[str, str] = field(factory=dict)

    def spelling(self, pattern: str, rule: Rule) -> Spelling:
        """The spelling that the chosen variants call for."""
        return max(
            spellings(rules_spec(self.spec, self.model.architecture), pattern, rule),
            key=lambda s: sum(1 if self.choices.get(variant) == choice else -1 for variant, choice in s.choices),
        )

    def places(self, spelling: Spelling, rule: Rule | None) -> Iterator[tuple[Stage, range]]:
        """The stages that store an entry, each with the indices that it holds of the pipeline's axis."""
        if "pp" in dict(named_axes(spelling.pattern)).values() or any(
            isinstance(dim, Axis) and dim.shard == "pp" for dim in spelling.layout.dims
        ):
            for stage in self.stages:
                yield stage, range(stage.first, stage.first + stage.count)
        elif rule is not None and rule.stage == "last":
            yield self.stages[-1], range(0)
        elif (rule is not None and rule.stage == "first") or not self.spec.ranked:
            yield self.stages[0], range(0)
        else:
            for stage in self.stages:
                if stage.vpp == 0:
                    yield stage, range(0)

    def shard_ranks(self, names: set[str]) -> Iterator[dict[str, int]]:
        """One index for each parallel dimension but the pipeline's: all ranks where each has files of its own."""
        dims = [dim for dim in self.spec.parallel if dim not in ("pp", "vpp")]
        counts = [self.parallel.size(dim) if self.spec.ranked or dim in names else 1 for dim in dims]
        for at in itertools.product(*(range(n) for n in counts)):
            yield dict(zip(dims, at, strict=True))

    def stored_dtype(self, rule: Rule) -> str:
        if rule.dtype:
            return rule.dtype
        found = {self.dtype_of(self.model.home(t)) for t in rule.parsed.tensors if t in self.model.present}
        if self.dtype:
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

    def write(self, pattern: str, rule: Rule) -> None:
        """Add every slot of one rule."""
        spelling = self.spelling(pattern, rule)
        if spelling.pattern in self.written:
            raise MappingError(
                f"two rules of {self.spec.name} hold for {spelling.pattern}", where=f"{pattern}: {rule.layout}",
                expected="one rule for a name", found=self.written[spelling.pattern],
                hint="give them `when:` conditions",
            )  # fmt: skip
        self.written[spelling.pattern] = rule.layout
        sizes = dict(self.model.sizes)
        for axis, text in rule.pad.items():
            multiple = expressions.parse(text)(self.env)
            sizes[axis] = -(-sizes[axis] // multiple) * multiple
        layout = spelling.layout
        shards = layout.sharded_over() | {dim for _, dim in named_axes(spelling.pattern) if dim}
        dtype = self.stored_dtype(rule)
        limits = self.model.sizes if rule.pad else {}
        box = Box(sizes, self.model.present, {}, replicated(self.spec), limits)
        if not self.spec.ranked:
            self.chunks(spelling, rule, dtype, box)
            return
        for at in self.shard_ranks(shards):
            ranks = {dim: (i, self.parallel.size(dim)) for dim, i in at.items()}
            own = Box(sizes, self.model.present, ranks, replicated(self.spec), limits)
            self.add(spelling, rule, dtype, layout, own, at, None, None)

    def chunks(self, spelling: Spelling, rule: Rule, dtype: str, box: Box) -> None:
        """Slots of a global tensor: cut where the ranks' shards meet, one layer at a time."""
        layout = spelling.layout
        grid = [list(_grid(dim, box, self.parallel)) for dim in layout.dims]
        whole = boxes.shape(layout, box)
        if not self.spec.parallel:
            self.add(spelling, rule, dtype, layout, box, {}, None, None)
            return
        for cell in itertools.product(*grid):
            at = {dim: i for _, _, owner in cell for dim, i in owner.items()}
            self.add(spelling, rule, dtype, layout, box, at, [(o, n) for o, n, _ in cell], whole)

    def add(
        self, spelling: Spelling, rule: Rule, dtype: str, layout: Layout, box: Box, at: Mapping[str, int],
        piece: list[tuple[int, int]] | None, whole: tuple[int, ...] | None,
    ) -> None:  # fmt: skip
        """The slots of one cell of one rule, for every index of the axes in its name."""
        named = named_axes(spelling.pattern)
        folded = [d for d, dim in enumerate(layout.dims) if isinstance(dim, Axis) and dim.shard == "pp"]
        if folded and piece is not None:
            piece = [(0, 1) if d in folded else span for d, span in enumerate(piece)]
        shape = tuple(n for _, n in piece) if piece is not None else boxes.shape(layout, box)
        template, _ = template_of(spelling.pattern)
        axes = [axis for axis, _ in named] + [str(layout.dims[d]).split("@")[0] for d in folded]
        first = len(self.target.slots)
        index: list[tuple[int, ...]] = []
        for stage, layers in self.places(spelling, rule):
            rank = Rank(tp=at.get("tp", 0), pp=stage.pp, ep=at.get("ep", 0), vpp=stage.vpp)
            spans = [self.span(axis, dim, at, layers) for axis, dim in named] + [layers for _ in folded]
            places = list(itertools.product(*spans))
            names = [template % shown for shown in itertools.product(*self.shown(named, spans))]
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
        fragments = boxes.fragments(layout, box, piece=piece)
        columns = np.array(index, dtype=np.int64).reshape(len(index), len(axes))
        self.target.groups.append(
            Group(
                spelling.pattern, rule, dtype, shape, tuple(without(f, axes) for f in fragments),
                np.arange(first, len(self.target.slots), dtype=np.int64),
                {axis: columns[:, k] for k, axis in enumerate(axes)},
            )
        )  # fmt: skip

    def shown(self, named: Sequence[tuple[str, str | None]], spans: Sequence[range]) -> list[range]:
        """The indices that names spell: counted from the rank's first where every rank has files of its own."""
        return [
            range(len(span)) if self.spec.ranked and dim else span for (_, dim), span in zip(named, spans, strict=False)
        ]

    def span(self, axis: str, dim: str | None, at: Mapping[str, int], layers: range) -> range:
        if dim == "pp":
            return layers
        size = self.model.sizes[axis]
        if dim is None or dim not in at:
            return range(size)
        first, count = boxes.interval(size, at[dim], self.parallel.size(dim), f"{axis}@{dim}")
        return range(first, first + count)

    def write_object(self, pattern: str) -> None:
        """Add every entry without data of one pattern."""
        rule = Rule.model_construct(layout="_:", names={}, aliases=[])
        spelling = self.spelling(pattern, rule)
        template, axes = template_of(spelling.pattern)
        stage = "last" if not axes and not spelling.layout.dims else None
        rule = rule.model_copy(update={"stage": stage})
        for at in self.shard_ranks(set()) if self.spec.ranked else iter([{}]):
            for place, layers in self.places(spelling, rule):
                rank = Rank(tp=at.get("tp", 0), pp=place.pp, ep=at.get("ep", 0), vpp=place.vpp)
                for layer in layers or [0]:
                    if spelling.layout.dims:
                        whole = (self.model.sizes[str(spelling.layout.dims[0]).split("@")[0]],)
                        self.target.objects.append(ObjectSlot(template, rank, (layer,), whole))
                    else:
                        shown = (layer - layers.start if self.spec.ranked else layer,) if axes else ()
                        self.target.objects.append(ObjectSlot(template % shown, rank))


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
    staged = {axis for pattern, _ in rules for axis, dim in named_axes(pattern) if dim == "pp"} & set(model.sizes)
    stages = parallel.stages(model.sizes[staged.pop()]) if staged else [Stage(0, 0, 0, 0)]
    env = {**model.facts, **parallel.env(), **options}
    writer = _Writer(spec, model, parallel, env, choices, dtype_of, dtype, stages, target)
    problems: list[str] = []
    housed: set[str] = set()
    for pattern, rule in rules:
        tensors = [t for t in rule.parsed.tensors if t in model.present]
        if not tensors or (rule.when is not None and not expressions.parse(rule.when)(env)):
            continue
        if all(t in model.ties for t in tensors) and not expressions.parse(rule.tied)(env):
            continue
        housed |= {model.home(t) for t in tensors}
        try:
            writer.write(pattern, rule)
        except ParallelError as error:
            problems.append(f"{pattern}: {error.problem}: {error.found}")
    if problems:
        raise ParallelError(
            f"the model does not divide over {parallel}", where=f"format {spec.name}", details=problems,
            hint="choose another parallel layout",
        )  # fmt: skip
    for pattern, when in spec.objects.items():
        if expressions.parse(when)(env):
            writer.write_object(pattern)
    target.homeless = sorted(set(model.tensors) - housed)
    return target
