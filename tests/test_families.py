"""Every built-in architecture through the tests that a third party's gets, on tiny models of its own classes.

And what those tests do not ask: Transformer-Engine's names in bfloat16, and that transformers computes the same.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from attrs import evolve

import registry
from registry import Parallel, catalog
from registry.model import config_map, loose_facts, read_facts
from registry.prepare import merged_options
from registry.source import Source, understood
from registry.source import load as open_source
from registry.testing import MappingTests, same_directory
from tests.families import DCP, FAMILIES, HF, LEGACY, MEGATRON, TRTLLM, build, load
from tests.goldens import TrtllmCase, golden
from tests.test_golden_trtllm import TRT

# A file of every rank is one more way to go wrong, so those formats get the layouts with more of them.
LAYOUTS = {
    HF: [Parallel()],
    DCP: [Parallel()],
    MEGATRON: [Parallel(), Parallel(tp=2, pp=2)],
    LEGACY: [Parallel(tp=2), Parallel(tp=2, pp=2)],
    TRTLLM: [Parallel(), Parallel(tp=2), Parallel(tp=2, pp=2)],
}
EXPERT_LAYOUTS = {
    MEGATRON: [Parallel(tp=2, ep=2)],
    LEGACY: [Parallel(ep=2), Parallel(tp=2, pp=2, ep=4, etp=1)],
    TRTLLM: [Parallel(tp=2, ep=2)],
}
#: One of each kind of layout that transformers 5 fuses in memory and unfuses in files, or the other way round.
RUN = ["mixtral", "qwen3_next", "gpt_oss", "deepseek_v2_lite", "falcon_40b", "phi3", "bloom_hub", "granitemoe", "olmo2",
       "mamba2", "bert", "t5"]  # fmt: skip


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`family_model(name, dtype="float32")`: the directory of a tiny model, made once in a session: only read it."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = build(name, dtype, tmp_path_factory.mktemp(f"{name}-{dtype}") / "hf")
        return made[name, dtype]

    return make


def came_back(name: str, source: Path, there: registry.Report, back: Path, to: str) -> None:
    """`back` is `source`, but for copies and buffers, which may be missing, and what is said to be rounded."""
    rounded = FAMILIES[name].rounded
    if rounded and (to == TRTLLM or ("positions" in rounded and to not in (HF, DCP))):
        assert any("offset" in note or "leaves" in note for note in there.notes)
        (expected, _), (found, _) = load(source), load(back)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            if fnmatch.fnmatch(key, rounded) and "positions" in key:
                assert torch.equal(found[key][2:], tensor[2:]) and not found[key][:2].any()
            else:
                atol = 2e-7 if fnmatch.fnmatch(key, rounded) else 0
                assert torch.allclose(found[key], tensor, rtol=0, atol=atol), key
        return
    if not FAMILIES[name].dropped:
        assert not there.left_out
        same_directory(source, back)
        return
    (expected, config), (found, config_back) = load(source), load(back)
    dropped = {key for key in expected if any(fnmatch.fnmatch(key, glob) for glob in FAMILIES[name].dropped)}
    assert dropped
    assert there.left_out.keys() <= dropped
    assert expected.keys() - dropped <= found.keys() <= expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found)
    assert config_back == config


#: Rules that no model here calls for.
UNCALLED = {
    "glm4_moe": {"model.layers.{mtp+layers}.mlp.*_proj.weight": "the further layer has experts in every release"},
    "glm4_moe_lite": {"model.layers.{mtp+layers}.mlp.*_proj.weight": "the further layer has experts in every release"},
    "gpt_oss": {"*_blocks": "MXFP4, which tests/test_encoding.py reads"},
    "nemotron-nas": {"*.linear_*.weight": "tests/test_megatron_loads.py gives models such parts"},
    "opt": {"lm_head.weight": "every release ties it"},
    "qwen3_next": {
        "*.mlp.experts.*_proj": "how transformers 5 holds experts in memory; tests/test_dcp.py has them",
        "mtp.layers.{mtp}.mlp.*_proj.weight": "the further layer has experts in every release",
    },
}


class BuiltIn(MappingTests):
    """The battery on the models of one architecture."""

    layouts: ClassVar = {to: [*LAYOUTS[to], *EXPERT_LAYOUTS.get(to, [])] for to in LAYOUTS}

    def takes(self, name: str) -> Sequence[str]:
        return FAMILIES[name].formats

    @pytest.fixture(autouse=True)
    def _made(self, family_model: Callable[..., Path]) -> None:
        self.family_model = family_model

    def directory(self, name: str, factory: pytest.TempPathFactory) -> Path:
        return self.family_model(name)

    def came_back(self, name: str, source: Path, back: Path, report: registry.Report) -> None:
        came_back(name, source, report, back, report.target_format)


def battery(architecture: str) -> type[BuiltIn]:
    """The class for one architecture."""
    models = {name: family for name, family in FAMILIES.items() if family.architecture == architecture}
    configs = {name: {"model_type": architecture, **family.config} for name, family in models.items()}
    return type(
        architecture,
        (BuiltIn,),
        {"architecture": architecture, "configs": configs, "uncalled": UNCALLED.get(architecture, {})},
    )


globals().update({f"Test_{name}": battery(name) for name in registry.architectures()})


@pytest.mark.parametrize("to", [MEGATRON, LEGACY])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if MEGATRON in family.formats])
def test_transformer_engine_names_in_bfloat16(
    name: str, to: str, tmp_path: Path, family_model: Callable[..., Path]
) -> None:
    source = family_model(name, "bfloat16")
    options = {"transformer_impl": "transformer_engine"}
    parallel = Parallel(tp=2, pp=[1, 3])
    report = registry.convert(source, tmp_path / "there", to=to, parallel=parallel, options=options, durable=False)
    registry.convert(tmp_path / "there", tmp_path / "back", to=HF, durable=False)
    came_back(name, source, report, tmp_path / "back", to)


def outputs(name: str, folder: Path) -> torch.Tensor:
    """What transformers computes with a directory, every weight of which it must know and find."""
    import transformers

    model_class = getattr(transformers, str(FAMILIES[name].model_class))
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    extra = ("model.layers.4.*", *FAMILIES[name].dropped)  # multi-token prediction, which its classes leave out
    assert not [key for key in info["unexpected_keys"] if not any(fnmatch.fnmatch(key, glob) for glob in extra)]
    ids = {"input_ids": torch.arange(24).reshape(2, 12)}
    if model_class.__name__.startswith("T5"):
        ids["decoder_input_ids"] = ids["input_ids"] + 3
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**ids)[0]
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("name", RUN)
def test_transformers_computes_the_same(name: str, tmp_path: Path, family_model: Callable[..., Path]) -> None:
    source = family_model(name)
    to = next(to for to in (LEGACY, TRTLLM, HF) if to in FAMILIES[name].formats)
    parallel = Parallel(tp=2, pp=2) if to != HF else None
    registry.convert(source, tmp_path / "there", to=to, parallel=parallel, durable=False)
    options = {"shard_size": "100KB"}
    registry.convert(tmp_path / "there", tmp_path / "back", to=HF, options=options, durable=False)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert torch.equal(outputs(name, source), outputs(name, tmp_path / "back"))


# Gemma 3's text class does not read the package, nor DeepSeek's Kimi's config; T5's output matrix was its embedding.
HUB = [name for name, family in FAMILIES.items() if family.hub and name not in ("gemma3_hub", "kimi_k2", "t5_untied")]


@pytest.mark.parametrize("layout", HUB)
def test_the_published_layouts_are_those_that_transformers_reads(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family_model: Callable[..., Path]
) -> None:
    """A check of tests/hub_layouts.py: rewritten or not, it is the same model."""
    published = outputs(layout, family_model(layout))
    monkeypatch.setitem(FAMILIES, layout, dataclasses.replace(FAMILIES[layout], hub=None))
    assert torch.equal(published, outputs(layout, build(layout, "float32", tmp_path / "saved")))


def keeps_values(architecture: str) -> None:
    """Logical tensors have HuggingFace's values and types: where a format has others, its own rules say so."""
    for pattern, rule in catalog.architecture(architecture).rules():
        said = (rule.scale, rule.offset, rule.codec, rule.dtype, rule.pad, rule.cast_first, rule.shape)
        assert said == (1.0, "0", None, None, {}, "false", None), pattern
        assert not rule.parsed.sharded_over() and "@" not in pattern, f"{pattern}: HuggingFace's files are whole"


