"""Every parameter that a model class of TensorRT-LLM asks for is in the export, with its shape and type.

`_schemas/` lists what the classes of version 0.17 ask for once a checkpoint is loaded, a file for each architecture,
quantisation and layout. What the loader itself makes anew is made so here (shared reference trtllm.md 2.4, 2.5).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import registry
from tests.goldens import SHARED, golden
from tests.test_quantization import every_range, larger

LAYOUTS = {
    "none": [
        "bert_tp2", "bloom_tp2", "falcon_40b_tp2", "falcon_7b_tp2", "falcon_rw_tp2", "gemma2_tp2", "gemma_tp2",
        "gpt2_tp2_pp1", "gptj_tp2", "gptneox_tp2", "llama_gqa_tp2_pp1", "llama_gqa_tp2_pp2", "mamba_tp1", "mistral_tp2",
        "mixtral_tp2", "mpt_tp2", "nemotron_tp2", "opt_tp2", "phi3_tp1", "phi_tp2", "qwen2_moe_tp2", "qwen2_tp2_pp1",
        "starcoder2_tp2", "starcoder_tp2",
    ],
    **{
        scheme: ["gpt2_tp2_pp1", "llama_gqa_tp2_pp1", "mixtral_tp2"]
        for scheme in (
            "FP8", "FP8_kvFP8", "FP8_PER_CHANNEL_PER_TOKEN", "W8A16", "W4A16", "W4A16_AWQ", "W4A16_GPTQ", "W4A8_AWQ",
            "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
        )
    },
}  # fmt: skip
SCHEMAS = [f"trt_{layout}__{scheme}" for scheme, layouts in LAYOUTS.items() for layout in layouts]
#: What is not exported, by schema: the reason, and what the refusal says. The first four the classes refuse themselves.
REFUSED: dict[str, tuple[str, str]] = {
    "trt_mixtral_tp2__FP8_PER_CHANNEL_PER_TOKEN": ("MOE Does not support FP8 rowwise quantize", "no form for weights"),
    "trt_gpt2_tp2_pp1__W4A8_AWQ": ("group_size = 64 is not implemented", "no groups of that size"),
    "trt_llama_gqa_tp2_pp1__W4A8_AWQ": ("group_size = 64 is not implemented", "no groups of that size"),
    "trt_mixtral_tp2__W4A8_AWQ": ("group_size = 64 is not implemented", "no groups of that size"),
    # The class gives its experts' float16 weights an input of integers, and no converter writes such a checkpoint.
    "trt_mixtral_tp2__W8A8_SQ_PER_TENSOR_PLUGIN": ("", "no form for weights of experts"),
    "trt_mixtral_tp2__W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": ("", "no form for weights of experts"),
    # No plain form: values are stored in an order that a kernel of the engine makes up.
    **dict.fromkeys(
        [f"trt_{layout}__W4A16_GPTQ" for layout in LAYOUTS["W4A16_GPTQ"]], ("", "quantization.*W4A16_GPTQ")
    ),
}
#: Where an export differs from what the class asks for: schema -> (the modules, what of each layer is there instead).
#: Version 0.17 asks for plain integers of experts, and takes no AWQ of them; later ones read what ModelOpt writes
#: (shared reference trtllm.md 2.5).
OTHERWISE: dict[str, tuple[tuple[str, ...], dict[str, tuple[list[int], str]]]] = {
    "trt_mixtral_tp2__W4A16_AWQ": (("mlp.fc.", "mlp.proj."), {
        "mlp.fc.weight": ([4, 256, 256], "int8"), "mlp.fc.weights_scaling_factor": ([4, 512, 4], "float32"),
        "mlp.fc.prequant_scaling_factor": ([4, 256], "float16"), "mlp.proj.weight": ([4, 128, 256], "int8"),
        "mlp.proj.weights_scaling_factor": ([4, 256, 4], "float32"),
        "mlp.proj.prequant_scaling_factor": ([4, 256], "float16"),
    }),
}  # fmt: skip
Params = dict[str, tuple[list[int], str]]


def test_every_schema_is_asked() -> None:
    there = {path.stem for path in (SHARED / "trtllm/_schemas").glob("*.json")}
    assert there <= set(SCHEMAS)


def exported(name: str, config: dict[str, Any], tmp_path: Path) -> Path:
    """An export of a model with the schema's config, in its layout and quantisation."""
    quantization, mapping = config["quantization"], config["mapping"]
    source = golden(f"trtllm/_inputs/{name.removeprefix('trt_').split('_tp')[0]}")
    options: dict[str, Any] = {"use_parallel_embedding": config.get("use_parallel_embedding", False)}
    if algorithm := quantization["quant_algo"]:
        larger(source, tmp_path / "model", config)
        source = tmp_path / "model"
        save_file(every_range(source), tmp_path / "ranges.safetensors")
        options |= {"quantization": algorithm, "kv_cache_quantization": quantization["kv_cache_quant_algo"]}
        options |= {"calibration": str(tmp_path / "ranges.safetensors")}
        options |= {"group_size": quantization["group_size"]} if "AWQ" in algorithm else {}
    parallel = registry.Parallel(tp=mapping["tp_size"], pp=mapping["pp_size"])
    registry.convert(
        source, tmp_path / "out", to="trtllm", dtype=config["dtype"], parallel=parallel, options=options
    )  # fmt: skip
    assert len(list((tmp_path / "out").glob("rank*.safetensors"))) == mapping["world_size"]
    return tmp_path / "out"


