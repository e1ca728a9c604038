"""Plans: carried out index by index, they give the target that a reference says, and what is incomplete is refused.

Nothing here is on disk. Every logical element has a number of its own; a stored tensor is an array of the numbers of
the elements in it, by the reference of `tests/test_boxes.py`. A plan is right if its copies turn the source's numbers
into the target's.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from registry import bind, catalog, expressions, layout
from registry.errors import MappingError, ParallelError
from registry.model import LogicalModel, format_rules, logical_model, rules_spec
from registry.parallel import Parallel
from registry.planning import Copies, Plan, make_plan, merge
from registry.specs import ArchitectureSpec, FormatSpec
from registry.storage import Opened, Piece, Rank, Slot
from registry.target import Target, bind_target
from registry.tensor_rules import AXIS, Named, Rule, named_axes
from registry.testing.layouts import axes_of, layouts, show
from tests.test_boxes import Reference
from tests.test_layout import tree_of

PADDING = -1


class Side:
    """One format of one model at one parallel layout: what it stores, and the numbers in it."""

    def __init__(
        self,
        spec: FormatSpec,
        model: LogicalModel,
        parallel: Parallel | None = None,
        options: dict[str, Any] | None = None,
        choices: dict[str, str] | None = None,
    ) -> None:
        self.spec, self.model, self.parallel = spec, model, parallel or Parallel()
        self.options = {name: option.default for name, option in spec.options.items()}
        if extension := model.architecture.formats.get(spec.name):
            self.options |= extension.options
        self.options |= options or {}
        self.owner = rules_spec(spec, model.architecture)
        self.rules = list(format_rules(spec, model.architecture))
        self.choices = {variant: next(iter(named)) for variant, named in self.owner.variants.items()}
        self.choices |= {variant: self.options[variant] for variant in self.owner.variants if variant in self.options}
        self.choices |= choices or {}
        self.env = {**model.facts, **self.parallel.env(), **self.options, **self.choices}

    @cached_property
    def target(self) -> Target:
        return bind_target(
            self.spec, self.rules, self.model, self.parallel, self.options, self.choices, lambda tensor: "float32", None
        )

    @cached_property
    def pieces(self) -> list[Piece]:
        return [
            Piece(s.name, s.dtype, s.shape, 0, 0, s.rank if self.spec.ranked else None, s.origin, s.whole)
            for s in self.target.slots
        ]

    # The reference

    @cached_property
    def spelled(self) -> list[tuple[re.Pattern[str], list[Named], Rule, list[str]]]:
        """Every name that a rule may have: its matcher, its axes, and the axes that are stacked in the tensor."""
        variants = [v for named in self.owner.variants.values() for v in named.values()]
        stackable = [v.fold for v in variants if v.fold]
        found = []
        for pattern, rule in self.rules:
            if rule.choice is None or rule.choice in self.choices.values():
                names = [pattern, *rule.names.values(), *rule.aliases]
                for v in variants:
                    begins = sorted(v.begin, key=len, reverse=True)
                    longest = [next((b for b in begins if name.startswith(b)), None) for name in names]
                    names += [v.begin[b] + n[len(b) :] for n, b in zip(names, longest, strict=True) if b is not None]
                for name, n in itertools.product(names, range(len(stackable) + 1)):
                    for stacked in itertools.combinations(stackable, n):
                        text = name
                        for axis in stacked:
                            text = re.sub(rf"\.\{{{axis}(@\w+)?\}}", "", text)
                        if len(AXIS.findall(text)) == len(AXIS.findall(name)) - n:
                            parts = AXIS.split(text)[::4]
                            matcher = re.compile(r"(\d+)".join(map(re.escape, parts)))
                            found.append((matcher, named_axes(text), rule, list(stacked)))
        return found

    def fitting(self, name: str, rank: Rank | None) -> tuple[Rule, dict[str, int], list[str]]:
        """The rule that holds for one name: with the index that the name spells, and the axes that are stacked."""
        for matcher, named, rule, stacked in self.spelled:
            if match := matcher.fullmatch(name):
                at = {}
                for n, text in zip(named, match.groups(), strict=True):
                    first = self.first(n.axis, n.shard, rank) if rank is not None and n.shard else 0
                    at[n.axis] = int(text) + first - (self.model.facts[n.plus] if n.plus else 0)
                index = {**dict.fromkeys(stacked, 0), **at}
                sizes, _ = world(self.model, {})
                if not all(0 <= i < sizes[axis] for axis, i in index.items()):
                    continue
                _, present = world(self.model, index)
                env = {**self.env, **at, "has": present.__contains__}
                held = rule.when is None or expressions.parse(rule.when)(env)
                if held and present.intersection(rule.parsed.tensors):
                    return rule, at, stacked
        raise AssertionError(f"no rule holds for {name}")

    def reference(self, name: str, rank: Rank | None) -> np.ndarray:
        """The numbers in one stored tensor."""
        rule, fixed, stacked = self.fitting(name, rank)
        sizes, present = world(self.model, {**dict.fromkeys(stacked, 0), **fixed})
        for axis in stacked:
            alike = [world(self.model, {**dict.fromkeys(stacked, 0), **fixed, axis: i}) for i in range(sizes[axis])]
            assert alike[1:] == alike[:-1], f"{name}: stacked along {axis}, where indices differ"
        limits = dict(sizes)
        label, dims = tree_of(layout.parse(rule.layout))
        dims = [*(("axis", axis, None) for axis in stacked), *dims]
        for axis, text in rule.pad.items():
            multiple = expressions.parse(text)(self.env)
            sizes[axis] = math.ceil(sizes[axis] / multiple) * multiple
        replicate = {dim: frozenset(axes) for dim, axes in self.spec.replicate.items()}
        ranks = self.shares(rank) if rank is not None else {}
        case = Reference((label, dims), sizes, present, ranks, replicate, limits)
        array = np.full(case.shape(), PADDING)
        axes = {tensor: [*stacked, *axes] for tensor, axes in layout.parse(rule.layout).axes.items()}
        for at, element in case.elements().items():
            if element is not None:
                index = {**fixed, **dict(zip(axes[element[0]], element[1], strict=True))}
                array[at] = number(self.model, element[0], index)
        if rule.shape is not None:
            array = array.reshape(Reference(tree_of(layout.parse(rule.shape)), sizes, present, ranks, {}).shape())
        return array

    def shares(self, rank: Rank) -> dict[str, tuple[int, int]]:
        """(index, count) of a rank along every dimension, as Megatron numbers its global ranks."""
        tp, ep, etp = (self.parallel.size(dim) for dim in ("tp", "ep", "etp"))
        at = {"tp": rank.tp, "ep": rank.ep}
        at["etp"] = next(r % etp for r in range(tp * ep * etp) if (r % tp, r // etp % ep) == (rank.tp, rank.ep))
        return {dim: (at[dim], self.parallel.size(dim)) for dim in ("tp", "ep", "etp") if dim in self.spec.parallel}

    def first(self, axis: str, dim: str, rank: Rank) -> int:
        """The first index that a rank has of an axis that its names count from zero."""
        size, p = self.model.sizes[axis], self.parallel
        if dim != "pp":
            return getattr(rank, dim) * size // p.size(dim)
        counts = p.layers or (size // (p.pp * p.vpp),) * (p.pp * p.vpp)
        return sum(counts[: rank.vpp * p.pp + rank.pp])

    def contents(self, entries: Sequence[Slot] | Sequence[Piece]) -> list[np.ndarray]:
        """The numbers in every entry."""
        made: dict[tuple[str, Rank | None], np.ndarray] = {}
        found = []
        for entry in entries:
            key = (entry.name, entry.rank if self.spec.ranked else None)
            if key not in made:
                made[key] = self.reference(*key)
            box = [slice(o, o + n) for o, n in zip(entry.origin or (), entry.shape, strict=False)]
            found.append(made[key][tuple(box)] if entry.origin is not None else made[key])
            assert found[-1].shape == entry.shape, (
                f"{entry.name}: shape {entry.shape}, the reference has {found[-1].shape}"
            )
        return found


def world(model: LogicalModel, at: Mapping[str, int]) -> tuple[dict[str, int], frozenset[str]]:
    """The sizes and tensors that a model has at one index, by its spec; what differs along another axis is left out."""
    sizes, present = _world(model, tuple(at.items()))
    return dict(sizes), present


@lru_cache(maxsize=1 << 12)
def _world(model: LogicalModel, at: tuple[tuple[str, int], ...]) -> tuple[dict[str, int], frozenset[str]]:
    spec, env = model.architecture, {**model.facts, **dict(at)}

    def known(text: str) -> bool:
        return not expressions.parse(text).names & set(spec.axes) - set(env)

    sizes = {axis: expressions.parse(text)(env) for axis, text in spec.axes.items() if known(text)}
    present: set[str] = set()
    for _, rule in spec.rules():
        condition = rule.when or "true"
        if not rule.replica and rule.optional not in model.without and known(condition):
            present |= {t for t in rule.parsed.tensors if expressions.parse(condition)(env)}
    return sizes, frozenset(present | set(model.ties))


#: Every element that was ever met: (tensor, its axes and the index along each) -> a number of its own.
NUMBERS: dict[tuple[str, tuple[tuple[str, int], ...]], int] = {}


def number(model: LogicalModel, tensor: str, index: Mapping[str, int]) -> int:
    """The number of one element of one logical tensor. A further copy of it may have an index more."""
    home = model.home(tensor)
    assert set(index) >= set(model.tensors[home])
    return NUMBERS.setdefault((home, tuple((axis, index[axis]) for axis in model.tensors[home])), len(NUMBERS))


def planned(source: Side, target: Side, pieces: list[Piece] | None = None) -> tuple[Plan, Opened]:
    opened = Opened(Path("toy"), source.spec.name, [], source.pieces if pieces is None else pieces, {}, source.parallel)
    bound = bind.bind_source(opened, source.spec, source.rules, source.model, source.options, source.spec.ignored)
    assert not target.target.homeless
    return make_plan(bound, opened, target.target.groups, target.target.slots, source.model), opened


def positions(size: Sequence[int], stride: Sequence[int], offset: int) -> np.ndarray:
    """Every element position of one strided box, in order."""
    found = np.array([offset])
    for n, step in zip(size, stride, strict=True):
        found = (found[:, None] + np.arange(n) * step).reshape(-1)
    return found


def each(copies: Iterable[Copies]) -> Iterable[tuple[int, np.ndarray, int, np.ndarray]]:
    """(source entry, its positions, target entry, its positions) of every single copy."""
    for c in copies:
        for s, so, t, to in zip(c.source, c.source_offset, c.target, c.target_offset, strict=True):
            yield s, positions(c.size, c.source_stride, so), t, positions(c.size, c.target_stride, to)


def check(source: Side, target: Side, pieces: list[Piece] | None = None) -> Plan:
    """Plan, carry out and compare with the reference."""
    plan, opened = planned(source, target, pieces)
    held, wanted = source.contents(opened.pieces), target.contents(target.target.slots)
    made = [np.full(array.shape, PADDING) for array in wanted]
    written = [np.zeros(array.size, dtype=int) for array in wanted]
    read = [(array == PADDING).reshape(-1) for array in held]
    for s, here, t, there in each(plan.copies):
        made[t].reshape(-1)[there] = held[s].reshape(-1)[here]
        np.add.at(written[t], there, 1)
        read[s][here] = True
    for slot, array, expected, times in zip(target.target.slots, made, wanted, written, strict=True):
        assert np.array_equal(array, expected), slot.name
        assert np.array_equal(times, (expected != PADDING).reshape(-1)), f"{slot.name} is not written exactly once"
    for s, here, t, there in each(plan.replicas):
        assert np.array_equal(held[s].reshape(-1)[here], held[t].reshape(-1)[there]), "replicas that are none"
        read[t][there] = True
    for piece, all_read in zip(opened.pieces, read, strict=True):
        assert all_read.all(), f"{piece.name} is neither read nor a replica"
    return plan


# Models and formats


FACTS = {
    "layers": 2, "hidden_size": 4, "heads": 4, "kv_heads": 2, "head_dim": 2, "ffn_size": 4, "vocab_size": 5,
    "max_positions": 3, "tied_embeddings": False, "qkv_bias": False, "attention_output_bias": False, "mlp_bias": False,
}  # fmt: skip


def built_in(name: str, **facts: Any) -> LogicalModel:
    return logical_model(catalog.architecture(name), {**FACTS, **facts})


TOY = ArchitectureSpec.model_validate(
    {
        "name": "toy",
        "axes": {
            "layer": "layers", "expert": "experts", "vocab": "vocab_size", "hidden": "hidden_size", "ffn": "ffn_size",
            "group": "kv_heads", "rep": "heads // kv_heads", "head_dim": "head_dim", "none": "0", "breite": "3",
        },
        "config": {"facts": {name: name for name in ("experts", "tied_embeddings", *FACTS)}},
        "tied": [{"tensor": "output", "to": "embedding", "when": "tied_embeddings"}],
        "tensors": {
            "emb": "embedding: vocab hidden",
            "head": "output: vocab hidden",
            "step": "step:",
            "nothing": "nothing: none hidden",
            "h.{layer}.scale": "scale:",
            "h.{layer}.größe": "größe: breite",
            "h.{layer}.qkv": "hidden [q: group rep head_dim | k: group head_dim | v: group head_dim]",
            "h.{layer}.experts.{expert}.gate_up": "hidden (ffn [gate: | up:])",
            "h.{layer}.experts.down": "down: expert ffn hidden",
        },
    }
)  # fmt: skip

# Global tensors in chunks, like torch_dist.
GRID = FormatSpec.model_validate(
    {
        "name": "grid",
        "container": "none",
        "parallel": ["tp", "pp", "vpp", "ep"],
        "variants": {"layers": {"stacked": {"fold": "layer"}, "single": {}}},
        "options": {"layers": {"default": "stacked"}, "multiple": {"default": 1}},
        "tensors": {
            "embedding": {"layout": "embedding: vocab@tp hidden", "pad": {"vocab": "multiple * tp"}, "stage": "first"},
            "head": {"layout": "output: vocab@tp hidden", "pad": {"vocab": "multiple * tp"}, "stage": "last"},
            "step": {"layout": "step: 1", "stage": "first"},
            "nothing": {"layout": "nothing: hidden none", "stage": "last"},
            "layers.{layer@pp}.scale": "scale:",
            "layers.{layer@pp}.größe": "größe: breite",
            "layers.{layer@pp}.qkv": "(group [q: rep | k: | v:] head_dim)@tp hidden",
            "layers.{layer@pp}.experts.up": "expert@ep [gate: ffn@tp | up: ffn@tp] hidden",
            "layers.{layer@pp}.experts.{expert@ep}.down": "down: hidden ffn@tp",
        },
    }
)

# Files of every rank, layers and experts counted from zero in each.
RANKED = FormatSpec.model_validate(
    {
        "name": "ranked",
        "container": "none",
        "ranked": True,
        "parallel": ["tp", "pp", "vpp", "ep"],
        "replicate": {"tp": ["group"]},
        "options": {"multiple": {"default": 1}},
        "tensors": {
            "emb": {"layout": "embedding: vocab@tp hidden", "pad": {"vocab": "multiple * tp"}, "stage": "first"},
            "head": {
                "layout": "output: vocab@tp hidden",
                "pad": {"vocab": "multiple * tp"},
                "stage": "last",
                "tied": "pp > 1",
            },
            "step": "step:",
            "nothing": "nothing: none hidden",
            "l.{layer@pp}.scale": "scale:",
            "l.{layer@pp}.größe": "größe: breite",
            "l.{layer@pp}.qkv": "[q: (group rep)@tp head_dim | k: group@tp head_dim | v: group@tp head_dim] hidden",
            "l.{layer@pp}.e.{expert@ep}.up": "(ffn@tp [gate: | up:]) hidden",
            "l.{layer@pp}.e.{expert@ep}.down": "down: hidden ffn@tp",
        },
    }
)
PLAIN = catalog.format_spec("huggingface")


def toy(**facts: Any) -> LogicalModel:
    return logical_model(TOY, {**FACTS, "experts": 2, **facts})


@st.composite
def sizes_of_models(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    facts: dict[str, Any] = {name: draw(st.booleans()) for name, value in FACTS.items() if isinstance(value, bool)}
    return facts | {
        "layers": draw(st.integers(1, 4)), "heads": heads, "kv_heads": kv_heads, "vocab_size": draw(st.integers(2, 9)),
        "head_dim": draw(st.sampled_from([1, 2])), "hidden_size": draw(st.sampled_from([1, 2, 4])),
        "ffn_size": draw(st.sampled_from([2, 4])), "experts": draw(st.sampled_from([1, 2, 4])),
    }  # fmt: skip


@st.composite
def sides(draw: st.DrawFn, model: LogicalModel, specs: list[FormatSpec]) -> Side:
    """Some format at some parallel layout."""
    spec = draw(st.sampled_from(specs))
    layers, dims = model.sizes["layer"], spec.parallel
    vpp = draw(st.sampled_from([1, 1, 2])) if "vpp" in dims else 1
    pp: int | list[int] = 1
    if "pp" in dims:
        cuts = sorted(draw(st.lists(st.integers(0, layers), min_size=vpp - 1, max_size=3)))
        bounds = [0, *cuts, layers]
        pp = [high - low for low, high in itertools.pairwise(bounds)]
        if len(pp) % vpp:
            pp, vpp = 1, 1
        elif draw(st.booleans()) and layers % len(pp) == 0:
            pp = len(pp) // vpp
    tp = draw(st.sampled_from([1, 2, 4])) if "tp" in dims else 1
    ep = draw(st.sampled_from([1, 2])) if "ep" in dims and "expert" in model.sizes else 1
    options = {}
    for name, option in spec.options.items():
        if option.choices:
            options[name] = draw(st.sampled_from(option.choices))
        elif name in ("make_vocab_size_divisible_by", "multiple"):
            options[name] = draw(st.integers(1, 4))
    if spec is GRID:
        options["layers"] = draw(st.sampled_from(["stacked", "single"]))
    side = Side(spec, model, Parallel(tp=tp, pp=pp, vpp=vpp, ep=ep), options)
    try:
        assert side.target.slots
    except ParallelError:
        side = Side(spec, model, Parallel(pp=pp, vpp=vpp), options)
    return side


# Conversions


@given(sizes_of_models(), st.data())
@settings(max_examples=60)
def test_toy_formats_convert_into_each_other(facts: dict[str, Any], data: st.DataObject) -> None:
    """Experts, scalars, tensors without elements, fewer groups than ranks, uneven stages, padding, ties."""
    model = toy(**facts)
    specs = [PLAIN, GRID, RANKED]
    check(data.draw(sides(model, specs)), data.draw(sides(model, specs)))


@given(sizes_of_models(), st.sampled_from(["llama", "qwen2", "qwen3", "gpt2"]), st.data())
@settings(max_examples=60)
def test_built_in_formats_convert_into_each_other(facts: dict[str, Any], name: str, data: st.DataObject) -> None:
    del facts["experts"]
    if name == "gpt2":
        facts |= {"kv_heads": facts["heads"]}
    model = built_in(name, **facts)
    specs = [
        catalog.format_spec(format_name) for format_name in ("huggingface", "megatron", "megatron-legacy", "trtllm")
    ]
    check(data.draw(sides(model, specs)), data.draw(sides(model, specs)))


@st.composite
def random_sides(draw: st.DrawFn) -> tuple[Side, Side]:
    """One stored tensor of a random layout, and its tensors stored one by one with their axes in another order."""
    tree = draw(layouts())
    parsed = layout.parse(show(tree))
    sizes = {axis: draw(st.sampled_from([1, 2, 2, 3, 4, 0])) for axis in sorted({*axes_of(tree[1])})}
    assume(math.prod(Reference(tree, sizes).shape()) <= 400)
    single = {}
    for i, (tensor, axes) in enumerate(parsed.axes.items()):
        dims, rest = [], list(draw(st.permutations(axes)))
        while rest:
            n = draw(st.integers(1, len(rest)))
            dims.append("(" + " ".join(rest[:n]) + ")")
            rest = rest[n:]
        single[f"t{i}"] = f"{tensor}: {' '.join(dims)}"
    architecture = ArchitectureSpec.model_validate(
        {"name": "random", "axes": {axis: str(n) for axis, n in sizes.items()}, "tensors": single}
    )
    # The shards mean nothing here: the format is stored whole.
    fused = re.sub(r"@\w+", "", show(tree))
    spec = FormatSpec.model_validate({"name": "fused", "container": "none", "tensors": {"fused": fused}})
    model = logical_model(architecture, {})
    return Side(spec, model), Side(PLAIN, model)


@given(random_sides())
@settings(max_examples=100)
def test_random_layouts_convert_both_ways(both: tuple[Side, Side]) -> None:
    fused, single = both
    check(fused, single)
    check(single, fused)


def cut_up(draw: st.DrawFn, piece: Piece) -> list[Piece]:
    """One stored tensor as chunks, in any order."""
    spans = []
    for n in piece.shape:
        bounds = [0, *sorted(draw(st.sets(st.integers(1, n - 1), max_size=2)) if n > 1 else ()), n]
        spans.append([(low, high - low) for low, high in itertools.pairwise(bounds)])
    cells = list(itertools.product(*spans))
    return [
        piece._replace(shape=tuple(n for _, n in cell), origin=tuple(o for o, _ in cell), whole=piece.shape)
        for cell in draw(st.permutations(cells))
    ]


@st.composite
def chunked(draw: st.DrawFn) -> tuple[Side, Side, list[Piece]]:
    fused, single = draw(random_sides())
    return fused, single, cut_up(draw, fused.pieces[0])


@given(chunked())
@settings(max_examples=100)
def test_a_source_may_be_cut_into_any_chunks(case: tuple[Side, Side, list[Piece]]) -> None:
    check(*case)


@given(chunked(), st.data())
@settings(max_examples=60)
def test_a_chunk_that_is_there_twice_is_a_replica(case: tuple[Side, Side, list[Piece]], data: st.DataObject) -> None:
    fused, single, pieces = case
    twice = data.draw(st.sampled_from(pieces))
    plan = check(fused, single, [*pieces, twice])
    volume = sum(c.volume * len(c.source) for c in plan.replicas)
    assert volume == math.prod(twice.shape)


# What is incomplete is refused


def refused(*case: Any) -> str:
    with pytest.raises(MappingError) as caught:
        planned(*case)
    return str(caught.value)


@given(chunked(), st.data())
@settings(max_examples=60)
def test_a_chunk_that_is_missing_is_named_by_its_tensor(
    case: tuple[Side, Side, list[Piece]], data: st.DataObject
) -> None:
    fused, single, pieces = case
    filled = [piece for piece in pieces if math.prod(piece.shape)]
    assume(filled)
    lost = data.draw(st.sampled_from(filled))
    (numbers,) = fused.contents([lost])
    lost_numbers = set(numbers.reshape(-1).tolist())
    hit = {tensor for (tensor, _), i in NUMBERS.items() if i in lost_numbers}
    problem = refused(fused, single, [piece for piece in pieces if piece is not lost])
    assert all(f"- {tensor}: the source" in problem for tensor in hit)
    assert all(f"- {tensor}:" not in problem for tensor in set(single.model.tensors) - hit)


@given(chunked(), st.data())
@settings(max_examples=60)
def test_a_chunk_that_lies_over_another_is_refused(case: tuple[Side, Side, list[Piece]], data: st.DataObject) -> None:
    fused, single, pieces = case
    wider = [
        (piece, d)
        for piece in pieces
        for d in range(len(piece.shape))
        if piece.origin and piece.whole and piece.origin[d] > 0 and math.prod(piece.shape)
    ]
    assume(wider)
    piece, d = data.draw(st.sampled_from(wider))
    assert piece.origin is not None
    origin = tuple(o - (k == d) for k, o in enumerate(piece.origin))
    shape = tuple(n + (k == d) for k, n in enumerate(piece.shape))
    changed = [other if other is not piece else piece._replace(origin=origin, shape=shape) for other in pieces]
    try:
        check(fused, single, changed)
    except MappingError as error:
        assert "overlapping pieces" in str(error)
    # Otherwise the wider chunk has all of its neighbour, or of one tensor in it: that is a replica, and was checked.


@pytest.mark.parametrize("name", ["emb", "h.1.scale", "h.0.qkv", "h.1.experts.0.gate_up", "h.0.experts.down", "step"])
def test_a_tensor_that_is_missing_is_named(name: str) -> None:
    side = Side(PLAIN, toy())
    problem = refused(side, Side(GRID, side.model), [piece for piece in side.pieces if piece.name != name])
    tensors = {"emb": "embedding", "h.0.qkv": "q", "h.1.experts.0.gate_up": "gate", "h.0.experts.down": "down"}
    assert f"- {tensors.get(name, name.split('.')[-1])}: the source" in problem
    assert f"missing from the source: {name}" in problem


def test_a_tensor_that_no_rule_claims_is_named() -> None:
    side = Side(PLAIN, toy())
    extra = Piece("h.7.scale", "float32", (), 0, 0)
    assert "h.7.scale: the config has no layer 7: layers is 2" in refused(side, side, [*side.pieces, extra])
    assert "no rule claims other []" in refused(side, side, [*side.pieces, extra._replace(name="other")])


@pytest.mark.parametrize("gone", [pattern for pattern, _ in RANKED.rules() if pattern != "nothing"])
def test_a_rule_less_is_noticed_on_both_sides(gone: str) -> None:
    """Without its rule a source's tensors belong to nobody, and a target has no place for them."""
    model = toy(layers=1, experts=1)
    whole = Side(RANKED, model)
    less = RANKED.model_copy(update={"tensors": {p: r for p, r in RANKED.tensors.items() if p != gone}})
    assert "no rule claims " + gone.replace("{layer@pp}", "0").replace("{expert@ep}", "0") in refused(
        Side(less, model), Side(PLAIN, model), whole.pieces
    )
    (rule,) = RANKED.tensors[gone]
    assert Side(less, model).target.homeless == sorted(rule.parsed.tensors)