@pytest.mark.parametrize("architecture", registry.architectures())
def test_logical_values_are_huggingfaces(architecture: str) -> None:
    keeps_values(architecture)


#: What the names in HuggingFace's files say themselves, and a logical name then has: the first that fits is asked.
WORDS = {
    r"\b(q_proj|q|query)\.(weight|bias)$": r"\.q(_up)?\.",
    r"\b(k_proj|k|key)\.(weight|bias)$": r"\.k\.",
    r"\b(v_proj|v|value)\.(weight|bias)$": r"\.v\.",
    r"\b(q_norm|q_layernorm)\.": r"\.q_(full_|head_)?norm\.",
    r"\b(k_norm|k_layernorm)\.": r"\.k_(full_|head_)?norm\.",
    r"\b(gate_proj|wi_0)\.weight$": r"\.gate\.",
    r"\b(up_proj|wi|wi_1)\.weight$": r"\.up\.",
    r"\b(down_proj|wo)\.weight$": r"\.down\.",
    r"\bA_log$": r"\.a_log$",
    r"\bdt_bias$": r"\.dt_bias$",
    r"\bD$": r"\.d$",
    r"\b(enorm|pre_fc_norm_embedding)\.": r"mtp\.embedding_norm\.",
    r"\b(hnorm|pre_fc_norm_hidden)\.": r"mtp\.hidden_norm\.",
    r"(\bmtp|shared_head)\.norm\.": r"mtp\.final_norm\.",
}
#: Further layers have the layouts of the decoder's, under other names.
ALIKE = {"mtp.layers.{mtp}.": "model.layers.{layer}."}


