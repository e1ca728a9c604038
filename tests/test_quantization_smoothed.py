"""TensorRT-LLM's own SmoothQuant for models of which there is no golden, against its steps in half precision.

Source: tensorrt_llm/models/convert_utils.py (smooth_gemm, generate_int8) and models/gpt/convert.py (smooth_gpt_model,
get_tllm_linear_sq_weight) of version 0.17.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import registry
from tests.goldens import golden
from tests.test_quantization import ranks, same

Tensor = torch.Tensor
HALF = torch.float16


def smooth(weight: Tensor, x: Tensor, *norm: Tensor) -> Tensor:
    """Smooth a weight (out, in) and the norm before it in place; the smoother is returned."""
    scales = (x.double().pow(0.5) / weight.abs().amax(0).double().pow(0.5)).clamp(min=1e-5)
    for vector in norm:
        vector.div_(scales)
    weight.mul_(scales)
    return scales


def int8(weight: Tensor, x: Tensor, y: Tensor, *, parts: int, channel: bool, token: bool) -> dict[str, Tensor]:
    """What is stored of a weight (out, in) but for the scale of its input. Queries, keys and values are `parts`."""
    rows = weight.abs().amax(1).reshape(parts, -1)
    wide = rows if channel else rows.amax(1, keepdim=True) if parts > 1 else rows.max()
    to_int = 127.0 / wide
    from_int, to_int = 1.0 / to_int, to_int.float()
    shaped = weight.t().reshape(weight.shape[1], parts, -1) if parts > 1 else weight.t()
    values = shaped * (to_int.reshape(-1) if parts == 1 and channel else to_int)
    stored = {"weight": values.round().clip(-127, 127).to(torch.int8).reshape(weight.shape[1], -1).t()}
    accumulated = 127.0 / y.max() / (127.0 / x.max() * to_int)
    scale = (from_int if token else accumulated).float()
    scale = scale.expand(rows.shape) if parts > 1 or channel else scale
    stored["per_channel_scale"] = scale.reshape(1, -1)
    if not token:
        stored["act_scale"] = (y.max() / 127.0).float().reshape(1, 1)
    return stored


KINDS = {
    "W8A8_SQ_PER_TENSOR_PLUGIN": (False, False), "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": (True, False),
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": (False, True), "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": (True, True),
}  # fmt: skip


@dataclass
class Layer:
    """What is expected of one layer. A linear layer is added with its weight (out, in) and ranges."""

    name: str
    channel: bool
    token: bool
    stored: dict[str, Tensor] = field(default_factory=dict)

    def column(
        self, modules: dict[str, Tensor], x: Tensor, ys: list[Tensor], norm: str, vectors: dict[str, Tensor]
    ) -> None:
        """Layers that take the same input, from a norm."""
        whole = torch.cat([*modules.values()])
        vectors = {key: vector.clone() for key, vector in vectors.items()}
        x = x / smooth(whole, x, *vectors.values())
        for (module, weight), y in zip(modules.items(), ys, strict=True):
            own, whole = whole[: len(weight)], whole[len(weight) :]
            self.add(module, int8(own, x, y, parts=3 if "qkv" in module else 1, channel=self.channel, token=self.token))
        self.stored |= {f"{self.name}.{norm}.{key}": vector for key, vector in vectors.items()}
        self.stored[f"{self.name}.{norm}.scale_to_int"] = torch.ones(1) if self.token else (127.0 / x.max()).float()

    def row(self, module: str, weight: Tensor, x: Tensor, y: Tensor, *, smoothed: bool) -> None:
        """A layer whose input has no norm right before it."""
        smoother = smooth(weight, x) if smoothed else torch.ones(weight.shape[1])
        x = x / smoother if smoothed else x
        self.add(module, int8(weight, x, y, parts=1, channel=self.channel, token=self.token))
        self.stored[f"{self.name}.{module}.smoother"] = smoother.float()
        if not self.token:
            name = f"{self.name}.{module.split('.')[0]}.quantization_scaling_factor"
            self.stored[name] = (127.0 / x.max()).float()

    def add(self, module: str, parts: dict[str, Tensor]) -> None:
        self.stored |= {f"{self.name}.{module}.{key}": value for key, value in parts.items()}


def ranges(weights: dict[str, Tensor], *, transposed: bool) -> dict[str, Tensor]:
    """Made-up ranges of what goes into linear layers and comes out of them."""
    generator, found = torch.Generator().manual_seed(7), {}
    for name, weight in weights.items():
        rows, columns = weight.shape[::-1] if transposed else weight.shape
        found[f"{name.removesuffix('.weight')}.x"] = torch.rand(columns, generator=generator) * 5 + 0.01
        found[f"{name.removesuffix('.weight')}.y"] = torch.rand(rows, generator=generator) * 9 + 0.01
    return found


def compare(source: Path, tmp_path: Path, scheme: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    save_file(found, tmp_path / "ranges.safetensors")
    options = {"quantization": scheme, "calibration": str(tmp_path / "ranges.safetensors")}
    registry.convert(source, tmp_path / "out", to="trtllm", dtype="float16", options=options)
    (stored,) = ranks(tmp_path / "out")
    biases = {name for name in stored if name.endswith(".bias") and "layernorm" not in name}
    assert {name for name in stored if ".layers." in name} - biases == expected.keys()
    off = [n for n in expected if not same(stored[n], expected[n].reshape(stored[n].shape))]
    assert off == []


@pytest.mark.parametrize("scheme", KINDS)
def test_gpt2_as_its_converter_smooths_it(scheme: str, tmp_path: Path) -> None:
    """The norm's bias is divided too. Inputs of output projections stay as they are, with a smoother of ones."""
    source = golden("trtllm/_inputs/gpt2")
    weights = {n: t.to(HALF) for n, t in load_file(source / "model.safetensors").items()}
    found = ranges({n: t for n, t in weights.items() if ".c_" in n and n.endswith(".weight")}, transposed=True)
    expected: dict[str, Tensor] = {}
    for i in range(4):
        layer, old = Layer(f"transformer.layers.{i}", *KINDS[scheme]), f"transformer.h.{i}"
        for theirs, ours, before, norm in (("attn.c_attn", "attention.qkv", "ln_1", "input_layernorm"),
                                           ("mlp.c_fc", "mlp.fc", "ln_2", "post_layernorm")):  # fmt: skip
            vectors = {part: weights[f"{old}.{before}.{part}"] for part in ("weight", "bias")}
            weight = weights[f"{old}.{theirs}.weight"].t()
            layer.column({ours: weight}, found[f"{old}.{theirs}.x"], [found[f"{old}.{theirs}.y"]], norm, vectors)
        for theirs, ours in (("attn.c_proj", "attention.dense"), ("mlp.c_proj", "mlp.proj")):
            weight = weights[f"{old}.{theirs}.weight"].t().contiguous()
            layer.row(ours, weight, found[f"{old}.{theirs}.x"], found[f"{old}.{theirs}.y"], smoothed=False)
        expected |= layer.stored
    compare(source, tmp_path, scheme, found, expected)


