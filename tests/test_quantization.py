"""Quantised exports: against what ModelOpt and TensorRT-LLM wrote, and the properties of every scheme."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import registry
from registry import catalog
from registry.cli import main
from registry.quantization.formulas import parse
from registry.storage import Rank
from tests.goldens import SHARED, TrtllmCase, golden, trtllm_cases

BYTES = torch.uint8
#: What the case's exporter was asked for.
ASKED: dict[str, dict[str, Any]] = {
    "FP8": {"quantization": "FP8"},
    "FP8+kvFP8": {"quantization": "FP8", "kv_cache_quantization": "FP8"},
    "FP8_PER_CHANNEL_PER_TOKEN": {"quantization": "FP8_PER_CHANNEL_PER_TOKEN"},
    "W4A16_AWQ g64": {"quantization": "W4A16_AWQ", "group_size": 64},
    "W4A8_AWQ g128": {"quantization": "W4A8_AWQ"},
    "W8A8_SQ_PER_CHANNEL": {"quantization": "W8A8_SQ_PER_CHANNEL"},
    "W8A8_SQ_PER_CHANNEL+kvINT8": {"quantization": "W8A8_SQ_PER_CHANNEL", "kv_cache_quantization": "INT8"},
    "NVFP4": {"quantization": "NVFP4"},
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": {"quantization": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"},
    "W8A8_SQ_PER_TENSOR_PLUGIN": {"quantization": "W8A8_SQ_PER_TENSOR_PLUGIN"},
    "kvINT8 only": {"kv_cache_quantization": "INT8"},
}
CASES = [c for c in trtllm_cases() if c.quant in ASKED and not c.id.startswith("meg_")]
#: One case of every scheme that ModelOpt calibrates, by the scheme: what the properties are tried on.
CALIBRATED = {
    "FP8": "mo_llama_fp8_tp1", "FP8_PER_CHANNEL_PER_TOKEN": "mo_llama_fp8pcpt_tp2", "NVFP4": "mo_llama_nvfp4_tp1",
    "W4A16_AWQ": "mo_llama_int4awq_g64_tp1", "W4A8_AWQ": "mo_llama_w4a8awq_g128_tp1",
    "W8A8_SQ_PER_CHANNEL": "mo_llama_int8sq_tp1",
}  # fmt: skip
SCHEMES = {**CALIBRATED, "W8A8_SQ_PER_TENSOR_PLUGIN": "trt_llama_sq_pt_tp2"}
MODEL = "trtllm/_inputs/llama_h128"


def calibration(case: str) -> Path:
    name = "modelopt_state" if case.startswith("mo_") else "act_range"
    return golden(f"trtllm/{case}/{name}.safetensors")


def options(case: TrtllmCase, said: dict[str, Any]) -> dict[str, Any]:
    chosen = {**ASKED[str(case.quant)], "calibration": str(calibration(case.id))}
    if case.id.startswith("mo_"):
        excluded = said["quantization"]["exclude_modules"]
        chosen |= {"use_parallel_embedding": True, "separate_kv_scales": True, "exclude_modules": excluded}
    return chosen


def asked(scheme: str, **more: Any) -> dict[str, Any]:
    """Options for a scheme, with ranges that were calibrated for the model."""
    return {"quantization": scheme, "calibration": str(calibration(SCHEMES[scheme])), **more}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Are they equal to the last bit?"""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.contiguous().flatten().view(BYTES), b.contiguous().flatten().view(BYTES))


def convert(target: Path, tp: int = 1, source: Path | None = None, dtype: str | None = None, **chosen: Any) -> Any:
    parallel = registry.Parallel(tp=tp)
    return registry.convert(
        source or golden(MODEL), target, to="trtllm", dtype=dtype, parallel=parallel, options=chosen
    )


def ranks(path: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path / f"rank{i}.safetensors") for i in range(len(list(path.glob("rank*.safetensors"))))]


def test_every_scheme_has_a_case() -> None:
    found = {case.quant for case in CASES}
    assert found == set(ASKED) if SHARED.exists() else found <= set(ASKED)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_real_exporter_wrote(case: TrtllmCase, tmp_path: Path) -> None:
    said = json.loads((case.path / "config.json").read_text())
    report = convert(tmp_path / "out", case.tp, golden(case.input), case.dtype, **options(case, said))
    for ours, theirs in zip(ranks(tmp_path / "out"), ranks(case.path), strict=True):
        # ModelOpt leaves a tied output layer to the loader; the tables of positions are recomputed by it.
        tied = {"lm_head.weight"} if "lm_head.weight" not in theirs else set()
        tables = {name for name in theirs if name.startswith(("embed_positions", "rotary_inv_freq"))}
        assert ours.keys() - tied == theirs.keys() - tables
        assert [name for name in ours.keys() & theirs.keys() if not same(ours[name], theirs[name])] == []
    wrote = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert {k: wrote.get(k) for k in said["quantization"] if k != "smoothquant_val"} == {
        k: v for k, v in said["quantization"].items() if k != "smoothquant_val"
    }
    weights = {name for name in report.losses if name.startswith("transformer.layers.0.")}
    assert len(weights) == (0 if case.quant == "kvINT8 only" else 5 if "mlp.gate.weight" in str(ours.keys()) else 4)
    assert all(loss.max > 0 and 0 < loss.relative < 0.2 for loss in report.losses.values())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "W4A8_AWQ"])  # whose groups no two ranks could share
