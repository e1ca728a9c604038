"""What a HuggingFace config means to Megatron, family by family, as data: arguments of Megatron's config and model.

An argument's value is a field of the HuggingFace config where it is a string, is computed from that config where it is
a function, and is itself otherwise. What Megatron cannot compute is required to be switched off.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F


class Config(dict[str, Any]):
    """A HuggingFace config; a field that it lacks is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    @property
    def rope(self) -> "Config":
        """The rotary embeddings in the spelling of transformers 5."""
        old = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        old = {name: value for name, value in old.items() if value is not None}
        return Config({"rope_type": "default", **old, **(self.rope_scaling or {}), **(self.rope_parameters or {})})


Source = Callable[[Config], Any]


def always(value: Any) -> Source:
    return lambda _: value


def first(*names: str) -> Source:
    """The first of these fields that the config has."""
    return lambda hf: next(hf[name] for name in names if hf.get(name) is not None)


def flag(name: str) -> Source:
    return lambda hf: bool(hf.get(name))


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


tanh_gelu = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "relu2": squared_relu}
ACTIVATIONS |= {"gelu_new": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu}
ACTIVATION_FIELDS = "hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act"
LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Family:
    """One family's arguments, and how they differ from another's: `LLAMA.but(qk_layernorm=True)`."""

    config: Mapping[str, Any]  # of TransformerConfig
    model: Mapping[str, Any]  # of the model's class
    kind: str = "gpt"  # which class that is: `tests.megatron_cpu.model.KINDS`
    engine: bool = False  # it exists with Transformer-Engine's layers only
    neutral: Mapping[str, Any] = field(default_factory=dict)  # fields of HuggingFace's that must have this value
    scale: Mapping[str, Any] = field(default_factory=dict)  # module -> factor on what it puts out, which core lacks
    ropes: tuple[str, ...] = ("default", "llama3")

    def but(self, model: Mapping[str, Any] | None = None, **config: Any) -> "Family":
        return replace(self, config={**self.config, **config}, model={**self.model, **(model or {})})

    def settings(self, hf: Config) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
        """The arguments of Megatron's config and of its model, and the scales."""
        for name, value in self.neutral.items():
            assert hf.get(name, value) == value, f"{name} is {hf[name]}, and Megatron knows {value} only"
        assert hf.rope.rope_type in self.ropes, f"rotary embeddings {hf.rope}"
        if hf.rope.rope_type == "llama3":
            assert LLAMA3.items() <= hf.rope.items(), f"rotary embeddings {hf.rope}"
        parts = self.config, self.model, self.scale
        config, model, scale = ({name: evaluated(hf, source) for name, source in part.items()} for part in parts)
        return config, model, scale


def evaluated(hf: Config, source: Any) -> Any:
    if isinstance(source, str):
        return hf[source]
    return source(hf) if callable(source) else source


def moe_layers(dense: Callable[[Config, int], bool]) -> Source:
    """Megatron's moe_layer_freq: a list where some layers are dense, and 1 where none is."""

    def layers(hf: Config) -> int | list[int]:
        pattern = [int(not dense(hf, layer)) for layer in range(hf.num_hidden_layers)]
        return pattern if 0 in pattern else 1

    return layers