SWAPPED = {
    "emb": "embedding: vocab@tp breite",
    "l.{layer@pp}.qkv": "[q: (group rep)@tp head_dim | k: group@tp head_dim | v: group@tp] hidden",
    "l.{layer@pp}.e.{expert@ep}.up": "hidden (ffn@tp [gate: | up:])",
    "l.{layer@pp}.e.{expert@ep}.down": "down: ffn@tp hidden",
    "l.{layer@pp}.scale": "scale: hidden",
    "l.{layer@pp}.größe": "größe: head_dim",
    "step": "step: 1 1",
}


@pytest.mark.parametrize("pattern", SWAPPED)
def test_a_rule_that_is_altered_does_not_fit_the_shapes(pattern: str) -> None:
    model = toy(hidden_size=6)
    (rule,) = RANKED.tensors[pattern]
    altered = {**RANKED.tensors, pattern: [rule.model_copy(update={"layout": SWAPPED[pattern]})]}
    wrong = RANKED.model_copy(update={"tensors": altered})
    problem = refused(Side(wrong, model), Side(PLAIN, model), Side(RANKED, model).pieces)
    assert "shape disagrees with the config" in problem
    name = pattern.replace("{layer@pp}", "{0..1}").replace("{expert@ep}", "{0..1}")
    assert name in problem or name.replace("{0..1}", "0") in problem