def keeps_words(architecture: str) -> None:
    """Where HuggingFace's names say what a tensor is, the logical names say the same; a bias is its matrix's."""
    spec = catalog.architecture(architecture)
    for pattern, rule in spec.rules():
        last = pattern.split(".")[-1]
        for tensor in rule.parsed.tensors if last in ("weight", "bias") else ():
            assert tensor.endswith((f".{last}", ".padding")), f"{pattern}: {tensor}"
        for word, meant in WORDS.items():
            if re.search(word, pattern):
                assert any(re.search(meant, tensor) for tensor in rule.parsed.tensors), f"{pattern}: {rule.layout}"
                break
        for other in spec.tensors.get(f"{pattern.removesuffix('.bias')}.weight", ()) if last == "bias" else ():
            matrix = [tensor.replace(".weight", ".bias") for tensor in other.parsed.tensors]
            assert len(spec.tensors[pattern]) > 1 or list(rule.parsed.tensors) == matrix, pattern
        for further, decoder in ALIKE.items():
            if pattern.startswith(further):
                alike = [str(other.parsed) for other in spec.tensors[pattern.replace(further, decoder)]]
                assert str(rule.parsed).replace("mtp.", "") in alike, pattern
        if architecture == "t5" and pattern.startswith(("encoder", "decoder")) and "embed" not in pattern:
            assert {tensor.split(".")[0] for tensor in rule.parsed.tensors} == {pattern.split(".")[0]}, pattern


def says_what_it_uses(architecture: str) -> None:
    """Every axis of a spec is that of some tensor, and a size is a fact only where a tensor has it."""
    spec = catalog.architecture(architecture)
    used = {axis for axes in spec.logical().values() for axis in axes}
    within = {name for text in spec.axes.values() for name in re.findall(r"\w+", text)}
    assert not [axis for axis in spec.axes if axis not in used | within]
    for fact, axis in {"ffn_size": "ffn", "moe_ffn_size": "moe_ffn", "experts": "expert", "mtp_layers": "mtp"}.items():
        assert (fact in spec.config.facts) == (axis in used), fact


@pytest.mark.parametrize("architecture", registry.architectures())
def test_axes_and_sizes_are_those_of_tensors(architecture: str) -> None:
    says_what_it_uses(architecture)


@pytest.mark.parametrize("architecture", registry.architectures())
def test_names_say_the_same(architecture: str) -> None:
    keeps_words(architecture)


