"""Runs functions of `tests.training.jobs` on several processes that talk over gloo, each bounded in time.

run([Job("save", 4, {"path": ...}), Job("load", 2, {...})])     # one launcher imports torch once for all of them
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
    with tempfile.TemporaryDirectory(prefix="training-") as name:
        folder, repository = Path(name), Path(__file__).resolve().parents[2]
        (folder / "jobs").write_text(json.dumps([asdict(job) for job in jobs], default=str))
        done = subprocess.run(
            [sys.executable, "-m", "tests.training.run", str(folder), str(timeout)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            timeout=60 + timeout * len(jobs),
        )
        assert (folder / "report").exists(), done.stderr[-4000:]
        found: list[list[dict[str, Any]]] = json.loads((folder / "report").read_text())
        return found


def results(outcome: list[dict[str, Any]]) -> list[Any]:
    """The results of ranks that must all have ended well."""
    for i, one in enumerate(outcome):
        assert "result" in one, f"rank {i}: {one}"
    return [one["result"] for one in outcome]