def test_a_rule_that_is_there_twice_reads_replicas() -> None:
    """The same tensor under a second name: both are read, and both must hold the same."""
    model = toy()
    twice = RANKED.model_copy(update={"tensors": {**RANKED.tensors, "emb2": RANKED.tensors["emb"]}})
    plan = check(Side(twice, model, Parallel(tp=2)), Side(PLAIN, model))
    assert {c.tensor for c in plan.replicas} == {"embedding", *replicated_over_tp()}


def replicated_over_tp() -> set[str]:
    return {"step", "scale", "größe"}


def test_heads_and_norms_that_ranks_share_are_replicas() -> None:
    model = toy(kv_heads=1, heads=4)
    plan = check(Side(RANKED, model, Parallel(tp=4)), Side(PLAIN, model))
    assert {c.tensor for c in plan.replicas} == {"k", "v", *replicated_over_tp()}
    assert sum(len(c.source) for c in plan.replicas if c.tensor == "k") == 3 * 2, "3 repeats of 2 layers"


def test_a_tied_embedding_on_the_last_stage_is_a_replica() -> None:
    model = toy(tied_embeddings=True)
    assert "output" not in model.tensors
    plan = check(Side(RANKED, model, Parallel(pp=2)), Side(PLAIN, model))
    assert "output" in {c.tensor for c in plan.replicas}
    check(Side(PLAIN, model), Side(RANKED, model, Parallel(pp=2)))


