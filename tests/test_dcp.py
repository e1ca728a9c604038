"""torch.distributed.checkpoint is the judge: it loads what we write into transformers' models and torch's optimizers,
and what it saves, whole or sharded by FSDP2 (tests/dcp_ranks.py), is read, whatever the dict around it looks like."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import registry
from registry import ArgumentError, CheckpointError, DetectionError, MappingError, Parallel, Rank
from tests.families import FAMILIES, build
from tests.goldens import golden
from tests.test_golden_megatron import global_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RANKS = 3
#: Families whose tensors transformers has in memory as in its files; of most mixtures of experts it fuses the experts.
IN_MEMORY = [
    "llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma", "gemma2", "gemma3_text", "phi", "phi_qk_norm", "phi3",
    "starcoder2", "starcoder2_tied", "gpt_bigcode", "gpt_bigcode_mha", "nemotron", "falcon_7b", "falcon_40b",
    "falcon_11b", "falcon_rw", "gptj", "bloom", "opt", "opt_post_norm", "mpt", "olmo2", "olmo3", "granite",
    "granite_tied", "cohere", "cohere_qk_norm", "cohere2", "stablelm", "stablelm_qk_norm", "glm", "glm4", "exaone4",
    "exaone4_tied", "seed_oss", "smollm3", "qwen3_5_text", "gpt_oss", "llama4_text", "mamba", "mamba2", "mamba2_tied",
    "falcon_h1", "falcon_h1_norm", "bert_base", "bert_classifier",
]  # fmt: skip


@pytest.mark.parametrize("name", IN_MEMORY)
def test_torch_fills_a_model_of_transformers_with_what_we_write(name: str, tmp_path: Path) -> None:
    import transformers

    hf = build(name, "bfloat16", tmp_path / "hf")
    registry.convert(hf, tmp_path / "dcp", to="dcp", durable=False)
    model_class = getattr(transformers, str(FAMILIES[name].model_class))
    expected = model_class.from_pretrained(hf, dtype=torch.bfloat16).state_dict()
    found = {key: torch.full_like(tensor, 77) for key, tensor in expected.items()}
    dcp.load({"model": found}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("root", ["", "app.model"])
def test_the_weights_are_where_the_root_option_says(root: str, tmp_path: Path) -> None:
    hf = build("llama", "float32", tmp_path / "hf")
    registry.convert(hf, tmp_path / "dcp", to="dcp", options={"root": root})
    expected = load_file(hf / "model.safetensors")
    found = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    dcp.load({"app": {"model": found}} if root else found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    registry.convert(tmp_path / "dcp", tmp_path / "back", to="huggingface")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


# FSDP2.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    repository = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.dcp_ranks", str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert (folder / "rank2.json").exists(), done.stderr[-4000:]
    return folder


def test_fully_sharded_runs_are_saved_and_resumed(ranks: Path) -> None:
    for rank in range(RANKS):
        report = json.loads((ranks / f"rank{rank}.json").read_text())
        assert "error" not in report, report["error"]
        assert report.pop("iteration") == 7 and report.pop("iterations") == 5
        assert sorted(report) == ["ours of dcp", "ours of megatron", "ours of torch's", "torch's of ours"]
        assert not any(report.values()), report


def config(ranks: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ranks / "dcp/iter_0000005/huggingface/config.json").read_text())
    return found


@pytest.mark.parametrize("source", ["torch", "dcp", "megatron", "huggingface"])
def test_what_was_sharded_becomes_one_directory(source: str, ranks: Path, tmp_path: Path) -> None:
    for folder in (ranks / "torch", ranks / "dcp/iter_0000005"):  # every rank wrote what it held
        sizes = [file.stat().st_size for file in folder.glob("*.distcp")]
        assert len(sizes) == RANKS and min(sizes) > 0.4 * max(sizes)
    whole = torch.load(ranks / "whole.pt")
    path = next((ranks / "huggingface").glob("iter_*"), ranks / source) if source == "huggingface" else ranks / source
    registry.convert(path, tmp_path / "hf", to="huggingface", config=config(ranks))
    found = load_file(tmp_path / "hf/model.safetensors")
    assert {f"model.{key}" for key in found} == {key for key in whole if key.startswith("model.")}
    assert all(torch.equal(tensor, whole[f"model.{key}"]) for key, tensor in found.items())


def test_the_optimizer_goes_through_megatrons_formats_and_back(ranks: Path, tmp_path: Path) -> None:
    whole = torch.load(ranks / "whole.pt")
    source = ranks / "torch"
    for i, to in enumerate(["megatron", "megatron-legacy", "dcp"]):
        parallel = Parallel(tp=2, pp=2) if to != "dcp" else None
        registry.convert(source, tmp_path / str(i), to=to, parallel=parallel, config=config(ranks))
        source = tmp_path / str(i)
    tensors = {key: torch.zeros_like(value) for key, value in whole.items() if isinstance(value, torch.Tensor)}
    dcp.load(tensors, checkpoint_id=source, no_dist=True)
    assert sum(key.startswith("optimizer.") for key in tensors) >= 3 * 20
    for key, tensor in tensors.items():
        assert torch.equal(tensor, whole[key]), key
    lr: dict[str, Any] = {"optimizer.param_groups.0.lr": None, "optimizer.param_groups.1.weight_decay": None}
    dcp.load(lr, checkpoint_id=source, no_dist=True)
    assert list(lr.values()) == [3e-3, 0.0]


def test_an_optimizer_of_megatron(tmp_path: Path) -> None:
    """Its copy of the weights too, which torch's own optimizers do not have."""
    sixteen = {"make_vocab_size_divisible_by": 16}
    source = golden("megatron/llama/tp1pp1dp2_bf16_distfull")
    registry.convert(source, tmp_path / "dcp", to="dcp", architecture="llama")
    registry.convert(tmp_path / "dcp", tmp_path / "back", to="megatron", options=sixteen)
    found, expected = (global_tensors(path / "iter_0000010") for path in (tmp_path / "back", source))
    assert found.keys() == expected.keys() and sum(".param." in key for key in found) == 9
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


