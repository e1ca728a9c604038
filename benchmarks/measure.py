"""What the benchmarks share: processes that are timed and watched, runs beside `cp`, results with their machine.

Both sides of a comparison start alike: unmeasured copies bring the source into the page cache and make a virtual
machine have the memory that the run is about to take (the first touch of a page that the host must find costs several
times the copy), their targets are removed again, and no page is dirty. On a busy machine the wall time says little: the
processor time of both sides is given too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
#: Where models are kept from run to run.
KEPT = Path(tempfile.gettempdir(), "registry-bench")
#: Unmeasured copies before a run. One is not enough: which free pages a program gets depends on how it writes.
_PRIMES = 2
#: An hour: whatever takes longer is stuck.
_LIMIT = 3600


@dataclass
class Run:
    """One run: seconds, processor seconds, seconds of the whole process, and anonymous bytes: most, and of the call."""

    call: float
    cpu: float
    process: float
    peak: int = 0
    over: int = 0


def files_of(path: Path) -> Iterator[Path]:
    """Every file below a directory."""
    return (file for file in path.rglob("*") if file.is_file())


def nbytes_of(path: Path) -> int:
    """The bytes of every file below a directory."""
    return sum(file.stat().st_size for file in files_of(path))


def clean(path: Path) -> None:
    """Remove a directory, if it is there."""
    if path.exists():
        shutil.rmtree(path)


def settle() -> None:
    """Wait until (nearly) no page of the machine is dirty, so that both sides meet the same write-back."""
    os.sync()
    for _ in range(100):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        if sum(int(fields[key].split()[0]) for key in ("Dirty", "Writeback")) < 4096:
            return
        time.sleep(0.05)


def copy(source: Path, target: Path, durable: bool) -> Run:
    """`cp -r`, with an fsync of every file where `durable`."""
    start, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True, timeout=_LIMIT)
    if durable:
        for path in [*files_of(target), target, target.parent]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Run(seconds, cpu, seconds)


def prime(source: Path, scratch: Path, times: int = _PRIMES) -> None:
    """Bring the source into the page cache, and make the machine find the memory that as many new files need."""
    primes = [scratch / f"prime{k}" for k in range(times)]
    for path in primes:
        copy(source, path, durable=False)
    for path in primes:
        clean(path)
    settle()


def _watch(pid: int, stop: threading.Event, peak: list[int]) -> None:
    """Keep the greatest anonymous memory of a process, sampled every 5 ms."""
    while not stop.wait(0.005):
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        if "RssAnon:" in text:
            peak[0] = max(peak[0], int(text.split("RssAnon:")[1].split()[0]) << 10)


def job(name: str, *arguments: object, under: Sequence[str] = ()) -> tuple[Run, dict[str, Any]]:
    """One job of benchmarks/jobs.py, in a process of its own: the run, and what the job found out.

    `under` is a command that starts the process, such as one that limits it.
    """
    stop, peak = threading.Event(), [0]
    command = [*under, sys.executable, "-m", "benchmarks.jobs", name, json.dumps(arguments, default=str)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watcher = threading.Thread(target=_watch, args=(process.pid, stop, peak))
    watcher.start()
    try:
        output, errors = process.communicate(timeout=_LIMIT)
    finally:
        process.kill()
        stop.set()
        watcher.join()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{name} failed\n{errors}")
    found = json.loads(output.splitlines()[-1])
    before = found.pop("before")
    return Run(found.pop("seconds"), found.pop("cpu"), seconds, peak[0], peak[0] - before), found


def beside_cp(
    name: str, source: Path, scratch: Path, *arguments: object, pairs: int, durable: bool = False
) -> dict[str, Any]:
    """Runs of a job that is given a source, a target and `arguments`, and of `cp`.

    They alternate, and who is first changes. Times are medians, the ratio is the median of the pairs'.
    """
    target = scratch / "target"
    runs: dict[bool, list[Run]] = {False: [], True: []}
    for i in range(pairs):
        for ours in (i % 2 == 1, i % 2 == 0):
            prime(source, scratch)
            runs[ours].append(job(name, source, target, *arguments)[0] if ours else copy(source, target, durable))
            clean(target)
    copies, mine = runs[False], runs[True]
    both = list(zip(mine, copies, strict=True))
    return {
        "nbytes": nbytes_of(source), "durable": durable,
        "cp": median(c.call for c in copies), "cp_cpu": median(c.cpu for c in copies),
        "call": median(r.call for r in mine), "call_cpu": median(r.cpu for r in mine),
        "process": median(r.process for r in mine),
        "ratio": median(r.call / c.call for r, c in both), "ratios": sorted(r.call / c.call for r, c in both),
        "cpu_ratio": median(r.cpu for r in mine) / median(c.cpu for c in copies),
        "process_ratio": median(r.process / c.call for r, c in both),
        "peak": max(r.peak for r in mine), "over": max(r.over for r in mine),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str], first: str = "name") -> Iterator[str]:
    """Lines of a table. `columns` are head -> key; memory, which is in bytes, is said in MiB, and files in MB."""
    width = max([18, *(len(str(row[first])) + 2 for row in rows)])
    yield f"{first:<{width}}" + "".join(f"{head:>10}" for head in columns)
    for row in rows:
        cells = []
        for key in columns.values():
            value = row.get(key)
            if key in ("peak", "over"):
                value = value and round(value / 2**20)
            elif key == "nbytes":
                value = round(row[key] / 1e6)
            cells.append(f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value))
        yield f"{row[first]:<{width}}" + "".join(f"{cell:>10}" for cell in cells)


#: What `beside_cp` gives, as a table shows it.
BESIDE_CP = {
    "MB": "nbytes", "durable": "durable", "cp s": "cp", "cpu": "cp_cpu", "call s": "call", "cpu ": "call_cpu",
    "ratio": "ratio", "cpu ratio": "cpu_ratio", "process": "process_ratio", "anon MiB": "peak", "over": "over",
}  # fmt: skip


def machine(folder: Path) -> dict[str, Any]:
    """What a result was measured on. `folder` is where the files are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [m for m in mounts if folder.resolve().is_relative_to(m[1])]
    packages = ("torch", "transformers", "safetensors", "numpy", "megatron-core", "mergekit", "ray")
    return {
        "processor": names[0] if names else platform.machine(), "processors": os.cpu_count(),
        "memory": int(memory.split()[1]) << 10, "file system": max(inside, key=lambda m: len(m[1]))[2],
        "kernel": platform.release(), "python": platform.python_version(), "load at the end": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"), "versions": {name: v for name in packages if (v := _version(name))},
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def options(description: str | None, name: str, **more: Any) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=KEPT, help=f"where models and targets are put (default {KEPT})")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures; python -m benchmarks.plot draws it")
    return parser


def write(output: Path | None, folder: Path, rows: Any, **settings: Any) -> None:
    """Write what was found, and on what machine, where a file is named."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(folder), **settings, "rows": rows}
        output.write_text(json.dumps(found, indent=1) + "\n")


def size(text: str) -> int:
    """A number of bytes, such as 2GB, for argparse."""
    units = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}
    unit = next((u for u in units if text.endswith(u)), None)
    if unit is None:
        raise argparse.ArgumentTypeError("a size such as 2GB")
    return int(float(text.removesuffix(unit)) * units[unit])


def made(directory: Path) -> Path:
    """The directory, which is made where it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory
