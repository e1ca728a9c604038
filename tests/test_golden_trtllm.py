"""TensorRT-LLM checkpoints that its own converters wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import registry
from tests.goldens import SHARED, TrtllmCase, golden, trtllm_cases

FAMILIES = {
    "llama", "mistral", "qwen2", "qwen3", "gpt2", "phi", "phi3", "gpt_bigcode", "starcoder2", "gpt_neox", "gptj",
    "bloom", "mpt", "opt", "falcon", "mixtral", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "nemotron",
    "bert", "mamba", "deepseek_v2",
}  # fmt: skip
#: Tables that some converters dump and no loader needs.
BUFFERS = re.compile(r"(.*\.)?embed_positions|rotary_inv_freq|.*\.alibi_slopes$")
CASES = [
    case for case in trtllm_cases() if case.quant is None and case.family in FAMILIES and not case.id.startswith("meg_")
]
TRT = [case for case in CASES if case.id.startswith("trt_")]
#: What Megatron's exporter wrote: the HuggingFace model that its model was made of, and the options for its ways.
MEGATRON: dict[str, tuple[str, dict[str, object]]] = {
    "meg_llama_gqa_tp2_pp1": ("llama_gqa", {}),
    "meg_mixtral_tp1": ("mixtral", {"routers": "weights"}),
    "meg_nemotron_gptnext_tp1": ("nemotron", {"cast_first": False}),
}


def options(case: TrtllmCase) -> dict[str, object]:
    if case.id.startswith("mo_"):  # ModelOpt always shards the embedding over the vocabulary
        return {"use_parallel_embedding": True, "logits_dtype": "float16"}
    argv = case.argv or ""
    chosen: dict[str, object] = {}
    if "--use_parallel_embedding" in argv:
        chosen["use_parallel_embedding"] = True
    if match := re.search(r"--embedding_sharding_dim[ =](\d)", argv):
        chosen["embedding_sharding_dim"] = int(match[1])
    return chosen


def export(case: TrtllmCase, target: Path) -> None:
    source = golden(case.input)
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


def exported(name: str) -> TrtllmCase:
    golden(f"trtllm/{name}")  # skips where it is absent
    (case,) = (case for case in trtllm_cases() if case.id == name)
    return case


@pytest.mark.parametrize("name", MEGATRON)
def test_tensors_are_those_of_megatrons_exporter(name: str, tmp_path: Path) -> None:
    made, chosen = MEGATRON[name]
    case = exported(name)
    registry.convert(
        golden(f"trtllm/_inputs/{made}"), tmp_path / "out", to="trtllm", dtype=case.dtype,
        parallel=registry.Parallel(tp=case.tp, pp=case.pp), options=chosen,
    )  # fmt: skip
    for rank in range(case.tp * case.pp):
        ours = load_file(tmp_path / f"out/rank{rank}.safetensors")
        theirs = load_file(case.path / f"rank{rank}.safetensors")
        assert ours.keys() == theirs.keys()
        for tensor, value in theirs.items():
            mine = ours[tensor]
            if tensor == "lm_head.weight":  # it does not pad: no reader takes ranks with fewer rows
                assert not mine[len(value) :].any()
                mine = mine[: len(value)]
            assert mine.dtype == value.dtype, tensor
            assert torch.equal(mine, value), tensor
    written = flat(json.loads((tmp_path / "out/config.json").read_text()))
    theirs_said = flat(json.loads((case.path / "config.json").read_text()))
    differ = {f for f in written.keys() & theirs_said.keys() if written[f] != theirs_said[f]}
    assert differ == MEGATRONS_OWN[name]
    assert theirs_said.keys() - written.keys() <= UNREAD


@pytest.mark.parametrize("name", ["meg_mixtral_tp1", "meg_nemotron_gptnext_tp1"])
def test_what_megatrons_exporter_wrote_comes_back(name: str, tmp_path: Path) -> None:
    """With the model's own config: the exporter's names one class for several families."""
    case = exported(name)
    made = golden(f"trtllm/_inputs/{MEGATRON[name][0]}")
    registry.convert(case.path, tmp_path / "out", to="huggingface", config=made)
    ours = load_file(tmp_path / "out/model.safetensors")
    dtype = getattr(torch, case.dtype)
    for tensor, value in load_file(made / "model.safetensors").items():
        around_one = name.startswith("meg_nemotron") and "norm.weight" in tensor
        assert torch.equal(ours[tensor], (value + 1).to(dtype) - 1 if around_one else value.to(dtype)), tensor


#: Where Megatron's exporter says something else. It has two classes for all that it knows, gives dense models one
#: expert, and says the padded vocabulary, to which it does not pad.
MEGATRONS_OWN = {
    "meg_llama_gqa_tp2_pp1": {"vocab_size", "moe.num_experts", "moe.top_k", "moe.normalization_mode"},
    "meg_mixtral_tp1": {"architecture"},
    "meg_nemotron_gptnext_tp1": {"architecture", "gpt_variant", "moe.num_experts", "moe.top_k"},
}
#: Fields that the classes of TensorRT-LLM 0.17 do not read, which other exporters write.
UNREAD = {
    "apply_query_key_layer_scaling", "bias", "decoder", "gpus_per_node", "lm_head_bias", "moe_tp_mode", "pp_size",
    "producer.name", "producer.version", "rank", "rmsnorm", "rotary_pct", "share_embedding_table", "tp_size",
    "world_size",
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.id.startswith("mo_")], ids=str)
def test_config_says_what_modelopts_says(case: TrtllmCase, tmp_path: Path) -> None:
    export(case, tmp_path / "out")
    ours = flat(json.loads((tmp_path / "out/config.json").read_text()))
    theirs = flat(json.loads((case.path / "config.json").read_text()))
    assert theirs.keys() - ours.keys() <= UNREAD
    assert not [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]


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
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["tie_word_embeddings"] == AutoConfig.from_pretrained(golden(case.input)).tie_word_embeddings
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
        elif name.endswith(("mixer.D", "dt_proj.bias")):
            expected = expected.float()
        elif name.endswith("mixer.A_log"):  # stored as -exp(A_log)
            torch.testing.assert_close(ours[name], expected.float(), rtol=1e-6, atol=1e-7)
            continue
        assert ours[name].dtype == expected.dtype, name
        assert torch.equal(ours[name], expected), name


#: Layouts beside those of the goldens, each with what it takes: two ranks or stages, and every way to shard embeddings.
LAYOUTS: list[tuple[dict[str, Any], dict[str, object]]] = [
    ({"tp": 2, "pp": 2}, {}),
    ({"tp": 2}, {"use_parallel_embedding": True, "embedding_sharding_dim": 1}),
    ({"pp": [2, 0]}, {"use_parallel_embedding": True}),
]


@pytest.mark.parametrize("case", [case for case in TRT if case.tp == case.pp == 1], ids=str)
def test_every_family_comes_back_from_every_layout(case: TrtllmCase, tmp_path: Path) -> None:
    """In the source's own type nothing is lost, but for norms that had one added, and what Mamba stores as -exp(x)."""
    source = golden(case.input)
    own = load_file(source / "model.safetensors")
    layers = registry.open(source).facts["layers"]
    for n, (layout, chosen) in enumerate(LAYOUTS):
        sizes = {"tp": 1, **layout}
        if case.family == "mamba":
            sizes["tp"] = 1
        if isinstance(sizes.get("pp"), list):
            sizes["pp"] = [layers, 0]
        registry.convert(source, tmp_path / f"{n}", to="trtllm", parallel=registry.Parallel(**sizes), options=chosen)
        registry.convert(tmp_path / f"{n}", tmp_path / f"{n}hf", to="huggingface")
        back = load_file(tmp_path / f"{n}hf/model.safetensors")
        assert back.keys() == own.keys()
        for name, tensor in own.items():
            expected = tensor.clone()
            if case.family in ("gemma", "gemma2", "nemotron") and "norm.weight" in name:
                expected = (tensor + 1) - 1
            elif name.endswith("embed_positions.weight"):  # OPT's rows before position 0 are left out
                expected[:2] = 0
            assert back[name].dtype == expected.dtype, name
            if name.endswith("mixer.A_log"):
                torch.testing.assert_close(back[name], expected, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(back[name], expected), name