#: What a fact says of a model's tensors: it is true where there is such a tensor.
SHOWN = {
    "gated": r"mlp\.(experts\.|shared\.)?gate\.weight$",
    "qk_norm": r"(attention\.q_(full_|head_)?norm|mla\.kv_norm)\.weight$",
    "qkv_bias": r"attention\.q\.bias$", "attention_output_bias": r"attention\.output\.bias$",
    "mlp_bias": r"mlp\.(experts\.|shared\.)?down\.bias$", "router_bias": r"mlp\.router\.bias$",
    "shared_expert_gate": r"mlp\.shared_gate\.weight$", "attention_sinks": r"attention\.sinks$",
    "attention_gate": r"attention\.gate\.weight$",
}  # fmt: skip


def says_what_is_there(name: str, folder: Path) -> None:
    """The facts of a model say what its tensors show."""
    source = open_source(folder)
    model = source.model
    for fact, pattern in SHOWN.items():
        if fact in model.facts:
            shown = any(re.search(pattern, tensor) for tensor in model.tensors)
            assert bool(model.facts[fact]) == shown, fact
    assert (model.facts["position"] == "learned") == ("position_embedding.weight" in model.tensors)
    # A norm of queries that is not of each head with the same weights is of all heads at once, or has weights for each.
    rows = {len(piece.shape) for piece in source.opened.pieces if piece.name.endswith("q_norm.weight")}
    over = "projection" if rows == {1} else "each head"
    shown = any(re.fullmatch(r"attention\.q_(full|head)_norm\.weight", tensor) for tensor in model.tensors)
    assert model.facts.get("qk_norm_over") == (over if shown else None)


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_say_what_is_there(name: str, family_model: Callable[..., Path]) -> None:
    says_what_is_there(name, family_model(name))


#: Facts that a format's own config cannot say of every model, or says in another way.
UNSAID = {
    MEGATRON: {"activation", "ffn_size", "rope_scaling", "sub_norm_epsilon", "expert_groups", "groups_per_token",
               "layer_types", "moe_ffn_size"},
    TRTLLM: {"rope_scaling", "sub_norm_epsilon", "sliding_window", "layer_types", "time_step_rank"},
}  # fmt: skip
#: Models of which the format says these too.
SAID = {
    "activation": ["llama", "gpt2", "nemotron"], "ffn_size": ["llama"], "moe_ffn_size": ["mixtral", "nemotron_h"],
    "rope_scaling": ["llama", "deepseek_v2"], "layer_types": ["qwen3_next"],
    "time_step_rank": ["mamba_bias"],
}  # fmt: skip
#: Facts that it has no place for.
NO_PLACE = {
    MEGATRON: {
        "embedding_multiplier", "query_scale_dim", "attention_softcap", "logit_softcap", "local_rope_theta",
        "parallel_residual", "alibi", "alibi_bias_max", "post_norm", "qk_norm_over", "attention_multiplier",
        "residual_multiplier", "logits_scaling", "logit_scale", "no_rope_in", "l2_norm_qk", "attention_chunk",
        "attention_temperature", "attention_temperature_floor", "attention_temperature_scale", "conv_bias",
        "mamba_activation", "mamba_inner_size", "mamba_norm", "mamba_norm_before_gate", "logits_multiplier",
        "key_multiplier", "attention_in_multiplier", "attention_out_multiplier", "ssm_in_multiplier",
        "ssm_out_multiplier", "ssm_multipliers", "mlp_multipliers", "group_score", "parallel_norms",
    },
    TRTLLM: set[str](),
}  # fmt: skip


def same_facts(name: str, facts: dict[str, Any], again: dict[str, Any], found: Source) -> None:
    """What a format's document says is what HuggingFace's says, but for what it has no place for."""
    to = found.spec.name
    loose = loose_facts(config_map(found.spec, found.architecture)) | loose_facts(found.architecture.config)
    unsaid = {fact for fact in UNSAID[to] if name not in SAID.get(fact, ())}
    for fact, value in facts.items():
        if fact in found.architecture.facts:
            assert again.get(fact) in (None, value), fact
        elif fact not in (loose - {"parallel_norms"}) | NO_PLACE[to] | unsaid:
            assert again.get(fact) == value or not (value or again.get(fact)), fact


#: What its converter does not say, or not as it is (ADDED and WRONG in tests/test_golden_trtllm.py).
UNTOLD = {"mpt": "max_positions", "qwen3_moe": "router_normalized"}