def loaded(found: Params, algorithm: str | None, dtype: str) -> Params:
    """What the loader makes of a file's parameters: it quantises plain weights, and lays out AWQ's for its kernels."""
    made = dict(found)
    for name, (shape, _) in found.items():
        module, _, part = name.rpartition(".")
        if module.rpartition(".")[2] not in ("qkv", "dense", "fc", "gate", "proj"):
            continue
        if algorithm in ("W8A16", "W4A16") and part == "weight":
            *experts, out, width = shape
            made[name] = [*experts, width, out if algorithm == "W8A16" else out // 2], "int8"
            made[f"{module}.per_channel_scale"] = [*experts, out], dtype
        elif algorithm == "W4A16_AWQ" and len(found[f"{module}.weight"][0]) == 2:
            if part == "weight":  # two rows in a byte, two bytes in a float16
                made[name] = [shape[1], shape[0] // 2], dtype
            elif part == "weights_scaling_factor":
                made[name] = shape[::-1], dtype
            elif part == "prequant_scaling_factor":
                made[name] = [1, *shape], dtype
    return made


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name not in REFUSED])
def test_parameters_are_those_that_the_model_class_asks_for(name: str, tmp_path: Path) -> None:
    schema = json.loads(golden(f"trtllm/_schemas/{name}.json").read_text())
    config = schema["config"]
    out = exported(name, config, tmp_path)
    modules, instead = OTHERWISE.get(name, ((), {}))
    for rank, asked in schema["params"].items():
        tensors = load_file(out / f"{rank}.safetensors")
        stored = {n: ([*t.shape], str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()}
        required = {n: (shape, {"fp8": "float8_e4m3fn"}.get(dtype, dtype)) for n, (shape, dtype, need) in asked.items()
                    if need == "required" and not n.split(".", 3)[-1].startswith(modules or "-")}  # fmt: skip
        # TensorRT-LLM's converters write these in float32 too, whatever the class says.
        required |= {n: (shape, "float32") for n, (shape, _) in required.items() if n.endswith(".scale_to_int")}
        for layer in range(config["num_hidden_layers"]):
            required |= {f"transformer.layers.{layer}.{end}": param for end, param in instead.items()}
        assert loaded(stored, config["quantization"]["quant_algo"], config["dtype"]) == required


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exported_is_refused(name: str, tmp_path: Path) -> None:
    schema = json.loads(golden(f"trtllm/_schemas/{name}.json").read_text())
    theirs, ours = REFUSED[name]
    if theirs:
        assert all("ERROR" in params and theirs in params for params in schema["params"].values())
    with pytest.raises(registry.RegistryError, match=ours):
        exported(name, schema["config"], tmp_path)
    assert not (tmp_path / "out").exists()
