"""TensorRT-LLM checkpoints that its own converters wrote."""

from __future__ import annotations

import json
import re
import shutil
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
    """What TensorRT-LLM wrote, without our help on the way, is the HuggingFace model in the export's type."""
    comes_back(case, case.path, tmp_path / "out")


def test_fields_that_a_config_may_lack(tmp_path: Path) -> None:
    """Defaults of PretrainedConfig and of LLaMAConfig (shared reference trtllm.md 1.7 and 1.8)."""
    shutil.copytree(golden("trtllm/trt_llama_gqa_tp1_pp1"), tmp_path / "in")
    there = next((tmp_path / "in").rglob("rank0.safetensors")).parent
    config = json.loads((there / "config.json").read_text())
    less = {name: value for name, value in config.items() if name not in ("norm_epsilon", "rotary_base", "head_size")}
    (there / "config.json").write_text(json.dumps(less))
    registry.convert(there, tmp_path / "out", to="huggingface")
    found = said(tmp_path / "out")
    assert (found["rms_norm_eps"], found["rope_parameters"]["rope_theta"]) == (1e-5, 10000.0)
    assert found["head_dim"] == config["hidden_size"] // config["num_attention_heads"]


#: Fields of HuggingFace's configs that TensorRT-LLM's do without: of tokens, and sizes that follow from others.
IMPLIED = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "head_dim", "n_inner", "pad_token_id",
    "transformers_version",
}  # fmt: skip
#: What the converters do not write down.
UNRECORDED = {
    "bert": {"position_embedding_type"},
    "falcon": {"num_ln_in_parallel_attn"},
    "gemma": {"hidden_activation"},
    "gemma2": {"sliding_window", "cache_implementation"},
    "gpt_neox": {"partial_rotary_factor", "rope_theta"},
    "mamba": {"fused_add_norm", "rms_norm"},
    "mistral": {"sliding_window"},
    "mpt": {"max_seq_len", "verbose"},
    "phi3": {"original_max_position_embeddings"},
    "qwen3_moe": {"norm_topk_prob", "max_window_layers"},
}


def said(path: Path) -> dict[str, Any]:
    """What a config says, with the defaults of its class, and one name for a function that has two."""
    fields: dict[str, Any] = AutoConfig.from_pretrained(path).to_dict()
    fields = {name: "gelu_pytorch_tanh" if value == "gelu_new" else value for name, value in fields.items()}
    if rope := fields.get("rope_parameters"):  # which may say its type by an old name too
        fields["rope_parameters"] = {name: value for name, value in rope.items() if name != "type"}
    return fields


def comes_back(case: TrtllmCase, exported: Path, out: Path) -> None:
    """An export becomes its HuggingFace model at `out`, in the export's type.

    But for what it stores otherwise: routers in float32, and norms around zero with one added, which rounds.
    """
    if case.id.startswith("mo_"):
        registry.convert(exported, out, to="huggingface", config=golden(case.input), durable=False)
    else:
        registry.convert(exported, out, to="huggingface", durable=False)
        ours, theirs = (said(path) for path in (out, golden(case.input)))
        differ = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
        assert differ <= IMPLIED | UNRECORDED.get(case.family, set())
    ours = load_file(out / "model.safetensors")
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
