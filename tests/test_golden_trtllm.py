"""TensorRT-LLM checkpoints that its own converters wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import registry
from tests.goldens import TrtllmCase, golden, trtllm_cases

FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gpt2"}
#: Rotary tables that some converters dump and no loader needs.
BUFFERS = re.compile(r"embed_positions|rotary_inv_freq")
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
    registry.convert(
        golden(case.input), target, to="trtllm", dtype=case.dtype,
        parallel=registry.Parallel(tp=case.tp, pp=case.pp), options=options(case),
    )  # fmt: skip


def test_every_family_has_a_case() -> None:
    assert {case.family for case in TRT} == FAMILIES


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


@pytest.mark.parametrize("case", TRT, ids=str)
def test_config_is_that_of_the_real_converter(case: TrtllmCase, tmp_path: Path) -> None:
    export(case, tmp_path / "out")
    ours = json.loads((tmp_path / "out/config.json").read_text())
    assert ours == json.loads((case.path / "config.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_comes_back(case: TrtllmCase, tmp_path: Path) -> None:
    """What TensorRT-LLM wrote, without our help on the way, is the HuggingFace model in the export's type."""
    if case.id.startswith("mo_"):
        registry.convert(case.path, tmp_path / "out", to="huggingface", config=golden(case.input))
    else:
        registry.convert(case.path, tmp_path / "out", to="huggingface")
    ours = load_file(tmp_path / "out/model.safetensors")
    theirs = load_file(golden(case.input) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name].to(getattr(torch, case.dtype))), name
