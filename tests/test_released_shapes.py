"""The published models at their true sizes: a plan covers every element of every tensor, from headers alone.

tests/released/*.json are config.json files as they were published (fields that say nothing about the model may be
missing; `long_factor` and the like are shortened to ones). Names and shapes come from transformers' own classes, built
on the meta device, and from `tests.hub_layouts` for what transformers drops or names otherwise. The published count of
parameters tells whether both are right. The files are headers with holes for the data: they take no disk.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import registry
from registry import Parallel
from tests import hub_layouts as hub
from tests.families import FAMILIES, HF, MEGATRON
from tests.hub_layouts import Config, Hub, Tensors

FOLDER = Path(__file__).parent / "released"
SHARD = 5 * 10**9

# By file: billions of parameters in the published files (None where a vision tower is in the package), and a layout
# that such a model is trained or served in.
RELEASED: dict[str, tuple[float | None, Parallel]] = {
    "DeepSeek-V2": (235.74, Parallel(tp=8, pp=4, ep=16, etp=1)),
    "DeepSeek-V2-Lite": (15.71, Parallel(tp=2, pp=[14, 13], ep=8, etp=1)),
    "DeepSeek-V3": (684.53, Parallel(tp=8, pp=[4] * 13 + [3] * 3, ep=64, etp=1)),
    "ERNIE-4.5-21B-A3B-PT": (21.83, Parallel(tp=4, pp=4, ep=8, etp=1)),
    "ERNIE-4.5-300B-A47B-PT": (299.48, Parallel(tp=8, pp=6, ep=16, etp=1)),
    "EXAONE-4.0-32B": (32.00, Parallel(tp=8, pp=2)),
    "Falcon-H1-34B-Base": (33.64, Parallel(tp=2, pp=4)),
    "GLM-4-32B-0414": (32.57, Parallel(tp=8, pp=[31, 30])),
    "GLM-4.5": (358.34, Parallel(tp=8, pp=4, ep=16, etp=1)),
    "GLM-4.5-Air": (110.47, Parallel(tp=8, pp=2, ep=8)),
    "GLM-4.7-Flash": (31.22, Parallel(tp=4, pp=[24, 23], ep=8, etp=1)),
    "Kimi-K2-Instruct": (1026.41, Parallel(tp=8, pp=[4] * 13 + [3] * 3, ep=64, etp=1)),
    "Llama-3.1-405B": (405.85, Parallel(tp=8, pp=[7] * 2 + [8] * 14)),
    "Llama-3.1-8B": (8.03, Parallel(tp=2, pp=2)),
    "Llama-3.2-1B": (1.236, Parallel(tp=2)),
    "Llama-3_3-Nemotron-Super-49B-v1": (49.87, Parallel(tp=8, pp=4)),
    "Llama-4-Maverick-17B-128E": (None, Parallel(tp=8, pp=8, ep=64, etp=1)),
    "Llama-4-Scout-17B-16E": (None, Parallel(tp=8, pp=4, ep=16, etp=1)),
    "Mamba-Codestral-7B-v0.1": (7.29, Parallel(tp=8)),
    "MiniMax-M2": (228.70, Parallel(tp=8, pp=2, ep=32, etp=1)),
    "Minitron-8B-Base": (8.27, Parallel(tp=4)),
    "Mistral-Nemo-Instruct-2407": (12.25, Parallel(tp=8)),
    "Mixtral-8x22B-v0.1": (140.62, Parallel(tp=2, pp=8, ep=8)),
    "Mixtral-8x7B-v0.1": (46.70, Parallel(tp=2, pp=4, ep=8)),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (31.58, Parallel(tp=2, pp=4, ep=8)),
    "Nemotron-4-340B-Base-hf": (341.03, Parallel(tp=8, pp=12)),
    "Nemotron-H-47B-Base-8K": (46.79, Parallel(tp=8, pp=2)),
    "Nemotron-H-8B-Base-8K": (8.10, Parallel(tp=8, pp=4)),
    "OLMo-2-0325-32B": (32.23, Parallel(tp=8)),
    "OLMoE-1B-7B-0924": (6.92, Parallel(tp=2, ep=8)),
    "Olmo-3-1125-32B": (32.23, Parallel(tp=8, pp=4)),
    "Phi-3-medium-4k-instruct": (13.96, Parallel(tp=5)),
    "Phi-3.5-MoE-instruct": (41.87, Parallel(tp=4, ep=8)),
    "Qwen1.5-MoE-A2.7B": (14.32, Parallel(tp=4, ep=4)),
    "Qwen2-57B-A14B": (57.41, Parallel(tp=4, pp=2, ep=8)),
    "Qwen2.5-0.5B": (0.494, Parallel(tp=2)),
    "Qwen2.5-72B-Instruct": (72.71, Parallel(tp=8, pp=4)),
    "Qwen3-235B-A22B": (235.09, Parallel(tp=4, pp=[12] * 7 + [10], ep=8)),
    "Qwen3-30B-A3B": (30.53, Parallel(tp=4, ep=8)),
    "Qwen3-32B": (32.76, Parallel(tp=8)),
    "Qwen3-Next-80B-A3B-Instruct": (81.32, Parallel(tp=2, pp=4, ep=16)),
    "Qwen3.5-27B": (None, Parallel(tp=4, pp=4)),
    "Qwen3.5-35B-A3B": (None, Parallel(tp=2, ep=8)),
    "Seed-OSS-36B-Instruct": (36.15, Parallel(tp=8, pp=2)),
    "SmolLM3-3B": (3.08, Parallel(tp=4)),
    "bert-large-uncased": (0.335, Parallel(tp=4)),
    "bloom": (176.25, Parallel(tp=8, pp=10)),
    "c4ai-command-a-03-2025": (111.06, Parallel(tp=8, pp=4)),
    "c4ai-command-r-plus": (103.81, Parallel(tp=8, pp=8)),
    "falcon-180B": (179.52, Parallel(tp=8, pp=8)),
    "falcon-40b": (41.84, Parallel(tp=8, pp=4)),
    "falcon-7b": (7.22, Parallel(pp=4)),
    "gemma-2-27b": (27.23, Parallel(tp=8, pp=2)),
    "gemma-3-1b-pt": (1.00, Parallel(tp=4)),
    "gemma-3-27b-pt": (None, Parallel(tp=8, pp=2)),
    "gemma-7b": (8.54, Parallel(tp=8)),
    "glm-4-9b-chat-hf": (9.40, Parallel(tp=4)),
    "gpt-j-6b": (6.05, Parallel(tp=4)),
    "gpt-neox-20b": (20.55, Parallel(tp=2, pp=4)),
    "gpt-oss-120b": (116.83, Parallel(tp=8, pp=4, ep=16, etp=1)),
    "gpt-oss-20b": (20.91, Parallel(tp=4, ep=8)),
    "gpt2-xl": (1.56, Parallel(tp=5)),
    "granite-3.0-3b-a800m-base": (3.30, Parallel(tp=8, ep=8)),
    "granite-3.1-8b-base": (8.17, Parallel(tp=4)),
    "mamba-2.8b-hf": (2.77, Parallel(tp=4)),
    "mpt-30b": (29.96, Parallel(tp=8, pp=2)),
    "opt-66b": (65.72, Parallel(tp=8, pp=4)),
    "phi-2": (2.78, Parallel(tp=4)),
    "stablelm-2-12b": (12.14, Parallel(tp=8)),
    "starcoder": (15.52, Parallel(tp=4)),
    "starcoder2-15b": (15.96, Parallel(tp=4)),
    "t5-11b": (11.31, Parallel(tp=8)),
    "t5-v1_1-xxl": (11.14, Parallel(tp=8)),
}

# What the published files have that transformers' classes have not, or spell otherwise.
LAYOUTS: dict[str, list[Hub]] = {
    "DeepSeek-V3": [hub.deepseek_mtp],
    "GLM-4.5": [hub.deepseek_mtp],
    "GLM-4.5-Air": [hub.deepseek_mtp],
    "GLM-4.7-Flash": [hub.deepseek_mtp],
    "Llama-4-Maverick-17B-128E": [hub.llama4_package],
    "Llama-4-Scout-17B-16E": [hub.llama4_package],
    "Qwen3-Next-80B-A3B-Instruct": [hub.qwen_mtp],
    "Qwen3.5-27B": [hub.qwen3_5_package],
    "Qwen3.5-35B-A3B": [hub.qwen3_5_moe_package],
    "bloom": [hub.renamed("transformer.", "")],
    "falcon-180B": [hub.with_output_copy("transformer.word_embeddings.weight")],
    "falcon-40b": [hub.with_output_copy("transformer.word_embeddings.weight")],
    "falcon-7b": [hub.with_output_copy("transformer.word_embeddings.weight")],
    "gemma-3-27b-pt": [hub.gemma3_package],
    "t5-v1_1-xxl": [hub.t5_untied],
}
COPIES = (".embed_tokens.weight", ".shared_head.head.weight")

DTYPES = {
    torch.bfloat16: ("BF16", 2), torch.float16: ("F16", 2), torch.float32: ("F32", 4), torch.uint8: ("U8", 1),
    torch.float8_e4m3fn: ("F8_E4M3", 1),
}  # fmt: skip


def config_of(name: str) -> Config:
    config: Config = json.loads((FOLDER / f"{name}.json").read_text())
    return config


def published_tensors(name: str, config: Config) -> Tensors:
    """The published files' tensors, on the meta device, before any of them is quantised."""
    if "block_configs" in config:
        shapes = hub.decilm_shapes(config)
        return {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in shapes.items()}
    text = config.get("text_config", config)
    tensors = transformers_tensors(text, getattr(torch, config.get("torch_dtype", "bfloat16")))
    for rewrite in LAYOUTS.get(name, ()):
        tensors, _ = rewrite(tensors, {"tie_word_embeddings": False, **text})
    return tensors


