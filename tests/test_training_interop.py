"""What registry.save writes, megatron-core loads strictly; what Megatron wrote, registry.load fills a run with."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import registry
from registry import Parallel, Rank
from tests import megatron_cpu
from tests.goldens import golden
from tests.megatron_cpu.reference import reference_logits
from tests.training import Job, results, run

IDS = torch.arange(24).reshape(2, 12) * 5 % 61


@pytest.mark.timeout(400)
def test_megatron_core_loads_what_we_save(whole: Path, tmp_path: Path) -> None:
    saves = [
        Job("save", 4, {"path": tmp_path / "a", "whole": whole, "layout": {"tp": 2, "pp": 2}}),
        Job("save", 4, {"path": tmp_path / "b", "whole": whole, "layout": {"tp": 2}}),
        Job(
            "save", 4,
            {"path": tmp_path / "c", "whole": whole, "layout": {"tp": 2, "pp": 2}, "format": "megatron-legacy",
             "optimizer": False},
        ),
    ]  # fmt: skip
    for outcome in run(saves):
        results(outcome)
    hf = tmp_path / "hf"
    registry.convert(tmp_path / "a", hf, to="huggingface")
    ignore = ("optimizer", "rng_state")
    jobs = [
        megatron_cpu.Job(tmp_path / "a", hf, tp=1, ignore=ignore),
        megatron_cpu.Job(tmp_path / "a", hf, tp=2, pp=2, ignore=ignore),
        megatron_cpu.Job(tmp_path / "b", hf, pp=2, ignore=ignore),
        megatron_cpu.Job(tmp_path / "c", hf, tp=2, pp=2, format="torch"),
    ]
    expected = reference_logits(hf, IDS)
    for found in megatron_cpu.run(jobs, IDS, timeout=60):
        assert isinstance(found, torch.Tensor), found
        assert (found[..., : expected.shape[-1]] - expected).abs().max() < 1e-4


def test_a_run_of_megatron_is_resumed_at_another_layout() -> None:
    path = golden("megatron/llama/tp1pp1_optim")
    ckpt = registry.open(path, config=golden("megatron/llama/hf"))
    view = ckpt.view("megatron-legacy", parallel=Parallel(tp=2), rank=Rank(tp=1))
    weights = {name: torch.full(view.shape(name), float("nan")) for name in view}
    kinds = ("exp_avg", "exp_avg_sq")
    state = {n: {**{k: torch.full_like(t, float("nan")) for k in kinds}, "step": 0} for n, t in weights.items()}
    groups = torch.load(next(path.glob("iter_*")) / "common.pt", weights_only=False)["optimizer"]["param_groups"]
    optimizer = {"state": state, "param_groups": [{"lr": 1.0, "eps": 0.0} for _ in groups]}
    found = registry.load(
        path, model=weights, optimizer=optimizer, parallel=Parallel(tp=2), rank=Rank(tp=1),
        config=golden("megatron/llama/hf"),
    )  # fmt: skip
    assert found.iteration > 0
    name = "mlp.linear_fc2.weight"
    metadata = dcp.FileSystemReader(next(path.glob("iter_*"))).read_metadata().state_dict_metadata
    for kind in kinds:
        key = f"optimizer.state.{kind}.decoder.layers.{name}"
        raw = {key: torch.empty(metadata[key].size)}
        dcp.load(raw, checkpoint_id=next(path.glob("iter_*")), no_dist=True)
        for layer, tensor in enumerate(raw[key]):
            assert torch.equal(state[f"decoder.layers.{layer}.{name}"][kind], tensor.chunk(2, 1)[1])
    assert all(not t.isnan().any() for entry in state.values() for t in (entry["exp_avg"], entry["exp_avg_sq"]))
    assert optimizer["param_groups"][0]["lr"] == groups[0]["lr"]
    assert {entry["step"] for entry in state.values()} != {0}
