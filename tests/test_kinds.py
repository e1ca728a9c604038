"""Models whose layers differ, and every other way in which rules hold here and not there.

As in `tests/test_plan.py`, nothing is on disk (but where bytes are compared): every logical element has a number, a
reference says which numbers a stored tensor holds, and a plan is right if it turns the source's into the target's.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import registry
from formats import huggingface
from registry import bind, catalog
from registry.config_rules import ConfigMap
from registry.errors import MappingError, SpecError
from registry.model import LogicalModel, logical_model, read_facts, write_document
from registry.parallel import Parallel
from registry.specs import ArchitectureSpec, FormatSpec
from registry.storage import Opened, Piece
from tests.test_plan import PLAIN, Side, check, planned, refused

# A family with every kind of layer: dense, experts, no attention; sizes that differ; two layers more behind the last.
VARIED = {
    "kind": "architecture",
    "name": "varied",
    "axes": {
        "layer": "layers", "mtp": "mtp_layers", "vocab": "5", "hidden": "hidden_size", "group": "kv_heads[layer]",
        "rep": "heads // kv_heads[layer]", "head_dim": "2", "ffn": "ffn_sizes[layer]", "expert": "experts",
        "moe_ffn": "4", "two_hidden": "2 * hidden_size",
    },
    "config": {
        "facts": {
            name: name
            for name in ("layers", "mtp_layers", "hidden_size", "heads", "kv_heads", "ffn_sizes", "experts",
                         "moe_layers", "bare_layers", "parts")
        }
    },
    "define": {"attends": "layer not in bare_layers", "moe_layer": "layer in moe_layers"},
    "optional": {"mtp": {"reason": "others leave it out", "facts": {"mtp_layers": 0}}},
    "variants": {"experts": {"one_by_one": {}, "packed": {}}, "prefix": {"long": {}, "bare": {"begin": {"m.": ""}}}},
    "tensors": {
        "m.emb": "embedding: vocab hidden",
        "m.h.{layer}.norm": [
            {"layout": "attention_norm: hidden", "when": "attends"},
            {"layout": "mlp_norm: hidden", "when": "not attends"},
        ],
        "m.h.{layer}.post": {"layout": "mlp_norm: hidden", "when": "attends"},
        "m.h.{layer}.q": {"layout": "q: (group rep head_dim) hidden", "when": "attends"},
        "m.h.{layer}.kv": {"layout": "[k: group head_dim | v: group head_dim] hidden", "when": "attends"},
        "m.h.{layer}.up": {"layout": "up: ffn hidden", "when": "not moe_layer"},
        "m.h.{layer}.down": {"layout": "down: hidden ffn", "when": "not moe_layer"},
        "m.h.{layer}.router": {"layout": "router: expert hidden", "when": "moe_layer"},
        "m.h.{layer}.experts.{expert}.up":
            {"layout": "experts.up: moe_ffn hidden", "when": "moe_layer", "choice": "one_by_one"},
        "m.h.{layer}.experts.{expert}.down":
            {"layout": "experts.down: hidden moe_ffn", "when": "moe_layer", "choice": "one_by_one"},
        "m.h.{layer}.experts.up":
            {"layout": "experts.up: expert hidden moe_ffn", "when": "moe_layer", "choice": "packed"},
        "m.h.{layer}.experts.down":
            {"layout": "experts.down: expert moe_ffn hidden", "when": "moe_layer", "choice": "packed"},
        "m.h.{mtp+layers}.join": {"layout": "mtp.join: hidden two_hidden", "optional": "mtp"},
        "m.h.{mtp+layers}.norm": {"layout": "mtp.norm: hidden", "optional": "mtp"},
        "m.h.{mtp+layers}.emb": {"layout": "embedding: vocab hidden", "optional": "mtp", "replica": True},
        "m.norm": "final_norm: hidden",
    },
}  # fmt: skip

# What layers share between formats with names of each rank and with global tensors.
_LAYERS = {
    "l.{layer@pp}.norm1": {"layout": "attention_norm: hidden", "when": "has('q')"},
    "l.{layer@pp}.norm2": [
        {"layout": "mlp_norm: hidden", "when": "has('router')", "names": {"te": "l.{layer@pp}.mlp.norm"}},
        {"layout": "mlp_norm: hidden", "when": "not has('router')"},
    ],
    "l.{layer@pp}.o.{expert@ep}.down": {"layout": "experts.down: hidden moe_ffn@etp"},
    "l.{layer@pp}.router": "router: expert hidden",
    "l.{layer@pp}.up": "up: ffn@tp hidden",
    "l.{layer@pp}.down": "down: hidden ffn@tp",
    "mtp.{mtp}.join": {"layout": "mtp.join: hidden two_hidden", "stage": "last"},
    "mtp.{mtp}.norm": {"layout": "mtp.norm: hidden", "stage": "last"},
    "norm": {"layout": "final_norm: hidden", "stage": "last"},
    "emb": {"layout": "embedding: vocab@tp hidden", "pad": {"vocab": "tp"}, "stage": "first"},
}
_FORMAT = {
    "kind": "format", "container": "none", "parallel": ["tp", "pp", "vpp", "ep", "etp"],
    "variants": {
        "layers": {"stacked": {"fold": "layer"}, "single": {}},
        "experts": {"together": {"fold": "expert"}, "apart": {}},
        "impl": {"local": {}, "te": {}},
    },
    "options": {"layers": {"default": "stacked"}, "experts": {"default": "together"}, "impl": {"default": "local"}},
}  # fmt: skip
GRID = FormatSpec.model_validate(
    _FORMAT
    | {
        "name": "varied-grid",
        "tensors": _LAYERS
        | {
            "l.{layer@pp}.qkv": "(group [q: rep | k: | v:] head_dim)@tp hidden",
            "l.{layer@pp}.e.{expert@ep}.up": "experts.up: moe_ffn@etp hidden",
        },
    }
)
RANKED = FormatSpec.model_validate(
    _FORMAT
    | {
        "name": "varied-ranked",
        "ranked": True,
        "replicate": {"tp": ["group"]},
        "variants": {"impl": {"local": {}, "te": {}}},
        "options": {"impl": {"default": "local"}},
        "tensors": _LAYERS
        | {
            "l.{layer@pp}.qkv": "[q: (group rep)@tp head_dim | k: group@tp head_dim | v: group@tp head_dim] hidden",
            # The bytes of one matrix an expert, shown as one matrix.
            "l.{layer@pp}.e.up": {
                "layout": "experts.up: expert@ep hidden moe_ffn@etp",
                "shape": "experts.up: hidden (expert@ep moe_ffn@etp)",
            },
        },
    }
)


def varied(*, without: tuple[str, ...] = (), spec: dict[str, Any] | None = None, **facts: Any) -> LogicalModel:
    layers = facts.get("layers", 3)
    alike = {"kv_heads": [2] * layers, "ffn_sizes": [4] * layers, "moe_layers": [], "bare_layers": []}
    known = {"layers": layers, "mtp_layers": 0, "hidden_size": 2, "heads": 4, "experts": 2, **alike, **facts}
    return logical_model(ArchitectureSpec.model_validate(spec or VARIED), known, without)


@st.composite
def models(draw: st.DrawFn) -> LogicalModel:
    """Any pattern of layers, with any sizes; also all alike."""
    layers = draw(st.integers(0, 5))

    def some() -> list[int]:
        return [i for i in range(layers) if draw(st.booleans())]

    def each(*choices: int) -> list[int]:
        differ = draw(st.booleans())
        return [draw(st.sampled_from(choices)) for _ in range(layers)] if differ else [choices[0]] * layers

    return varied(
        layers=layers, moe_layers=some(), bare_layers=some(), kv_heads=each(2, 1, 4), ffn_sizes=each(4, 8, 0, 12),
        experts=draw(st.sampled_from([2, 4])), mtp_layers=draw(st.integers(0, 2)),
    )  # fmt: skip


@st.composite
def sides(draw: st.DrawFn, model: LogicalModel) -> Side:
    """Any format at any layout: uneven and interleaved stages, experts sharded otherwise than the rest."""
    spec = draw(st.sampled_from([PLAIN, GRID, RANKED]))
    if spec is PLAIN:
        choices = {"experts": draw(st.sampled_from(["one_by_one", "packed"]))}
        return Side(spec, model, choices=choices | {"prefix": draw(st.sampled_from(["long", "bare"]))})
    layers = model.sizes["layer"]
    cuts = sorted(draw(st.lists(st.integers(0, layers), max_size=3)))
    pp = [high - low for low, high in itertools.pairwise([0, *cuts, layers])]
    vpp = draw(st.sampled_from([n for n in (1, 2) if len(pp) % n == 0]))
    # Where etp divides tp, no two ranks would write the same file (tests/test_parallel.py).
    tp, ep, etp = draw(st.sampled_from([(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2), (4, 2, 4), (1, 2, 1), (4, 1, 1)]))
    options = {name: draw(st.sampled_from(list(spec.variants[name]))) for name in spec.options}
    return Side(spec, model, Parallel(tp=tp, ep=ep, etp=etp, pp=pp, vpp=vpp), options)


# Layers that differ


@given(models(), st.data())
@settings(max_examples=100)
def test_models_whose_layers_differ_convert_into_each_other(model: LogicalModel, data: st.DataObject) -> None:
    check(data.draw(sides(model)), data.draw(sides(model)))


def names_of(side: Side) -> set[str]:
    return {slot.name for slot in side.target.slots}


def test_layers_are_stacked_only_where_all_are_alike() -> None:
    alike = names_of(Side(GRID, varied(moe_layers=[0, 1, 2])))
    assert {"l.router", "l.e.up", "l.qkv"} <= alike and not any("0" in name for name in alike)
    mixed = names_of(Side(GRID, varied(moe_layers=[1])))
    assert {"l.1.router", "l.1.e.up", "l.0.qkv", "l.2.up", "l.0.norm1"} <= mixed and "l.qkv" not in mixed
    sized = names_of(Side(GRID, varied(ffn_sizes=[4, 4, 8])))
    assert {"l.2.up", "l.0.qkv"} <= sized and "l.qkv" not in sized


def test_what_a_model_has_at_which_layer() -> None:
    model = varied(moe_layers=[1], bare_layers=[2], ffn_sizes=[4, 0, 8], kv_heads=[1, 2, 4])
    assert [(kind.axis, kind.indices) for kind in model.varying["layer"]] == [("layer", (i,)) for i in range(3)]
    assert [(kind.indices, shape) for kind, shape in model.parts("up")] == [((0,), (1, 4, 2)), ((2,), (1, 8, 2))]
    assert [(kind.indices, shape) for kind, shape in model.parts("q")] == [
        ((0,), (1, 1, 4, 2, 2)), ((1,), (1, 2, 2, 2, 2)),
    ]  # fmt: skip
    assert model.volume("up") == 4 * 2 + 8 * 2 and model.volume("experts.up") == 2 * 4 * 2
    assert model.shape("up") == (2, 8, 2), "two layers have it; of the sizes, the largest"
    assert model.sizes["ffn"] == 8
    has, each = model.functions["has"], model.functions["each"]
    assert has("router") and has("q") and not has("nothing")
    assert each("router") == [0, 1, 0] and each("q") == [1, 1, 0] and each("mlp_norm") == [1, 1, 1]
    assert each("mtp.norm") == [] and each("nothing") == [] == each("embedding")[5:]


def test_indices_that_are_alike_are_one_kind() -> None:
    assert varied().varying == varied(moe_layers=[0, 1, 2], bare_layers=[0, 1, 2]).varying == {}
    model = varied(layers=6, moe_layers=[1, 3, 5])
    assert [kind.indices for kind in model.varying["layer"]] == [(0, 2, 4), (1, 3, 5)]
    assert "q" not in varied(bare_layers=[0, 1, 2]).tensors


@pytest.mark.parametrize("layers", range(4))
def test_a_per_layer_list_that_is_too_short_is_reported_with_its_field(layers: int) -> None:
    for name, axis in (("ffn_sizes", "ffn"), ("kv_heads", "group")):
        with pytest.raises(MappingError) as caught:
            varied(layers=4, **{"kv_heads": [2] * 4, "ffn_sizes": [4] * 4, name: [4] * layers})
        assert f"axis '{axis}' = {name}[layer] is no size: {name} is {[4] * layers}" in caught.value.details
    with pytest.raises(MappingError, match="does not describe a varied model"):
        varied(layers=4, kv_heads=["2"] * 4)


def test_a_condition_that_cannot_be_answered_names_the_layer() -> None:
    spec = VARIED | {"define": VARIED["define"] | {"moe_layer": "parts[layer] == 'moe'"}}
    with pytest.raises(MappingError) as caught:
        varied(spec=spec, parts=["dense", "moe"])
    (problem,) = caught.value.details
    assert problem.startswith("layer 2: cannot evaluate") and "element 2 of 2" in problem


def test_a_config_that_says_dense_where_experts_are_stored_names_family_rule_and_tensor() -> None:
    model, source = varied(moe_layers=[]), Side(PLAIN, varied(moe_layers=[1, 2]))
    problem = refused(Side(PLAIN, model), Side(GRID, model), source.pieces)
    assert "does not fit varied" in problem
    assert "m.h.{1..2}.router" in problem and "m.h.{1..2}.experts.{0..1}.up" in problem
    assert "router: expert hidden" in problem and "layer in moe_layers" in problem
    assert "missing: m.h.{1..2}.up" in problem
    # The other way round: experts are expected, and what is there is dense.
    model, source = varied(moe_layers=[1, 2]), Side(PLAIN, varied(moe_layers=[1]))
    problem = refused(Side(PLAIN, model), Side(GRID, model), source.pieces)
    assert "m.h.2.up" in problem and "up: ffn hidden" in problem and "m.h.2.router" in problem


def test_a_layer_of_another_size_is_refused_with_both_shapes() -> None:
    model = varied(ffn_sizes=[4, 8, 4])
    problem = refused(Side(PLAIN, model), Side(GRID, model), Side(PLAIN, varied(ffn_sizes=[4, 12, 4])).pieces)
    assert "m.h.1.up: shape disagrees with the config; expected (8, 2) (up: ffn hidden), found (12, 2)" in problem
    assert "m.h.0" not in problem


@pytest.mark.parametrize("name", ["m.h.1.router", "m.h.1.experts.0.up", "m.h.0.up", "m.h.2.norm", "m.h.1.q"])
def test_a_tensor_that_is_missing_at_one_layer_is_named(name: str) -> None:
    side = Side(PLAIN, varied(moe_layers=[1], bare_layers=[2]))
    problem = refused(side, Side(GRID, side.model), [piece for piece in side.pieces if piece.name != name])
    assert f"missing from the source: {name}" in problem
    assert "holds only" in problem or "the source lacks it" in problem


# Another stack of the same layers


REPEATED = VARIED | {
    "name": "repeated",
    "tensors": {n: r for n, r in VARIED["tensors"].items() if n not in ("m.h.{mtp+layers}.norm",)},
    "repeats": [{"of": "m.h.{layer}.", "to": "m.h.{mtp+layers}.", "prefix": "mtp.", "optional": "mtp",
                 "leave": [f"m.h.{{layer}}.{name}" for name in ("q", "kv", "norm", "post", "up", "down")]}],
}  # fmt: skip
REPEATED_FORMAT = FormatSpec.model_validate(
    RANKED.model_dump()
    | {
        "name": "repeated-ranked",
        "tensors": {n: r for n, r in RANKED.model_dump()["tensors"].items() if not n.startswith("mtp.{mtp}.norm")},
        "repeats": [
            {"of": "l.{layer@pp}.", "to": "mtp.{mtp}.layer.", "prefix": "mtp.", "stage": "last",
             "aliases": ["mtp.{mtp}.model."]}
        ],
    }
)  # fmt: skip


@pytest.mark.parametrize("moe", [[], [0], [2], [3], [2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("prefix", ["long", "bare"])
def test_layers_behind_the_last_follow_the_same_pattern(moe: list[int], prefix: str) -> None:
    """Their conditions go on counting: of layers 0 and 1, and 2 and 3 behind them, some have experts."""
    model = varied(spec=REPEATED, layers=2, mtp_layers=2, moe_layers=moe)
    has_router = [i + 2 in moe for i in range(2)]
    assert any(has_router) == ("mtp.router" in model.tensors)
    assert model.functions["each"]("mtp.router") == ([int(x) for x in has_router] if any(has_router) else [0, 0])
    plain = Side(PLAIN, model, choices={"prefix": prefix})
    names = names_of(plain)
    for i, here in enumerate(has_router):
        assert (f"{'m.' if prefix == 'long' else ''}h.{2 + i}.router" in names) == here
    ranked = Side(REPEATED_FORMAT, model, Parallel(tp=2, pp=[1, 1], ep=2, etp=1))
    check(plain, ranked)
    check(ranked, plain)
    assert {s.rank.pp for s in ranked.target.slots if s.name.startswith("mtp.")} <= {1}
    other = [piece._replace(name=piece.name.replace(".layer.", ".model.")) for piece in ranked.pieces]
    check(ranked, plain, other)


def test_has_in_a_repeated_rule_asks_about_the_repeated_tensor() -> None:
    for quote in "'\"":
        rules = {"l.{layer}.x": {"layout": "x: a", "when": f"has({quote}x{quote}) and 'has(x)' != {quote}x{quote}"}}
        spec = FormatSpec.model_validate(
            _FORMAT | {"name": "f", "tensors": rules, "repeats": [{"of": "l.{layer}", "to": "m.{mtp}", "prefix": "p."}]}
        )
        (rule,) = spec.tensors["m.{mtp}.x"]
        assert rule.layout == "p.x: a"
        assert rule.when == f"has({quote}p.x{quote}) and 'has(x)' != {quote}x{quote}"


def test_a_rule_of_its_own_stands_before_a_repeated_one() -> None:
    own = REPEATED["tensors"] | {"m.h.{mtp+layers}.router": {"layout": "mtp.mine: hidden", "optional": "mtp"}}
    spec = ArchitectureSpec.model_validate(REPEATED | {"tensors": own})
    layouts = {name: [rule.layout for rule in rules] for name, rules in spec.tensors.items()}
    assert layouts["m.h.{mtp+layers}.router"] == ["mtp.mine: hidden"]
    assert layouts["m.h.{mtp+layers}.experts.up"] == ["mtp.experts.up: expert hidden moe_ffn"]
    assert "m.h.{mtp+layers}.q" not in layouts, "it is left out"


def test_a_repeated_size_that_differs_between_layers_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        catalog.build(REPEATED | {"repeats": [repeat()]}, "repeated.yaml")
    assert "m.h.{mtp+layers}.up: axis 'ffn' of mtp.up differs along 'layer', which mtp.up lacks" in caught.value.details


# Parts that checkpoints may lack


def absent(pieces: list[Piece], model: LogicalModel) -> tuple[list[str], list[str]]:
    """(parts that are absent, names that are missing), of a source of these pieces."""
    side = Side(PLAIN, model)
    opened = Opened(Path("toy"), PLAIN.name, [], pieces, {})
    bound = bind.bind_source(opened, PLAIN, side.rules, model, {}, [])
    return bound.absent, bound.missing


def test_an_optional_part_is_there_or_not() -> None:
    model = varied(mtp_layers=2)
    pieces = Side(PLAIN, model).pieces
    part = [piece for piece in pieces if piece.name.startswith(("m.h.3.", "m.h.4."))]
    assert len(part) == 6 and absent(pieces, model) == ([], [])
    rest = [piece for piece in pieces if piece not in part]
    assert absent(rest, model) == (["mtp"], [])
    for lost in part:
        assert absent([p for p in pieces if p is not lost], model) == ([], [lost.name]), "half of it is too little"
    without = varied(mtp_layers=2, without=("mtp",))
    assert "mtp.join" not in without.tensors and not any(n.startswith("m.h.3") for n in names_of(Side(PLAIN, without)))
    check(Side(PLAIN, without), Side(RANKED, without, Parallel(tp=2)), rest)


def test_half_of_an_optional_part_is_refused_by_name() -> None:
    model = varied(mtp_layers=2)
    side = Side(PLAIN, model)
    problem = refused(side, Side(GRID, model), [piece for piece in side.pieces if piece.name != "m.h.4.join"])
    assert "mtp.join: the source holds only 8 of 16 elements" in problem
    assert "missing from the source: m.h.4.join" in problem


# Copies, spellings and coding


def test_a_copy_is_a_replica_and_may_be_absent() -> None:
    model = varied(mtp_layers=2)
    side = Side(PLAIN, model)
    plan = check(side, Side(GRID, model))
    assert [(c.tensor, len(c.source)) for c in plan.replicas] == [("embedding", 2)]
    fewer = [piece for piece in side.pieces if piece.name != "m.h.4.emb"]
    plan = check(side, Side(GRID, model), fewer)
    assert sum(len(c.source) for c in plan.replicas) == 1
    assert "m.h.4.emb" in names_of(side), "a copy is written too"


def test_a_copy_alone_holds_the_tensor() -> None:
    model = varied(mtp_layers=1)
    side = Side(PLAIN, model)
    check(side, Side(GRID, model), [piece for piece in side.pieces if piece.name != "m.emb"])


def bound_choices(side: Side) -> dict[str, str]:
    opened = Opened(Path("toy"), PLAIN.name, [], side.pieces, {})
    return bind.bind_source(opened, side.spec, side.rules, side.model, side.options, []).variants


@pytest.mark.parametrize("experts", ["one_by_one", "packed"])
@pytest.mark.parametrize("prefix", ["long", "bare"])
@pytest.mark.parametrize("moe", [[0, 1, 2], [1], [0, 2]])
def test_the_choice_on_disk_is_seen_from_names(experts: str, prefix: str, moe: list[int]) -> None:
    side = Side(PLAIN, varied(moe_layers=moe), choices={"experts": experts, "prefix": prefix})
    found = bound_choices(side)
    assert found["experts"] == experts and found.get("prefix", "long") == prefix
    assert any(".experts.0." in piece.name for piece in side.pieces) == (experts == "one_by_one")


def test_half_packed_experts_are_refused() -> None:
    model = varied(moe_layers=[1])
    one, packed = (Side(PLAIN, model, choices={"experts": choice}) for choice in ("one_by_one", "packed"))
    (whole,) = (piece for piece in packed.pieces if piece.name == "m.h.1.experts.down")
    mixed = [piece for piece in one.pieces if not piece.name.endswith(".1.down")]
    assert "m.h.1.experts.down" in refused(one, Side(GRID, model), [*mixed, whole])


@pytest.mark.parametrize("layers", ["stacked", "single"])
@pytest.mark.parametrize("experts", ["together", "apart"])
def test_two_axes_fold_at_once(layers: str, experts: str) -> None:
    model = varied(moe_layers=[0, 1, 2], experts=4)
    side = Side(GRID, model, Parallel(tp=2, pp=[1, 2], ep=2, etp=1), {"layers": layers, "experts": experts})
    name = {"stacked": "l.e", "single": "l.0.e"}[layers] + {"together": "", "apart": ".0"}[experts] + ".up"
    (whole,) = {slot.whole for slot in side.target.slots if slot.name == name}
    assert whole == (3,) * (layers == "stacked") + (4,) * (experts == "together") + (4, 2)
    for other in (Side(PLAIN, model), Side(RANKED, model, Parallel(tp=4, ep=2, etp=2))):
        check(side, other)
        check(other, side)


@pytest.mark.parametrize(("tp", "ep", "etp"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2), (2, 4, 1), (4, 1, 2)])
def test_bytes_shown_in_other_dimensions(tp: int, ep: int, etp: int) -> None:
    """One [hidden, moe_ffn] matrix an expert, shown as [hidden, experts x moe_ffn]: not what a transpose would give."""
    model = varied(moe_layers=[1], experts=4)
    side = Side(RANKED, model, Parallel(tp=tp, ep=ep, etp=etp))
    shapes = {slot.shape for slot in side.target.slots if slot.name.endswith(".e.up")}
    assert shapes == {(2, 4 // ep * 4 // etp)}
    check(side, Side(PLAIN, model))
    check(Side(PLAIN, model), side)


def test_a_tensor_with_the_bytes_and_not_the_shape_is_refused() -> None:
    model = varied(moe_layers=[1])
    side = Side(RANKED, model)
    turned = [p._replace(shape=p.shape[::-1]) if p.name.endswith(".e.up") else p for p in side.pieces]
    assert "l.1.e.up: shape disagrees with the config; expected (2, 8)" in refused(side, Side(PLAIN, model), turned)


def test_offsets_follow_facts() -> None:
    architecture = ArchitectureSpec.model_validate(
        {
            "name": "t", "axes": {"a": "3"}, "config": {"facts": {"centred": "centred"}},
            "tensors": {"w": {"layout": "x: a", "offset": "-1 if centred else 0"}},
        }
    )  # fmt: skip
    spec = FormatSpec.model_validate(
        {"name": "f", "container": "none", "tensors": {"w": {"layout": "x: a", "offset": "0.5 * tp"}}}
    )
    for centred, offset in ((True, -1.0), (False, 0.0), (None, 0.0)):
        model = logical_model(architecture, {"centred": centred})
        plan, _ = planned(Side(PLAIN, model), Side(spec, model, Parallel(tp=2)))
        (copies,) = plan.copies
        assert (copies.values.source.offset, copies.values.target.offset) == (offset, 1.0)
    wrong = spec.model_copy(update={"tensors": {"w": [spec.tensors["w"][0].model_copy(update={"offset": "'one'"})]}})
    with pytest.raises(MappingError, match="an offset is no number"):
        planned(Side(PLAIN, model), Side(wrong, model))


# What formats ask of a model


OBJECTS = {
    "l.{layer@pp}.state": "true",
    "l.{layer@pp}.q.state": "has('q')",
    "l.{layer@pp}.e.{expert@ep}.state": "has('experts.up') and impl == 'te'",
    "mtp.{mtp}.state": "has('mtp.join')",
    "end.state": "has('router') and not has('nothing')",
}


@pytest.mark.parametrize("spec", [GRID, RANKED], ids=lambda spec: spec.name)
@pytest.mark.parametrize("impl", ["local", "te"])
@pytest.mark.parametrize("moe", [[1], [], [0, 1, 2]])
def test_entries_without_data_are_where_the_model_has_the_tensor(spec: FormatSpec, impl: str, moe: list[int]) -> None:
    model = varied(moe_layers=moe, bare_layers=[2] if moe else [], mtp_layers=1, experts=4)
    options = {"impl": impl} | ({"layers": "single", "experts": "apart"} if spec is GRID else {})
    asking = FormatSpec.model_validate(spec.model_dump() | {"objects": OBJECTS})
    side = Side(asking, model, Parallel(tp=2, pp=[1, 2], ep=2, etp=1), options)
    attends = [layer for layer in range(3) if not (moe and layer == 2)]
    names = {f"l.{layer}.state" for layer in range(3)} | {f"l.{layer}.q.state" for layer in attends} | {"mtp.0.state"}
    names |= {f"l.{layer}.e.{expert}.state" for layer in moe for expert in range(4) if impl == "te"}
    names |= {"end.state"} if moe else set()
    found = [(slot.name, slot.rank) for slot in side.target.objects]
    assert len(set(found)) == len(found)
    if spec is GRID:
        assert {name for name, _ in found} == names and len(found) == len(names)
        return
    whole = set()
    for name, rank in found:  # a stage counts its layers from zero, a rank its experts
        steps = name.split(".")
        if steps[0] == "l":
            steps[1] = str(int(steps[1]) + rank.pp)
        if "e" in steps:
            steps[3] = str(int(steps[3]) + 2 * rank.ep)
        assert rank.pp == 1 or steps[0] == "l"
        whole.add((".".join(steps), rank.tp, rank.ep))
    each = {name: 1 if ".e." in name else 2 for name in names}  # ranks (tp 0, ep 0) and (tp 1, ep 1)
    assert {name: sum(n == name for n, *_ in whole) for name in names} == each
    assert len(found) == len(whole) == sum(each.values())


def test_both_ends_of_the_pipeline_may_store_a_copy() -> None:
    rule = RANKED.tensors["emb"][0].model_copy(update={"stage": "ends"})
    spec = RANKED.model_copy(update={"tensors": {**RANKED.tensors, "emb": [rule]}})
    model = varied(moe_layers=[1])
    for stages, copies in (([3], 0), ([1, 2], 1), ([1, 1, 1], 1)):
        side = Side(spec, model, Parallel(pp=stages))
        assert len([slot for slot in side.target.slots if slot.name == "emb"]) == 1 + copies
        plan = check(side, Side(PLAIN, model))
        assert sum(len(c.source) for c in plan.replicas if c.tensor == "embedding") == copies


def test_facts_within_a_part_of_the_document() -> None:
    config = ConfigMap.model_validate(
        {
            "within": "text",
            "facts": {
                "layers": {"field": ["n_layers", "depth"]}, "heads": {"read": "n_heads or 2 * n_layers"},
                "tied": {"field": "tie", "default": False}, "theta": "rope.theta",
            },
        }
    )  # fmt: skip
    inner = {"n_layers": 3, "rope": {"theta": 5.0}}
    assert read_facts({"text": inner, "tie": True, "n_layers": 9}, config) == {
        "layers": 3, "heads": 6, "tied": True, "theta": 5.0,
    }  # fmt: skip
    assert read_facts({"depth": 4, "n_heads": 1, "rope": {"theta": 1.0}}, config)["layers"] == 4, "no part: the top"
    assert read_facts({"text": {"depth": 4}, "n_layers": 9}, config)["layers"] == 4, "any field of the part first"
    written = write_document({"layers": 5, "tied": True, "theta": 5.0}, config, {}, {"text": dict(inner), "tie": False})
    assert written == {"text": {**inner, "n_layers": 5}, "tie": True}, "each where it was, and only what differs"
    assert write_document({"layers": 5}, config, {}, {}) == {"text": {"n_layers": 5}}


# What a spec calls by a name


def test_a_child_that_redefines_a_condition_changes_every_rule() -> None:
    """DeepSeek V3 has experts from a layer on; a child of it has them in the layers before."""
    catalog.register(
        {
            "kind": "architecture",
            "name": "child",
            "extends": "deepseek_v3",
            "define": {"moe_layer": "layer < 2"},
        }
    )
    parts = {}
    for name in ("deepseek_v3", "child"):
        facts = dict.fromkeys(catalog.architecture(name).config.facts, 2) | {
            "layers": 5,
            "moe_every": 1,
            "mtp_layers": 0,
        }
        model = logical_model(catalog.architecture(name), facts)
        parts[name] = [[kind.indices for kind, _ in model.parts(t)] for t in ("mlp.router.weight", "mlp.up.weight")]
    assert parts == {"deepseek_v3": [[(2, 3, 4)], [(0, 1)]], "child": [[(0, 1)], [(2, 3, 4)]]}


def test_definitions_may_use_each_other_and_name_sizes() -> None:
    spec = ArchitectureSpec.model_validate(
        {
            "name": "t", "axes": {"layer": "layers", "a": "2 * width"},
            "config": {"facts": {"layers": "layers", "every": "every", "size": "size"}},
            "define": {"width": "size + 1", "late": "layer > 1", "moe": "late and layer % every == 0"},
            "tensors": {"{layer}.x": {"layout": "x: a", "when": "moe or 'late' == 'moe'"}},
        }
    )  # fmt: skip
    model = logical_model(spec, {"layers": 7, "every": 2, "size": 1})
    assert model.sizes["a"] == 4, "2 * (size + 1), not 2 * size + 1"
    assert [kind.indices for kind, _ in model.parts("x")] == [(2, 4, 6)], "text in quotes stays as it is"


# On disk


TOY = {
    "kind": "architecture", "name": "kinds",
    "axes": {"layer": "layers", "a": "3", "expert": "2", "wide": "4", "mtp": "1"},
    "config": {
        "within": "text_config",
        "facts": {"layers": "num_layers", "shift": {"field": "shift", "default": 0}},
        "constants": {"model_type": "kinds"},
    },
    "optional": {"mtp": {"reason": "left out by some"}},
    "variants": {"experts": {"apart": {}, "packed": {}, "old": {"written": False}},
                 "prefix": {"long": {}, "bare": {"begin": {"model.": "", "model.h.": "layers."}}}},
    "tensors": {
        "model.emb": "embedding: a",
        "model.h.{layer}.x": {"layout": "x: a", "offset": "shift"},
        "model.h.{layer}.e.{expert}.w": {"layout": "w: wide a", "choice": "apart"},
        "model.h.{layer}.e.w": {"layout": "w: expert a wide", "choice": "packed"},
        "model.h.{layer}.e.w_old": {"layout": "w: expert wide a", "choice": "old"},
        "model.h.{mtp+layers}.y": {"layout": "y: a", "optional": "mtp"},
        "model.h.{mtp+layers}.emb": {"layout": "embedding: a", "optional": "mtp", "replica": True},
    },
}  # fmt: skip
TOY_FORMAT = {
    "kind": "format", "name": "kindsfmt", "container": "elsewhere",
    "tensors": {
        "emb": "embedding: a", "l.{layer}.x": "x: a", "l.{layer}.w": "w: expert wide a", "y.{mtp}": "y: a",
    },
}  # fmt: skip

Tensors = dict[str, np.ndarray]


class Elsewhere(huggingface.Container):
    """Directories like HuggingFace's that are of another format."""

    def detect(self, path: Path) -> bool:
        return False


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Path]:
    """A directory on disk of these tensors."""
    catalog.register(TOY)

    def make(tensors: Tensors, name: str = "source", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        document = {"model_type": "kinds", "num_layers": 7, "text_config": {"num_layers": 2}, **config}
        (folder / "config.json").write_text(json.dumps(document))
        return folder

    return make


def toy_tensors(spelling: str = "apart", mtp: bool = True) -> Tensors:
    random = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    tensors = {"model.emb": some(3)}
    for layer in range(2):
        at = f"model.h.{layer}"
        tensors[f"{at}.x"], w = some(3), some(2, 4, 3)
        if spelling == "apart":
            tensors |= {f"{at}.e.{i}.w": w[i].copy() for i in range(2)}
        elif spelling == "packed":
            tensors[f"{at}.e.w"] = np.ascontiguousarray(w.transpose(0, 2, 1))
        else:
            tensors[f"{at}.e.w_old"] = w
    tensors["model.h.2.y"] = some(3)
    tensors["model.h.2.emb"] = tensors["model.emb"].copy()
    return tensors if mtp else {name: t for name, t in tensors.items() if ".h.2." not in name}


def begun_bare(tensors: Tensors) -> Tensors:
    """`model.h.` becomes `layers.`, and what else begins with `model.` loses it: the longest beginning holds."""
    return {n.replace("model.h.", "layers.").removeprefix("model."): t for n, t in tensors.items()}


def written(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("spelling", ["apart", "packed"])
@pytest.mark.parametrize("bare", [False, True])
def test_the_way_back_keeps_spelling_and_beginning(
    toy: Callable[..., Path], tmp_path: Path, spelling: str, bare: bool
) -> None:
    tensors = begun_bare(toy_tensors(spelling)) if bare else toy_tensors(spelling)
    registry.convert(toy(tensors), tmp_path / "back", to="huggingface")
    assert same(written(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back/config.json").read_text())["text_config"] == {"num_layers": 2}


def test_a_spelling_that_is_only_read_is_written_as_the_default(toy: Callable[..., Path], tmp_path: Path) -> None:
    registry.convert(toy(toy_tensors("old")), tmp_path / "back", to="huggingface")
    assert same(written(tmp_path / "back"), toy_tensors("apart"))


def test_spellings_are_one_model(toy: Callable[..., Path]) -> None:
    folders = [toy(toy_tensors(spelling), spelling) for spelling in ("apart", "packed", "old")]
    bare = toy(begun_bare(toy_tensors()), "bare")
    assert all(registry.verify(folders[0], other) for other in (*folders[1:], bare))
    changed = toy_tensors("packed")
    changed["model.h.1.e.w"][0, 0, 0] += 1
    (difference,) = registry.verify(folders[0], toy(changed, "changed")).differences
    assert difference.tensor == "w.1.0" and difference.problem == "the values differ"


@pytest.mark.parametrize("mtp", [True, False])
def test_an_optional_part_travels_if_it_is_there(toy: Callable[..., Path], tmp_path: Path, mtp: bool) -> None:
    tensors = toy_tensors(mtp=mtp)
    registry.convert(toy(tensors), tmp_path / "back", to="huggingface")
    assert same(written(tmp_path / "back"), tensors)


def test_copies_that_differ_are_refused_and_absent_ones_are_not_missed(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    tensors = toy_tensors()
    tensors["model.h.2.emb"][1] += 1
    with pytest.raises(MappingError) as caught:
        registry.convert(toy(tensors), tmp_path / "back", to="huggingface")
    assert "copies of embedding differ" in str(caught.value)
    assert "model.emb" in str(caught.value) and "model.h.2.emb" in str(caught.value)
    assert not (tmp_path / "back").exists()
    del tensors["model.h.2.emb"]
    registry.convert(toy(tensors, "fewer"), tmp_path / "back", to="huggingface")
    assert same(written(tmp_path / "back"), toy_tensors()), "a copy is made"


def test_half_of_an_optional_part_on_disk(toy: Callable[..., Path], tmp_path: Path) -> None:
    tensors = toy_tensors()
    del tensors["model.h.2.y"]
    with pytest.raises(MappingError, match=r"y: the source lacks it(.|\n)*missing from the source: model\.h\.2\.y"):
        registry.convert(toy(tensors), tmp_path / "back", to="huggingface")


@pytest.mark.parametrize("shift", [0, 1, -2])
def test_an_offset_from_the_config_is_taken_off_and_put_on_again(
    toy: Callable[..., Path], tmp_path: Path, shift: int
) -> None:
    catalog.register_container("elsewhere", Elsewhere())
    catalog.register(TOY_FORMAT)
    tensors = toy_tensors()
    source = toy(tensors, text_config={"num_layers": 2, "shift": shift})
    registry.convert(source, tmp_path / "other", to="kindsfmt")
    other = written(tmp_path / "other")
    assert np.array_equal(other["l.0.x"], tensors["model.h.0.x"] - np.float32(shift))
    assert np.array_equal(other["l.1.w"][0], tensors["model.h.1.e.0.w"])


# What does not fit together in a spec


def rules(**changes: Any) -> dict[str, Any]:
    """The rules of the family, with others in each layer; None takes one out."""
    changed = VARIED["tensors"] | {f"m.h.{{layer}}.{name}": rule for name, rule in changes.items()}
    return {"tensors": {name: rule for name, rule in changed.items() if rule is not None}}


def repeat(**changes: Any) -> dict[str, Any]:
    return {"of": "m.h.{layer}.", "to": "m.h.{mtp+layers}.", "prefix": "mtp.", "leave": ["*.norm"], **changes}


MTP_RULE = {"layout": "mtp.join: hidden two_hidden", "optional": "mtp"}
COPY = {"layout": "embedding: vocab hidden", "replica": True}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown choice": (rules(q={"layout": "q: hidden", "choice": "loose"}), "no variant has the choice 'loose'"),
    "unknown optional part": (
        {"tensors": VARIED["tensors"] | {"m.h.{mtp+layers}.join": MTP_RULE | {"optional": "mpt"}}},
        "m.h.{mtp+layers}.join: 'mpt' is no optional part of this spec",
    ),
    "fact of an optional part": (
        {"optional": {"mtp": {"reason": "r", "facts": {"mtp_layer": 0}}}},
        "optional mtp: 'mtp_layer' is no fact of this spec",
    ),
    "optional without a reason": ({"optional": {"mtp": {}}}, "optional.mtp.reason: Field required"),
    "unknown shift": (
        {"tensors": VARIED["tensors"] | {"m.h.{mtp+layer}.x": "mtp.x: hidden"}},
        "m.h.{mtp+layer}.x: 'layer' is no fact of this spec",
    ),
    "condition along two axes": (
        {"tensors": VARIED["tensors"] | {"m.{layer}.{expert}": {"layout": "x: hidden", "when": "layer > expert"}}},
        "m.{layer}.{expert}: differs along expert and layer; one axis is the most",
    ),
    "size along two axes": (
        {"axes": VARIED["axes"] | {"ffn": "ffn_sizes[layer] * expert"}},
        "axis ffn: differs along expert and layer; one axis is the most",
    ),
    "tensor along two axes": (
        {
            "axes": VARIED["axes"] | {"wide": "4 * expert + 4"},
            "tensors": VARIED["tensors"] | {"m.h.{layer}.{expert}.x": "x: wide"},
        },
        "m.h.{layer}.{expert}.x: x differs along expert and layer; one axis is the most",
    ),
    "size along an axis that the tensor lacks": (
        {"tensors": VARIED["tensors"] | {"m.x": "x: ffn"}},
        "m.x: axis 'ffn' of x differs along 'layer', which x lacks",
    ),
    "condition along an axis of other names": (
        {"tensors": VARIED["tensors"] | {"m.x": {"layout": "x: hidden", "when": "layer > 1"}}},
        "m.x: 'layer' is no fact of this spec",
    ),
    "shape with other axes": (rules(x={"layout": "x: ffn hidden", "shape": "x: (ffn head_dim)"}), "has other axes"),
    "shape that is no layout": (rules(x={"layout": "x: ffn hidden", "shape": "x: (ffn"}), "expected ')'"),
    "shape of another tensor": (rules(x={"layout": "x: hidden", "shape": "y: hidden"}), "'y: hidden' has other axes"),
    "offset over what is no fact": (
        rules(x={"layout": "x: hidden", "offset": "-1 if centred else 0"}),
        "m.h.{layer}.x offset: 'centred' is no fact of this spec",
    ),
    "offset that is no expression": (rules(x={"layout": "x: hidden", "offset": "open('x')"}), "not allowed in an expr"),
    "copy of nothing": (
        rules(x=COPY | {"layout": "embeding: vocab hidden"}),
        "m.h.{layer}.x: a copy of embeding, which no other rule names",
    ),
    "copy that lacks an axis": (
        rules(x=COPY | {"layout": "embedding: hidden"}),
        "m.h.{layer}.x: a copy of embedding without its axis 'vocab'",
    ),
    "repeats that clash": (
        {"repeats": [repeat(), repeat(of="m.h.{layer}.experts.", to="m.h.{mtp+layers}.experts.")]},
        "repeats: m.h.{mtp+layers}.experts.up comes of 'm.h.{layer}.' and of 'm.h.{layer}.experts.'",
    ),
    "repeat of nothing": ({"repeats": [repeat(of="m.layers.{layer}.")]}, "repeats: no name begins with 'm.layers.{la"),
    "repeat along another axis": (
        {"repeats": [repeat(to="m.h.{extra}.")]},
        "m.h.{extra}.q: axis 'extra' of mtp.q is not declared",
    ),
    "repeat for an unknown part": ({"repeats": [repeat(optional="mpt")]}, "'mpt' is no optional part of this spec"),
    "repeat without a prefix": ({"repeats": [{"of": "m.", "to": "n."}]}, "repeats.0.prefix: Field required"),
    "definition that shadows a fact": ({"define": VARIED["define"] | {"heads": "8"}}, "define: 'heads' is a fact of"),
    "definition that shadows an axis": ({"define": VARIED["define"] | {"layer": "8"}}, "define: 'layer' is an axis of"),
    "definition that is a function": ({"define": VARIED["define"] | {"has": "8"}}, "define: 'has' is a function"),
    "definition over what is no fact": (
        {"define": VARIED["define"] | {"attends": "layer in bear_layers"}},
        "m.h.{layer}.q: 'bear_layers' is no fact of this spec",
    ),
    "definition of itself": (
        {"define": VARIED["define"] | {"attends": "layer > 0 and attends"}},
        "m.h.{layer}.q: 'attends' is no fact of this spec",
    ),
    "definition that is no expression": ({"define": {"attends": "layer in"}}, "define.attends: not an expression"),
    "fold of several axes": ({"variants": {"v": {"a": {"fold": ["layer"]}}}}, "variants.v.a.fold"),
    "variant that is no mapping": ({"variants": {"v": {"a": {"starts": {}}}}}, "variants.v.a.starts: Extra inputs"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "problem"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_family_is_told_in_its_own_terms(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        catalog.build(VARIED | changes, "varied.yaml")
    assert any(problem in line for line in caught.value.details), caught.value.details


FORMAT_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "condition along an axis": (
        {"l.{layer@pp}.x": {"layout": "x: hidden", "when": "layer > 1"}},
        "l.{layer@pp}.x: 'layer' in `when`: only families differ along an axis, ask has()",
    ),
    "chunks in another shape": (
        {"x": {"layout": "x: expert@ep ffn", "shape": "x: (expert@ep ffn)"}},
        "x: chunks of a tensor cannot be shown in another shape",
    ),
    "dimension that is not listed": (
        {"x": {"layout": "x: a@dp"}},
        "x: shards over 'dp', which `parallel` does not list",
    ),
    "name and layout over one dimension": (
        {"l.{expert@ep}.x": "x: hidden@ep"},
        "l.{expert@ep}.x: 'ep' shards an axis of the name and of the layout",
    ),
}


@pytest.mark.parametrize(("rules", "problem"), FORMAT_MISTAKES.values(), ids=FORMAT_MISTAKES)
def test_a_mistake_in_a_format_is_told_in_its_own_terms(rules: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        catalog.build(_FORMAT | {"name": "f", "tensors": rules}, "f.yaml")
    assert problem in caught.value.details


def test_two_rules_of_one_name_that_both_hold_are_refused() -> None:
    both = rules(norm=[{"layout": "attention_norm: hidden", "when": "attends"}, "mlp_norm: hidden"])
    model = varied(spec=VARIED | both, bare_layers=[1])
    with pytest.raises(MappingError) as caught:
        _ = Side(PLAIN, model).target
    assert "two rules of huggingface hold for m.h.{layer}.norm" in str(caught.value)


def test_a_rule_less_leaves_the_layers_that_need_it_without_a_place() -> None:
    less = {name: rule for name, rule in GRID.model_dump()["tensors"].items() if name != "l.{layer@pp}.router"}
    spec = FormatSpec.model_validate(GRID.model_dump() | {"tensors": less})
    assert Side(spec, varied(moe_layers=[1])).target.homeless == ["router"]
    assert Side(spec, varied()).target.homeless == []