def test_shards_are_cut_of_the_encoded_matrix(scheme: str, tmp_path: Path) -> None:
    """Put together again, the ranks' shards are what one rank would have: scales are never those of a shard."""
    chosen = asked(scheme, **({"group_size": 64} if scheme == "W4A16_AWQ" else {}))
    tp = 2
    convert(tmp_path / "one", **chosen)
    convert(tmp_path / "two", tp, **chosen)
    (whole,), shards = ranks(tmp_path / "one"), ranks(tmp_path / "two")
    assert all(whole.keys() == shard.keys() for shard in shards)
    cut = 0
    for name, tensor in whole.items():
        parts = [shard[name] for shard in shards]
        if parts[0].shape == tensor.shape:
            assert all(same(part, tensor) for part in parts), name
            continue
        cut += 1
        axis = next(d for d, n in enumerate(tensor.shape) if parts[0].shape[d] != n)
        together = torch.cat([part.view(BYTES) if part.element_size() == 1 else part for part in parts], axis)
        expected = tensor.view(BYTES) if tensor.element_size() == 1 else tensor
        if (
            ".attention.qkv." in name
        ):  # queries, keys and values are cut each by itself: the same rows, in another order
            rows = {row.numpy().tobytes() for row in together.movedim(axis, 0)}
            assert rows == {row.numpy().tobytes() for row in expected.movedim(axis, 0)}, name
        else:
            assert torch.equal(together, expected), name
    assert cut >= 10


@pytest.mark.parametrize("scheme", SCHEMES)
def test_encoding_is_deterministic(scheme: str, tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 4)):
        registry.convert(golden(MODEL), tmp_path / name, to="trtllm", options=asked(scheme), threads=threads)
    assert (tmp_path / "a/rank0.safetensors").read_bytes() == (tmp_path / "b/rank0.safetensors").read_bytes()


#: The largest error of a value, as a part of its scale: half a step of the format, at its widest.
HALF_STEP = {"FP8": 16, "FP8_PER_CHANNEL_PER_TOKEN": 16, "W4A16_AWQ": 0.5, "W8A8_SQ_PER_CHANNEL": 0.5, "NVFP4": 1}


