"""The harness that judges our Megatron checkpoints, against checkpoints that Megatron wrote."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests import megatron_cpu
from tests.goldens import MegatronCase, golden, megatron_cases, trtllm_cases
from tests.megatron_cpu import Job, MegatronError

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)

# Those that local layers of core 0.16.1 can load: in the torch format, Transformer-Engine's names are others.
LOADABLE = [
    case
    for case in megatron_cases()
    if case.family in ("llama", "qwen2", "qwen3", "gpt2")
    and not case.id.endswith("_mcore020")
    and (case.format == "torch_dist" or case.spec == "local")
    and not (case.trained and case.dtype == "bfloat16")  # their reference logits were computed in bfloat16
]
BEYOND_MODEL = ("rng_state", "optimizer")
TE_ONLY = (
    "decoder.final_layernorm._extra_state"  # what a checkpoint of Transformer-Engine layers has and local layers lack
)


VARIANTS = ["reshard", "uneven stages", "an empty stage", "iteration folder", "assume ok"]
VARIANTS += ["unrequested", "te object", "wrong layout", "wrong layers", "wrong width", "no such folder"]


class Variant(NamedTuple):
    """The same weights, run in another way than they were saved."""

    job: Job
    error: str | None  # what Megatron says, or None where the logits are to be llama's


def variants(folder: Path) -> dict[str, Variant]:
    llama, hf = golden("megatron/llama/tp1pp1"), golden("megatron/llama/hf")
    te, torch_format = golden("megatron/llama/tp1pp1_te"), golden("megatron/llama/tp1pp2vp2_torch")
    for name, field, value in (("layers", "num_hidden_layers", 5), ("hidden", "hidden_size", 72)):
        config = {**json.loads((hf / "config.json").read_text()), field: value}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    rng = ("rng_state",)
    return {
        "reshard": Variant(Job(llama, hf, tp=4, pp=1, ignore=rng), None),
        "uneven stages": Variant(Job(llama, hf, tp=2, pp=2, stages=(1, 3), ignore=rng), None),
        "an empty stage": Variant(Job(llama, hf, pp=2, vpp=2, stages=(1, 0, 1, 2), ignore=rng), None),
        "iteration folder": Variant(Job(llama / "iter_0000010", hf, ignore=rng), None),
        "assume ok": Variant(Job(te, hf, strict="assume_ok_unexpected"), None),
        "unrequested": Variant(Job(llama, hf), "are missing in the provided sharded state dict. \nMissing keys"),
        "te object": Variant(Job(te, hf, ignore=rng), TE_ONLY),
        "wrong layout": Variant(Job(torch_format, hf, pp=2, format="torch"), "not {'model'}"),
        "wrong layers": Variant(Job(llama, folder / "layers", ignore=rng), "shape mismatch"),
        "wrong width": Variant(Job(llama, folder / "hidden", ignore=rng), "shape mismatch"),
        "no such folder": Variant(Job(folder / "absent", hf), "No such file"),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, torch.Tensor | MegatronError]]:
    """All of it in one launcher, so that Megatron is imported once."""
    jobs = {
        case.id: Job(
            case.path,
            golden(case.hf),
            **{axis: case.layout[axis] for axis in ("tp", "pp", "vpp")},
            format=case.format,
            ignore=(*BEYOND_MODEL, TE_ONLY),
        )
        for case in LOADABLE
    }
    jobs |= {name: variant.job for name, variant in variants(tmp_path_factory.mktemp("configs")).items()}
    logits = megatron_cpu.run(list(jobs.values()), input_ids())
    return dict(zip(jobs, zip(jobs.values(), logits, strict=True), strict=True))


def input_ids() -> torch.Tensor:
    return load_file(golden("megatron/llama/reference_logits.safetensors"))["input_ids"]


def reference(case: MegatronCase) -> torch.Tensor:
    if case.dtype == "float32":
        stored = load_file(golden(case.reference))
        assert torch.equal(stored["input_ids"], input_ids())
        return stored["logits"]
    import transformers  # the stored ones are of the float32 weights

    model = transformers.AutoModelForCausalLM.from_pretrained(golden(case.hf), dtype=torch.float32)
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        return model(input_ids()).logits


@needs_megatron
@pytest.mark.parametrize("case", LOADABLE, ids=str)
def test_megatron_gives_the_reference_logits(case, results):
    _, logits = results[case.id]
    assert isinstance(logits, torch.Tensor), logits
    torch.testing.assert_close(logits, reference(case), rtol=0, atol=1e-5)


@needs_megatron
@pytest.mark.parametrize("name", VARIANTS)
def test_other_layouts_run_and_what_does_not_fit_is_refused(name, results, tmp_path):
    error, (_, found) = variants(tmp_path)[name].error, results[name]
    if error is None:
        expected = load_file(golden("megatron/llama/reference_logits.safetensors"))["logits"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert isinstance(found, MegatronError) and error in str(found)


@needs_megatron
def test_another_config_gives_other_logits(tmp_path):
    """So that agreement with the reference means something."""
    config = json.loads(golden("megatron/llama/hf/config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = megatron_cpu.logits(golden("megatron/llama/tp1pp1_torch"), tmp_path, input_ids()[0], format="torch")
    expected = load_file(golden("megatron/llama/reference_logits.safetensors"))["logits"]
    assert logits.shape == expected[0].shape
    assert (logits - expected[0]).abs().max() > 1e-3


@needs_megatron
@pytest.mark.skipif(sys.platform != "linux", reason="relies on PR_SET_PDEATHSIG")
@pytest.mark.parametrize("end", ["timeout", "killed"])
def test_no_process_stays_behind(end, tmp_path):
    psutil = pytest.importorskip("psutil")
    os.mkfifo(tmp_path / "input")  # reading it blocks for ever
    command = [sys.executable, "-m", "tests.megatron_cpu.run", "--timeout", "3" if end == "timeout" else "100"]
    command += ["--checkpoint", "none", "--hf", golden("megatron/llama/hf"), "--tp", "2"]
    command += ["--input", tmp_path / "input", "--out", tmp_path / "out"]
    root = Path(__file__).resolve().parents[1]
    scratch = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed launcher cannot remove its own
    with subprocess.Popen(command, cwd=root, env=scratch, stderr=subprocess.PIPE, text=True) as launcher:
        process = psutil.Process(launcher.pid)
        deadline = time.monotonic() + 120
        while len(ranks := process.children(recursive=True)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(ranks) == 2
        if end == "killed":
            launcher.kill()
        stderr = launcher.communicate(timeout=60)[1]
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    assert launcher.returncode == (-9 if end == "killed" else 1)
    assert end == "killed" or "not finished after 3 s" in stderr


def test_usage_errors_exit_with_2():
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "tests.megatron_cpu.run", "--tp", "2"]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ended.returncode == 2 and "--checkpoint" in ended.stderr


def test_packed_goldens_are_complete():
    """What a fresh clone has, without ../shared."""
    manifest = json.loads((Path(__file__).parent / "golden" / "MANIFEST.json").read_text())
    for kind, cases in (("megatron", megatron_cases()), ("trtllm", trtllm_cases())):
        assert [case.id for case in cases] == sorted(case.id for case in cases)
        packed = {entry["id"] for entry in manifest[kind]}
        chosen = [case for case in cases if case.id in packed]
        assert len(chosen) == len(packed) > 10
        for case in chosen:
            for name in (case.dir, case.input if kind == "trtllm" else case.hf):
                assert "unpacked" in golden(name).parts and golden(name).is_dir()
    assert (golden("megatron/llama/tp1pp1/iter_0000010") / ".metadata").is_file()
    assert {case.optimizer for case in megatron_cases()} > {None}