# What training scripts save.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, torch.optim.AdamW]:
    from tests import dcp_ranks

    model = dcp_ranks.build()
    optimizer = dcp_ranks.adam(model)
    dcp_ranks.train(model, optimizer)
    folder = tmp_path_factory.mktemp("trained") / "hf"
    model.save_pretrained(folder)
    return folder, model, optimizer


def prefixed(state: dict[str, Any], begin: str) -> dict[str, Any]:
    return {f"{begin}{key}": value for key, value in state.items()}


def saved(form: str, model: Any, optimizer: Any) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    if form == "flattened":  # as torchtitan's optimizers
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        return {**weights, **get_state_dict(model, optimizer, options=flat)[1], "train_state": {"step": 3}}
    return {
        "model": {"model": weights, "optimizer": state, "rng": torch.get_rng_state()},
        "bare": dict(weights),
        "app": {"app": {"model": weights, "optim": state}, "dataloader": {"at": [1, {"b": 2}]}},
        "data parallel": {"model": prefixed(weights, "module.")},
        "compiled": {"state_dict": prefixed(weights, "_orig_mod."), "optimizer": state},
        "average too": {"ema": {k: v + 1 for k, v in weights.items()}, "model": weights},
    }[form]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "form", ["model", "bare", "app", "data parallel", "compiled", "average too", "flattened"]
)  # fmt: skip
def test_the_dict_around_a_model(
    form: str, told: bool, trained: tuple[Path, Any, torch.optim.AdamW], tmp_path: Path
) -> None:
    hf, model, optimizer = trained
    dcp.save(saved(form, model, optimizer), checkpoint_id=tmp_path / "dcp", no_dist=True)
    if not told:  # what has been written by others need not say how the dict was
        if form in ("app", "average too", "compiled"):
            return
        edited(tmp_path / "dcp", lambda found: setattr(found, "planner_data", None))
    report = registry.convert(tmp_path / "dcp", tmp_path / "hf", to="huggingface", config=hf)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert ("rng" in report.left_out) == (form == "model")
    if form not in ("bare", "data parallel", "average too"):
        state = state_of(registry.load, tmp_path / "dcp", hf)
        for name, parameter in model.named_parameters():
            for kind, tensor in optimizer.state[parameter].items():
                assert torch.equal(state[name][kind], tensor), (name, kind)


def state_of(load: Any, path: Path, hf: Path) -> dict[str, Any]:
    from tests import dcp_ranks

    model = dcp_ranks.build(seed=5)
    optimizer = dcp_ranks.adam(model)
    load(path, model=model, optimizer=optimizer, names="huggingface", config=hf, random_states=False)
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def edited(folder: Path, change: Any) -> None:
    with (folder / ".metadata").open("rb") as file:
        found = pickle.load(file)
    change(found)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(found, file)


