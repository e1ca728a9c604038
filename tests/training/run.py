"""The launcher: it imports torch once, then forks the processes of one job after the other.

It reads a line of JSON from its standard input for each list of jobs, and answers with one; it ends with the input.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Every rank needs all of this, and importing it takes longer than what is tested: making an optimizer imports
# torch._dynamo, and a config that leaves anything out transformers.
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.tensor
import transformers
from torch.multiprocessing import _prctl_pr_set_pdeathsig as die_with_parent  # type: ignore[attr-defined]

import registry.training.loading
import registry.training.saving  # noqa: F401
from registry import catalog
from tests.training import jobs as functions


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a rank prints is no answer
    die_with_parent(signal.SIGKILL)
    for name in ("megatron", "megatron-legacy"):
        catalog.format_spec(name)
    for name in ("llama", "mixtral"):
        catalog.architecture(name)
        transformers.AutoConfig.for_model(name)
    gc.freeze()  # the ranks share the pages of what is imported
    for line in sys.stdin:
        asked = json.loads(line)
        folder, timeout = Path(asked["folder"]), asked["timeout"]
        report = [run_job(job, folder / f"job{i}", timeout) for i, job in enumerate(asked["jobs"])]
        answers.write(json.dumps(report) + "\n")
        answers.flush()


def run_job(job: dict[str, Any], folder: Path, timeout: float) -> list[dict[str, Any]]:
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_of, args=(job, i, folder)) for i in range(job["ranks"])]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process.is_alive() for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return [outcome(folder / str(i), process, late[i], timeout) for i, process in enumerate(ranks)]


def outcome(file: Path, process: Any, late: bool, timeout: float) -> dict[str, Any]:
    if late:
        return {"error": "Timeout", "text": f"not finished after {timeout:g} s"}
    if not file.exists():
        return {"killed": process.exitcode}
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def rank_of(job: dict[str, Any], rank: int, folder: Path) -> None:
    die_with_parent(signal.SIGKILL)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if job["ranks"] > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=job["ranks"]
            )  # fmt: skip
        found = {"result": getattr(functions, job["function"])(**job["given"])}
    except Exception as error:
        found = {"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
    (folder / f"{rank}.partial").write_text(json.dumps(found, default=str))
    (folder / f"{rank}.partial").rename(folder / str(rank))
    os._exit(0)  # a process group whose other ranks are gone can hang when it is torn down


if __name__ == "__main__":
    main()
