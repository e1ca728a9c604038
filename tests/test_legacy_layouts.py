"""Per-rank Megatron checkpoints: what no golden of several ranks and no run of megatron-core shows.

What is expected is cut by hand out of goldens of one rank, by the tables of the shared reference megatron.md (B1.6, D).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import registry
from registry import Parallel
from tests.families import build
from tests.goldens import golden
from tests.test_golden_megatron import global_tensors, load_golden, parts

LEGACY = "megatron-legacy"
MIXTRAL = "megatron/mixtral/hf"


def rank_state(there: Path, *rank: int) -> dict[str, Any]:
    """A rank's file, by its number of tp, or of tp and ep."""
    name = "mp_rank_" + "_".join([f"{rank[0]:02d}", *(f"{i:03d}" for i in rank[1:])])
    state: dict[str, Any] = torch.load(there / "release" / name / "model_optim_rng.pt", weights_only=False)
    return state


def halves(whole: Tensor, ranks: int, rank: int) -> Tensor:
    """Of two matrices in one, the rows of one rank of each."""
    return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])


#: Goldens, and a pattern for some of their tensors.
DOWN = ("DeepseekV2ForCausalLM", r"\.linear_(q|kv)_down_proj\.weight$")
BIASES = ("GptOssForCausalLM", r"\.experts\..*\.bias$")


@pytest.mark.parametrize(("case", "pattern"), [DOWN, BIASES])
def test_ranks_have_their_rows(case: str, pattern: str, tmp_path: Path) -> None:
    """Down-projections of local layers are sharded; of the biases of experts the first one's halves are."""
    folder = golden(f"bridge/{case}")
    registry.convert(folder / "hf", tmp_path / "out", to=LEGACY, parallel=Parallel(tp=2))
    found = {n: t for n, t in load_file(folder / "megatron.safetensors").items() if re.search(pattern, n)}
    assert found
    for rank in range(2):
        ours = rank_state(tmp_path / "out", rank)["model"]
        for name, whole in found.items():
            if "experts" in name:
                expected = halves(whole, 2, rank) if "fc1" in name else whole
            else:
                expected = whole.chunk(2)[rank]
            assert torch.equal(ours[name], expected), name


