"""`python -m benchmarks.bench`: conversions against `cp` of the same bytes, memory, planning and start-up times.

Both sides of a comparison start alike: unmeasured copies bring the source into the page cache and make a virtual
machine have the memory that the run is about to take (the first touch of a page that the host must find costs several
times the copy), their targets are removed again, and no page is dirty. Runs of `cp` and of the library alternate; the
ratio is the median of the pairs' ratios. A conversion is a process of its own, whose anonymous memory is sampled from
outside; its time is given in the call (`convert()` alone) and of the whole process. On a busy machine the wall time of
two threads says little: the processor time of both sides is given too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import models

_CHILD = """
import json, os, sys, time
def anonymous():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))
import registry.conversion  # what convert() would import first
from registry import Parallel, convert
source, target, to, parallel, dtype, durable = json.loads(sys.argv[1])
if dtype:
    import torch
before, start, cpu = anonymous(), time.perf_counter(), time.process_time()
convert(source, target, to=to, parallel=Parallel(**parallel), dtype=dtype, durable=durable)
print(json.dumps([time.perf_counter() - start, time.process_time() - cpu, before]))
"""

_PLAN = """
import json, sys, time
import registry
from registry import catalog, prepare, source
path, to = sys.argv[1:]
times = {}
def timed(owner, name, step):
    call = getattr(owner, name)
    def wrapper(*arguments, **options):
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            times[step] = times.get(step, 0) + time.perf_counter() - start
    setattr(owner, name, wrapper)
for format in catalog.names("format"):
    catalog.container(catalog.format_spec(format).container)
