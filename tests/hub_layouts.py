"""What published files look like where they differ from what transformers 5 saves: rewriters of tensors and config.

Names are those of the published files (shared reference `hf_keys` and `megatron_hf_names.txt`). Tensors that
transformers drops on reading (multi-token prediction) get random numbers of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from registry.testing.models import random_like

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Hub = Callable[[Tensors, Config], tuple[Tensors, Config]]


def _random(shape: tuple[int, ...], name: str, like: torch.Tensor) -> torch.Tensor:
    return random_like(torch.empty(shape, dtype=like.dtype, device=like.device), name)


def renamed(old: str, new: str) -> Hub:
    """Every name that starts with `old` starts with `new`."""
    return lambda tensors, config: (_renamed(tensors, old, new), historical(config))


def _renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}


def historical(config: Config) -> Config:
    """The config as transformers 4 spelled it: rope fields on top, torch_dtype."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype", "float32")
    config.pop("layer_types", None)
    rope = config.pop("rope_parameters", None)
    if rope and "sliding_attention" in rope:  # gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope:
        config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config["rope_scaling"] = None if rest["rope_type"] == "default" else rest
    return config


# Buffers that are no weights


def with_inv_freq(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Llama 2's files hold the rotary frequencies of every layer."""
    frequencies = 1 / config["rope_parameters"]["rope_theta"] ** (torch.arange(0, 12, 2) / 12)
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config["num_hidden_layers"])]
    return {**tensors, **dict.fromkeys(names, frequencies)}, historical(config)


def _mask(positions: int) -> torch.Tensor:
    return torch.ones(positions, positions, dtype=torch.bool).tril()[None, None]


