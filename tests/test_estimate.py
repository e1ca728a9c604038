"""What `plan` says that a conversion takes is held against conversions."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import registry
from benchmarks import models
from registry import Parallel
from registry.estimate import ASSUMED

Models = Callable[..., Path]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("to", "parallel", "dtype"),
    [("megatron", Parallel(tp=2, pp=2), None), ("trtllm", Parallel(tp=2), "bfloat16"), ("huggingface", None, None)],
)
def test_the_bytes_are_exact(
    to: str, parallel: Parallel | None, dtype: str | None, hf_model: Models, tmp_path: Path
) -> None:
    source, target = hf_model("llama3"), tmp_path / "x"
    found = registry.plan(source, to=to, parallel=parallel, dtype=dtype).estimate()
    registry.convert(source, target, to=to, parallel=parallel, dtype=dtype)
    manifest = sum(file.stat().st_size for file in target.rglob(".registry-manifest*"))
    assert found.written == size(target) - manifest
    tensors = registry.inspect(source).nbytes
    assert tensors <= found.read <= 1.1 * tensors  # what several ranks hold is read for each
    assert (found.rate, found.free, found.refused) == (ASSUMED, None, None)
    assert "assumed" in found.basis


def test_replicas_are_read_twice_more(hf_model: Models, tmp_path: Path) -> None:
    registry.convert(hf_model("llama3"), tmp_path / "x", to="trtllm", parallel=Parallel(tp=2))
    alone = registry.plan(hf_model("llama3"), to="huggingface").estimate().read
    both = 4 * (9 * 64 + 131 * 64)  # the norms and the embedding, which each of the two ranks holds
    assert registry.plan(tmp_path / "x", to="huggingface").estimate().read == alone + 2 * both


def test_a_measurement_leaves_nothing_behind(hf_model: Models, tmp_path: Path) -> None:
    planned = registry.plan(hf_model("llama3"), to="megatron")
    found = planned.estimate(tmp_path / "new" / "x", threads=2)
    assert list(tmp_path.iterdir()) == []
    assert found.basis.startswith("measured with") and found.rate > 0 and found.free and found.refused is None
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").touch()
    again = planned.estimate(tmp_path / "x")
    assert again.refused is not None and "not empty" in again.refused and "refused" in str(again)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "file"]


def test_where_nothing_can_be_measured(hf_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = registry.plan(hf_model("llama3"), to="megatron")

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    found = planned.estimate(tmp_path / "x")
    assert found.rate == ASSUMED and "Permission denied" in found.basis
    assert "network" in planned.estimate("memory://bucket/x").basis


def test_the_estimate_of_a_real_conversion(tmp_path: Path) -> None:
    """120 MB: memory to a third and 40 MB, time to a factor that only a wrong idea of the work exceeds."""
    source, target = models.write(tmp_path / "model", *models.llama(120 << 20)), tmp_path / "x"
    line = [sys.executable, "-m", "registry.cli"]
    rest = [str(source), str(target), "--to", "trtllm", "--tp", "2", "--no-sync"]
    plan = [*line, "plan", *rest[:-1], "--json"]
    done = subprocess.run(plan, capture_output=True, text=True, timeout=200, check=True)
    said = json.loads(done.stdout)["estimate"]
    process = subprocess.Popen([*line, "convert", *rest, "--json"], stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            except OSError:
                return
            if "RssAnon:" in text:
                peak = max(peak, int(text.split("RssAnon:")[1].split()[0]) << 10)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    took = json.loads(process.communicate(timeout=200)[0])["seconds"]
    watcher.join()
    assert abs(said["memory"] - peak) < peak / 3 + (40 << 20), (said, peak)
    assert took / 20 < said["seconds"] < took * 20, (said, took)
    assert said["basis"].startswith("measured with")
