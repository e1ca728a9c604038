"""TensorRT-LLM checkpoints that its own converters wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import registry
from tests.goldens import SHARED, TrtllmCase, golden, trtllm_cases

FAMILIES = {
    "llama", "mistral", "qwen2", "qwen3", "gpt2", "phi", "phi3", "gpt_bigcode", "starcoder2", "gpt_neox", "gptj",
    "bloom", "mpt", "opt", "falcon", "mixtral", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "nemotron",
}  # fmt: skip
#: Tables that some converters dump and no loader needs.
BUFFERS = re.compile(r"embed_positions|rotary_inv_freq|.*\.alibi_slopes$")
CASES = [
    case for case in trtllm_cases() if case.quant is None and case.family in FAMILIES and not case.id.startswith("meg_")
]
TRT = [case for case in CASES if case.id.startswith("trt_")]


def options(case: TrtllmCase) -> dict[str, object]:
    if case.id.startswith("mo_"):  # ModelOpt always shards the embedding over the vocabulary
        return {"use_parallel_embedding": True}
    argv = case.argv or ""
    chosen: dict[str, object] = {}
    if "--use_parallel_embedding" in argv:
        chosen["use_parallel_embedding"] = True
    if match := re.search(r"--embedding_sharding_dim[ =](\d)", argv):
        chosen["embedding_sharding_dim"] = int(match[1])
    return chosen


def export(case: TrtllmCase, target: Path) -> None:
    source = golden(case.input)
    if case.family == "nemotron":  # its converter casts before it adds one, as we do with a model of that type
        registry.convert(source, target.parent / "cast", to="huggingface", dtype=case.dtype)
        source = target.parent / "cast"
    registry.convert(
        source, target, to="trtllm", dtype=case.dtype,
        parallel=registry.Parallel(tp=case.tp, pp=case.pp), options=options(case),
    )  # fmt: skip


def test_every_family_has_a_case() -> None:
    families = {case.family for case in TRT}
    assert families == FAMILIES if SHARED.exists() else families <= FAMILIES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensors_are_those_of_the_real_converter(case: TrtllmCase, tmp_path: Path) -> None:
    export(case, tmp_path / "out")
    for rank in range(case.tp * case.pp):
        ours = load_file(tmp_path / f"out/rank{rank}.safetensors")
        theirs = {n: t for n, t in load_file(case.path / f"rank{rank}.safetensors").items() if not BUFFERS.match(n)}
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype, name
            assert torch.equal(ours[name], theirs[name]), name


#: Fields that the converter leaves out, and whose absence means something else or nothing. Phi 3's are those of later
#: versions; what other scripts write besides is no loss.
ADDED = {
    "falcon": {"rotary_scaling"},
    "gpt_neox": {"rotary_scaling"},
    "mpt": {"max_position_embeddings"},
    "phi3": {"tie_word_embeddings", "rotary_pct", "original_max_position_embeddings"},
}  # fmt: skip
#: Whatever norm_topk_prob is, the converter says 0: TensorRT-LLM would not normalise the weights of experts.
WRONG = {"qwen3_moe": {"moe.normalization_mode"}}


def flat(document: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The fields of a document by dotted path."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {above + name: value}
    return found


def completed(written: dict[str, Any]) -> dict[str, Any]:
    """A config with what TensorRT-LLM's base classes add to one that a script wrote by hand.

    Source: shared reference trtllm.md 1.7 and 2; PretrainedConfig, Mapping and QuantConfig of TensorRT-LLM 0.17.
    """
    heads, hidden = written["num_attention_heads"], written["hidden_size"]
    head_size = written.get("head_size", hidden // heads)
    usual = {
        "logits_dtype": "float32", "num_key_value_heads": heads, "head_size": head_size,
        "intermediate_size": 4 * hidden, "norm_epsilon": 1e-5,
        "rotary_embedding_dim": int(head_size * written.get("rotary_pct", 1.0)), "qk_layernorm": False,
        "runtime_defaults": None, "mapping.cp_size": 1, "mapping.gpus_per_node": 8,
        "mapping.moe_tp_size": written["mapping.tp_size"], "mapping.moe_ep_size": 1, "quantization.quant_algo": None,
        "quantization.kv_cache_quant_algo": None, "quantization.group_size": 128, "quantization.smoothquant_val": 0.5,
        "quantization.clamp_val": None, "quantization.use_meta_recipe": False, "quantization.has_zero_point": False,
        "quantization.pre_quant_scale": False, "quantization.exclude_modules": None,
    }  # fmt: skip
    return usual | written


@pytest.mark.parametrize("case", TRT, ids=str)
def test_config_is_that_of_the_real_converter(case: TrtllmCase, tmp_path: Path) -> None:
    export(case, tmp_path / "out")
    ours = flat(json.loads((tmp_path / "out/config.json").read_text()))
    theirs = completed(flat(json.loads((case.path / "config.json").read_text())))
    assert ours.keys() - theirs.keys() == ADDED.get(case.family, set())
    assert theirs.keys() <= ours.keys()
    assert {name for name in theirs if ours[name] != theirs[name]} == WRONG.get(case.family, set())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_comes_back(case: TrtllmCase, tmp_path: Path) -> None:
    """What TensorRT-LLM wrote, without our help on the way, is the HuggingFace model in the export's type.

    But for what it stores otherwise: routers in float32, and norms around zero with one added, which rounds.
    """
    if case.id.startswith("mo_"):
        registry.convert(case.path, tmp_path / "out", to="huggingface", config=golden(case.input))
    else:
        registry.convert(case.path, tmp_path / "out", to="huggingface")
    ours = load_file(tmp_path / "out/model.safetensors")
    theirs = load_file(golden(case.input) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    dtype = getattr(torch, case.dtype)
    for name, tensor in theirs.items():
        expected = tensor.to(dtype)
        if case.family in ("gemma", "gemma2", "nemotron") and "norm.weight" in name:
            expected = ((expected if case.family == "nemotron" else tensor).float() + 1).to(dtype) - 1
        elif name.endswith("embed_positions.weight"):  # OPT's rows before position 0 are left out
            expected[:2] = 0
        elif re.search(r"(mlp|moe)\.gate\.weight$", name):
            expected = tensor
        assert ours[name].dtype == expected.dtype, name
        assert torch.equal(ours[name], expected), name


#: What the model classes ask for on each of two ranks, by the input: _schemas/ lists every parameter of theirs.
ASKED = [
    "bloom_tp2", "falcon_40b_tp2", "falcon_7b_tp2", "falcon_rw_tp2", "gpt2_tp2_pp1", "gptj_tp2", "gptneox_tp2",
    "llama_gqa_tp2_pp2", "mistral_tp2", "mixtral_tp2", "mpt_tp2", "nemotron_tp2", "phi_tp2", "qwen2_moe_tp2",
    "qwen2_tp2_pp1", "starcoder2_tp2", "starcoder_tp2",
]  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_tensors_are_those_that_the_model_class_asks_for(case: str, tmp_path: Path) -> None:
    schema = json.loads(golden(f"trtllm/_schemas/trt_{case}__none.json").read_text())
    source = golden(f"trtllm/_inputs/{case[: case.index('_tp')]}")
    mapping = schema["config"]["mapping"]
    parallel = registry.Parallel(tp=mapping["tp_size"], pp=mapping["pp_size"])
    registry.convert(source, tmp_path / "out", to="trtllm", dtype=schema["config"]["dtype"], parallel=parallel)
    assert len(list((tmp_path / "out").glob("rank*.safetensors"))) == mapping["world_size"]
    for rank, asked in schema["params"].items():
        ours = load_file(tmp_path / f"out/{rank}.safetensors")
        required = {name: (shape, dtype) for name, (shape, dtype, need) in asked.items() if need == "required"}
        assert {name: ([*t.shape], str(t.dtype).removeprefix("torch.")) for name, t in ours.items()} == required
