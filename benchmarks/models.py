"""Checkpoints to measure on: HuggingFace directories of random numbers, written without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]

_SHARD = 500 << 20


def llama(nbytes: int) -> tuple[dict[str, Any], Shapes]:
    """The config and the tensors of a Llama of about `nbytes` in bfloat16, with the proportions of Llama 3.2 1B."""
    per_layer, rest = 2 * (2048 * (2048 * 2 + 512 * 2 + 8192 * 3) + 2 * 2048), 2 * (2 * 32000 * 2048 + 2048)
    layers = max(4, round((nbytes - rest) / per_layer) // 4 * 4)
    return _llama(hidden=2048, ffn=8192, heads=32, kv_heads=8, layers=layers, vocab=32000)


def many(layers: int = 11200) -> tuple[dict[str, Any], Shapes]:
    """A Llama with more than 100,000 tensors, all of them tiny."""
    return _llama(hidden=8, ffn=16, heads=4, kv_heads=2, layers=layers, vocab=64)


def _llama(hidden: int, ffn: int, heads: int, kv_heads: int, layers: int, vocab: int) -> tuple[dict[str, Any], Shapes]:
    head = hidden // heads
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, ffn)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 4096, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.02,
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    return config, shapes


def gpt2(nbytes: int) -> tuple[dict[str, Any], Shapes]:
    """The config and the tensors of a GPT-2, whose linear weights are stored transposed."""
    hidden, vocab, positions = 1280, 50304, 1024
    layers = max(4, round((nbytes - 2 * hidden * (vocab + positions)) / (2 * 12 * hidden * hidden)) // 4 * 4)
    shapes: Shapes = {"transformer.wte.weight": (vocab, hidden), "transformer.wpe.weight": (positions, hidden)}
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes[f"{at}.{norm}.weight"] = shapes[f"{at}.{norm}.bias"] = (hidden,)
        linear = (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1))
        for name, rows, columns in linear:
            shapes[f"{at}.{name}.weight"] = (rows * hidden, columns * hidden)
            shapes[f"{at}.{name}.bias"] = (columns * hidden,)
    shapes |= {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "torch_dtype": "bfloat16", "n_embd": hidden,
        "n_layer": layers, "n_head": 20, "n_positions": positions, "n_inner": None, "vocab_size": vocab,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return config, shapes


def fp8(nbytes: int) -> tuple[dict[str, Any], Shapes]:
    """The same Llama of about `nbytes` with its linear weights in FP8, and a scale for every 128 x 128 of them."""
    config, shapes = llama(2 * nbytes)
    linear = {name: shape for name, shape in shapes.items() if ".layers." in name and len(shape) == 2}
    scales = {f"{name}_scale_inv": (-(-rows // 128), -(-columns // 128)) for name, (rows, columns) in linear.items()}
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return config | {"quantization_config": quantized}, shapes | scales


def _dtype(name: str, shapes: Shapes) -> str:
    if name.endswith("_scale_inv"):
        return "F32"
    return "F8_E4M3" if f"{name}_scale_inv" in shapes else "BF16"


def _numbers(random: np.random.Generator, dtype: str, nbytes: int) -> bytes:
    """Numbers of ordinary size (2**-7 to 2, of both signs; scales from 1 to 2), so that casts do ordinary work."""
    kinds = {"BF16": (2, 0x83FF, 0x3C00), "F8_E4M3": (1, 0x87, 0x30), "F32": (4, 0x7FFFFF, 0x3F800000)}
    width, keep, add = kinds[dtype]
    kind = np.dtype(f"u{width}")
    bits = random.integers(0, 1 << 8 * width, nbytes // width, dtype=kind)
    return (bits & kind.type(keep) | kind.type(add)).tobytes()


def _shards(shapes: Shapes, sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for name in shapes:
        if shard and filled + sizes[name] > limit:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += sizes[name]
    yield shard


def _header(shard: list[str], shapes: Shapes, sizes: dict[str, int]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in shard:
        end = at + sizes[name]
        entries[name] = {"dtype": _dtype(name, shapes), "shape": shapes[name], "data_offsets": (at, end)}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def write(path: Path, config: dict[str, Any], shapes: Shapes, *, sparse: bool = False) -> Path:
    """Write a sharded HuggingFace directory; a complete one is kept. `sparse` writes headers only."""
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    widths = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    sizes = {name: widths[_dtype(name, shapes)] * prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    shards = list(_shards(shapes, sizes, total // 4 if sparse else _SHARD))
    where = {}
    random = np.random.default_rng(0)
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        where.update(dict.fromkeys(shard, name))
        head, size = _header(shard, shapes, sizes)
        with (path / name).open("wb") as file:
            file.write(head)
            for tensor in () if sparse else shard:
                for at in range(0, sizes[tensor], 1 << 22):
                    file.write(_numbers(random, _dtype(tensor, shapes), min(1 << 22, sizes[tensor] - at)))
            file.truncate(len(head) + size)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path
