"""Runs functions of `tests.training.jobs` on several processes that talk over gloo, each bounded in time.

run([Job("save", 4, {"path": ...}), Job("load", 2, {...})])

One launcher a test process imports torch once, and forks the ranks of all jobs of all tests.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A function of jobs.py, on `ranks` processes; every one of them gets `given`."""

    function: str
    ranks: int
    given: dict[str, Any] = field(default_factory=dict)


def run(jobs: Sequence[Job], timeout: float = 60) -> list[list[dict[str, Any]]]:
    """What each rank of each job returned: {"result": ...}, {"error": type, "text": ...} or {"killed": signal}."""
    launcher = _launcher()
    assert launcher.stdin is not None and launcher.stdout is not None
    with tempfile.TemporaryDirectory(prefix="training-") as folder:
        asked = {"folder": folder, "timeout": timeout, "jobs": [asdict(job) for job in jobs]}
        launcher.stdin.write(json.dumps(asked, default=str) + "\n")
        launcher.stdin.flush()
        limit = 60 + timeout * len(jobs)
        line = launcher.stdout.readline() if select.select([launcher.stdout], [], [], limit)[0] else ""
    if not line:
        launcher.kill()
        _launcher.cache_clear()
        raise AssertionError(f"the launcher ended with {launcher.wait()}, or took longer than {limit:g} s")
    found: list[list[dict[str, Any]]] = json.loads(line)
    return found


@cache
def _launcher() -> subprocess.Popen[str]:
    repository = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.run"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)  # its ranks die with it
    return process


def results(outcome: list[dict[str, Any]]) -> list[Any]:
    """The results of ranks that must all have ended well."""
    for i, one in enumerate(outcome):
        assert "result" in one, f"rank {i}: {one}"
    return [one["result"] for one in outcome]
