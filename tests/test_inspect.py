"""inspect(): every golden says what it is, whoever wrote it; what is odd is said; and the commands it names work."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import registry
from registry.cli import main
from tests.goldens import bridge_cases, megatron_cases, trtllm_cases

Models = Callable[..., Path]


@pytest.mark.parametrize("case", megatron_cases(), ids=str)
def test_what_megatron_wrote(case: Any) -> None:
    found = registry.inspect(case.path)
    assert found.format == {"torch_dist": "megatron", "torch": "megatron-legacy"}[case.format]
    assert found.iteration == int(Path(case.iter_dir).name.removeprefix("iter_"))
    assert (found.optimizer is not None) == case.has_optimizer
    assert found.rng  # all of these runs kept theirs
    assert not found.manifest and not found.config
    layout = {name: size for name, size in case.layout.items() if name in ("tp", "pp", "vpp", "ep") and size > 1}
    assert found.parallel.replace("one rank", "") == " ".join(f"{name}{size}" for name, size in layout.items())
    if found.problem is None:
        assert found.architecture == case.family
    else:  # several fit, or the arguments alone do not tell: then the family is among those that fit, or none is named
        assert found.architecture is None and "architecture" in found.problem
        assert not found.architectures or case.family in found.architectures
    if found.parameters is not None:
        assert found.dtypes == {case.dtype: found.parameters}
    said = registry.inspect(case.path, architecture=case.family)
    assert said.architecture == case.family and said.problem is None
    if case.padded_vocab != case.true_vocab:
        assert said.padded == {"vocab": case.padded_vocab}
    if case.has_optimizer:
        assert {"exp_avg", "exp_avg_sq"} <= set(str(said.optimizer).split(", "))


@pytest.mark.parametrize("case", bridge_cases(), ids=str)
def test_a_checkpoint_without_any_config(case: Any) -> None:
    found = registry.inspect(case.path / "torch_dist")
    assert (found.format, found.architecture, found.parameters) == ("megatron", None, None)
    assert found.problem is not None and "no config" in found.problem
    assert found.tensors and sum(found.dtypes.values())
    assert found.commands == (f"registry inspect {case.path / 'torch_dist'} --config DIRECTORY",)
    assert registry.inspect(case.path / "torch_dist", config=case.path / "hf").architecture == case.family


@pytest.mark.parametrize("case", trtllm_cases(), ids=str)
def test_what_tensorrt_llm_reads(case: Any) -> None:
    found = registry.inspect(case.path)
    assert (found.format, found.parallel) == ("trtllm", "one rank" if case.tp * case.pp == 1 else found.parallel)
    assert (f"tp{case.tp}" in found.parallel) == (case.tp > 1)
    assert (f"pp{case.pp}" in found.parallel) == (case.pp > 1)
    assert found.problem or found.architecture
    assert str(found) and json.dumps(found.as_dict(), default=str)


def test_the_commands_that_it_names_work(hf_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hf_model("llama3"), "a model")
    registry.convert("a model", "a model-megatron", to="megatron")
    for command in registry.inspect("a model-megatron").commands:
        words = shlex.split(command)
        assert words[0] == "registry" and main(words[1:]) == 0, command
    assert {p.name for p in tmp_path.iterdir()} >= {"a model-trtllm", "a model-megatron-legacy", "a model-huggingface"}


def test_only_formats_that_have_a_place_for_the_model_are_named() -> None:
    cases = {case.id: case for case in trtllm_cases()}
    if "trt_bloom_tp1" not in cases:
        pytest.skip("no golden of a model that a format has no place for")
    named = " ".join(registry.inspect(cases["trt_bloom_tp1"].path).commands)
    assert "--to huggingface" in named and "--to megatron" not in named


def test_a_run_and_what_died_in_it(hf_model: Models, tmp_path: Path) -> None:
    run = tmp_path / "run"
    registry.convert(hf_model("llama3"), run, to="megatron")
    shutil.copytree(run / "release", run / "iter_0000007")
    (run / ".iter_0000008.partial").mkdir()
    (tmp_path / ".run.partial").mkdir()
    found = registry.inspect(run)
    assert Path(found.path).name == "release"
    assert found.iterations == ("iter_0000007",)
    assert found.unfinished == (".iter_0000008.partial",)
    assert "died" in str(found) and "iter_0000007" in str(found)
    one = registry.inspect(run / "iter_0000007")
    assert (one.iterations, one.unfinished, one.iteration) == ((), (), 7)


def test_the_active_parameters_of_a_mixture(tmp_path: Path) -> None:
    case = next((case for case in megatron_cases() if case.family == "mixtral"), None)
    if case is None:
        pytest.skip("no golden of a mixture of experts")
    hf = case.path.parent / "hf"
    found, config = registry.inspect(hf), json.loads((hf / "config.json").read_text())
    tensors = load_file(hf / "model.safetensors")
    routed = sum(t.numel() for name, t in tensors.items() if ".experts." in name)
    idle = routed * (config["num_local_experts"] - config["num_experts_per_tok"]) // config["num_local_experts"]
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert found.active == found.parameters - idle < found.parameters
    assert registry.inspect(Path(case.path), architecture="mixtral").active is not None


def test_a_dense_model_has_no_active_parameters(hf_model: Models) -> None:
    assert registry.inspect(hf_model("llama3")).active is None


def test_the_facts_are_those_of_the_family(hf_model: Models, tmp_path: Path) -> None:
    """Megatron's own document says more, of experts and state spaces, whatever the model."""
    source = hf_model("llama3")
    registry.convert(source, tmp_path / "there", to="megatron")
    assert registry.inspect(tmp_path / "there").facts == registry.inspect(source).facts


def test_what_does_not_fit_is_a_problem_and_no_error(hf_model: Models, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(hf_model("llama3"), broken)
    config = json.loads((broken / "config.json").read_text()) | {"intermediate_size": 161}
    (broken / "config.json").write_text(json.dumps(config))
    found = registry.inspect(broken)
    assert found.parameters is None and found.problem is not None and "161" in found.problem
    assert main(["inspect", str(broken)]) == 1
    with pytest.raises(registry.MappingError):
        registry.inspect(broken, architecture="llama")


def test_the_checkpoints_in_a_directory_are_named(hf_model: Models, tmp_path: Path) -> None:
    shutil.copytree(hf_model("llama3"), tmp_path / "step-1")
    registry.convert(hf_model("llama3"), tmp_path / "step-2", to="trtllm")
    (tmp_path / "notes").mkdir()
    with pytest.raises(registry.DetectionError) as caught:
        registry.inspect(tmp_path)
    assert caught.value.hint == "name one of the checkpoints in it: step-1 (huggingface), step-2 (trtllm)"
