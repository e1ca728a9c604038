"""What Megatron's arguments mean: each one's fact, by megatron/training/arguments.py and TransformerConfig.

Arguments that contradict what a family always is are refused by their facts, so they are read for families too that say
the same in their own spec.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from registry import catalog
from registry.model import read_facts
from tests.families import LEGACY, MEGATRON

SIZES = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}
#: Arguments -> facts that follow. What is not given is as Megatron has it where nobody says otherwise.
MEANING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"zero_centered_norm": False, "gated": False, "activation": "gelu_tanh", "attention_sinks": False}),
    ({}, {"attention_gate": False, "qk_norm": False, "norm": "layer", "router_score": "softmax", "rope_scaling": None}),
    ({}, {"tied_embeddings": True, "rope_interleaved": False, "rotary_percent": 1.0, "layer_types": None}),
    ({}, {"mtp_layers": 0, "router_scale": 1.0, "expert_groups": 1, "groups_per_token": 1, "router_normalized": True}),
    ({}, {"activation_alpha": None, "rope_layers": None, "sliding_window": None, "kv_heads": 4, "head_dim": 16}),
    ({"normalization": "LayerNorm"}, {"norm": "layer"}),
    ({"normalization": "RMSNorm"}, {"norm": "rms"}),
    ({"layernorm_zero_centered_gamma": True}, {"zero_centered_norm": True}),
    ({"apply_layernorm_1p": True}, {"zero_centered_norm": True}),
    ({"swiglu": True}, {"gated": True, "activation": "silu"}),
    ({"quick_geglu": True}, {"gated": True, "activation": "quick_gelu", "activation_alpha": 1.702}),
    ({"squared_relu": True}, {"gated": False, "activation": "relu2"}),
    ({"activation_func_clamp_value": 7.0}, {"activation_clamp": 7.0}),
    ({"glu_linear_offset": 1.0}, {"linear_offset": 1.0}),
    ({"kv_channels": 24}, {"head_dim": 24}),
    ({"group_query_attention": True, "num_query_groups": 2}, {"kv_heads": 2}),
    ({"max_position_embeddings": 77}, {"max_positions": 77}),
    ({"init_method_std": 0.01}, {"initializer_range": 0.01}),
    ({"layernorm_epsilon": 1e-6}, {"norm_epsilon": 1e-6, "sub_norm_epsilon": 1e-6}),
    ({"position_embedding_type": "learned_absolute"}, {"position": "learned"}),
    ({"rotary_base": 500000}, {"rope_theta": 500000.0}),
    ({"rotary_percent": 0.5}, {"rotary_percent": 0.5}),
    ({"rotary_interleaved": True}, {"rope_interleaved": True}),
    ({"multi_latent_attention": True, "rope_type": "rope"}, {"rope_interleaved": True, "rope_scaling": None}),
    (
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
        {
            "rope_scaling": {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    ({"no_rope_freq": 4}, {"rope_layers": [1, 1, 1, 0]}),
    ({"window_size": [127, 0]}, {"sliding_window": 128, "layer_types": None}),
    (
        {"window_size": [127, 0], "window_attn_skip_freq": 2},
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    ({"softmax_type": "learnable"}, {"attention_sinks": True}),
    ({"softmax_type": "vanilla"}, {"attention_sinks": False}),
    ({"attention_output_gate": True}, {"attention_gate": True}),
    ({"untie_embeddings_and_output_weights": True}, {"tied_embeddings": False}),
    ({"qk_layernorm": True}, {"qk_norm": True}),
    ({"add_qkv_bias": True}, {"qkv_bias": True, "attention_output_bias": False, "mlp_bias": False}),
    ({"add_bias_linear": True}, {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}),
    ({"q_lora_rank": 24}, {"q_lora_rank": 24}),
    ({"q_lora_rank": None}, {"q_lora_rank": 0}),
    ({"moe_router_score_function": "sigmoid"}, {"router_score": "sigmoid", "router_normalized": True}),
    ({"moe_router_pre_softmax": True}, {"router_normalized": False}),
    ({"moe_router_topk_scaling_factor": 2.5}, {"router_scale": 2.5}),
    ({"moe_router_num_groups": 8, "moe_router_group_topk": 4}, {"expert_groups": 8, "groups_per_token": 4}),
    ({"num_experts": 4, "moe_layer_freq": [0, 1, 1, 1]}, {"first_dense": 1, "moe_every": 1, "dense_layers": [0]}),
    ({"num_experts": 4, "moe_layer_freq": 2}, {"first_dense": 0, "moe_every": 2}),
    ({"num_experts": 4, "moe_ffn_hidden_size": 8}, {"moe_ffn_size": 8}),
    ({"mtp_num_layers": 1}, {"mtp_layers": 1}),
]  # fmt: skip


@pytest.mark.parametrize("format", [MEGATRON, LEGACY])
@pytest.mark.parametrize(("arguments", "facts"), MEANING)
def test_what_an_argument_means(format: str, arguments: dict[str, Any], facts: dict[str, Any]) -> None:
    found = read_facts({**SIZES, **arguments}, catalog.format_spec(format).config)
    assert {name: found.get(name, "not said") for name in facts} == facts


@pytest.mark.parametrize("format", [MEGATRON, LEGACY])
def test_what_is_not_said_is_as_megatron_has_it(format: str) -> None:
    """The fields of its own config class, where arguments have the same names and defaults."""
    config = pytest.importorskip("megatron.core.transformer.transformer_config").TransformerConfig
    defaults = {field.name: field.default for field in fields(config)}
    same = (
        "normalization", "layernorm_zero_centered_gamma", "activation_func_clamp_value", "glu_linear_offset",
        "softmax_type", "attention_output_gate", "qk_layernorm", "moe_router_score_function", "moe_router_pre_softmax",
        "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk", "window_size",
    )  # fmt: skip
    said = {**SIZES, **{name: defaults[name] for name in same}}
    spec = catalog.format_spec(format).config
    silent = read_facts(SIZES, spec)
    assert {name: value for name, value in read_facts(said, spec).items() if name in silent} == silent
