"""Tiny models of every family, each built by the family's own transformers class and filled with random numbers.

    FAMILIES["mixtral"]                          # what it is, and which formats take it
    build("mixtral", "bfloat16", folder)         # config.json, model.safetensors, generation_config.json

Sizes differ from each other wherever the class lets them, so that a wrong axis does not fit by accident; all divide
over two ranks, layers over two stages and experts over four ranks. `hub` rewrites what transformers saves into the
layout of the published files, where those differ (tests/hub_layouts.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from registry.testing import transformers_model
from registry.testing.models import load_directory as load
from registry.testing.models import save_directory as save
from tests import hub_layouts as hub
from tests.hub_layouts import Config, Hub

HF, DCP, MEGATRON, LEGACY, TRTLLM = "huggingface", "dcp", "megatron", "megatron-legacy", "trtllm"
MCORE, ALL = (HF, DCP, MEGATRON, LEGACY), (HF, DCP, MEGATRON, LEGACY, TRTLLM)


@dataclass(frozen=True)
class Family:
    """One tiny model."""

    architecture: str  # the spec's name, a model_type
    model_class: str | None  # of transformers; None where the tensors are made by hand
    config: Config = field(repr=False)
    hub: Hub | None = None  # rewrites tensors and config to the published layout
    dropped: tuple[
        str, ...
    ] = ()  # globs: what the published files hold besides the weights, and what does not come back
    formats: tuple[str, ...] = MCORE  # that take it; the others must refuse it
    # a glob: what TensorRT-LLM stores with 1 added or as another function of it, or others too without its first rows
    rounded: str | None = None
    experts: bool = False


def build(name: str, dtype: str, folder: Path) -> Path:
    """Write the model as a HuggingFace directory. The numbers depend on its name only; bfloat16 is float32, rounded."""
    import transformers

    family = FAMILIES[name]
    if family.model_class is None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors, config = hub.decilm(family.config), {**family.config, "torch_dtype": dtype}
        save(folder, {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}, config)
        return folder
    transformers_model(family.config, folder, dtype, getattr(transformers, family.model_class))
    if family.hub:
        tensors, config = load(folder)
        save(folder, *family.hub(tensors, config))
    return folder


# Sizes. Heads of a size of their own, where the class has head_dim; else hidden_size / heads.
_ENDS = {"vocab_size": 131, "max_position_embeddings": 46, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_RMS = {"rms_norm_eps": 3e-6}
_HEADS = {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 88}
_OWN = {**_ENDS, **_HEADS, "hidden_size": 60, "head_dim": 12, "tie_word_embeddings": False}
_SHARED = {**_ENDS, **_HEADS, "hidden_size": 72, "tie_word_embeddings": False}  # head_dim 72 / 6
_LLAMA, _OLMO = {**_OWN, **_RMS}, {**_SHARED, **_RMS}
_MHA = {"num_key_value_heads": 6}
_TIED = {"tie_word_embeddings": True}
_TOP2 = {"num_experts_per_tok": 2}
_LOCAL = {**_TOP2, "num_local_experts": 4}
_ROUTED = {**_TOP2, "num_experts": 4, "moe_intermediate_size": 40}
_DEEPSEEK_MOE = {
    **_TOP2, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 40, "first_k_dense_replace": 1,
}  # fmt: skip
_MLA = {
    **_ENDS, **_RMS, **_DEEPSEEK_MOE, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6,
    "hidden_size": 60, "intermediate_size": 88, "tie_word_embeddings": False, "q_lora_rank": 26, "kv_lora_rank": 22,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 14,
}  # fmt: skip
_DEEPSEEK_V3 = {**_MLA, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.3}
_COUNTED = {k: v for k, v in _DEEPSEEK_V3.items() if k != "first_k_dense_replace"}
_GDN = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 10, "linear_value_head_dim": 14,
    "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5,
}  # fmt: skip
_QWEN3_5 = {**_LLAMA, **_GDN}
_QWEN3_5_MOE = {**_QWEN3_5, **_ROUTED, "shared_expert_intermediate_size": 26}
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 64, "rope_theta": 150000.0,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5], "original_max_position_embeddings": 30,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 131, "n_embd": 72, "n_layer": 4, "n_head": 6, "n_positions": 46, "n_inner": 88, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_FALCON = {
    **_ENDS, "num_hidden_layers": 4, "num_attention_heads": 6, "hidden_size": 72, "ffn_hidden_size": 88,
    "layer_norm_epsilon": 3e-6,
}  # fmt: skip
_OPT = {
    **_ENDS, "num_hidden_layers": 4, "num_attention_heads": 6, "hidden_size": 72, "ffn_dim": 88,
    "word_embed_proj_dim": 72,
}  # fmt: skip
_BLOOM = {
    "vocab_size": 131, "hidden_size": 72, "n_layer": 4, "n_head": 6, "layer_norm_epsilon": 3e-6, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_BERT = {
    **_ENDS, "num_hidden_layers": 4, "num_attention_heads": 6, "hidden_size": 72, "intermediate_size": 88,
    "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip
_T5 = {
    "vocab_size": 131, "d_model": 56, "d_kv": 12, "d_ff": 88, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 6,
    "relative_attention_num_buckets": 18, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_MAMBA_ENDS = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MAMBA = {
    **_MAMBA_ENDS, "hidden_size": 56, "num_hidden_layers": 4, "state_size": 10, "conv_kernel": 4, "expand": 2,
    "layer_norm_epsilon": 3e-6,
}  # fmt: skip
_NEMOTRON_H = {
    **_MAMBA_ENDS, "hidden_size": 56, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 88, "mamba_num_heads": 8, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 10,
    "conv_kernel": 4, "layer_norm_epsilon": 3e-6,
}  # fmt: skip
_NEMOTRON_MOE = {**_DEEPSEEK_MOE, "moe_shared_expert_intermediate_size": 26}
_FALCON_H1 = {
    **_LLAMA, "mamba_d_ssm": 48, "mamba_n_heads": 8, "mamba_d_head": 6, "mamba_n_groups": 2, "mamba_d_state": 10,
    "mamba_d_conv": 4,
}  # fmt: skip
_MPT = {"vocab_size": 131, "d_model": 72, "n_heads": 6, "n_layers": 4, "expansion_ratio": 3, "max_seq_len": 46}
_LLAMA4 = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 82}
_NAS = {
    "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "vocab_size": 131, "hidden_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": None, "intermediate_size": None,
    "hidden_act": "silu", "rms_norm_eps": 3e-6, "rope_theta": 500000.0, "rope_scaling": None, "attention_bias": False,
    "mlp_bias": False, "tie_word_embeddings": False, "max_position_embeddings": 46, "bos_token_id": 1,
    "eos_token_id": 2, "block_configs": [
        hub.nas_block(n_heads_in_group=2, ffn_mult=1.0), hub.nas_block(n_heads_in_group=None, ffn_mult=9.0),
        hub.nas_block(n_heads_in_group=None, ffn_mult=None), hub.nas_block(n_heads_in_group=4, ffn_mult=None),
    ],
}  # fmt: skip
_MTP_COPIES = ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight")


def _tiny(
    architecture: str,
    model_class: str | None,
    sizes: Config,
    *,
    hub: Hub | None = None,
    dropped: tuple[str, ...] = (),
    formats: tuple[str, ...] = MCORE,
    rounded: str | None = None,
    **fields: Any,
) -> Family:
    config = sizes | fields
    experts = any("experts" in key for key in config)
    return Family(architecture, model_class, config, hub, dropped, formats, rounded, experts)


# fmt: off
FAMILIES: dict[str, Family] = {
    "llama": _tiny("llama", "LlamaForCausalLM", _LLAMA, formats=ALL),
    "llama_hub": _tiny("llama", "LlamaForCausalLM", _LLAMA, hub=hub.with_inv_freq, formats=ALL,
                       dropped=("*.inv_freq",)),
    "mistral": _tiny("mistral", "MistralForCausalLM", _LLAMA, formats=ALL),
    "qwen2": _tiny("qwen2", "Qwen2ForCausalLM", _OLMO, formats=ALL),
    "qwen3": _tiny("qwen3", "Qwen3ForCausalLM", _LLAMA, formats=ALL),
    "gpt2": _tiny("gpt2", "GPT2LMHeadModel", _GPT2, formats=ALL),

    # dense
    "gemma": _tiny("gemma", "GemmaForCausalLM", _LLAMA | _TIED, formats=ALL, rounded="*norm.weight"),
    "gemma2": _tiny("gemma2", "Gemma2ForCausalLM", _LLAMA | _TIED, query_pre_attn_scalar=14, sliding_window=8,
                    formats=ALL, rounded="*norm.weight"),
    "gemma3_text": _tiny("gemma3_text", "Gemma3ForCausalLM", _LLAMA | _TIED, sliding_window=8,
                         query_pre_attn_scalar=14),
    "gemma3_hub": _tiny("gemma3", "Gemma3ForCausalLM", _LLAMA | _TIED, sliding_window=8, hub=hub.gemma3_package),
    "phi": _tiny("phi", "PhiForCausalLM", _SHARED, formats=(HF, DCP, TRTLLM)),
    "phi_qk_norm": _tiny("phi", "PhiForCausalLM", _SHARED | _MHA, qk_layernorm=True, formats=(HF, DCP)),
    "phi3": _tiny("phi3", "Phi3ForCausalLM", _OLMO, formats=ALL),
    "phi3_long": _tiny("phi3", "Phi3ForCausalLM", _OLMO, rope_parameters=_LONG, formats=ALL,
                       original_max_position_embeddings=30),
    "starcoder2": _tiny("starcoder2", "Starcoder2ForCausalLM", _SHARED, formats=ALL),
    "starcoder2_tied": _tiny("starcoder2", "Starcoder2ForCausalLM", _SHARED | _TIED, formats=ALL),
    "gpt_bigcode": _tiny("gpt_bigcode", "GPTBigCodeForCausalLM", _GPT2, formats=ALL),
    "gpt_bigcode_mha": _tiny("gpt_bigcode", "GPTBigCodeForCausalLM", _GPT2, multi_query=False, formats=ALL),
    "nemotron": _tiny("nemotron", "NemotronForCausalLM", _OWN, norm_eps=3e-6, formats=ALL, rounded="*norm.weight"),
    "nemotron_nas": _tiny("nemotron-nas", None, _NAS),
    "nemotron_nas_bias": _tiny("nemotron-nas", None, _NAS, attention_bias=True, mlp_bias=True),
    "falcon_7b": _tiny("falcon", "FalconForCausalLM", _FALCON, multi_query=True, parallel_attn=True, formats=ALL),
    "falcon_40b": _tiny("falcon", "FalconForCausalLM", _FALCON, new_decoder_architecture=True, num_kv_heads=2,
                        formats=ALL),
    "falcon_11b": _tiny("falcon", "FalconForCausalLM", _FALCON, new_decoder_architecture=True, num_kv_heads=2,
                        num_ln_in_parallel_attn=1, formats=ALL),
    "falcon_rw": _tiny("falcon", "FalconForCausalLM", _FALCON, alibi=True, bias=True, multi_query=False,
                       parallel_attn=False, formats=ALL),
    "falcon_hub": _tiny("falcon", "FalconForCausalLM", _FALCON, multi_query=True, parallel_attn=True,
                        hub=hub.with_output_copy("transformer.word_embeddings.weight"), dropped=("lm_head.weight",),
                        formats=ALL),
    "gpt_neox": _tiny("gpt_neox", "GPTNeoXForCausalLM", _SHARED | _MHA, rotary_pct=0.5, hidden_act="gelu_fast",
                      formats=ALL),
    "gpt_neox_hub": _tiny("gpt_neox", "GPTNeoXForCausalLM", _SHARED | _MHA, rotary_pct=0.5, hub=hub.gpt_neox_buffers,
                          dropped=("*.attention.bias", "*.masked_bias", "*.inv_freq"), formats=ALL),
    "gptj": _tiny("gptj", "GPTJForCausalLM", _GPT2, rotary_dim=8, tie_word_embeddings=False, formats=(HF, DCP, TRTLLM)),
    "gptj_hub": _tiny("gptj", "GPTJForCausalLM", _GPT2, rotary_dim=8, tie_word_embeddings=False, hub=hub.gptj_buffers,
                      dropped=("*.attn.bias", "*.attn.masked_bias"), formats=(HF, DCP, TRTLLM)),
    "bloom": _tiny("bloom", "BloomForCausalLM", _BLOOM, formats=(HF, DCP, TRTLLM)),
    "bloom_hub": _tiny("bloom", "BloomForCausalLM", _BLOOM, hub=hub.renamed("transformer.", ""),
                       formats=(HF, DCP, TRTLLM)),
    "opt": _tiny("opt", "OPTForCausalLM", _OPT, formats=ALL, rounded="*embed_positions.weight"),
    "opt_post_norm": _tiny("opt", "OPTForCausalLM", _OPT, do_layer_norm_before=False,
                           formats=ALL, rounded="*embed_positions.weight"),
    "opt_hub": _tiny("opt", "OPTForCausalLM", _OPT, hub=hub.renamed("model.decoder.", "decoder."),
                     formats=ALL, rounded="*embed_positions.weight"),
    "opt_350m": _tiny("opt", "OPTForCausalLM", _OPT, do_layer_norm_before=False, word_embed_proj_dim=36,
                      formats=(HF, DCP)),
    "mpt": _tiny("mpt", "MptForCausalLM", _MPT, formats=ALL),
    "olmo2": _tiny("olmo2", "Olmo2ForCausalLM", _OLMO),
    "olmo3": _tiny("olmo3", "Olmo3ForCausalLM", _OLMO, sliding_window=8),
    "granite": _tiny("granite", "GraniteForCausalLM", _OLMO, logits_scaling=3.0, residual_multiplier=0.7,
                     embedding_multiplier=5.0, attention_multiplier=0.1),
    "granite_tied": _tiny("granite", "GraniteForCausalLM", _OLMO | _TIED),
    "cohere": _tiny("cohere", "CohereForCausalLM", _SHARED | _TIED, layer_norm_eps=3e-6),
    "cohere_qk_norm": _tiny("cohere", "CohereForCausalLM", _SHARED | _TIED, use_qk_norm=True),
    "cohere2": _tiny("cohere2", "Cohere2ForCausalLM", _OWN | _TIED, sliding_window=8),
    "stablelm": _tiny("stablelm", "StableLmForCausalLM", _SHARED, partial_rotary_factor=0.5),
    "stablelm_qk_norm": _tiny("stablelm", "StableLmForCausalLM", _SHARED, partial_rotary_factor=0.5, qk_layernorm=True,
                              use_qkv_bias=True, use_parallel_residual=True),
    "glm": _tiny("glm", "GlmForCausalLM", _LLAMA, attention_bias=True),
    "glm4": _tiny("glm4", "Glm4ForCausalLM", _LLAMA, attention_bias=True),
    "exaone4": _tiny("exaone4", "Exaone4ForCausalLM", _LLAMA, sliding_window=8, sliding_window_pattern=3),
    "exaone4_tied": _tiny("exaone4", "Exaone4ForCausalLM", _LLAMA | _TIED, sliding_window=None,
                          layer_types=["full_attention"] * 4),
    "seed_oss": _tiny("seed_oss", "SeedOssForCausalLM", _LLAMA),
    "smollm3": _tiny("smollm3", "SmolLM3ForCausalLM", _OLMO | _TIED),

    # mixtures of experts
    "mixtral": _tiny("mixtral", "MixtralForCausalLM", _LLAMA | _LOCAL, formats=ALL),
    "qwen2_moe": _tiny("qwen2_moe", "Qwen2MoeForCausalLM", _OLMO | _ROUTED, shared_expert_intermediate_size=26,
                       formats=ALL),
    "qwen2_moe_mixed": _tiny("qwen2_moe", "Qwen2MoeForCausalLM", _OLMO | _ROUTED, shared_expert_intermediate_size=26,
                             mlp_only_layers=[1, 2]),
    "qwen3_moe": _tiny("qwen3_moe", "Qwen3MoeForCausalLM", _LLAMA | _ROUTED, formats=ALL),
    "qwen3_moe_mixed": _tiny("qwen3_moe", "Qwen3MoeForCausalLM", _LLAMA | _ROUTED, mlp_only_layers=[1, 2]),
    "qwen3_next": _tiny("qwen3_next", "Qwen3NextForCausalLM", _QWEN3_5_MOE),
    "qwen3_next_mixed": _tiny("qwen3_next", "Qwen3NextForCausalLM", _QWEN3_5_MOE, mlp_only_layers=[1, 2]),
    "qwen3_next_hub": _tiny("qwen3_next", "Qwen3NextForCausalLM", _QWEN3_5_MOE, hub=hub.qwen_mtp),
    "qwen3_5_text": _tiny("qwen3_5_text", "Qwen3_5ForCausalLM", _QWEN3_5),
    "qwen3_5_hub": _tiny("qwen3_5", "Qwen3_5ForCausalLM", _QWEN3_5, hub=hub.qwen3_5_package),
    "qwen3_5_moe_text": _tiny("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _QWEN3_5_MOE),
    "qwen3_5_moe_hub": _tiny("qwen3_5_moe", "Qwen3_5MoeForCausalLM", _QWEN3_5_MOE, hub=hub.qwen3_5_moe_package),
    "qwen3_5_moe_packed": _tiny("qwen3_5_moe", "Qwen3_5MoeForCausalLM", _QWEN3_5_MOE,
                                hub=hub.qwen3_5_moe_packed),
    "olmoe": _tiny("olmoe", "OlmoeForCausalLM", _OLMO, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": _tiny("gpt_oss", "GptOssForCausalLM", _LLAMA | _LOCAL, sliding_window=8, rope_parameters=_YARN),
    "glm4_moe": _tiny("glm4_moe", "Glm4MoeForCausalLM", _LLAMA | _DEEPSEEK_MOE, attention_bias=True),
    "glm4_moe_hub": _tiny("glm4_moe", "Glm4MoeForCausalLM", _LLAMA | _DEEPSEEK_MOE, attention_bias=True,
                          use_qk_norm=True, hub=hub.deepseek_mtp, dropped=_MTP_COPIES),
    "glm4_moe_lite": _tiny("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _COUNTED),
    "glm4_moe_lite_hub": _tiny("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _DEEPSEEK_V3, hub=hub.deepseek_mtp,
                               dropped=_MTP_COPIES),
    "deepseek_v2": _tiny("deepseek_v2", "DeepseekV2ForCausalLM", _MLA, n_shared_experts=2, formats=ALL),
    "deepseek_v2_lite": _tiny("deepseek_v2", "DeepseekV2ForCausalLM", _MLA, n_shared_experts=2, q_lora_rank=None,
                              formats=ALL),
    "deepseek_v2_grouped": _tiny("deepseek_v2", "DeepseekV2ForCausalLM", _MLA, n_group=2, topk_group=1,
                                 n_shared_experts=3, topk_method="group_limited_greedy", routed_scaling_factor=1.3,
                                 norm_topk_prob=True, rope_parameters=_YARN, formats=ALL),
    "deepseek_v3": _tiny("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK_V3),
    "deepseek_v3_hub": _tiny("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK_V3, hub=hub.deepseek_mtp,
                             dropped=_MTP_COPIES),
    "kimi_k2": _tiny("kimi_k2", "DeepseekV3ForCausalLM", _DEEPSEEK_V3, hub=hub.kimi_k2),
    "minimax_m2": _tiny("minimax_m2", "MiniMaxM2ForCausalLM", _LLAMA | _LOCAL),
    "ernie4_5_moe": _tiny("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _LLAMA, moe_num_experts=4, moe_k=2,
                          moe_intermediate_size=40, moe_num_shared_experts=2),
    "ernie4_5_moe_bias": _tiny("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _LLAMA, moe_num_experts=4, moe_k=2,
                               moe_intermediate_size=40, moe_num_shared_experts=2, use_bias=True, formats=(HF, DCP)),
    "granitemoe": _tiny("granitemoe", "GraniteMoeForCausalLM", _OLMO | _TIED | _LOCAL),
    "phimoe": _tiny("phimoe", "PhimoeForCausalLM", _OLMO | _LOCAL, attention_bias=True, lm_head_bias=True,
                    formats=(HF, DCP)),
    "llama4_text": _tiny("llama4_text", "Llama4ForCausalLM", _LLAMA4, interleave_moe_layer_step=2),
    "llama4_hub": _tiny("llama4", "Llama4ForCausalLM", _LLAMA4, hub=hub.llama4_package),

    # state space models and hybrids
    "mamba": _tiny("mamba", "MambaForCausalLM", _MAMBA, time_step_rank=5, formats=(HF, DCP, TRTLLM), rounded="*.A_log"),
    "mamba_bias": _tiny("mamba", "MambaForCausalLM", _MAMBA, time_step_rank="auto", use_bias=True,
                        formats=(HF, DCP, TRTLLM), rounded="*.A_log"),
    "mamba2": _tiny("mamba2", "Mamba2ForCausalLM", _MAMBA, num_heads=8, head_dim=14, n_groups=2),
    "mamba2_tied": _tiny("mamba2", "Mamba2ForCausalLM", _MAMBA | _TIED, num_heads=8, head_dim=14, n_groups=4),
    "nemotron_h": _tiny("nemotron_h", "NemotronHForCausalLM", _NEMOTRON_H | _NEMOTRON_MOE,
                        layers_block_type=["mamba", "mlp", "attention", "moe"]),
    "nemotron_h_hub": _tiny("nemotron_h", "NemotronHForCausalLM", _NEMOTRON_H, hub=hub.nemotron_h_pattern,
                            layers_block_type=["mamba", "mlp", "mamba", "attention"]),
    "falcon_h1": _tiny("falcon_h1", "FalconH1ForCausalLM", _FALCON_H1),
    "falcon_h1_norm": _tiny("falcon_h1", "FalconH1ForCausalLM", _FALCON_H1, mamba_rms_norm=True,
                            mlp_multipliers=[0.3, 0.6], ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9]),

    # encoders, and encoders with decoders
    "bert": _tiny("bert", "BertForMaskedLM", _BERT, formats=(HF, DCP)),
    "bert_base": _tiny("bert", "BertModel", _BERT, formats=(HF, DCP)),
    "bert_classifier": _tiny("bert", "BertForSequenceClassification", _BERT, num_labels=3, formats=(HF, DCP, TRTLLM)),
    "bert_hub": _tiny("bert", "BertForPreTraining", _BERT, hub=hub.bert_gamma_beta, formats=(HF, DCP),
                      dropped=("cls.predictions.decoder.weight",)),
    "t5": _tiny("t5", "T5ForConditionalGeneration", _T5, formats=(HF, DCP)),
    "t5_gated": _tiny("t5", "T5ForConditionalGeneration", _T5, feed_forward_proj="gated-gelu", formats=(HF, DCP)),
    "t5_untied": _tiny("t5", "T5ForConditionalGeneration", _T5, feed_forward_proj="gated-gelu", hub=hub.t5_untied,
                       formats=(HF, DCP)),
    "t5_hub": _tiny("t5", "T5ForConditionalGeneration", _T5, hub=hub.t5_copies,
                    dropped=("*coder.embed_tokens.weight", "*.EncDecAttention.relative_attention_bias.weight"),
                    formats=(HF, DCP)),
}
# fmt: on
