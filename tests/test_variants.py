"""Every switch of a transformers class that adds tensors or takes some away: the specs follow, or refuse by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import registry
from registry.source import load
from tests.families import FAMILIES, build
from tests.test_symmetries import check

_BIAS = ["attention_bias"]
_BIASES = ["attention_bias", "mlp_bias"]
#: Model -> switches of its config that are turned round, one at a time.
SWITCHES = {
    "llama": _BIASES, "qwen3": _BIAS, "gemma": _BIAS, "gemma2": _BIAS, "gemma3_text": _BIAS, "starcoder2": ["use_bias"],
    "nemotron": _BIASES, "falcon_7b": ["new_decoder_architecture", "multi_query", "parallel_attn", "bias"],
    "opt": ["do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "layer_norm_elementwise_affine"],
    "opt_350m": ["do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine"],
    "gpt_neox": _BIAS,
    "olmo2": _BIAS, "olmo3": _BIAS, "granite": _BIASES, "cohere": [*_BIAS, "use_qk_norm"], "cohere2": _BIAS,
    "stablelm": ["use_qkv_bias", "qk_layernorm", "use_parallel_residual"], "glm": _BIAS, "glm4": _BIAS,
    "seed_oss": [*_BIASES, "attention_out_bias"], "smollm3": _BIASES, "qwen2_moe": ["qkv_bias"], "qwen3_moe": _BIAS,
    "qwen3_next": _BIAS, "qwen3_5_text": _BIAS, "qwen3_5_moe_text": _BIAS, "olmoe": _BIAS, "gpt_oss": _BIAS,
    "glm4_moe": [*_BIAS, "use_qk_norm"], "granitemoe": _BIAS, "phi": ["qk_layernorm"], "llama4_text": _BIAS,
    "phimoe": [*_BIAS, "lm_head_bias"], "mamba": ["use_bias", "use_conv_bias"], "mamba2": ["use_conv_bias"],
    "nemotron_h": ["use_conv_bias"], "falcon_h1": [*_BIAS, "mamba_conv_bias", "mamba_rms_norm"],
    "gpt_bigcode": ["multi_query"], "ernie4_5_moe": ["use_bias"],
}  # fmt: skip
#: These tie their output matrix to the embedding, and need not, or the other way round.
for _name in ("gpt2", "bloom", "mpt", "opt", "mamba", "gpt_bigcode", "opt_350m", "gpt_neox"):
    SWITCHES[_name] = [*SWITCHES.get(_name, []), "tie_word_embeddings"]
#: Those that no spec has a place for.
REFUSED = {
    "gpt2": ["add_cross_attention"], "gpt_bigcode_mha": ["add_cross_attention"], "glm4_moe_lite": _BIAS,
    "deepseek_v2": _BIASES, "deepseek_v3": _BIAS, "mamba2": ["use_bias"], "nemotron_h": ["mlp_bias", "use_bias"],
    "falcon_h1": ["mamba_proj_bias", "projectors_bias", "mlp_bias"],
}  # fmt: skip


def fields(name: str, switch: str) -> dict[str, Any]:
    """The field that turns a switch round."""
    model_class = getattr(transformers, str(FAMILIES[name].model_class))
    return {switch: not getattr(model_class.config_class(**copy.deepcopy(FAMILIES[name].config)), switch)}


def every(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, switch) for name, switches in table.items() for switch in switches]


@pytest.fixture
def variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The directory of a tiny model with a switch turned round."""
    name, switch = request.param
    family = FAMILIES[name]
    monkeypatch.setitem(FAMILIES, name, replace(family, config={**family.config, **fields(name, switch)}))
    return build(name, "float32", tmp_path / "hf")


def whole(name: str, folder: Path, scratch: Path) -> None:
    """Every tensor has its place, and the model computes the same when what goes together is rearranged."""
    source = load(folder)
    assert not source.bound.missing and not source.bound.left_out
    registry.plan(folder, to="huggingface")
    check(name, folder, scratch)


def refused(folder: Path) -> None:
    with pytest.raises(registry.MappingError, match="no rule claims"):
        load(folder)


@pytest.mark.parametrize(
    ("variant", "name"),
    [(pair, pair[0]) for pair in every(SWITCHES)],
    indirect=["variant"],
    ids=map(str, every(SWITCHES)),
)
def test_a_model_with_a_switch_turned_round(variant: Path, name: str, tmp_path: Path) -> None:
    whole(name, variant, tmp_path)


@pytest.mark.parametrize("variant", every(REFUSED), indirect=True, ids=map(str, every(REFUSED)))
def test_a_model_of_which_a_spec_knows_only_a_part_is_refused(variant: Path) -> None:
    refused(variant)


#: T5's class takes it from another field; the other is the switch of `gpt_bigcode`.
DERIVED = {("t5", "is_gated_act"), ("gpt_bigcode_mha", "multi_query")}


def shapes(name: str, changed: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What the class has in memory, on the meta device."""
    model_class = getattr(transformers, str(FAMILIES[name].model_class))
    with torch.device("meta"):
        model = model_class(model_class.config_class(**copy.deepcopy({**FAMILIES[name].config, **changed})))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def switches(name: str) -> Iterator[str]:
    """The fields of the config whose truth decides which tensors there are."""
    model_class, before = getattr(transformers, str(FAMILIES[name].model_class)), shapes(name, {})
    for field, value in model_class.config_class(**copy.deepcopy(FAMILIES[name].config)).to_dict().items():
        if type(value) is bool and field != "tie_word_embeddings":
            try:
                after = shapes(name, {field: not value})
            except (TypeError, ValueError, AttributeError, NotImplementedError):
                continue  # a config that its own class refuses
            if after != before:
                yield field


@pytest.mark.parametrize("name", sorted({*SWITCHES, *REFUSED, "t5", "qwen2", "mixtral"}))
def test_no_switch_is_forgotten(name: str) -> None:
    known = {*every(SWITCHES), *every(REFUSED), *DERIVED}
    assert {(name, switch) for switch in switches(name)} <= known