catalog.architecture("llama")
timed(catalog.container("huggingface"), "open", "open")
timed(source, "bind_source", "bind source")
timed(prepare, "bind_target", "bind target")
timed(prepare, "make_plan", "plan")
timed(catalog.container(catalog.format_spec(to).container), "lay_out", "layout")
start = time.perf_counter()
plan = registry.plan(path, to=to, parallel=registry.Parallel(tp=2, pp=2))
times["plan() in all"] = time.perf_counter() - start
tensors = plan.report.tensors
times["with its report"] = time.perf_counter() - start
print(json.dumps(times | {"tensors": tensors}))
"""


@dataclass
class Direction:
    """One conversion to measure. `source` is a model, or the direction that makes it."""

    name: str
    source: str
    to: str
    parallel: dict[str, int] = field(default_factory=dict)
    dtype: str | None = None


_RANKS = {"tp": 2, "pp": 2}
DIRECTIONS = [
    Direction("hf-megatron", "llama", "megatron", _RANKS),
    Direction("megatron-hf", "hf-megatron", "huggingface"),
    Direction("hf-legacy", "llama", "megatron-legacy", _RANKS),
    Direction("legacy-hf", "hf-legacy", "huggingface"),
    Direction("hf-trtllm", "llama", "trtllm", {"tp": 2}),
    Direction("trtllm-hf", "hf-trtllm", "huggingface"),
    Direction("megatron-tp4", "hf-megatron", "megatron", {"tp": 4}),
    Direction("megatron-trtllm", "hf-megatron", "trtllm", {"tp": 2}),
    Direction("gpt2-megatron", "gpt2", "megatron", _RANKS),
    Direction("megatron-gpt2", "gpt2-megatron", "huggingface"),
    Direction("cast-fp16-trtllm", "llama", "trtllm", {"tp": 2}, "float16"),
]


#: Unmeasured copies before a run. One is not enough: which free pages a program gets depends on how it writes.
_PRIMES = 2


@dataclass
class Row:
    """What was measured of one direction. Times are medians, in seconds; memory is a maximum, in bytes."""

    name: str
    durable: bool
    nbytes: int
    cp: float
    cp_cpu: float
    call: float
    call_cpu: float
    process: float
    call_ratio: float
    process_ratio: float
    peak_anonymous: int
    over_imports: int


def files_of(path: Path) -> Iterator[Path]:
    """Every file below a directory."""
    return (file for file in path.rglob("*") if file.is_file())


def settle() -> None:
    """Wait until (nearly) no page of the machine is dirty, so that both sides meet the same write-back."""
    os.sync()
    for _ in range(100):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        if sum(int(fields[key].split()[0]) for key in ("Dirty", "Writeback")) < 4096:
            return
        time.sleep(0.05)


@dataclass
class Run:
    """One run: seconds, of the call and of its whole process, processor seconds, and anonymous bytes."""

    call: float
    cpu: float
    process: float
    peak: int = 0
    over: int = 0


def copy(source: Path, target: Path, durable: bool) -> Run:
    """`cp -r`, with an fsync of every file where `durable`."""
    start, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if durable:
        for path in [*files_of(target), target, target.parent]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Run(seconds, cpu, seconds)


def _watch(pid: int, stop: threading.Event, peak: list[int]) -> None:
    """Keep the greatest anonymous memory of a process, sampled every 5 ms."""
    while not stop.wait(0.005):
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        if "RssAnon:" in text:
            peak[0] = max(peak[0], int(text.split("RssAnon:")[1].split()[0]) << 10)


def convert(direction: Direction, source: Path, target: Path, durable: bool) -> Run:
    """One conversion, in a process of its own."""
    arguments = [str(source), str(target), direction.to, direction.parallel, direction.dtype, durable]
    stop, peak = threading.Event(), [0]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", _CHILD, json.dumps(arguments)], stdout=subprocess.PIPE, text=True)
    watcher = threading.Thread(target=_watch, args=(process.pid, stop, peak))
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{direction.name} failed")
    call, cpu, before = json.loads(output)
    return Run(call, cpu, seconds, peak[0], peak[0] - before)


def measure(direction: Direction, source: Path, scratch: Path, durable: bool, pairs: int) -> Row:
    """Alternating runs of `cp` and of the conversion."""
    copies: list[Run] = []
    runs: list[Run] = []
    target = scratch / "target"
    for i in range(pairs):
        for ours in (i % 2 == 1, i % 2 == 0):
            primes = [scratch / f"prime{k}" for k in range(_PRIMES)]
            for prime in primes:
                copy(source, prime, durable=False)
            for prime in primes:
                _clean(prime)
            settle()
            if ours:
                runs.append(convert(direction, source, target, durable))
            else:
                copies.append(copy(source, target, durable))
            _clean(target)
    nbytes, both = sum(file.stat().st_size for file in files_of(source)), list(zip(runs, copies, strict=True))
    return Row(
        direction.name, durable, nbytes, median(c.call for c in copies), median(c.cpu for c in copies),
        median(r.call for r in runs), median(r.cpu for r in runs), median(r.process for r in runs),
        median(r.call / c.call for r, c in both), median(r.process / c.call for r, c in both),
        max(r.peak for r in runs), max(r.over for r in runs),
    )  # fmt: skip


def _clean(target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)


def build(name: str, directory: Path, size: int, made: dict[str, Path]) -> Path:
    """The checkpoint that a direction reads: a model, or what another direction writes; kept from run to run."""
    if name in made:
        return made[name]
    path = directory / f"{name}-{size >> 20}"
    if name in ("llama", "gpt2"):
        made[name] = models.write(path, *(models.llama(size) if name == "llama" else models.gpt2(size // 4)))
    elif not path.exists():
        direction = next(d for d in DIRECTIONS if d.name == name)
        convert(direction, build(direction.source, directory, size, made), path, durable=False)
    made[name] = path
    return path


def planning(directory: Path, to: str) -> dict[str, float]:
    """Seconds of each step of planning more than 100,000 tensors."""
    path = models.write(directory / "many", *models.many(), sparse=True)
    done = subprocess.run([sys.executable, "-c", _PLAN, str(path), to], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"planning failed\n{done.stderr}")
    times: dict[str, float] = json.loads(done.stdout)
    return times


def startup(times: int = 9) -> dict[str, float]:
    """Median seconds over a bare interpreter's of an import and of the command's help."""
    command = Path(sys.executable).with_name("registry")
    runs: dict[str, list[str]] = {"bare": [sys.executable, "-c", "pass"]}
    runs["import registry"] = [sys.executable, "-c", "import registry"]
    if command.exists():
        runs["registry --help"] = [str(command), "--help"]
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times):
        for name, argv in runs.items():
            start = time.perf_counter()
            done = subprocess.run(argv, capture_output=True, check=False)
            found[name].append(time.perf_counter() - start if done.returncode == 0 else float("nan"))
    bare = median(found.pop("bare"))
    return {name: median(seconds) - bare for name, seconds in found.items()}


def _table(rows: list[Row], plans: dict[str, dict[str, float]], starts: dict[str, float]) -> Iterator[str]:
    heads = "durable", "MB", "cp s", "cpu", "call s", "cpu", "ratio", "process", "anon MiB", "over"
    yield f"{'direction':<18}" + "".join(f"{head:>9}" for head in heads)
    for r in rows:
        seconds = r.cp, r.cp_cpu, r.call, r.call_cpu, r.call_ratio, r.process_ratio
        yield (
            f"{r.name:<18}{'yes' if r.durable else 'no':>9}{r.nbytes / 1e6:>9.0f}"
            + "".join(f"{number:>9.2f}" for number in seconds)
            + f"{r.peak_anonymous / 2**20:>9.0f}{r.over_imports / 2**20:>9.0f}"
        )
    for to, times in plans.items():
        tensors = times.pop("tensors")
        steps = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
        yield f"plan to {to}, {tensors:.0f} tensors: {steps}"
    yield ", ".join(f"{name} {seconds:.2f} s" for name, seconds in starts.items())


def _bytes(text: str) -> int:
    units = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}
    unit = next((u for u in units if text.endswith(u)), None)
    if unit is None:
        raise argparse.ArgumentTypeError("a size such as 2GB")
    return int(float(text.removesuffix(unit)) * units[unit])


def main(argv: list[str] | None = None) -> None:
    """Measure, and print one table or JSON."""
    names = ", ".join(direction.name for direction in DIRECTIONS)
    kept = Path(tempfile.gettempdir(), "registry-bench")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--size", type=_bytes, default=_bytes("2.2GB"), help="bytes of the Llama (default 2.2GB)")
    parser.add_argument("--dir", type=Path, default=kept, help="where models are kept")
    parser.add_argument("--only", action="append", help=f"plan, start, or one of {names}")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs of each direction")
    parser.add_argument("--durable", choices=["no", "yes", "both"], default="both", help="with syncing, or without")
    parser.add_argument("--json", action="store_true", help="JSON in place of a table")
    chosen = parser.parse_args(argv)
    modes = {"no": [False], "yes": [True], "both": [False, True]}[chosen.durable]
    made: dict[str, Path] = {}
    rows = []
    with tempfile.TemporaryDirectory(dir=_made(chosen.dir)) as scratch:
        for direction in (d for d in DIRECTIONS if not chosen.only or d.name in chosen.only):
            source = build(direction.source, chosen.dir, chosen.size, made)
            for durable in modes:
                rows.append(measure(direction, source, Path(scratch), durable, chosen.pairs))
                print(".", end="", file=sys.stderr, flush=True)
    targets = ("megatron", "megatron-legacy", "trtllm") if not chosen.only or "plan" in chosen.only else ()
    plans = {to: planning(chosen.dir, to) for to in targets}
    starts = startup() if not chosen.only or "start" in chosen.only else {}
    print(file=sys.stderr)
    if chosen.json:
        found: dict[str, Any] = {"rows": [asdict(row) for row in rows], "planning": plans, "startup": starts}
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_table(rows, plans, starts)))


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


if __name__ == "__main__":
    main()