def test_a_whole_embedding_beside_its_shards_is_a_replica() -> None:
    """TensorRT-LLM stores tied weights twice: the lookup table whole, the head in shards."""
    model = built_in("llama", tied_embeddings=True, vocab_size=6)
    plan = check(Side(catalog.format_spec("trtllm"), model, Parallel(tp=2)), Side(PLAIN, model))
    assert "output.weight" in {c.tensor for c in plan.replicas}


def test_layers_in_any_order_are_found() -> None:
    """Names sort as text: layer 10 comes before layer 2."""
    model = toy(layers=12)
    side = Side(PLAIN, model)
    check(side, Side(GRID, model, Parallel(tp=2, pp=[5, 7])), sorted(side.pieces))
    ranked = Side(RANKED, model, Parallel(tp=2))
    check(ranked, side, sorted(ranked.pieces))


def test_a_padded_vocabulary_on_more_ranks_than_rows() -> None:
    """5 rows padded to 6 on 3 ranks, and 5 rows on 8 ranks, of which three have nothing."""
    model = toy(heads=8, kv_heads=8, ffn_size=24, vocab_size=5)
    for tp, multiple in ((2, 1), (4, 1), (4, 3), (8, 1), (8, 2)):
        for spec in (RANKED, GRID):
            side = Side(spec, model, Parallel(tp=tp), {"multiple": multiple})
            check(side, Side(PLAIN, model))
            check(Side(PLAIN, model), side)


