"""verify() must reject every way of damaging a model that leaves its files well formed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import registry
from registry import Parallel

FORMATS = {
    "huggingface": Parallel(),
    "megatron": Parallel(tp=2, pp=2),
    "megatron-legacy": Parallel(tp=2),
    "trtllm": Parallel(tp=2),
}
L = "model.layers.1."
Tensors = dict[str, torch.Tensor]


def swap(a: str, b: str) -> Callable[[Tensors], None]:
    def apply(t: Tensors) -> None:
        t[a], t[b] = t[b].clone(), t[a].clone()

    return apply


def swap_q_and_k(t: Tensors) -> None:
    q, k = t[f"{L}self_attn.q_proj.weight"], t[f"{L}self_attn.k_proj.weight"]
    head = q[: k.shape[0]].clone()
    q[: k.shape[0]] = k
    k.copy_(head)


def permute_two_heads(t: Tensors) -> None:
    q = t[f"{L}self_attn.q_proj.weight"].view(8, -1, 64)
    q[[2, 5]] = q[[5, 2]].clone()


def permute_heads_of_one_group(t: Tensors) -> None:
    q = t[f"{L}self_attn.q_proj.weight"].view(8, -1, 64)
    q[[0, 1]] = q[[1, 0]].clone()


def shift_a_layer(t: Tensors) -> None:
    names = [n for n in t if n.startswith("model.layers.0.")]
    for name in names:
        t[name] = t[name.replace("layers.0.", "layers.2.")].clone()


def flip_a_bit(t: Tensors) -> None:
    t["model.norm.weight"].view(torch.int32)[7] ^= 1


def transpose_a_square(t: Tensors) -> None:
    name = f"{L}self_attn.o_proj.weight"
    t[name] = t[name].T.contiguous()


def negate_a_zero(t: Tensors) -> None:
    t["model.norm.weight"][0] = 0.0 if t["model.norm.weight"][0] else 1.0
    t["model.norm.weight"][0] = -0.0


MUTATIONS = {
    "swap q and k": swap_q_and_k,
    "permute two heads": permute_two_heads,
    "permute two heads of one group": permute_heads_of_one_group,
    "exchange gate and up": swap(f"{L}mlp.gate_proj.weight", f"{L}mlp.up_proj.weight"),
    "exchange k and v": swap(f"{L}self_attn.k_proj.weight", f"{L}self_attn.v_proj.weight"),
    "exchange two norms": swap(f"{L}input_layernorm.weight", f"{L}post_attention_layernorm.weight"),
    "exchange two biases": swap(f"{L}self_attn.k_proj.bias", f"{L}self_attn.v_proj.bias"),
    "exchange embedding and head": swap("model.embed_tokens.weight", "lm_head.weight"),
    "shift a layer": shift_a_layer,
    "exchange two layers' norms": swap(
        "model.layers.0.input_layernorm.weight", "model.layers.3.input_layernorm.weight"
    ),
    "flip a bit": flip_a_bit,
    "transpose a square": transpose_a_square,
    "negate a zero": negate_a_zero,
}


@pytest.fixture(scope="module")
def source(hf_model: Callable[..., Path]) -> Path:
    return hf_model("qwen2")


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("to", FORMATS)
def test_every_mutation_is_rejected(mutation: str, to: str, source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    MUTATIONS[mutation](tensors)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copy(source / "config.json", damaged)
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    registry.convert(damaged, tmp_path / "other", to=to, parallel=FORMATS[to])
    result = registry.verify(tmp_path / "other", source)
    assert not result
    assert not result.equal
    assert result.differences
    assert registry.verify(tmp_path / "other", damaged)


def test_negative_zero_differs_from_zero(source: Path, tmp_path: Path) -> None:
    sides = []
    for name, value in (("plus", 0.0), ("minus", -0.0)):
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"][0] = value
        (tmp_path / name).mkdir()
        shutil.copy(source / "config.json", tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors")
        sides.append(tmp_path / name)
    assert not registry.verify(*sides)


def test_dropped_bias_is_refused(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors[f"{L}self_attn.k_proj.bias"]
    shutil.copy(source / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(registry.MappingError, match=r"layers\.1\.self_attn\.k_proj\.bias"):
        registry.verify(tmp_path, source)


def test_dtype_counts(source: Path, tmp_path: Path) -> None:
    registry.convert(source, tmp_path / "cast", to="megatron", dtype="bfloat16")
    result = registry.verify(tmp_path / "cast", source)
    assert not result
    assert "bfloat16" in result.differences[0].problem


def test_the_difference_is_named_in_stored_terms(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[f"{L}mlp.up_proj.weight"][0, 0] += 1
    (tmp_path / "damaged").mkdir()
    shutil.copy(source / "config.json", tmp_path / "damaged")
    save_file(tensors, tmp_path / "damaged/model.safetensors")
    registry.convert(tmp_path / "damaged", tmp_path / "m", to="megatron-legacy", parallel=Parallel(pp=2))
    result = registry.verify(source, tmp_path / "m")
    assert [d.tensor for d in result.differences] == ["mlp.up.weight.1"]
    assert result.differences[0].stored == (f"{L}mlp.up_proj.weight", "decoder.layers.1.mlp.linear_fc1.weight")
    assert result.as_dict()["equal"] is False
    assert "mlp.up.weight.1" in str(result)


def test_config_difference_is_noted(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "other")
    config = (source / "config.json").read_text()
    (tmp_path / "other/config.json").write_text(config.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    result = registry.verify(source, tmp_path / "other")
    assert result.equal
    assert any("norm_epsilon" in note for note in result.notes)
