"""The launcher: it imports Megatron once, then forks one process a rank for each job.

    python -m tests.megatron_cpu.run --checkpoint DIR --hf DIR --tp 2 --pp 2 --input ids.safetensors --out logits.out
    python -m tests.megatron_cpu.run --jobs jobs.json --report report.json

where jobs.json is a list of `Job` fields and report.json becomes a list of null or the error, for each job.
Exit codes: 0 every job ran; 1 one did not, and stderr says why; 2 usage.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.multiprocessing import _prctl_pr_set_pdeathsig as die_with_parent  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessException, start_processes

from tests.megatron_cpu import Job
from tests.megatron_cpu.cpu import import_megatron


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.megatron_cpu.run")
    parser.add_argument("--jobs", type=Path, help="a JSON file with a list of jobs, instead of the options of one")
    parser.add_argument("--report", type=Path, default=os.devnull, help="JSON file to write: each job's error, or null")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each job")
    for field in dataclasses.fields(Job):
        default = None if field.default is dataclasses.MISSING else field.default
        kind = int if field.name == "stages" or isinstance(default, int) else str
        parser.add_argument(f"--{field.name}", type=kind, default=default, nargs="*" if default == () else None)
    options = vars(parser.parse_args())
    file, report, timeout = (options.pop(name) for name in ("jobs", "report", "timeout"))
    if not file and not (options["checkpoint"] and options["hf"]):
        parser.error("give --jobs, or --checkpoint, --hf, --input and --out")
    jobs = [Job(**fields) for fields in (json.loads(file.read_text()) if file else [options])]
    die_with_parent(signal.SIGKILL)
    engines = {job.engine for job in jobs}
    assert len(engines) == 1, "jobs with and without Transformer-Engine need a launcher each"
    import_megatron(engines.pop())  # before the ranks, so that they inherit it
    errors = [run_job(job, timeout) for job in jobs]
    report.write_text(json.dumps(errors))
    for job, error in zip(jobs, errors, strict=True):
        print(f"{job.checkpoint}: {error or 'ok'}", file=sys.stderr)
    return int(any(errors))


def run_job(job: Job, timeout: float) -> str | None:
    """Returns what went wrong, or None."""
    from tests.megatron_cpu.model import world_size

    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="megatron-cpu-") as scratch:
        start: Any = start_processes
        ranks = start(_rank, (job, f"{scratch}/store", os.getpid()), world_size(job), join=False, start_method="fork")
        try:
            while not ranks.join(max(0, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    return f"not finished after {timeout:g} s"
        except ProcessException as error:
            return str(error).strip()
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
    return None


def _rank(rank: int, job: Job, store: str, launcher: int) -> None:
    die_with_parent(signal.SIGKILL)
    if os.getppid() != launcher:  # it ended before the line above took effect
        os._exit(1)
    from tests.megatron_cpu.model import work

    try:
        work(job, rank, store)
    except BaseException as error:  # torch's CheckpointException is no Exception
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