@pytest.mark.parametrize("spec", [GRID, RANKED], ids=lambda spec: spec.name)
def test_experts_stacked_and_one_by_one(spec: FormatSpec) -> None:
    """A rank has two of four experts, in one tensor or in two."""
    model = toy(experts=4)
    side = Side(spec, model, Parallel(tp=2, ep=2))
    check(side, Side(PLAIN, model))
    check(Side(PLAIN, model), side)
    check(side, Side(RANKED, model, Parallel(ep=4)))


@pytest.mark.parametrize("stages", [[4], [1, 3], [0, 4], [2, 0, 2], [1, 1, 1, 1]])
@pytest.mark.parametrize("vpp", [1, 2])
def test_uneven_and_interleaved_stages(stages: list[int], vpp: int) -> None:
    model = toy(layers=sum(stages))
    if len(stages) % vpp == 0:
        for spec in (RANKED, GRID):
            staged = Side(spec, model, Parallel(pp=stages, vpp=vpp))
            check(staged, Side(PLAIN, model))
            check(Side(PLAIN, model), staged)


def rule_over(text: str) -> tuple[Side, Side]:
    """A format that stores x over these axes, of a model that has x over a (3) and b (2)."""
    architecture = ArchitectureSpec.model_validate(
        {"name": "t", "axes": {"a": "3", "b": "2", "two": "2"}, "tensors": {"w": "x: a b"}}
    )
    spec = FormatSpec.model_validate({"name": "f", "container": "none", "tensors": {"w": text}})
    model = logical_model(architecture, {})
    return Side(spec, model), Side(PLAIN, model)


