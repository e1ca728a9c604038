"""The harness that judges our Megatron checkpoints, against checkpoints that Megatron wrote."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests import megatron_cpu
from tests.goldens import BridgeCase, MegatronCase, bridge_cases, golden, megatron_cases, trtllm_cases
from tests.megatron_cpu import Job, MegatronError, filled
from tests.megatron_cpu.families import FAMILIES
from tests.megatron_cpu.reference import reference_logits

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)

# Megatron 0.20 keeps its common state elsewhere.
LOADABLE = [
    case
    for case in megatron_cases()
    if not case.id.endswith("_mcore020")
    and not (case.trained and case.dtype == "bfloat16")  # their reference logits were computed in bfloat16
]
BEYOND_MODEL = ("rng_state", "optimizer")
TE_ONLY = (
    "decoder.final_layernorm._extra_state"  # what a checkpoint of Transformer-Engine layers has and local layers lack
)
# Latent attention runs with Transformer-Engine's layers only in this Megatron, and that golden has local ones.
LOCAL_LATENT = "deepseek_v2"
BRIDGE = [case for case in bridge_cases() if case.family in FAMILIES and case.family != LOCAL_LATENT]


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
            **{axis: case.layout.get(axis, 1) for axis in ("tp", "pp", "vpp", "ep", "etp")},
            format=case.format,
            engine=case.spec == "te",
            grouped=case.grouped_gemm,
            ignore=BEYOND_MODEL,
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
    return reference_logits(golden(case.hf), input_ids(), rounded=torch.bfloat16)


@needs_megatron
@pytest.mark.parametrize("case", LOADABLE, ids=str)
def test_megatron_gives_the_reference_logits(case, results):
    _, logits = results[case.id]
    assert isinstance(logits, torch.Tensor), logits
    torch.testing.assert_close(logits, reference(case), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def bridge_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor | MegatronError]:
    """Each at one rank and at two, which divide the same global tensors."""
    root, jobs = tmp_path_factory.mktemp("bridge"), {}
    for case in BRIDGE:
        folder = root / case.id
        shutil.copytree(case.path / "torch_dist", folder)
        torch.save({}, folder / "common.pt")  # this Megatron wants the common state in a file
        job = Job(folder, case.path / "hf", lenient=True, ignore=("common_state",))
        job = replace(job, engine=case.spec == "te" or FAMILIES[case.family].engine, etp=1)
        jobs |= {case.id: job, f"{case.id} tp2": replace(job, tp=2)}
    return dict(zip(jobs, megatron_cpu.run(list(jobs.values()), bridge_ids()), strict=True))


def bridge_ids() -> torch.Tensor:
    return torch.arange(2 * 24).reshape(2, 24).mul(7).remainder(96)


@needs_megatron
@pytest.mark.parametrize("case", BRIDGE, ids=str)
def test_megatron_computes_the_bridge_goldens_as_transformers_does(case: BridgeCase, bridge_results):
    # HuggingFace's Nemotron-H keeps time steps from getting too short, which Megatron does not.
    fields = {"time_step_min": 0.0} if case.family == "nemotron_h" else {}
    expected = reference_logits(case.path / "hf", bridge_ids(), **fields)
    for name in (case.id, f"{case.id} tp2"):
        found = bridge_results[name]
        assert isinstance(found, torch.Tensor), found
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@needs_megatron
@pytest.mark.parametrize("name", ["megatron_bert", "t5", "t5_gated"])
def test_encoders_compute_what_transformers_does(name: str, tmp_path: Path):
    import transformers

    t5 = name.startswith("t5")
    if t5:
        gated = {"feed_forward_proj": "gated-gelu"} if name == "t5_gated" else {}
        sizes = {"d_model": 56, "d_kv": 12, "d_ff": 88, "num_layers": 3, "num_heads": 6, **gated}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=96, **sizes))
    else:
        sizes = {"hidden_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 88}
        model = transformers.MegatronBertForPreTraining(transformers.MegatronBertConfig(vocab_size=96, **sizes))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1)
    model.save_pretrained(tmp_path)
    (tmp_path / "mp_rank_00").mkdir()
    state = (filled.t5 if t5 else filled.megatron_bert)(model.state_dict(), layers=3, heads=6)
    torch.save({"model": state}, tmp_path / "mp_rank_00/model_optim_rng.pt")
    found = megatron_cpu.logits(tmp_path, tmp_path, bridge_ids(), format="torch", engine=t5, lenient=True)
    torch.testing.assert_close(found, reference_logits(tmp_path, bridge_ids()), rtol=0, atol=1e-5)


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
    assert len(manifest["bridge"]) == len(bridge_cases()) > 10
    for case in bridge_cases():
        assert "unpacked" in case.path.parts and (case.path / "torch_dist/.metadata").is_file()
    assert (golden("megatron/llama/tp1pp1/iter_0000010") / ".metadata").is_file()
    assert {case.optimizer for case in megatron_cases()} > {None}