@pytest.mark.parametrize("scheme", KINDS)
def test_llama_with_as_many_keys_as_queries(scheme: str, tmp_path: Path) -> None:
    """The golden has fewer keys than queries, for which TensorRT-LLM divides where it multiplies here."""
    source = golden("trtllm/_inputs/llama_tied")
    weights = {n: t.to(HALF) for n, t in load_file(source / "model.safetensors").items()}
    found = ranges({n: t for n, t in weights.items() if "proj" in n}, transposed=False)
    for i in range(2):  # queries, keys and values have the same input
        for part in ("k_proj", "v_proj"):
            found[f"model.layers.{i}.self_attn.{part}.x"] = found[f"model.layers.{i}.self_attn.q_proj.x"].clone()
        found[f"model.layers.{i}.mlp.up_proj.x"] = found[f"model.layers.{i}.mlp.gate_proj.x"].clone()
    expected: dict[str, Tensor] = {}
    for i in range(2):
        layer, old = Layer(f"transformer.layers.{i}", *KINDS[scheme]), f"model.layers.{i}"
        qkv = [f"{old}.self_attn.{part}_proj" for part in "qkv"]
        layer.column(
            {"attention.qkv": torch.cat([weights[f"{n}.weight"] for n in qkv])}, found[f"{qkv[0]}.x"],
            [torch.cat([found[f"{n}.y"] for n in qkv])], "input_layernorm",
            {"weight": weights[f"{old}.input_layernorm.weight"]},
        )  # fmt: skip
        fc = {"mlp.fc": f"{old}.mlp.gate_proj", "mlp.gate": f"{old}.mlp.up_proj"}
        layer.column(
            {ours: weights[f"{n}.weight"] for ours, n in fc.items()}, found[f"{fc['mlp.fc']}.x"],
            [found[f"{n}.y"] for n in fc.values()], "post_layernorm",
            {"weight": weights[f"{old}.post_attention_layernorm.weight"]},
        )  # fmt: skip
        for ours, n in (("attention.dense", f"{old}.self_attn.o_proj"), ("mlp.proj", f"{old}.mlp.down_proj")):
            layer.row(ours, weights[f"{n}.weight"].clone(), found[f"{n}.x"], found[f"{n}.y"], smoothed=True)
        expected |= layer.stored
    compare(source, tmp_path, scheme, found, expected)


def test_what_comes_out_is_asked_for_where_it_is_scaled(tmp_path: Path) -> None:
    source = golden("trtllm/_inputs/gpt2")
    weights = load_file(source / "model.safetensors")
    found = ranges({n: t for n, t in weights.items() if ".c_" in n and n.endswith(".weight")}, transposed=True)
    save_file({name: t for name, t in found.items() if name.endswith(".x")}, tmp_path / "ranges.safetensors")
    for scheme, (_, token) in KINDS.items():
        options = {"quantization": scheme, "calibration": str(tmp_path / "ranges.safetensors")}
        if token:
            registry.plan(source, to="trtllm", options=options)
            continue
        with pytest.raises(registry.CheckpointError, match=r"attn\.c_attn\.y: not there"):
            registry.convert(source, tmp_path / "out", to="trtllm", options=options)
    assert not (tmp_path / "out").exists()


def test_columns_and_layers_of_zeros(tmp_path: Path) -> None:
    """What is zero stays zero, and everything else is a number."""
    source = golden("trtllm/_inputs/gpt2")
    weights = load_file(source / "model.safetensors")
    found = ranges({n: t for n, t in weights.items() if ".c_" in n and n.endswith(".weight")}, transposed=True)
    weights["transformer.h.0.attn.c_attn.weight"][5] = 0
    weights["transformer.h.1.mlp.c_proj.weight"][:] = 0
    (tmp_path / "in").mkdir()
    save_file(weights, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in/config.json").write_bytes((source / "config.json").read_bytes())
    save_file(found, tmp_path / "ranges.safetensors")
    for scheme in KINDS:
        options = {"quantization": scheme, "calibration": str(tmp_path / "ranges.safetensors")}
        registry.convert(tmp_path / "in", tmp_path / scheme, to="trtllm", dtype="float16", options=options)
        (stored,) = ranks(tmp_path / scheme)
        assert all(bool(t.isfinite().all()) for t in stored.values())
        assert not stored["transformer.layers.0.attention.qkv.weight"][:, 5].any()
        assert not stored["transformer.layers.1.mlp.proj.weight"].any()
