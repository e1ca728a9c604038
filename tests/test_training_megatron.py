"""Megatron's own optimizers given to registry.save and registry.load: what each writes, the other loads elsewhere.

The judge is megatron-core 0.16.1: it saves the same training itself, and once more what has been loaded.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron_cpu.optimizer import OURS, Run, training
from tests.test_golden_megatron import global_tensors
from tests.test_megatron_optimizer import FLAT, FULL, MOE, TINY, common_state, state_of
from tests.training import Job, results
from tests.training import run as ranks
from tests.training.model import CONFIG, LAYERS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"),
    pytest.mark.timeout(400),
]

LLAMA: dict[str, Any] = {"model_type": "llama", **TINY}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral", **TINY, **MOE}


@dataclass(frozen=True)
class Case:
    """A model, the layout of its training, and the one that goes on with it."""

    config: dict[str, Any]
    run: dict[str, Any]
    to: dict[str, Any]
    form: str = FULL  # the one of Megatron's that we load
    chains: bool = True  # both layouts have as many optimizers, without which Megatron itself cannot load


CASES = {
    "distributed": Case(LLAMA, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}, FLAT),
    "distributed float32": Case(LLAMA, {"dp": 2, "bf16": False}, {"tp": 2, "bf16": False}),
    "with copies": Case(LLAMA, {"tp": 2, "distributed": False}, {"pp": 2, "distributed": False}),
    "float32": Case(
        LLAMA, {"tp": 2, "distributed": False, "bf16": False}, {"pp": 2, "dp": 2, "distributed": False, "bf16": False}
    ),
    "experts": Case(MIXTRAL, {"ep": 2, "dp": 2}, {"tp": 2, "ep": 2, "dp": 2}, FLAT),
    "experts spread": Case(MIXTRAL, {"tp": 2}, {"pp": 2, "ep": 2, "dp": 2}, chains=False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, str | None]]]:
    """Case -> its folder, and what went wrong by what was done."""
    root = tmp_path_factory.mktemp("own-optimizer")
    folders = {name: root / str(i) for i, name in enumerate(CASES)}
    first = []
    for name, case in CASES.items():
        (folders[name] / "hf").mkdir(parents=True)
        (folders[name] / "hf/config.json").write_text(json.dumps(case.config))
        forms = {FULL, case.form, OURS}
        first.append(Run(folders[name] / "hf", {form: folders[name] / form for form in sorted(forms)}, **case.run))
    errors = {name: {"train": error} for name, error in zip(CASES, training(first), strict=True)}
    asked: list[tuple[str, str, Run]] = []
    for name, case in CASES.items():
        folder = folders[name]

        def again(what: str, load: Path, name: str = name, to: Any = case.to, **more: Any) -> None:
            asked.append((name, what, Run(folders[name] / "hf", {FULL: folders[name] / what}, load=load, **to, **more)))

        again("we load theirs", folder / case.form, ours=True)
        if not case.run.get("distributed", True):
            again("we load ours", folder / OURS, ours=True)
        elif case.chains:
            again("they load ours", folder / OURS / "iter_0000003")
    for (name, what, _), error in zip(asked, training([run for _, _, run in asked]), strict=True):
        errors[name][what] = error
    return {name: (folders[name], errors[name]) for name in CASES}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len([name for name in found if name.startswith("optimizer.state.exp_avg.")]) >= 9
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def groups(folder: Path) -> list[Any]:
    """All parameter groups of a checkpoint, whatever chain they are in."""
    found = common_state(folder)["optimizer"]
    parts = [found[i] for i in sorted(found)] if 0 in found else [found]
    return [group for part in parts for group in part.get("optimizer", part)["param_groups"]]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name != "with copies"])
def test_what_we_save_is_what_megatron_saves(name: str, made: Any) -> None:
    folder, errors = made[name]
    assert errors["train"] is None, errors["train"]
    same(state_of(folder / OURS / "iter_0000003"), state_of(folder / FULL))
    ours, theirs = (common_state(path)["optimizer"] for path in (folder / OURS / "iter_0000003", folder / FULL))
    assert {"state": {}, **ours} == {"state": {}, **theirs}


@pytest.mark.parametrize("name", CASES)
def test_each_loads_what_the_other_saved(name: str, made: Any) -> None:
    folder, errors = made[name]
    expected = state_of(folder / FULL)
    for what in [what for what in errors if what != "train"]:
        assert errors[what] is None, (what, errors[what])
        same(state_of(folder / what), expected)
        found = groups(folder / what)
        if CASES[name].chains:
            assert found == groups(folder / FULL)
        else:
            assert [group["is_expert_parallel"] for group in found] == [False, False, True]
        assert {group["step"] for group in found} == {3}


def test_copies_that_a_torch_optimizer_steps_become_megatrons(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    jobs = []
    for way in ("attribute", "mapping"):
        given = {"path": tmp_path / way, "whole": whole, "way": way}
        jobs += [
            Job("save_half", 4, {**given, "layout": {"tp": 2}}),
            Job("load_half", 2, {**given, "layout": {"pp": 2, "vpp": 2}}),
            Job("load_half", 4, {**given, "layout": {"tp": 2, "pp": 2}}),
        ]
    for job, outcome in zip(jobs, ranks(jobs), strict=True):
        assert all(not differ for differ in results(outcome)), (job, outcome)
    same(global_tensors(tmp_path / "attribute/iter_0000007"), global_tensors(tmp_path / "mapping/iter_0000007"))
    (error,) = training([Run(tmp_path, {FULL: tmp_path / "b"}, load=tmp_path / "mapping/iter_0000007", pp=2, dp=2)])
    assert error is None, error
    state = torch.load(whole, weights_only=True)
    fused = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
    fused |= {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
    expected = {}
    for begin, part in {
        "": {name: tensor.bfloat16() for name, tensor in state["weights"].items()},
        "optimizer.state.param.": state["weights"],
        "optimizer.state.exp_avg.": state["exp_avg"],
        "optimizer.state.exp_avg_sq.": state["exp_avg_sq"],
    }.items():
        for name, tensor in part.items():
            tail = name.removeprefix("decoder.layers.0.")
            if tail != name:
                rows = [part[f"decoder.layers.{i}.{tail}"] for i in range(LAYERS)]
                expected[f"{begin}decoder.layers.{fused.get(tail, tail)}"] = torch.stack(rows)
            elif not name.startswith("decoder.layers."):
                expected[begin + name] = tensor
    same(global_tensors(tmp_path / "b"), expected)
    assert [(group["wd_mult"], group["step"]) for group in groups(tmp_path / "b")] == [(1.0, 3), (0.0, 3)]