def transformers_tensors(config: Config, dtype: torch.dtype) -> Tensors:
    """What the class of a config would save."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    kinds = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
    auto = getattr(transformers, kinds.get(config["model_type"], "AutoModelForCausalLM"))
    kind = {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    parsed = transformers.AutoConfig.for_model(kind).from_dict({**config, "model_type": kind})
    with torch.device("meta"):
        model = auto.from_config(parsed, dtype=dtype)
    copies = model.all_tied_weights_keys if parsed.tie_word_embeddings else {}
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in copies}
    saved: Tensors = revert_weight_conversion(model, tensors)
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return {key: t.float() if any(part in key for part in wide) else t for key, t in saved.items()}


def quantised(tensors: Tensors, config: Config) -> Tensors:
    """The tensors as the config's quantisation stores them."""
    method = config.get("quantization_config", {}).get("quant_method")
    found: Tensors = {}
    for name, tensor in tensors.items():
        linear = tensor.ndim == 2 and ("_proj" in name or ".experts." in name) and "eh_proj" not in name
        if method == "fp8" and linear:
            found[name] = tensor.to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = _meta([-(-n // 128) for n in tensor.shape], torch.float32)
        elif method == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensor.shape
            found[f"{name}_blocks"] = _meta([experts, rows, columns // 32, 16], torch.uint8)
            found[f"{name}_scales"] = _meta([experts, rows, columns // 32], torch.uint8)
        else:
            found[name] = tensor
    return found


def _meta(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def write_headers(folder: Path, tensors: Tensors, config: Config) -> None:
    """A HuggingFace directory of `tensors` with holes for the data, in files of the usual size."""
    files: list[list[str]] = [[]]
    room = SHARD
    for name in sorted(tensors):
        size = tensors[name].numel() * DTYPES[tensors[name].dtype][1]
        if size > room and files[-1]:
            files.append([])
            room = SHARD
        files[-1].append(name)
        room -= size
    where = {}
    for i, names in enumerate(files, 1):
        file = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        where |= dict.fromkeys(names, file)
        _write_header(folder / file, ((name, tensors[name]) for name in names))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))


def _write_header(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        dtype, size = DTYPES[tensor.dtype]
        begin, end = end, end + tensor.numel() * size
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_every_config_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == RELEASED.keys()


def test_every_architecture_is_released() -> None:
    published = {config_of(name)["model_type"] for name in RELEASED}
    tiny = {family.architecture for family in FAMILIES.values()}
    texts = {"llama4_text", "qwen3_5_text", "qwen3_5_moe_text"}  # only inside packages
    assert published == tiny - texts


@pytest.mark.parametrize("name", RELEASED)
def test_a_plan_covers_the_published_model(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    tensors = published_tensors(name, config)
    billions, parallel = RELEASED[name]
    if billions is not None:
        assert sum(tensor.numel() for tensor in tensors.values()) / 1e9 == pytest.approx(billions, rel=2e-3)
    if config["model_type"] not in registry.architectures():
        pytest.skip("no architecture spec yet")
    write_headers(tmp_path, quantised(tensors, config), config)
    formats = {to for f in FAMILIES.values() if f.architecture == config["model_type"] for to in f.formats}
    plan = registry.plan(tmp_path, to=MEGATRON if MEGATRON in formats else HF, parallel=parallel)
    copies = {key for key in tensors if is_copy(key, config, tensors)}
    assert plan.report.architecture == config["model_type"]
    assert plan.report.left_out.keys() <= copies
    weights = sum(tensor.numel() for key, tensor in tensors.items() if key not in copies)
    if any("leaves position_embedding.padding out" in note for note in plan.report.notes):
        weights -= 2 * config["hidden_size"]  # OPT's table begins two rows before position 0
    assert sum(c.volume * len(c.source) for c in plan.plan.copies) == weights
    assert plan.report.seconds < 20


def is_copy(name: str, config: Config, tensors: Tensors) -> bool:
    """Is this tensor, in these files, another one under a second name?"""
    if name == "lm_head.weight":
        return config["model_type"] == "falcon"
    return name.startswith("model.layers.") and name.endswith(COPIES)


def test_the_headers_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    from safetensors import safe_open

    config = config_of("Llama-3.2-1B")
    write_headers(tmp_path, published_tensors("Llama-3.2-1B", config), config)
    with safe_open(tmp_path / "model-00001-of-00001.safetensors", "pt") as file:
        assert file.get_slice("model.layers.15.mlp.up_proj.weight").get_shape() == [8192, 2048]
        assert math.prod(file.get_tensor("model.norm.weight").shape) == 2048