ROPE = {
    "position_embedding_type": always("rope"),
    "rotary_base": lambda hf: hf.rope.rope_theta or 10000.0,
    "rotary_percent": lambda hf: hf.rope.partial_rotary_factor or 1.0,
    "rope_scaling": lambda hf: hf.rope.rope_type == "llama3",
    "rope_scaling_factor": lambda hf: hf.rope.factor or 1.0,
    "max_sequence_length": "max_position_embeddings",
    "share_embeddings_and_output_weights": flag("tie_word_embeddings"),
}
LLAMA = Family(
    {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": first("num_key_value_heads", "num_attention_heads"),
        "kv_channels": lambda hf: hf.head_dim or hf.hidden_size // hf.num_attention_heads,
        "layernorm_epsilon": first("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon"),
        "normalization": always("RMSNorm"),
        "gated_linear_unit": True,
        "activation_func": lambda hf: ACTIVATIONS[first(*ACTIVATION_FIELDS)(hf)],
        "add_bias_linear": flag("mlp_bias"),
        "add_qkv_bias": flag("attention_bias"),
    },
    ROPE,
)
GPT2 = Family(
    {
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "ffn_hidden_size": lambda hf: hf.n_inner or 4 * hf.n_embd,
        "num_attention_heads": "n_head",
        "layernorm_epsilon": "layer_norm_epsilon",
        "activation_func": lambda hf: ACTIVATIONS[hf.activation_function],
    },
    {
        "position_embedding_type": always("learned_absolute"),
        "max_sequence_length": "n_positions",
        "share_embeddings_and_output_weights": lambda hf: hf.get("tie_word_embeddings", True),
    },
)
MOE = LLAMA.but(
    num_moe_experts=first("num_local_experts", "num_experts", "n_routed_experts"),
    moe_ffn_hidden_size=first("moe_intermediate_size", "intermediate_size"),
    moe_router_topk="num_experts_per_tok",
    moe_router_load_balancing_type=always("none"),
    moe_router_pre_softmax=lambda hf: not hf.get("norm_topk_prob", True),
    moe_router_dtype=always("fp32"),
    moe_token_dispatcher_type=always("alltoall"),
)
QWEN_MOE = MOE.but(
    moe_layer_freq=moe_layers(
        lambda hf, layer: layer in (hf.mlp_only_layers or []) or (layer + 1) % (hf.decoder_sparse_step or 1) > 0
    ),
)
SIGMOID_MOE = MOE.but(
    moe_layer_freq=moe_layers(lambda hf, layer: layer < (hf.first_k_dense_replace or 0)),
    moe_shared_expert_intermediate_size=lambda hf: (hf.n_shared_experts or 0) * hf.moe_intermediate_size or None,
    moe_router_score_function=always("sigmoid"),
    moe_router_pre_softmax=False,
    moe_router_enable_expert_bias=True,
    moe_router_num_groups=lambda hf: hf.n_group if (hf.n_group or 1) > 1 else None,
    moe_router_group_topk=lambda hf: hf.topk_group if (hf.n_group or 1) > 1 else None,
    moe_router_topk_scaling_factor="routed_scaling_factor",
)
MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "qk_layernorm": True,
    "rope_type": always("rope"),
    "rotary_base": lambda hf: hf.rope.rope_theta,
    "rotary_scaling_factor": 1.0,
    "kv_channels": None,
}
DEEPSEEK_V3 = replace(SIGMOID_MOE.but(**MLA), engine=True, ropes=("default",))
ZERO_CENTERED = {"layernorm_zero_centered_gamma": True}
LAYER_NORM = {"normalization": always("LayerNorm"), "gated_linear_unit": False}
DELTA_NET = {
    **ZERO_CENTERED,
    "qk_layernorm": True,
    "attention_output_gate": True,
    "experimental_attention_variant": always("gated_delta_net"),
    "deterministic_mode": True,
    "linear_attention_freq": lambda hf: [int(kind == "linear_attention") for kind in hf.layer_types],
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
}
SHARED_GATE = {"moe_shared_expert_intermediate_size": "shared_expert_intermediate_size", "moe_shared_expert_gate": True}
SYMBOLS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}
GPT_OSS = replace(
    MOE.but(
        {"position_embedding_type": always("yarn")},
        add_bias_linear=True,
        softmax_type=always("learnable"),
        window_size=lambda hf: (hf.sliding_window - 1, 0),
        window_attn_skip_freq=lambda hf: [int(kind == "sliding_attention") for kind in hf.layer_types],
        activation_func=always(lambda x: x * torch.sigmoid(1.702 * x)),
        glu_linear_offset=1.0,
        activation_func_clamp_value=7.0,
        yarn_rotary_scaling_factor=lambda hf: hf.rope.factor,
        yarn_original_max_position_embeddings=lambda hf: hf.rope.original_max_position_embeddings,
        yarn_beta_fast=lambda hf: hf.rope.beta_fast,
        yarn_beta_slow=lambda hf: hf.rope.beta_slow,
        yarn_mscale=None,
        yarn_mscale_all_dim=None,
        yarn_correction_range_round_to_int=lambda hf: hf.rope.get("truncate", True),
    ),
    ropes=("yarn",),
)
NEMOTRON_H = Family(
    {
        **SIGMOID_MOE.config,
        "num_layers": lambda hf: len(hf.layers_block_type),
        "moe_layer_freq": 1,
        "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
        "gated_linear_unit": False,
        "mamba_state_dim": "ssm_state_size",
        "mamba_head_dim": "mamba_head_dim",
        "mamba_num_heads": "mamba_num_heads",
        "mamba_num_groups": "n_groups",
        "use_mamba_mem_eff_path": False,
        "is_hybrid_model": True,
    },
    {
        "hybrid_override_pattern": lambda hf: "".join(SYMBOLS[kind] for kind in hf.layers_block_type),
        "max_sequence_length": "max_position_embeddings",
        "share_embeddings_and_output_weights": flag("tie_word_embeddings"),
    },
    kind="mamba",
    engine=True,
)
MAMBA2 = Family(
    {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_heads",  # that Megatron's config wants, and the model does not
        "layernorm_epsilon": "layer_norm_epsilon",
        "normalization": always("RMSNorm"),
        "add_bias_linear": False,
        "mamba_state_dim": "state_size",
        "mamba_head_dim": "head_dim",
        "mamba_num_heads": "num_heads",
        "mamba_num_groups": "n_groups",
        "use_mamba_mem_eff_path": False,
    },
    {
        "hybrid_override_pattern": lambda hf: "M" * hf.num_hidden_layers,
        "max_sequence_length": 4096,
        "share_embeddings_and_output_weights": flag("tie_word_embeddings"),
    },
    kind="mamba",
    engine=True,
    neutral={"layer_norm_epsilon": 1e-5, "n_groups": 1},  # of the norm behind the gate: Megatron's, and over groups
)
BERT = Family(
    {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "layernorm_epsilon": "layer_norm_eps",
        "activation_func": lambda hf: ACTIVATIONS[hf.hidden_act],
    },
    {
        "num_tokentypes": "type_vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "share_embeddings_and_output_weights": lambda hf: hf.get("tie_word_embeddings", True),
        "add_binary_head": lambda hf: hf.architectures == ["MegatronBertForPreTraining"],
    },
    kind="bert",
)
T5 = Family(
    {
        "num_layers": "num_layers",
        "hidden_size": "d_model",
        "ffn_hidden_size": "d_ff",
        "num_attention_heads": "num_heads",
        "kv_channels": "d_kv",
        "layernorm_epsilon": "layer_norm_epsilon",
        "normalization": always("RMSNorm"),
        "add_bias_linear": False,
        "gated_linear_unit": lambda hf: hf.feed_forward_proj.startswith("gated-"),
        "activation_func": lambda hf: {"relu": F.relu, "gated-gelu": tanh_gelu}[hf.feed_forward_proj],
        "softmax_scale": 1.0,
    },
    {
        "position_embedding_type": always("relative"),
        "relative_attention_num_buckets": "relative_attention_num_buckets",
        "relative_attention_max_distance": "relative_attention_max_distance",
        "max_sequence_length": 512,
        "share_embeddings_and_output_weights": lambda hf: hf.get("tie_word_embeddings", True),
    },
    kind="t5",
    engine=True,
    scale={"output_layer": lambda hf: hf.d_model**-0.5 if hf.get("tie_word_embeddings", True) else 1.0},
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA.but(add_qkv_bias=True),
    "qwen3": LLAMA.but(qk_layernorm=True),
    "gpt2": GPT2,
    "phi3": LLAMA,
    "seed_oss": LLAMA,
    "smollm3": LLAMA.but(no_rope_freq=lambda hf: [int(not rotates) for rotates in hf.no_rope_layers]),
    "granite": replace(
        LLAMA.but(softmax_scale="attention_multiplier"),
        neutral={"residual_multiplier": 1.0},
        scale={"embedding": "embedding_multiplier", "output_layer": lambda hf: 1 / hf.logits_scaling},
    ),
    "gemma": replace(
        LLAMA.but(**ZERO_CENTERED), engine=True, scale={"embedding": lambda hf: hf.hidden_size**0.5}
    ),
    "nemotron-nas": LLAMA.but(
        heterogeneous_layers_config_encoded_json=lambda hf: json.dumps({"block_configs": hf.block_configs})
    ),
    "nemotron": replace(LLAMA.but(**LAYER_NORM, **ZERO_CENTERED), engine=True),
    "starcoder2": LLAMA.but(**LAYER_NORM, add_bias_linear=flag("use_bias")),
    "stablelm": LLAMA.but(
        normalization=always("LayerNorm"), layernorm_epsilon="layer_norm_eps", add_qkv_bias=flag("use_qkv_bias")
    ),
    "glm": LLAMA.but(rotary_interleaved=True),
    "mixtral": MOE,
    "granitemoe": replace(
        MOE.but(softmax_scale="attention_multiplier"),
        neutral={"residual_multiplier": 1.0},
        scale={"embedding": "embedding_multiplier", "output_layer": lambda hf: 1 / hf.logits_scaling},
    ),
    "qwen2_moe": QWEN_MOE.but(**SHARED_GATE, add_qkv_bias=True),
    "qwen3_moe": QWEN_MOE.but(qk_layernorm=True),
    "glm4_moe": SIGMOID_MOE.but(qk_layernorm=flag("use_qk_norm")),
    "deepseek_v2": replace(
        DEEPSEEK_V3.but(moe_router_score_function=always("softmax"), moe_router_enable_expert_bias=False,
                        moe_router_pre_softmax=True),
        neutral={"topk_method": "greedy", "norm_topk_prob": False},
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "glm4_moe_lite": DEEPSEEK_V3.but(moe_layer_freq=moe_layers(lambda hf, layer: hf.mlp_layer_types[layer] == "dense")),
    "gpt_oss": GPT_OSS,
    "qwen3_next": replace(QWEN_MOE.but(**SHARED_GATE, **DELTA_NET), engine=True),
    "qwen3_5_text": replace(LLAMA.but(**DELTA_NET), engine=True),
    "qwen3_5_moe_text": replace(MOE.but(**SHARED_GATE, **DELTA_NET), engine=True),
    "nemotron_h": NEMOTRON_H,
    "mamba2": MAMBA2,
    "megatron-bert": BERT,
    "t5": T5,
}  # fmt: skip
