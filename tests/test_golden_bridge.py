"""Tiny models of many families that Megatron-Bridge turned into Megatron's, in both directions, bit for bit."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import registry
from tests.goldens import BridgeCase, bridge_cases, golden
from tests.test_golden_megatron import equal, global_tensors, parts

CASES = bridge_cases()
#: (case, "tp2_pp1_ep1") of every set of rank files; the state dict of one rank lies beside them.
RANKED = [(case, layout) for case in CASES for layout in ("tp1_pp1_ep1", *case.layouts)]
# Vocabularies are not padded in these goldens.
UNPADDED = {"make_vocab_size_divisible_by": 1}


def known(case: BridgeCase) -> BridgeCase:
    if case.family not in registry.architectures():
        pytest.skip(f"no architecture spec yet for {case.family}")
    return case


def options(case: BridgeCase) -> dict[str, object]:
    return {**UNPADDED, "transformer_impl": "transformer_engine" if case.spec == "te" else "local"}


def parallel(layout: str) -> registry.Parallel:
    tp, pp, ep = (int(size) for size in re.findall(r"\d+", layout))
    return registry.Parallel(tp=tp, pp=pp, ep=ep)


def rank_files(case: BridgeCase, layout: str) -> list[Path]:
    if layout == "tp1_pp1_ep1":
        return [case.path / "megatron.safetensors"]
    return sorted((case.path / layout).glob("megatron_rank*.safetensors"))


def rank_folder(layout: str, rank: int) -> str:
    """Where Megatron keeps the states of a rank, in layouts without pipeline and expert parallelism."""
    assert layout.endswith("_pp1_ep1")
    return f"mp_rank_{rank:02d}"


def spelled_by_core(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The bridge ran on a later Megatron, whose Mamba holds the convolution itself; in core 0.16.1 it is a module."""
    return {re.sub(r"\bconv1d_(weight|bias)$", r"conv1d.\1", name): tensor for name, tensor in state.items()}


def huggingface(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bridge_golden_becomes_its_huggingface_model(case: BridgeCase, tmp_path: Path) -> None:
    hf = known(case).path / "hf"
    registry.convert(case.path / "torch_dist", tmp_path / "out", to="huggingface", config=hf / "config.json")
    equal(huggingface(tmp_path / "out"), huggingface(hf))
    assert (tmp_path / "out/config.json").read_bytes() == (hf / "config.json").read_bytes()


@pytest.mark.parametrize(("case", "layout"), RANKED, ids=lambda value: str(value))
def test_bridge_rank_states_become_their_huggingface_model(case: BridgeCase, layout: str, tmp_path: Path) -> None:
    hf = known(case).path / "hf"
    for rank, file in enumerate(rank_files(case, layout)):
        folder = tmp_path / "in/iter_0000001" / rank_folder(layout, rank)
        folder.mkdir(parents=True)
        state = {"args": Namespace(), "checkpoint_version": 3.0, "iteration": 1, "model": load_file(file)}
        torch.save(state, folder / "model_optim_rng.pt")
    (tmp_path / "in/latest_checkpointed_iteration.txt").write_text("1")
    registry.convert(tmp_path / "in", tmp_path / "out", to="huggingface", config=hf / "config.json")
    equal(huggingface(tmp_path / "out"), huggingface(hf))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_we_write_the_bridge_torch_dist(case: BridgeCase, tmp_path: Path) -> None:
    registry.convert(known(case).path / "hf", tmp_path / "out", to="megatron", options=options(case))
    equal(global_tensors(tmp_path / "out/release"), global_tensors(case.path / "torch_dist"))
    assert parts(tmp_path / "out/release") == parts(case.path / "torch_dist")


@pytest.mark.parametrize(("case", "layout"), RANKED, ids=lambda value: str(value))
def test_we_write_the_bridge_rank_states(case: BridgeCase, layout: str, tmp_path: Path) -> None:
    registry.convert(
        known(case).path / "hf", tmp_path / "out", to="megatron-legacy", parallel=parallel(layout),
        options=options(case),
    )  # fmt: skip
    files = rank_files(case, layout)
    assert len(files) == parallel(layout).tp == len(list((tmp_path / "out/release").glob("mp_rank_*")))
    for rank, file in enumerate(files):
        path = tmp_path / "out/release" / rank_folder(layout, rank) / "model_optim_rng.pt"
        ours = {
            name: tensor
            for name, tensor in torch.load(path, weights_only=False)["model"].items()
            if not name.endswith("_extra_state")
        }
        equal(ours, spelled_by_core(load_file(file)))


def test_norms_over_all_heads_are_cut_among_the_ranks(tmp_path: Path) -> None:
    """FullDimQNorm and FullDimKNorm of Megatron-Bridge's MiniMax M2 shard their weight over tp."""
    folder = golden("bridge/MiniMaxM2ForCausalLM__te")
    whole = {n: t for n, t in load_file(folder / "megatron.safetensors").items() if re.search(r"\.[qk]_layernorm\.", n)}
    assert len(whole) == 2 * 3
    for to in ("megatron", "megatron-legacy"):
        registry.convert(folder / "hf", tmp_path / to, to=to, parallel=registry.Parallel(tp=2), options=UNPADDED)
    for rank in range(2):
        file = tmp_path / f"megatron-legacy/release/mp_rank_{rank:02d}/model_optim_rng.pt"
        state = torch.load(file, weights_only=False)
        assert all(torch.equal(state["model"][name], tensor.chunk(2)[rank]) for name, tensor in whole.items())
    stored = parts(tmp_path / "megatron/release")
    for name in ("q_layernorm", "k_layernorm"):
        size = len(whole[f"decoder.layers.0.self_attention.{name}.weight"]) // 2
        expected = [((layer, first), (1, size)) for layer in range(3) for first in (0, size)]
        assert stored[f"decoder.layers.self_attention.{name}.weight"] == expected
