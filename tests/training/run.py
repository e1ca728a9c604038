"""The launcher: it imports torch once, then forks the processes of one job after the other."""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import _prctl_pr_set_pdeathsig as die_with_parent  # type: ignore[attr-defined]

import registry.loading
import registry.saving  # noqa: F401
from registry import catalog
from tests.training import jobs as functions


def main(folder: Path, timeout: float) -> None:
    for name in ("megatron", "megatron-legacy"):
        catalog.format_spec(name)
    catalog.architecture("llama")  # before the ranks, so that they inherit what reading specs takes
    die_with_parent(signal.SIGKILL)
    jobs = json.loads((folder / "jobs").read_text())
    report = [run_job(job, folder / f"job{i}", timeout) for i, job in enumerate(jobs)]
    (folder / "report").write_text(json.dumps(report))


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
    main(Path(sys.argv[1]), float(sys.argv[2]))