def test_a_target_with_an_axis_too_many_is_refused() -> None:
    more, whole = rule_over("x: a b two")
    assert "disagrees about the axes of x" in refused(whole, more)


def fused_pair(*spans: tuple[int, int]) -> tuple[Side, Side, list[Piece]]:
    """Six elements, stored in the chunks (origin, size)."""
    architecture = ArchitectureSpec.model_validate({"name": "t", "axes": {"a": "6"}, "tensors": {"w": "x: a"}})
    spec = FormatSpec.model_validate({"name": "f", "container": "none", "tensors": {"w": "x: a"}})
    model = logical_model(architecture, {})
    pieces = [Piece("w", "float32", (n,), 0, 0, None, (o,), (6,)) for o, n in spans]
    return Side(spec, model), Side(PLAIN, model), pieces


@pytest.mark.parametrize("spans", [[(0, 4), (2, 2)], [(0, 3), (1, 3)], [(0, 2), (0, 3), (5, 1)]])
def test_an_overlap_does_not_make_up_for_a_gap(spans: list[tuple[int, int]]) -> None:
    assert "x" in refused(*fused_pair(*spans))


def test_a_target_that_lacks_an_axis_is_refused() -> None:
    short, whole = rule_over("x: a")
    assert "x" in refused(whole, short)