def gpt_neox_buffers(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Causal masks and rotary frequencies; `rotary_pct` and `rotary_emb_base` at the config's top."""
    config = historical(config)
    config["rotary_pct"] = config.pop("partial_rotary_factor")
    config["rotary_emb_base"] = config.pop("rope_theta")
    for i in range(config["num_hidden_layers"]):
        at = f"gpt_neox.layers.{i}.attention."
        tensors[f"{at}bias"] = _mask(config["max_position_embeddings"])
        tensors[f"{at}masked_bias"] = torch.tensor(-1e9)
        tensors[f"{at}rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, 6, 2) / 6)
    return tensors, config


def gptj_buffers(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Causal masks."""
    for i in range(config["n_layer"]):
        tensors[f"transformer.h.{i}.attn.bias"] = _mask(config["n_positions"])
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e9)
    return tensors, historical(config)


# Multi-token prediction


def deepseek_mtp(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """One more layer, which carries embedding and output matrix a second time."""
    last, hidden = config["num_hidden_layers"], config["hidden_size"]
    tensors = _extra_layer(tensors, f"model.layers.{last - 1}.", f"model.layers.{last}.")
    at, like = f"model.layers.{last}.", tensors["lm_head.weight"]
    for name, shape in {
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "shared_head.norm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
    }.items():
        tensors[f"{at}{name}.weight"] = _random(shape, f"{at}{name.replace('proj', 'projection')}.weight", like)
    tensors[f"{at}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{at}shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors, {**historical(config), "num_nextn_predict_layers": 1}


def _extra_layer(tensors: Tensors, old: str, new: str) -> Tensors:
    """Random tensors under `new` for each of those under `old`."""
    names = [name for name in tensors if name.startswith(old)]
    return tensors | {new + n.removeprefix(old): random_like(tensors[n], new + n.removeprefix(old)) for n in names}


def qwen_mtp(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Qwen3-Next's and Qwen3.5's `mtp.*`: a full-attention layer, as the decoder's last one is."""
    hidden, like = config["hidden_size"], tensors["lm_head.weight"]
    tensors = _extra_layer(tensors, f"model.layers.{config['num_hidden_layers'] - 1}.", "mtp.layers.0.")
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = _random((hidden,), f"mtp.{name}.weight", like)
    tensors["mtp.fc.weight"] = _random((hidden, 2 * hidden), "mtp.fc.weight", like)
    return tensors, historical(config)


# Text models inside packages with a vision tower (which is left out here)


def _package(config: Config, architecture: str, model_type: str, **more: Any) -> Config:
    text = {key: value for key, value in config.items() if key not in ("architectures", "transformers_version")}
    return {
        "architectures": [architecture], "model_type": model_type, "text_config": text, "torch_dtype": "float32",
        "vision_config": {"model_type": model_type, "hidden_size": 32}, "transformers_version": "4.57.0", **more,
        "tie_word_embeddings": config["tie_word_embeddings"],
    }  # fmt: skip


def gemma3_package(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """gemma-3-4b and larger."""
    config = _package(historical(config), "Gemma3ForConditionalGeneration", "gemma3", mm_tokens_per_image=256)
    return _renamed(tensors, "model.", "language_model.model."), config


def llama4_package(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Llama 4 Scout and Maverick."""
    config = _package(historical(config), "Llama4ForConditionalGeneration", "llama4", image_token_index=92)
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()}, config


def qwen3_5_package(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Qwen3.5: the package with multi-token prediction."""
    tensors, _ = qwen_mtp(tensors, config)
    config = {**config, "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    config = _package(config, "Qwen3_5ForConditionalGeneration", "qwen3_5", image_token_id=92)
    return _renamed(tensors, "model.", "model.language_model."), config


def qwen3_5_moe_package(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Qwen3.5's mixture: the decoder's experts are packed, those of the multi-token prediction are not."""
    tensors, package = qwen3_5_package(tensors, config)
    package |= {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
    for i in range(config["num_hidden_layers"]):
        _pack(tensors, f"model.language_model.layers.{i}.mlp.experts.", config["num_experts"])
    return tensors, package


def qwen3_5_moe_packed(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """A release with all of them packed."""
    tensors, package = qwen3_5_moe_package(tensors, config)
    _pack(tensors, "mtp.layers.0.mlp.experts.", config["num_experts"])
    return tensors, package


def _pack(tensors: Tensors, at: str, experts: int) -> None:
    """Experts that are stored one by one, in one tensor for what goes in and one for what comes out."""
    parts = [
        torch.stack([tensors.pop(f"{at}{e}.{part}_proj.weight") for e in range(experts)])
        for part in ("gate", "up", "down")
    ]
    tensors[f"{at}gate_up_proj"], tensors[f"{at}down_proj"] = torch.cat(parts[:2], dim=1), parts[2]


# Other spellings


def kimi_k2(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Kimi K2: DeepSeek-V3's model under a name of its own, without multi-token prediction."""
    return tensors, {**historical(config), "model_type": "kimi_k2", "num_nextn_predict_layers": 0}


def nemotron_h_pattern(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Nemotron-H's published configs spell the layers' kinds as one string, and count them."""
    config = historical(config)
    kinds = config.pop("layers_block_type")
    letters = {"mamba": "M", "linear_attention": "M", "mlp": "-", "attention": "*", "full_attention": "*", "moe": "E"}
    pattern = "".join(letters[kind] for kind in kinds)
    return tensors, {**config, "hybrid_override_pattern": pattern, "num_hidden_layers": len(kinds)}


def with_output_copy(embedding: str) -> Hub:
    """A tied output matrix that is in the file too."""
    return lambda tensors, config: ({**tensors, "lm_head.weight": tensors[embedding]}, historical(config))


def bert_gamma_beta(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """The first BERT files: TensorFlow's names of a norm's parts, the embedding twice, and the head for pairs."""
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    names = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors, {**historical(config), "architectures": ["BertForMaskedLM"]}


def t5_copies(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """The first T5 files: the embedding three times, and a bias of the cross-attention that nothing reads."""
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_tokens.weight"] = tensors["shared.weight"]
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[name] = random_like(tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"], name)
    return tensors, historical(config)


def t5_untied(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """T5 1.1 has an output matrix of its own, which transformers 5 takes for a copy."""
    tensors["lm_head.weight"] = random_like(tensors["shared.weight"], "lm_head.weight")
    return tensors, {**historical(config), "tie_word_embeddings": False}


# Llama-Nemotron, which transformers has no class for


def nas_block(n_heads_in_group: int | None, ffn_mult: float | None) -> Config:
    """One entry of `block_configs`; None leaves the part out of the layer."""
    attention = {"n_heads_in_group": n_heads_in_group, "no_op": n_heads_in_group is None, "replace_with_linear": False}
    ffn = {"ffn_mult": ffn_mult, "no_op": ffn_mult is None, "replace_with_linear": False}
    return {"attention": attention, "ffn": ffn}


def decilm_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a DeciLM: Llama's names, each layer with sizes of its own (modeling_decilm.py)."""
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden),
    }  # fmt: skip
    for i, block in enumerate(config["block_configs"]):
        at, attention, ffn = f"model.layers.{i}.", block["attention"], block["ffn"]
        if not attention["no_op"]:
            keys = hidden // attention["n_heads_in_group"]
            shapes |= {
                f"{at}input_layernorm.weight": (hidden,), f"{at}self_attn.q_proj.weight": (hidden, hidden),
                f"{at}self_attn.k_proj.weight": (keys, hidden), f"{at}self_attn.v_proj.weight": (keys, hidden),
                f"{at}self_attn.o_proj.weight": (hidden, hidden),
            }  # fmt: skip
        if not ffn["no_op"]:
            inner = -(-int(2 * ffn["ffn_mult"] * hidden / 3) // 256) * 256
            shapes |= {
                f"{at}post_attention_layernorm.weight": (hidden,), f"{at}mlp.gate_proj.weight": (inner, hidden),
                f"{at}mlp.up_proj.weight": (inner, hidden), f"{at}mlp.down_proj.weight": (hidden, inner),
            }  # fmt: skip
    assert hidden % heads == 0
    for name in [name for name in shapes if name.endswith("_proj.weight")]:
        if config["attention_bias" if "self_attn" in name else "mlp_bias"]:
            shapes[name.replace(".weight", ".bias")] = shapes[name][:1]
    return shapes


def decilm(config: Config) -> Tensors:
    """A random DeciLM."""
    return {name: random_like(torch.empty(shape), name) for name, shape in decilm_shapes(config).items()}