def adversarial(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """A weight with what codecs stumble over: zero rows and groups, denormals, outliers, ties, ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(weight.shape, generator=generator) * 10.0 ** torch.randint(-6, 3, (len(weight), 1))
    found[0] = 0
    found[1] = torch.finfo(torch.float32).tiny / 64
    found[2, ::16] = 1e4
    found[3] = torch.linspace(-448, 448, weight.shape[1])
    found[4] = 0.5
    found[5, :16] = 0
    return found


@pytest.mark.parametrize("scheme", HALF_STEP)
@pytest.mark.parametrize("seed", range(3))
def test_values_come_back_within_half_a_step(scheme: str, seed: int, tmp_path: Path) -> None:
    """What a real loader would multiply out again: float64, from what is in the file."""
    weights = load_file(golden(MODEL) / "model.safetensors")
    ranges: dict[str, torch.Tensor] = {}
    for name in [n for n in weights if "proj" in n]:
        module = name.removesuffix(".weight")
        weights[name] = adversarial(weights[name], seed)
        ranges[f"{module}.input_quantizer._amax"] = torch.tensor(3.0)
        ranges[f"{module}.input_quantizer._pre_quant_scale"] = torch.ones(weights[name].shape[1])
    model(tmp_path / "model", weights)
    save_file(ranges, tmp_path / "ranges.safetensors")
    report = convert(tmp_path / "out", source=tmp_path / "model", quantization=scheme,
                     calibration=str(tmp_path / "ranges.safetensors"))  # fmt: skip
    stored = ranks(tmp_path / "out")[0]
    for layer in (0, 1):
        module = f"transformer.layers.{layer}.mlp.proj"
        plain = weights[f"model.layers.{layer}.mlp.down_proj.weight"].double()
        values, scale = multiplied(scheme, {k.removeprefix(f"{module}."): t for k, t in stored.items() if module in k})
        error = (values * scale - plain).abs()
        # NVFP4's scales are rounded too: a block may have values beyond 6 of them, which become 6.
        beyond = (plain.abs() - 6 * scale).clamp(min=0) if scheme == "NVFP4" else 0
        assert (error <= (scale * HALF_STEP[scheme] + beyond) * (1 + 1e-6)).all()
        assert report.losses[module].max == pytest.approx(error.max().item(), rel=1e-5)
        assert report.losses[module].relative == pytest.approx((error.max() / plain.abs().max()).item(), rel=1e-5)


def multiplied(scheme: str, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scales) of what is stored of one weight, in float64. Source: shared reference trtllm.md section 2."""
    weight = parts["weight"]
    if scheme.startswith("FP8"):
        scale = parts.get("weights_scaling_factor", parts.get("per_channel_scale"))
        assert scale is not None
        return weight.double(), scale.double().reshape(-1, 1)
    scale = parts["weights_scaling_factor"].double()
    if scheme == "W8A8_SQ_PER_CHANNEL":
        return weight.double(), scale[:, None]
    low, high = weight.view(BYTES) & 15, weight.view(BYTES) >> 4
    if scheme == "NVFP4":
        codes = torch.stack([low, high], -1).flatten(1).long()
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        signed = torch.cat([values, -values])[codes]
        return signed, scale.repeat_interleave(16, 1) * parts["weights_scaling_factor_2"].double()
    codes = torch.stack([low, high], 1).flatten(0, 1).long()
    return torch.where(codes > 7, codes - 16, codes).double(), scale.repeat_interleave(128, 1)


def model(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A model with the config of the golden and other weights."""
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text((golden(MODEL) / "config.json").read_text())


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_what_a_real_exporter_wrote_is_read_back(scheme: str, tmp_path: Path) -> None:
    """Each weight within the scheme's own error of the model that was quantised, and everything else as it was."""
    source = golden(f"trtllm/{CALIBRATED[scheme]}")
    report = registry.convert(source / "trtllm", tmp_path / "out", to="huggingface", config=golden(MODEL))
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(golden(MODEL) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    most = {"FP8": 0.05, "FP8_PER_CHANNEL_PER_TOKEN": 0.04, "W8A8_SQ_PER_CHANNEL": 0.03}.get(scheme, 0.16)
    for name, tensor in theirs.items():
        off = ((ours[name].double() - tensor.double()).abs().max() / tensor.double().abs().max()).item()
        # ModelOpt's exports in float16 have lost the smallest of the model's bfloat16s.
        assert 0 < off < most if "proj" in name else off < 1e-6, name
    assert any("lossy" in note for note in report.notes)


@pytest.mark.parametrize("scheme", HALF_STEP)
def test_what_was_quantised_once_is_quantised_alike_again(scheme: str, tmp_path: Path) -> None:
    """Read back and encoded again the values are the same: they are the format's own, and so are the scales."""
    chosen = {"quantization": scheme, "calibration": str(tmp_path / "ranges.safetensors")}
    weights = load_file(golden(MODEL) / "model.safetensors")
    ranges = {}
    for module in (name.removesuffix(".weight") for name in weights if "proj" in name):
        ranges[f"{module}.input_quantizer._amax"] = torch.tensor(3.0)
        ranges[f"{module}.input_quantizer._pre_quant_scale"] = torch.ones(weights[f"{module}.weight"].shape[1])
    save_file(ranges, tmp_path / "ranges.safetensors")
    model(tmp_path / "model", {name: tensor.float() for name, tensor in weights.items()})
    convert(tmp_path / "once", source=tmp_path / "model", **chosen)
    registry.convert(tmp_path / "once", tmp_path / "back", to="huggingface")
    report = convert(tmp_path / "twice", source=tmp_path / "back", **chosen)
    (once,), (twice,) = ranks(tmp_path / "once"), ranks(tmp_path / "twice")
    assert once.keys() == twice.keys()
    for module in (name.removesuffix(".weight") for name in once if "mlp" in name and name.endswith(".weight")):
        first, again = (
            multiplied(scheme, {k.removeprefix(f"{module}."): t for k, t in rank.items() if k.startswith(f"{module}.")})
            for rank in (once, twice)
        )
        assert torch.equal(first[0], again[0]), module  # FP4 has two zeros, which are one here
    assert all(loss.relative < 1e-6 for loss in report.losses.values())


def test_smoothing_that_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    source = golden("trtllm/trt_llama_sq_pt_tp2/trtllm")
    with pytest.raises(registry.CheckpointError, match="cannot be turned back into plain weights"):
        registry.convert(source, tmp_path / "out", to="huggingface", config=golden(MODEL))


def test_a_scale_that_is_missing_on_reading(tmp_path: Path) -> None:
    source = golden("trtllm/mo_llama_fp8_tp1/trtllm")
    tensors = load_file(source / "rank0.safetensors")
    (tmp_path / "in").mkdir()
    del tensors["transformer.layers.1.mlp.fc.weights_scaling_factor"]
    save_file(tensors, tmp_path / "in/rank0.safetensors")
    (tmp_path / "in/config.json").write_text((source / "config.json").read_text())
    with pytest.raises(registry.CheckpointError, match=r"layers\.1\.mlp\.fc\.weights_scaling_factor: missing"):
        registry.convert(tmp_path / "in", tmp_path / "out", to="huggingface", config=golden(MODEL))


LAYERS = {
    "transformer.layers.0.attention.qkv": {"quant_algo": "FP8"},
    "transformer.layers.1.attention.qkv": {"quant_algo": "W4A16_AWQ", "group_size": 64},
    "transformer.layers.*.mlp.fc": {"quant_algo": "W4A16_AWQ", "group_size": 64},
}


def mixed(tmp_path: Path, layers: dict[str, Any]) -> dict[str, Any]:
    """Options for MIXED_PRECISION, with the ranges of a calibration for both of its schemes."""
    ranges = load_file(calibration("mo_llama_w4a8awq_g128_tp1"))
    save_file({n: t for n, t in ranges.items() if "input_quantizer" in n}, tmp_path / "ranges.safetensors")
    (tmp_path / "layers.json").write_text(json.dumps({"quantized_layers": layers}))
    return {"quantization": "MIXED_PRECISION", "quantized_layers": str(tmp_path / "layers.json"),
            "calibration": str(tmp_path / "ranges.safetensors")}  # fmt: skip


def test_mixed_precision(tmp_path: Path) -> None:
    """Every layer is stored as it would be if all were quantised as it is, and the list says how."""
    chosen = mixed(tmp_path, LAYERS)
    convert(tmp_path / "mixed", 2, kv_cache_quantization="FP8", **chosen)
    alone = {}
    for scheme in ("FP8", "W4A16_AWQ"):
        size = {} if scheme == "FP8" else {"group_size": 64}
        convert(tmp_path / scheme, 2, quantization=scheme, calibration=chosen["calibration"], **size)
        alone[scheme] = ranks(tmp_path / scheme)
    convert(tmp_path / "plain", 2)
    for rank, ours in enumerate(ranks(tmp_path / "mixed")):
        expected = dict(ranks(tmp_path / "plain")[rank])
        for module, scheme in (("layers.0.attention.qkv", "FP8"), ("layers.1.attention.qkv", "W4A16_AWQ"),
                               ("layers.0.mlp.fc", "W4A16_AWQ"), ("layers.1.mlp.fc", "W4A16_AWQ")):  # fmt: skip
            expected |= {n: t for n, t in alone[scheme][rank].items() if f".{module}." in n}
        for layer in (0, 1):
            expected[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"] = torch.ones(1)
        assert ours.keys() == expected.keys()
        assert [name for name in ours if not same(ours[name], expected[name])] == []
    said = json.loads((tmp_path / "mixed/quant_cfg.json").read_text())
    awq = {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True}
    assert said == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": {
        "transformer.layers.0.attention.qkv": {"quant_algo": "FP8"}, "transformer.layers.1.attention.qkv": awq,
        "transformer.layers.0.mlp.fc": awq, "transformer.layers.1.mlp.fc": awq,
    }}  # fmt: skip
    assert json.loads((tmp_path / "mixed/config.json").read_text())["quantization"]["quant_algo"] == "MIXED_PRECISION"
    registry.convert(tmp_path / "mixed", tmp_path / "back", to="huggingface")
    assert (
        load_file(tmp_path / "back/model.safetensors").keys() == load_file(golden(MODEL) / "model.safetensors").keys()
    )


def test_mixed_precision_in_stages(tmp_path: Path) -> None:
    """The list has the layers as each stage counts them, and every stage reads the same list."""
    chosen = mixed(tmp_path, {"*.attention.qkv": {"quant_algo": "FP8"}})
    convert(tmp_path / "one", **chosen)
    registry.convert(golden(MODEL), tmp_path / "two", to="trtllm", parallel=registry.Parallel(pp=2), options=chosen)
    said = json.loads((tmp_path / "two/quant_cfg.json").read_text())["quantized_layers"]
    assert said == {"transformer.layers.0.attention.qkv": {"quant_algo": "FP8"}}
    (whole,) = ranks(tmp_path / "one")
    for stage, stored in enumerate(ranks(tmp_path / "two")):
        for name, tensor in stored.items():
            assert same(tensor, whole[name.replace("layers.0.", f"layers.{stage}.")]), name
    for name in ("one", "two"):
        registry.convert(tmp_path / name, tmp_path / f"{name} back", to="huggingface")
    one, two = (load_file(tmp_path / f"{name} back/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(same(one[name], two[name]) for name in one)


def test_rows_between_bounds(tmp_path: Path) -> None:
    """TensorRT-LLM's own converter: weights are clamped, and scales have a smallest value.

    Source: shared reference trtllm.md 2.3.
    """
    weights = load_file(golden(MODEL) / "model.safetensors")
    low, high, floor = -0.05, 0.04, 1 / (448 * 512)
    weights["model.layers.0.self_attn.o_proj.weight"][3] = 1e-6
    weights["model.layers.0.self_attn.o_proj.weight"][4] = 0
    model(tmp_path / "model", weights)
    chosen = {"quantization": "FP8_PER_CHANNEL_PER_TOKEN", "clamp_val": [low, high]}
    convert(tmp_path / "out", source=tmp_path / "model", **chosen)
    (stored,) = ranks(tmp_path / "out")
    x = weights["model.layers.0.self_attn.o_proj.weight"].float().clamp(low, high)
    scale = (x.abs().amax(1, keepdim=True) / 448).clamp(min=floor)
    assert (scale == torch.tensor(floor)).sum() == 2
    assert same(stored["transformer.layers.0.attention.dense.per_channel_scale"], scale[:, 0])
    expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert same(stored["transformer.layers.0.attention.dense.weight"], expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization"]["clamp_val"] == [low, high]
    with pytest.raises(registry.MappingError, match="two numbers around zero"):
        convert(tmp_path / "no", **{**chosen, "clamp_val": [1.0, 2.0]})


def test_the_recipe_of_llama_leaves_attention_and_the_outer_layers(tmp_path: Path) -> None:
    source = golden("trtllm/_inputs/qwen2")  # of four layers
    chosen = {"quantization": "FP8_PER_CHANNEL_PER_TOKEN"}
    for name, more in (("all", {}), ("some", {"use_meta_recipe": True}), ("plain", {"quantization": None})):
        convert(tmp_path / name, source=source, dtype="bfloat16", **{**chosen, **more})
    (all_of_it,), (some,), (plain,) = (ranks(tmp_path / name) for name in ("all", "some", "plain"))
    quantised = {n for n in all_of_it if re.search(r"layers\.[12]\.mlp\.(fc|gate|proj)\.(weight|per_channel_scale)", n)}
    assert len(quantised) == 12
    assert some.keys() == plain.keys() | quantised
    assert all(same(some[n], (all_of_it if n in quantised else plain)[n]) for n in some)
    said = json.loads((tmp_path / "some/config.json").read_text())["quantization"]
    assert (said["use_meta_recipe"], said["quant_algo"]) == (True, "FP8_PER_CHANNEL_PER_TOKEN")


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
def test_weight_only_is_said_and_not_done(scheme: str, tmp_path: Path) -> None:
    convert(tmp_path / "plain", 2)
    report = convert(tmp_path / "said", 2, quantization=scheme)
    for ours, plain in zip(ranks(tmp_path / "said"), ranks(tmp_path / "plain"), strict=True):
        assert ours.keys() == plain.keys()
        assert all(same(ours[name], plain[name]) for name in ours)
    assert json.loads((tmp_path / "said/config.json").read_text())["quantization"]["quant_algo"] == scheme
    assert report.losses == {}


def larger(source: Path, target: Path, said: dict[str, Any]) -> None:
    """A model of zeros and ones in the size that a schema was made with."""
    config = json.loads((source / "config.json").read_text())
    names = {
        "hidden_size": ["hidden_size", "n_embd"], "num_hidden_layers": ["num_hidden_layers", "n_layer"],
        "num_attention_heads": ["num_attention_heads", "n_head"], "num_key_value_heads": ["num_key_value_heads"],
        "intermediate_size": ["intermediate_size", "n_inner"], "vocab_size": ["vocab_size"],
        "max_position_embeddings": ["max_position_embeddings", "n_positions"],
    }  # fmt: skip
    for field, fields in names.items():
        config |= {f: said[field] for f in fields if f in config}
    config |= {"head_dim": said["head_size"]} if "head_dim" in config else {}
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    import transformers

    built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(target))
    built.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config))


def every_range(source: Path) -> dict[str, torch.Tensor]:
    """A range of every kind for every layer of a model."""
    found = {}
    for path in source.glob("*.safetensors"):
        for name, weight in load_file(path).items():
            if weight.dim() > 1 and name.endswith(".weight"):
                module = name.removesuffix(".weight")
                rows, columns = weight.shape[::-1] if ".c_" in name else weight.shape
                found[f"{module}.input_quantizer._amax"] = torch.tensor(3.0)
                found[f"{module}.input_quantizer._pre_quant_scale"] = torch.ones(columns)
                found |= {f"{module}.x": torch.ones(columns), f"{module}.y": torch.ones(rows)}
    return found


def changed(path: Path, change: Any, case: str = "mo_llama_fp8_tp1") -> str:
    """A calibration of the model with something wrong in it."""
    ranges = load_file(calibration(case))
    change(ranges)
    save_file(ranges, path / "ranges.safetensors")
    return str(path / "ranges.safetensors")


PROJ = "model.layers.1.mlp.down_proj"


def put(name: str, value: Any) -> Any:
    def change(ranges: dict[str, torch.Tensor]) -> None:
        ranges[name] = torch.tensor(value)

    return change


BAD: dict[str, tuple[str, Any, str]] = {
    "missing": (
        "FP8",
        lambda r: r.pop(f"{PROJ}.input_quantizer._amax"),
        r"down_proj\.input_quantizer\._amax.*not there",
    ),
    "zero": ("FP8", put(f"{PROJ}.input_quantizer._amax", 0.0), "expected positive numbers, found 0"),
    "negative": ("FP8", put(f"{PROJ}.input_quantizer._amax", -3.0), "expected positive numbers, found -3"),
    "NaN": ("FP8", put(f"{PROJ}.input_quantizer._amax", float("nan")), "infinity or NaN"),
    "infinite": ("NVFP4", put(f"{PROJ}.input_quantizer._amax", float("inf")), "infinity or NaN"),
    "other layers": ("FP8", put("model.layers.7.mlp.down_proj.input_quantizer._amax", 1.0), "no such module"),
    "other weights": ("FP8", put(f"{PROJ}.weight_quantizer._amax", 77.0), "of other weights"),
    "columns": ("W4A16_AWQ", put(f"{PROJ}.input_quantizer._pre_quant_scale", [1.0] * 3), "expected 256 numbers"),
    "a zero column": ("W4A16_AWQ", put(f"{PROJ}.input_quantizer._pre_quant_scale", [1.0] * 255 + [0.0]), "found 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_ranges_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    scheme, change, said = BAD[name]
    path = changed(tmp_path, change, CALIBRATED[scheme])
    with pytest.raises(registry.RegistryError, match=said):
        convert(tmp_path / "out", quantization=scheme, calibration=path, group_size=64 if "AWQ" in scheme else None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ranges.safetensors"]


def test_ranges_of_another_model_are_refused(tmp_path: Path) -> None:
    path = str(calibration("mo_mixtral_fp8_tp1"))
    with pytest.raises(registry.CheckpointError, match="the model has no such module"):
        convert(tmp_path / "out", quantization="FP8", calibration=path)
    with pytest.raises(registry.CheckpointError, match="cannot be read"):
        convert(tmp_path / "out", quantization="FP8", calibration=str(golden(MODEL) / "config.json"))
    with pytest.raises(registry.CheckpointError, match="no calibration is given"):
        convert(tmp_path / "out", quantization="FP8")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    weights = load_file(golden(MODEL) / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][3, 5] = value
    model(tmp_path / "model", weights)
    with pytest.raises(registry.MappingError, match="no finite numbers") as caught:
        convert(tmp_path / "out", source=tmp_path / "model", quantization="FP8_PER_CHANNEL_PER_TOKEN")
    assert "layers.1.attention.qkv" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_divide_are_refused_with_what_would_work(tmp_path: Path) -> None:
    with pytest.raises(registry.ParallelError, match="128 columns on 2 ranks in groups of 128") as caught:
        convert(tmp_path / "out", 2, **asked("W4A8_AWQ"))
    assert "choose tp as 1" in str(caught.value)
    with pytest.raises(registry.ParallelError, match="groups of 64") as caught:
        convert(tmp_path / "out", 4, **asked("W4A16_AWQ", group_size=64))
    assert "choose tp as 1 or 2" in str(caught.value)
    with pytest.raises(registry.ArgumentError, match="no groups of that size"):
        convert(tmp_path / "out", **asked("W4A16_AWQ", group_size=96))


LACKING = {
    "FP8_PER_CHANNEL_PER_TOKEN": "trtllm/_inputs/mixtral_h128", "W4A8_AWQ": "trtllm/_inputs/mixtral_h128",
    "W8A8_SQ_PER_TENSOR_PLUGIN": "trtllm/_inputs/gptj", "FP8": "trtllm/_inputs/mamba",
    "NVFP4": "trtllm/_inputs/deepseek_v2_lite", "W4A16": "trtllm/_inputs/mamba",
}  # fmt: skip


@pytest.mark.parametrize("scheme", LACKING)
def test_what_an_architecture_lacks_is_refused(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(registry.MappingError, match=r"has no form for|cannot be had of this model"):
        convert(tmp_path / "out", source=golden(LACKING[scheme]), quantization=scheme)
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_layers_that_is_wrong(tmp_path: Path) -> None:
    def refused(error: type[registry.RegistryError], match: str, layers: Any, tp: int = 1, pp: int = 1) -> None:
        with pytest.raises(error, match=match):
            registry.convert(golden(MODEL), tmp_path / "out", to="trtllm", options=mixed(tmp_path, layers),
                             parallel=registry.Parallel(tp=tp, pp=pp))  # fmt: skip

    refused(registry.ArgumentError, "unknown quantization 'FP9'", {"*.mlp.fc": {"quant_algo": "FP9"}})
    refused(registry.CheckpointError, "cannot be read", {"*.mlp.fc": "FP8"})
    refused(registry.MappingError, "not in the model", {"*.mlp.nothing": {"quant_algo": "FP8"}})
    first = {"transformer.layers.0.mlp.fc": {"quant_algo": "FP8"}}
    refused(registry.ArgumentError, "stages of the pipeline have layers that are quantised otherwise", first, pp=2)
    with pytest.raises(registry.ArgumentError, match="needs the option quantized_layers"):
        convert(tmp_path / "out", quantization="MIXED_PRECISION")


def test_a_spec_with_a_wrong_scheme() -> None:
    spec = catalog.format_spec("trtllm").model_dump(mode="json", by_alias=True, exclude_defaults=True)
    tensors = {"weight": {"shape": "out in", "dtype": "int8", "value": "round(plain / nothing)"}}

    def problems(scheme: dict[str, Any]) -> str:
        with pytest.raises(registry.SpecError) as caught:
            registry.register({**spec, "kind": "format", "name": "wrong", "quantizations": {
                **spec["quantizations"], "schemes": {"S": {"tensors": tensors, **scheme}}}})  # fmt: skip
        return str(caught.value)

    assert "'nothing' is no range" in problems({})
    assert "extends 'T', which is no other scheme" in problems({"extends": "T"})
    assert "is not allowed in a formula" in problems({"decoded": "weight.item()"})
    assert "is not allowed in a formula" in problems({"decoded": "__import__('os')"})
    groups = {"weight": {"shape": "out in/group", "dtype": "int8", "value": "plain"}}
    assert "in/group of a scheme without groups" in problems({"tensors": groups})
    assert "none of 1, expert, out" in problems({"tensors": {"weight": {**groups["weight"], "shape": "out up"}}})


def test_a_view_and_a_plan_show_the_same(tmp_path: Path) -> None:
    chosen = asked("NVFP4")
    convert(tmp_path / "out", 2, **chosen)
    for rank, stored in enumerate(ranks(tmp_path / "out")):
        view = registry.open(golden(MODEL)).view(
            "trtllm", parallel=registry.Parallel(tp=2), rank=Rank(tp=rank), options=chosen
        )
        assert set(view) == stored.keys()
        assert [name for name in view if not same(view[name], stored[name])] == []
    planned = registry.plan(golden(MODEL), to="trtllm", parallel=registry.Parallel(tp=2), options=chosen)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("rank*.safetensors")}
    assert {name: size for name, size in planned.files.items() if name in sizes} == sizes


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--option", "quantization=FP8", "--option", f"calibration={calibration('mo_llama_fp8_tp1')}"]
    left = ["--option", "exclude_modules=lm_head,*.layers.1.*"]
    assert main(["convert", str(golden(MODEL)), str(tmp_path / "out"), "--to", "trtllm", *given, *left]) == 0
    assert "lossy: 5 tensors, FP8" in capsys.readouterr().out
    stored = ranks(tmp_path / "out")[0]
    assert stored["transformer.layers.0.mlp.fc.weight"].dtype == torch.float8_e4m3fn
    assert stored["transformer.layers.1.mlp.fc.weight"].dtype == torch.bfloat16
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert said["exclude_modules"] == ["lm_head", "*.layers.1.*"]
    assert main(["convert", str(golden(MODEL)), str(tmp_path / "no"), "--to", "trtllm", *given[:2]]) == 1
    assert "no calibration is given" in capsys.readouterr().err


def test_pipeline_stages_and_experts(tmp_path: Path) -> None:
    """Layers are renumbered in each stage; experts' scales are each their own, and are cut with them."""
    chosen = asked("FP8")
    convert(tmp_path / "one", **chosen)
    registry.convert(golden(MODEL), tmp_path / "two", to="trtllm", parallel=registry.Parallel(pp=2), options=chosen)
    (whole,) = ranks(tmp_path / "one")
    for stage, stored in enumerate(ranks(tmp_path / "two")):
        for name, tensor in stored.items():
            assert same(tensor, whole[name.replace("layers.0.", f"layers.{stage}.")]), name
    case = "mo_mixtral_fp8_tp1"
    options = {"quantization": "FP8", "calibration": str(calibration(case))}
    source = golden("trtllm/_inputs/mixtral_h128")
    parallel = registry.Parallel(tp=2, ep=2)
    registry.convert(source, tmp_path / "experts", to="trtllm", parallel=parallel, options=options)
    theirs = load_file(golden(f"trtllm/{case}/trtllm") / "rank0.safetensors")
    for name in ("fc.weight", "fc.weights_scaling_factor", "proj.weight", "proj.weights_scaling_factor"):
        shards = [rank[f"transformer.layers.0.mlp.{name}"] for rank in ranks(tmp_path / "experts")]
        expected = theirs[f"transformer.layers.0.mlp.{name}"]
        assert [tuple(s.shape) for s in shards] == [(expected.shape[0] // 2, *expected.shape[1:])] * 2
        for shard, part in zip(shards, expected.contiguous().chunk(2), strict=True):
            assert same(shard, part), name


def test_casts_are_lossy_steps_too(tmp_path: Path) -> None:
    weights = {name: tensor.float() for name, tensor in load_file(golden(MODEL) / "model.safetensors").items()}
    weights["model.norm.weight"] = torch.linspace(0.1, 1e5, len(weights["model.norm.weight"]))
    weights["lm_head.weight"] = torch.randn(weights["lm_head.weight"].shape)
    model(tmp_path / "model", weights)
    exact = convert(tmp_path / "exact", source=tmp_path / "model")
    assert exact.losses == {}
    for dtype, target in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        report = convert(tmp_path / dtype, source=tmp_path / "model", dtype=dtype)
        for tensor, name in (("final_norm.weight", "model.norm.weight"), ("output.weight", "lm_head.weight")):
            off = (weights[name].to(target).float() - weights[name]).abs().max().item()
            assert report.losses[tensor].max == off
            assert report.losses[tensor].relative == pytest.approx(off / weights[name].abs().max().item())
            assert report.losses[tensor].step == f"float32 to {dtype}"
    assert report.losses["final_norm.weight"].max == float("inf")  # float16 ends before that


#: Every input but those whose weights have no quantised form (`LACKING`).
FAMILIES = [
    "bert", "bloom", "falcon_40b", "falcon_7b", "falcon_rw", "gemma", "gemma2", "gpt2", "gptj", "gptneox", "llama31",
    "llama_tied", "mistral", "mixtral", "mpt", "nemotron", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "starcoder", "starcoder2",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_quantised(name: str, tmp_path: Path) -> None:
    """On two ranks, and back: what was quantised is within FP8's error, all else as an unquantised export has it."""
    source = golden(f"trtllm/_inputs/{name}")
    save_file(every_range(source), tmp_path / "ranges.safetensors")
    report = convert(tmp_path / "out", 2 if name != "phi3" else 1, source, "bfloat16", quantization="FP8",
                     kv_cache_quantization="FP8", calibration=str(tmp_path / "ranges.safetensors"))  # fmt: skip
    convert(tmp_path / "plain", 2 if name != "phi3" else 1, source, "bfloat16")
    for ours, plain in zip(ranks(tmp_path / "out"), ranks(tmp_path / "plain"), strict=True):
        quantised = {n for n, t in ours.items() if t.dtype == torch.float8_e4m3fn}
        modules = {n.rsplit(".", 1)[0] for n in quantised}
        made = {f"{m}.{part}" for m in modules for part in ("weights_scaling_factor", "activation_scaling_factor")}
        made |= {f"{m.removesuffix('.qkv')}.kv_cache_scaling_factor" for m in modules if m.endswith(".qkv")}
        assert ours.keys() == plain.keys() | made
        assert made and all(same(ours[n], plain[n]) for n in plain.keys() - quantised)
        for weight in quantised:
            scale = ours[weight.removesuffix("weight") + "weights_scaling_factor"]
            back = ours[weight].float() * scale.reshape(-1, *[1] * (ours[weight].dim() - 1))
            off, rounding = (back - plain[weight].float()).abs().max(), plain[weight].abs().max() / 256
            assert off <= 16 * scale.max() + rounding, weight  # half of FP8's largest step, and bfloat16's
    assert {n for n, loss in report.losses.items() if loss.step == "FP8"} == modules
    registry.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    kept = {n for f in source.glob("*.safetensors") for n in load_file(f)}
    assert {n for f in (tmp_path / "back").glob("*.safetensors") for n in load_file(f)} == kept


def test_formulas() -> None:
    class Fixed:
        def name(self, name: str) -> Any:
            return {"x": torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -5.1, 0.0]]), "n": 2.0}[name]

        def given(self, name: str) -> bool:
            return name == "x"

        def reduce(self, function: str, inner: Any) -> torch.Tensor:
            raise AssertionError(function)

    def value(text: str) -> Any:
        return parse(text)(Fixed())

    # Round to even among what FP4 (E2M1) has. Source: OCP Microscaling Formats 1.0, section 5.3.3.
    assert value("fp4(x)").tolist() == [[0, 1, 1, 2, 2, 4, 4, 6, 0, -6, 0]]
    assert value("nonzero(x - x)").tolist() == [[1.0] * 11]
    assert value("1 - n if given(y) else n / 4") == 0.5
    assert value("cast(x * 100, 'float8_e4m3fn')")[0, :3].tolist() == [24, 72, 128]
    for text in (
        "x.sum()",
        "x[0]",
        "[x]",
        "open(x)",
        "x ** 2",
        "lambda: x",
        "given(1)",
        "'text'",
        "absmax(x, x)",
        "x if",
    ):
        with pytest.raises(registry.SpecError):
            parse(text)