def test_a_source_that_lacks_an_axis_is_refused() -> None:
    assert "x" in refused(*rule_over("x: a"))


def test_two_rules_for_one_name_are_refused() -> None:
    model = toy()
    twice = {**RANKED.tensors, "step": [*RANKED.tensors["step"], *RANKED.tensors["step"]]}
    assert "step" in refused(Side(PLAIN, model), Side(RANKED.model_copy(update={"tensors": twice}), model))


def test_whole_tensors_beside_their_shards_in_any_order_of_layers() -> None:
    architecture = ArchitectureSpec.model_validate(
        {"name": "t", "axes": {"layer": "3", "a": "2"}, "tensors": {"w.{layer}": "x: a"}}
    )
    tensors = {"half.{layer}": "x: a@tp", "whole.{layer}": "x: a"}
    spec = FormatSpec.model_validate(
        {"name": "f", "container": "none", "ranked": True, "parallel": ["tp"], "tensors": tensors}
    )
    model = logical_model(architecture, {})
    source = Side(spec, model, Parallel(tp=2))
    check(source, Side(PLAIN, model), source.pieces[::-1])


# The fewest dimensions


@given(st.data())
@settings(max_examples=200)
def test_merging_dimensions_keeps_every_pair_of_positions(data: st.DataObject) -> None:
    size = data.draw(st.lists(st.integers(1, 3), max_size=4))

    def nested(order: Sequence[int]) -> list[int]:
        steps, step = [0] * len(size), data.draw(st.integers(1, 2))
        for d in order:
            steps[d] = step
            step *= size[d] + data.draw(st.sampled_from([0, 0, 1]))
        return steps

    orders = st.permutations(range(len(size)))
    a, b = nested(data.draw(orders)), nested(data.draw(orders))
    merged, to_a, to_b = merge(size, a, b)
    before = set(zip(positions(size, a, 0).tolist(), positions(size, b, 0).tolist(), strict=True))
    after = list(zip(positions(merged, to_a, 0).tolist(), positions(merged, to_b, 0).tolist(), strict=True))
    assert set(after) == before and len(after) == len(before)
    assert list(to_b) == sorted(to_b, reverse=True), "the target is written from front to back"
    assert 1 not in merged
    for (_, outer_a, outer_b), (n, inner_a, inner_b) in itertools.pairwise(zip(merged, to_a, to_b, strict=True)):
        assert (outer_a, outer_b) != (inner_a * n, inner_b * n), "two dimensions that are one"


def test_a_plain_copy_is_one_dimension() -> None:
    assert merge((4, 1, 3), (3, 3, 1), (3, 7, 1)) == ((12,), (1,), (1,))
    assert merge((), (), ()) == ((), (), ())
    assert merge((2, 3), (1, 2), (3, 1)) == ((2, 3), (1, 2), (3, 1))


def test_bytes_of_a_plan() -> None:
    model = toy()
    plan, _ = planned(Side(PLAIN, model), Side(PLAIN, model))
    assert plan.nbytes == 4 * sum(math.prod(model.shape(tensor)) for tensor in model.tensors)