def golden_facts(case: TrtllmCase) -> None:
    """The config that TensorRT-LLM's converter wrote says what the model's own says."""
    found = open_source(case.path)
    again = read_facts(found.opened.document, config_map(found.spec, found.architecture))
    facts = open_source(golden(case.input)).model.facts
    same_facts(case.id, {fact: facts[fact] for fact in facts.keys() - {UNTOLD.get(case.family)}}, again, found)


@pytest.mark.parametrize("case", TRT, ids=str)
def test_the_config_of_a_golden_says_what_the_models_own_says(case: TrtllmCase) -> None:
    golden_facts(case)


#: The activations that TensorRT-LLM 0.17 knows by name (tensorrt_llm/functional.py, ACT2FN; those that are used here).
TRTLLM_ACTIVATIONS = {
    "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "squared-relu", "swiglu", "geglu",
}  # fmt: skip


def facts_come_back(name: str, to: str, folder: Path, there: Path) -> None:
    """A format's own config says what HuggingFace's does, without a copy of it."""
    facts, found = open_source(folder).model.facts, open_source(there)
    again = read_facts(found.opened.document, config_map(found.spec, found.architecture))
    same_facts(name, facts, again, found)
    if to == TRTLLM:
        document, (_, config) = found.opened.document, load(folder)
        for field, value in config.items():  # a number has the name that it has in HuggingFace's config, or a prefix
            alike = field if field in document else f"moe_{field}"
            assert not isinstance(value, int | float) or document.get(alike, value) == value, field
        assert document["hidden_act"] in TRTLLM_ACTIVATIONS
        rope = config.get("rope_parameters") or {}
        for side in ("short", "long") if rope.get("rope_type") == "longrope" else ():
            assert document["position_embedding_type"] == "long_rope"
            assert document[f"longrope_scaling_{side}_factors"] == rope[f"{side}_factor"]
            assert again["rope_scaling"][f"{side}_factor"] == rope[f"{side}_factor"]
        opened = evolve(found.opened, hub_config=None, architecture=None)
        for field in {"architecture", "is_roberta", "mamba_version"} & opened.document.keys():
            other = {**opened.document, field: "another" if field != "is_roberta" else True}
            with pytest.raises(registry.RegistryError):  # that of another class is not taken for this one
                understood(evolve(opened, document=other), found.spec, config=None, architecture=None, states=False)


@pytest.mark.parametrize(
    ("name", "to"), [(name, to) for name, family in FAMILIES.items() for to in UNSAID if to in family.formats]
)
def test_facts_come_back_from_the_format_itself(
    name: str, to: str, tmp_path: Path, family_model: Callable[..., Path]
) -> None:
    registry.convert(family_model(name), tmp_path / "there", to=to, durable=False)
    facts_come_back(name, to, family_model(name), tmp_path / "there")


#: Families with norms that Megatron's local layers have no place for, or mixers that exist as Transformer-Engine's.
ENGINE = {
    "exaone4", "falcon_h1", "gemma2", "gemma3", "gemma3_text", "glm4", "mamba2", "nemotron_h", "olmo2", "olmo3",
    "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
}  # fmt: skip


#: Families whose layers differ, which Megatron then stores one by one.
MIXED = {"falcon_h1", "mamba2", "nemotron_h"}
#: TensorRT-LLM's classes that hold every layer, or all of it, on every rank (models/mamba and models/bert, model.py).
LIMITS = {"mamba": {"tp": 1, "pp": 1}, "bert": {"pp": 1}}


def default_engine(architecture: str) -> None:
    """Which layers a Megatron checkpoint is for, unless it is said; and what TensorRT-LLM's quantisation leaves."""
    options = merged_options(catalog.format_spec(MEGATRON), catalog.architecture(architecture), None)
    assert (options["transformer_impl"] == "transformer_engine") == (architecture in ENGINE)
    assert (options["layers"] == "per_layer") == (architecture in MIXED)
    options = merged_options(catalog.format_spec(TRTLLM), catalog.architecture(architecture), None)
    added = catalog.architecture(architecture).formats.get(TRTLLM)
    assert (added.limits if added else {}) == LIMITS.get(architecture, {})
    assert options["smooth_rows"] == (architecture not in ("gpt2", "gpt_bigcode", "gptj"))