def test_a_tied_model_has_both_names(tmp_path: Path) -> None:
    from tests import dcp_ranks

    model = dcp_ranks.build(tied=True)
    model.save_pretrained(tmp_path / "hf")
    registry.convert(tmp_path / "hf", tmp_path / "dcp", to="dcp")
    found = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    assert "lm_head.weight" in found
    dcp.load({"model": found}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    registry.convert(tmp_path / "dcp", tmp_path / "back", to="huggingface")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_a_resumed_run_is_the_run_itself(tmp_path: Path) -> None:
    from tests import dcp_ranks

    straight = dcp_ranks.build()
    optimizer = dcp_ranks.adam(straight)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    dcp_ranks.train(straight, optimizer)
    schedule.step()
    config = dcp_ranks.SIZES_CONFIG
    registry.save(
        tmp_path, model=straight, optimizer=optimizer, scheduler=schedule, iteration=3, format="dcp", config=config,
        names="huggingface", extra={"note": [1, (2.5, None)]},
    )  # fmt: skip
    expected = torch.rand(3)
    other = dcp_ranks.build(seed=9)
    again = dcp_ranks.adam(other)
    later = torch.optim.lr_scheduler.StepLR(again, 99)
    found = registry.load(tmp_path, model=other, optimizer=again, scheduler=later, names="huggingface")
    assert found.iteration == 3 and found.extra == {"note": [1, (2.5, None)]} and found.random_states
    assert torch.equal(torch.rand(3), expected)
    assert later.state_dict() == schedule.state_dict()
    for one, its in ((straight, optimizer), (other, again)):
        dcp_ranks.train(one, its)
    for a, b in zip(straight.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(optimizer.state[a][key], again.state[b][key]) for key in optimizer.state[a])


# What is refused.


def refused(error: type[Exception], said: str, source: Path, target: Path, **given: Any) -> None:
    with pytest.raises(error, match=said):
        registry.convert(source, target, **{"to": "huggingface", **given})
    assert not target.exists()


def test_a_damaged_checkpoint(trained: tuple[Path, Any, torch.optim.AdamW], tmp_path: Path) -> None:
    hf, model, optimizer = trained
    source = tmp_path / "dcp"
    dcp.save(saved("model", model, optimizer), checkpoint_id=source, no_dist=True)
    with pytest.raises(DetectionError, match="carries no config"):
        registry.convert(source, tmp_path / "out", to="huggingface")
    (file,) = source.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    refused(CheckpointError, "shorter than its metadata says", source, tmp_path / "out", config=hf)
    file.write_bytes(content)
    odd = {"optimizer": {"state": {"model.layers.9.odd": {"exp_avg": torch.zeros(3)}}}, "model": model.state_dict()}
    dcp.save(odd, checkpoint_id=tmp_path / "odd", no_dist=True)
    refused(
        MappingError, "optimizer state of weights that the model does not have", tmp_path / "odd", tmp_path / "out",
        to="megatron", config=hf,
    )  # fmt: skip
    less = {"model": {key: value for key, value in model.state_dict().items() if "layers.1.mlp.up" not in key}}
    dcp.save(less, checkpoint_id=tmp_path / "less", no_dist=True)
    refused(MappingError, r"layers\.1\.mlp\.up_proj", tmp_path / "less", tmp_path / "out", config=hf)


def test_state_by_number_is_left_behind_and_said(
    trained: tuple[Path, Any, torch.optim.AdamW], tmp_path: Path
) -> None:  # fmt: skip
    """optimizer.state_dict() itself says of no tensor which weight it belongs to."""
    hf, model, optimizer = trained
    numbered = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(numbered, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(MappingError, match="optimizer state of weights that the model does not have"):
        registry.convert(tmp_path / "dcp", tmp_path / "out", to="megatron", config=hf)
    report = registry.convert(tmp_path / "dcp", tmp_path / "hf", to="huggingface", config=hf)
    assert "optimizer.state.0.exp_avg" in report.left_out
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_what_a_run_holds_besides_is_left_behind_and_said(tmp_path: Path) -> None:
    """State of modules, as Transformer-Engine's have it, and an optimizer's."""
    hf = build("llama", "float32", tmp_path / "hf")
    weights = {**load_file(hf / "model.safetensors"), "model.layers.0.mlp._extra_state": torch.zeros(4)}
    odd = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    dcp.save({"model": weights, "optimizer": odd}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    report = registry.convert(tmp_path / "dcp", tmp_path / "back", to="huggingface", config=hf)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    said = {name.rsplit(".", 1)[-1]: reason for name, reason in report.left_out.items()}
    assert "optimizer state" in said["exp_avg"] and "per-module state" in said["_extra_state"]


def test_nothing_in_it_is_executed(trained: tuple[Path, Any, torch.optim.AdamW], tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    hf, model, _ = trained
    dcp.save({"model": model.state_dict(), "odd": Touch()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert not (tmp_path / "touched").exists()
    registry.convert(tmp_path / "dcp", tmp_path / "hf", to="huggingface", config=hf)
    registry.convert(tmp_path / "dcp", tmp_path / "again", to="dcp", config=hf)
    assert not (tmp_path / "touched").exists()


def test_names_that_a_run_cannot_have(trained: tuple[Path, Any, torch.optim.AdamW], tmp_path: Path) -> None:
    hf, model, _ = trained
    given: dict[str, Any] = {"model": model, "iteration": 1, "config": hf, "format": "dcp"}
    with pytest.raises(ArgumentError, match="format with tensors of every rank"):
        registry.save(tmp_path / "out", names="megatron", **given)
    with pytest.raises(ArgumentError, match="whole, or sharded by DTensor"):
        registry.load(hf, model=model, names="huggingface", parallel=Parallel(tp=2), rank=Rank(tp=1))
    assert not (tmp_path / "out").exists()