#: Which golden has the names that a choice of modules for the experts calls for.
NAMED = {"sequential": "tp1pp1ep2_torch", "grouped": "tp1pp1_te_grouped_torch"}


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
@pytest.mark.parametrize("modules", NAMED)
def test_the_names_of_experts_are_a_choice_of_their_own(modules: str, layers: str, tmp_path: Path) -> None:
    theirs = golden(f"megatron/mixtral/{NAMED[modules]}")
    loaded: Any = load_golden(next(theirs.glob("iter_*/mp_rank_*/model_optim_rng.pt")))
    names = {name for name in loaded["model"] if re.search(r"layers\.0\..*experts\..*weight", name)}
    options = {"expert_modules": modules, "transformer_impl": layers}
    source, parallel = golden("bridge/GptOssForCausalLM") / "hf", Parallel(ep=4 // (len(names) // 2))
    registry.convert(source, tmp_path / "out", to=LEGACY, parallel=parallel, options=options)
    state = rank_state(tmp_path / "out", *[0] * (1 + (parallel.ep != 1)))
    ours = {name for name in state["model"] if re.search(r"layers\.0\..*experts\..*(weight|bias)", name)}
    assert ours == names | {re.sub(r"weight(?=\d*$)", "bias", name) for name in names}
    assert bool(state["args"].moe_grouped_gemm) == (modules == "grouped")
    registry.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    assert registry.verify(tmp_path / "back", source)


#: Layouts with their number of etp.
FUSED: list[tuple[dict[str, int], int]] = [({}, 1), ({"ep": 2}, 1), ({"tp": 2, "ep": 2}, 2)]


@pytest.mark.parametrize(("layout", "etp"), FUSED, ids=str)
def test_experts_fused_into_two_tensors(layout: dict[str, int], etp: int, tmp_path: Path) -> None:
    """Their bytes are one matrix [hidden, ffn] an expert after the other, whatever the shape says."""
    source = golden(MIXTRAL)
    options = {"expert_modules": "fused"}
    registry.convert(source, tmp_path / "out", to=LEGACY, parallel=Parallel(**layout), options=options)
    hub = load_file(source / "model.safetensors")
    ep = layout.get("ep", 1)
    own, hidden = 4 // ep, len(hub["model.norm.weight"])
    for tp in range(layout.get("tp", 1)):
        for rank in range(ep):
            state = rank_state(tmp_path / "out", tp, *[rank] * (ep > 1))
            assert state["args"].moe_grouped_gemm and state["args"].moe_use_legacy_grouped_gemm
            experts = {name: t for name, t in state["model"].items() if re.search(r"layers\.1\.mlp\.experts", name)}
            names = {name.split(".")[-1] for name, tensor in experts.items() if isinstance(tensor, Tensor)}
            assert names == {"weight1", "weight2"}
            first, second = (experts[f"decoder.layers.1.mlp.experts.weight{i}"] for i in (1, 2))
            assert first.shape[0] == second.shape[1] == hidden
            for i in range(own):
                gate, down, up = (
                    hub[f"model.layers.1.block_sparse_moe.experts.{rank * own + i}.w{k}.weight"] for k in (1, 2, 3)
                )
                mine = torch.cat([gate.chunk(etp)[tp % etp], up.chunk(etp)[tp % etp]])
                assert torch.equal(first.view(own, hidden, -1)[i].T, mine)
                assert torch.equal(second.view(own, -1, hidden)[i].T, down.chunk(etp, 1)[tp % etp])
    registry.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    assert registry.verify(tmp_path / "back", source)


def test_norms_of_single_heads_follow_one_another(tmp_path: Path) -> None:
    """Megatron has no such layer; as the heads, their norms are shared out among the ranks."""
    source = build("stablelm_qk_norm", "float32", tmp_path / "hf")
    options = {"layers": "per_layer"}
    registry.convert(source, tmp_path / "megatron", to="megatron", parallel=Parallel(tp=2), options=options)
    registry.convert(source, tmp_path / "out", to=LEGACY, parallel=Parallel(tp=2))
    hub, stored = load_file(source / "model.safetensors"), global_tensors(tmp_path / "megatron/release")
    where = parts(tmp_path / "megatron/release")
    for norm in ("q_layernorm", "k_layernorm"):
        heads = sum(f"layers.1.self_attn.{norm}.norms" in name for name in hub)
        whole = torch.cat([hub[f"model.layers.1.self_attn.{norm}.norms.{i}.weight"] for i in range(heads)])
        name, rows = f"decoder.layers.1.self_attention.{norm}.weight", len(whole) // 2
        assert torch.equal(stored[name], whole) and where[name] == [((0,), (rows,)), ((rows,), (rows,))]
        for rank in range(2):
            assert torch.equal(rank_state(tmp_path / "out", rank)["model"][name], whole.chunk(2)[rank])


#: The names of Megatron-Bridge's FalconH1Bridge -> HuggingFace's; on one rank the tensors are the same.
MIXER = {
    "norm.weight": "input_layernorm.weight", "mlp.linear_fc1.layer_norm_weight": "pre_ff_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    **{f"mamba_mixer.{name}": f"mamba.{name}" for name in (
        "A_log", "D", "dt_bias", "norm.weight", "out_proj.weight", "in_proj.weight", "conv1d.weight", "conv1d.bias",
    )},
}  # fmt: skip


def test_a_mixer_beside_attention(tmp_path: Path) -> None:
    source = build("falcon_h1_norm", "float32", tmp_path / "hf")
    registry.convert(source, tmp_path / "out", to=LEGACY)
    hub, state = load_file(source / "model.safetensors"), rank_state(tmp_path / "out", 0)["model"]
    for ours, theirs in MIXER.items():
        assert torch.equal(state[f"decoder.layers.1.{ours}"], hub[f"model.layers.1.{theirs}"]), ours
    assert torch.equal(state["decoder.final_norm.weight"], hub["model.final_layernorm.weight"])