@pytest.mark.parametrize("architecture", registry.architectures())
def test_the_layers_that_a_family_needs(architecture: str) -> None:
    default_engine(architecture)


#: Further layers that a config announces and a checkpoint may lack, by a model that has them.
FURTHER = {
    "qwen3_next_hub": "mtp.*", "qwen3_5_hub": "mtp.*", "qwen3_5_moe_hub": "mtp.*", "glm4_moe_hub": "model.layers.4.*",
    "glm4_moe_lite_hub": "model.layers.4.*", "deepseek_v3_hub": "model.layers.4.*",
}  # fmt: skip


def may_lack(name: str, folder: Path) -> None:
    """Without its further layers a model is whole; with some of their tensors it is not."""
    source = open_source(folder)
    pieces = source.opened.pieces
    further = [piece for piece in pieces if fnmatch.fnmatch(piece.name, FURTHER[name])]
    assert further
    for kept in ([], *([piece] for piece in further)):
        less = [piece for piece in pieces if piece not in further] + kept
        opened = evolve(source.opened, pieces=less)
        again = understood(opened, source.spec, config=None, architecture=None, states=False)
        assert bool(again.bound.missing) == bool(kept), kept


@pytest.mark.parametrize("name", FURTHER)
def test_further_layers_may_be_absent(name: str, family_model: Callable[..., Path]) -> None:
    may_lack(name, family_model(name))


#: Other names that a tensor has in transformers' memory, or in the first files.
ALSO = {
    "gpt_neox": ("embed_out.weight", "lm_head.weight"),
    "mamba": ("backbone.embeddings.weight", "backbone.embedding.weight"),
    "mamba2": ("backbone.embeddings.weight", "backbone.embedding.weight"),
}


def reads_also(name: str, folder: Path) -> None:
    """A tensor is found under its other name."""
    source = open_source(folder)
    name, other = ALSO[name]
    pieces = [piece._replace(name=other) if piece.name == name else piece for piece in source.opened.pieces]
    assert other in {piece.name for piece in pieces}
    opened = evolve(source.opened, pieces=pieces)
    again = understood(opened, source.spec, config=None, architecture=None, states=False)
    assert not again.bound.missing and not again.bound.left_out


@pytest.mark.parametrize("name", ALSO)
def test_other_names_are_read(name: str, family_model: Callable[..., Path]) -> None:
    reads_also(name, family_model(name))


_INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
#: What published files hold besides, by a model that it is added to here.
EXTRAS = {
    "bert": ["bert.embeddings.position_ids", "cls.predictions.decoder.bias"],
    "ernie4_5_moe": [_INV_FREQ, "model.mtp_block.0.input_layernorm.weight"],
    "gemma3_hub": ["vision_tower.vision_model.post_layernorm.bias", "multi_modal_projector.mm_soft_emb_norm.weight"],
    "gpt2": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
    "gpt_neox": [f"gpt_neox.layers.0.attention.{n}" for n in ("bias", "masked_bias", "rotary_emb.inv_freq")],
    "llama": [_INV_FREQ],
    "llama4_hub": ["vision_model.class_embedding", "multi_modal_projector.linear_1.weight"],
    "nemotron_h": ["mtp.layers.0.norm.weight"],
    "qwen3_5_hub": ["model.visual.patch_embed.proj.weight"],
    "qwen3_5_moe_hub": ["model.visual.patch_embed.proj.weight"],
    "t5": ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"],
}


def leaves_out(name: str, folder: Path) -> None:
    """The extra tensors of published files are left out, each for a reason, and nothing else is."""
    source = open_source(folder)
    more = [source.opened.pieces[0]._replace(name=extra) for extra in EXTRAS[name]]
    opened = evolve(source.opened, pieces=[*source.opened.pieces, *more])
    again = understood(opened, source.spec, config=None, architecture=None, states=False)
    assert again.bound.left_out.keys() - source.bound.left_out.keys() == set(EXTRAS[name])


@pytest.mark.parametrize("name", EXTRAS)
def test_what_published_files_hold_besides_is_left_out(name: str, family_model: Callable[..., Path]) -> None:
    leaves_out(name, family_model(name))


@pytest.mark.parametrize("architecture", registry.architectures())
def test_every_architecture_has_a_model(architecture: str) -> None:
    assert architecture in {family.architecture for family in FAMILIES.values()}
