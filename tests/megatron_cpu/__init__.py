"""Runs megatron-core on the CPU, as the judge of what we write: it builds a real model from a HuggingFace config, loads
a checkpoint into it strictly, as Megatron does, and returns its logits.

    megatron_cpu.logits(checkpoint, hf, input_ids, tp=2, pp=2)
    megatron_cpu.run([megatron_cpu.Job(...), ...], input_ids)      # imports Megatron once for all of them

Only the launcher's processes (`python -m tests.megatron_cpu.run`) import Megatron.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class MegatronError(RuntimeError):
    """Megatron refused the checkpoint, or did not finish in time."""


@dataclass(frozen=True)
class Job:
    """One checkpoint to load and to run, at one parallel layout. It always computes in float32."""

    checkpoint: Path  # a directory of .distcp or mp_rank_* files, or the one above it with a tracker file
    hf: Path  # a HuggingFace directory, of which only config.json is read
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1  # expert parallel ranks
    etp: int = 0  # tensor parallel ranks of the experts, where they are not tp
    stages: Sequence[int] = ()  # layers of each stage where they are uneven: pp * vpp counts, in model order
    format: str = "torch_dist"  # or "torch": Megatron's --ckpt-format
    engine: bool = False  # Transformer-Engine's layers, of our stand-in for it, instead of Megatron's own
    grouped: bool = False  # the experts of a layer in one module: with `engine`, other names in the torch format
    mtp: int = 0  # layers of multi-token prediction, which a config may announce and a checkpoint lack
    strict: str = "raise_all"  # for torch_dist, a value of Megatron's StrictHandling
    lenient: bool = False  # do without the extra state that the checkpoint lacks; for goldens of another Megatron only
    parts: bool = False  # torch_dist tensors are stored in the very parts that the ranks hold, as Megatron writes them
    ignore: Sequence[str] = ()  # prefixes of keys that a torch_dist checkpoint may hold beside the model ("rng_state")
    input: Path = Path()  # a safetensors file with `input_ids`
    out: Path = Path()  # the safetensors file to write `logits` to


def logits(checkpoint: Path, hf: Path, input_ids: torch.Tensor, timeout: float = 60, **job: Any) -> torch.Tensor:
    """The logits of one checkpoint, or raises `MegatronError`; `job` are the other fields of `Job`."""
    result = run([Job(checkpoint, hf, **job)], input_ids, timeout)[0]
    if isinstance(result, MegatronError):
        raise result
    return result


def run(jobs: Sequence[Job], input_ids: torch.Tensor, timeout: float = 60) -> list[torch.Tensor | MegatronError]:
    """Runs all, `timeout` seconds each. Logits are [*input_ids.shape, vocabulary without padding].

    There are two launchers at most, for a Megatron that has found Transformer-Engine is another than one that has not.
    """
    results: dict[int, torch.Tensor | MegatronError] = {}
    for engine in {job.engine for job in jobs}:
        chosen = [i for i, job in enumerate(jobs) if job.engine == engine]
        results |= dict(zip(chosen, launch([jobs[i] for i in chosen], input_ids, timeout), strict=True))
    return [results[i] for i in range(len(jobs))]


def launch(jobs: Sequence[Job], input_ids: torch.Tensor, timeout: float) -> list[torch.Tensor | MegatronError]:
    """Runs all in one launcher."""
    with tempfile.TemporaryDirectory(prefix="megatron-cpu-") as name:
        folder, repository = Path(name), Path(__file__).resolve().parents[2]
        save_file({"input_ids": input_ids.contiguous()}, folder / "input")
        jobs = [replace(job, input=folder / "input", out=folder / f"{i}.out") for i, job in enumerate(jobs)]
        (folder / "jobs").write_text(json.dumps([asdict(job) for job in jobs], default=str))
        options = [f"--jobs={folder}/jobs", f"--report={folder}/report", f"--timeout={timeout}"]
        launcher = subprocess.run(
            [sys.executable, "-m", "tests.megatron_cpu.run", *options],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            timeout=120 + timeout * len(jobs),  # it is killed then, and its workers with it
        )
        if not (folder / "report").exists():
            raise MegatronError(f"the launcher ended with {launcher.returncode}:\n{launcher.stderr[-4000:]}")
        pairs = zip(jobs, json.loads((folder / "report").read_text()), strict=True)
        return [MegatronError(error) if error else load_file(job.out)["logits"] for job, error in pairs]
