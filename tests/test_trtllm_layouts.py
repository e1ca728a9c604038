"""TensorRT-LLM checkpoints of several ranks: what its own converter wrote for one rank, cut as its loader wants it.

The rules are those of the shared reference trtllm.md, sections 1.2 to 1.6, which the goldens of several ranks bear out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import registry
from registry import Parallel
from tests.conftest import _save_model
from tests.families import FAMILIES, build
from tests.goldens import TrtllmCase, golden
from tests.test_golden_trtllm import BUFFERS, TRT, comes_back

Layout = dict[str, Any]
WHOLE = [case for case in TRT if case.tp == case.pp == 1]
DIM0: dict[str, object] = {"use_parallel_embedding": True, "embedding_sharding_dim": 0}
DIM1 = {**DIM0, "embedding_sharding_dim": 1}
#: TensorRT-LLM's classes of these hold every layer on every rank; Mamba has no tp here (bert/model.py, mamba/model.py).
WITHOUT_STAGES = {"bert": {"tp": 2}, "mamba": {}}
FIRST = re.compile(r"((\w+\.)?embedding|transformer|backbone)\.(vocab_embedding|\w+_embedding|ln_embed|embedding_ln)\.")


def layouts(case: TrtllmCase, layers: int) -> list[tuple[Layout, dict[str, object]]]:
    """Layouts and options that one model is tried in: every way to shard embeddings, also a stage without layers."""
    if case.family in WITHOUT_STAGES:
        return [(WITHOUT_STAGES[case.family], {})]
    half = [layers // 2] * 2
    found: list[tuple[Layout, dict[str, object]]] = [
        ({"tp": 2, "pp": half}, {}), ({"tp": 2, "pp": half}, DIM1), ({"tp": 2, "pp": [layers, 0]}, DIM0),
    ]  # fmt: skip
    if case.family.endswith("_moe") or case.family in ("mixtral", "deepseek_v2"):
        found += [({"tp": 2, "ep": 2}, {}), ({"tp": 4, "ep": 2, "pp": half}, {})]
    return found


def cut(
    whole: dict[str, Tensor], config: dict[str, Any], layout: Layout, chosen: dict[str, object]
) -> Iterator[dict[str, Tensor]]:
    """The tensors of every rank, in the order of the files."""
    stages = layout.get("pp", [config["num_hidden_layers"]])
    for stage, count in enumerate(stages):
        first = sum(stages[:stage])
        held = {}
        for name, tensor in whole.items():
            if found := re.search(r"(?<=layers\.)\d+", name):
                if int(found[0]) in range(first, first + count):
                    held[f"{name[: found.start()]}{int(found[0]) - first}{name[found.end() :]}"] = tensor
            elif stage == (0 if FIRST.match(name) else len(stages) - 1):
                held[name] = tensor
        for rank in range(layout.get("tp", 1)):
            yield {name: shard(name, tensor, config, layout, rank, chosen) for name, tensor in held.items()}


def shard(
    name: str, whole: Tensor, config: dict[str, Any], layout: Layout, rank: int, chosen: dict[str, object]
) -> Tensor:
    """What one rank of tp holds of a tensor of its stage."""
    tp, ep = layout.get("tp", 1), layout.get("ep", 1)
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    if re.search(r"(vocab|position)_embedding\.weight$", name) and chosen:
        dim = int(str(chosen["embedding_sharding_dim"]))
        return part(padded(whole, tp) if dim == 0 else whole, tp, rank, dim)
    if name.startswith("lm_head."):
        return part(padded(whole, tp), tp, rank)
    if ".attention.qkv." in name:
        size = whole.shape[0] // (heads + 2 * groups)
        q, k, v = whole.split([heads * size, groups * size, groups * size])
        shared = max(tp // groups, 1)  # ranks that have the same keys and values
        return torch.cat([part(q, tp, rank), *(part(x, tp // shared, rank // shared) for x in (k, v))])
    if name.endswith("attention.kv_b_proj"):
        keys = heads * config["qk_nope_head_dim"]
        return torch.cat([part(x, tp, rank) for x in (whole[:keys], whole[keys:])])
    if re.search(r"attention\.(q_b_proj|fused_q_proj)$", name):
        return part(whole, tp, rank)
    if re.search(r"mlp\.(fc|proj)\.weight$", name) and whole.ndim == 3:
        own = part(whole, ep, rank % ep)
        return halves(own, tp // ep, rank // ep, 1) if ".fc." in name else part(own, tp // ep, rank // ep, 2)
    if re.search(r"(attention\.dense|proj)\.weight$", name) and ".ssm." not in name:
        return part(whole, tp, rank, 1)
    ffn = config.get("intermediate_size", 4 * config["hidden_size"])
    if name.endswith("shared_expert.fc.weight") or (".mlp.fc." in name and len(whole) == 2 * ffn):
        return halves(whole, tp, rank, 0)
    return part(whole, tp, rank) if re.search(r"mlp\.(fc|gate)\.", name) else whole


def part(whole: Tensor, ranks: int, rank: int, dim: int = 0) -> Tensor:
    assert whole.shape[dim] % ranks == 0
    return whole.chunk(ranks, dim)[rank]


def halves(whole: Tensor, ranks: int, rank: int, dim: int) -> Tensor:
    """Of two matrices in one, the part of each."""
    return torch.cat([part(half, ranks, rank, dim) for half in whole.chunk(2, dim)], dim)


def padded(whole: Tensor, multiple: int) -> Tensor:
    return torch.cat([whole, whole.new_zeros(-len(whole) % multiple, *whole.shape[1:])])


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_every_family_in_every_layout(case: TrtllmCase, tmp_path: Path) -> None:
    """Every rank has what the rules say, and the ranks become the model again."""
    config = json.loads((case.path / "config.json").read_text())
    whole = {n: t for n, t in load_file(case.path / "rank0.safetensors").items() if not BUFFERS.match(n)}
    for n, (layout, chosen) in enumerate(layouts(case, config["num_hidden_layers"])):
        there = tmp_path / f"{n}"
        registry.convert(
            golden(case.input), there, to="trtllm", dtype=case.dtype, parallel=Parallel(**layout), options=chosen,
            durable=False,
        )  # fmt: skip
        ranks = list(cut(whole, config, layout, chosen))
        assert len(ranks) == len(list(there.glob("rank*.safetensors")))
        for rank, theirs in enumerate(ranks):
            ours = load_file(there / f"rank{rank}.safetensors")
            assert ours.keys() == theirs.keys(), (layout, rank)
            for name, tensor in theirs.items():
                assert torch.equal(ours[name], tensor), (name, layout, chosen, rank)
        for ours_alone in ("huggingface/config.json", "registry.json"):
            (there / ours_alone).unlink()
        comes_back(case, there, tmp_path / f"{n}hf")


@pytest.mark.parametrize("family", ["mamba", "bert"])
def test_what_has_no_stages_is_refused_in_stages(family: str, tmp_path: Path) -> None:
    with pytest.raises(registry.ParallelError, match=f"{family} with pp of at most 1"):
        registry.convert(golden(f"trtllm/_inputs/{family}"), tmp_path / "out", to="trtllm", parallel=Parallel(pp=2))


def test_rows_of_embeddings_are_rounded_up_to_the_ranks(tmp_path: Path) -> None:
    """split_embedding of tensorrt_llm/models/gpt/convert.py, for tokens and positions."""
    with pytest.MonkeyPatch.context() as patch:
        family = FAMILIES["gpt2"]
        patch.setitem(FAMILIES, "gpt2", replace(family, config={**family.config, "n_inner": 90}))
        source = build("gpt2", "float32", tmp_path / "hf")
    registry.convert(source, tmp_path / "out", to="trtllm", parallel=Parallel(tp=3), options=DIM0)
    own = load_file(source / "model.safetensors")
    for name, hub in {"vocab_embedding": "transformer.wte", "position_embedding": "transformer.wpe"}.items():
        rows = padded(own[f"{hub}.weight"], 3)
        assert len(rows) > len(own[f"{hub}.weight"])
        for rank in range(3):
            found = load_file(tmp_path / f"out/rank{rank}.safetensors")
            assert torch.equal(found[f"transformer.{name}.weight"], part(rows, 3, rank))


def test_biases_of_a_gated_mlp(tmp_path: Path) -> None:
    """A Llama with biases everywhere, which no golden is."""
    _save_model(tmp_path / "hf", "llama_bias", "float32", "5GB")
    parallel: Layout = {"tp": 2, "pp": [2, 2]}
    registry.convert(tmp_path / "hf", tmp_path / "out", to="trtllm", parallel=Parallel(**parallel))
    hub, whole = load_file(tmp_path / "hf/model.safetensors"), {}
    for i in range(4):
        ours, theirs = f"transformer.layers.{i}", f"model.layers.{i}"
        whole[f"{ours}.attention.qkv.bias"] = torch.cat([hub[f"{theirs}.self_attn.{x}_proj.bias"] for x in "qkv"])
        for name, other in {
            "attention.dense": "self_attn.o_proj", "mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj",
            "mlp.proj": "mlp.down_proj",
        }.items():  # fmt: skip
            whole[f"{ours}.{name}.bias"] = hub[f"{theirs}.{other}.bias"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["attn_bias"] and config["mlp_bias"]
    for rank, expected in enumerate(cut(whole, config, parallel, {})):
        found = load_file(tmp_path / f"out/rank{rank}.safetensors")
        assert {name for name in found if name.endswith(".bias")} == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


#: TensorRT-LLM's norms -> HuggingFace's, of Gemma 2; those of layers under layers.0.
NORMS = {
    "input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "post_feedforward_layernorm": "post_feedforward_layernorm", "ln_f": "model.norm",
}  # fmt: skip


def test_norms_may_be_cast_before_one_is_added(tmp_path: Path) -> None:
    source = golden("trtllm/_inputs/gemma2")
    registry.convert(source, tmp_path / "out", to="trtllm", dtype="bfloat16", options={"cast_first": True})
    hub, found = load_file(source / "model.safetensors"), load_file(tmp_path / "out/rank0.safetensors")
    for ours, theirs in NORMS.items():
        norm = hub[f"{theirs if '.' in theirs else f'model.layers.0.{theirs}'}.weight"]
        own = found[f"transformer.{ours if ours == 'ln_f' else f'layers.0.{ours}'}.weight"]
        assert torch.equal(own, norm.bfloat16() + 1)
        assert not torch.equal(own, (norm + 1).bfloat16())


def test_mamba_has_rows_for_a_vocabulary_rounded_up(tmp_path: Path) -> None:
    """MambaModel of tensorrt_llm/models/mamba/model.py: to a multiple of pad_vocab_size_multiple, usually 8."""
    source = build("mamba", "float32", tmp_path / "hf")
    registry.convert(source, tmp_path / "out", to="trtllm")
    found = load_file(tmp_path / "out/rank0.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["pad_vocab_size_multiple"]) == (131, 8)
    for name in ("backbone.vocab_embedding.weight", "lm_head.weight"):
        assert len(found[name]) == 136 and not found[name][131:].any()


def test_a_bert_model_has_no_pooler(tmp_path: Path) -> None:
    """BertModel of tensorrt_llm/models/bert/model.py; with a classifier it has one."""
    source = build("bert_base", "float32", tmp_path / "hf")
    with pytest.raises(registry.MappingError, match="no place"):
        registry.convert(source, tmp_path / "out", to="trtllm", options={"stem": "bare"})
