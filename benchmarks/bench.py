"""`python -m benchmarks.bench`: conversions against `cp` of the same bytes, memory, planning and start-up times.

A conversion is a process of its own, whose anonymous memory is sampled from outside; its time is given in the call
(`convert()` alone) and of the whole process. benchmarks/measure.py says how the two sides of a comparison are run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure, models

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
    options: dict[str, Any] = field(default_factory=dict)


#: Model -> what makes it, and which part of the size that was asked for it has.
_MODELS = {"llama": (models.llama, 1), "gpt2": (models.gpt2, 2), "fp8": (models.fp8, 2)}
_RANKS = {"tp": 2, "pp": 2}
DIRECTIONS = [
    Direction("hf-megatron", "llama", "megatron", _RANKS),
    Direction("megatron-hf", "hf-megatron", "huggingface"),
    Direction("hf-legacy", "llama", "megatron-legacy", _RANKS),
    Direction("legacy-hf", "hf-legacy", "huggingface"),
    Direction("hf-trtllm", "llama", "trtllm", {"tp": 2}),
    Direction("trtllm-hf", "hf-trtllm", "huggingface"),
    Direction("megatron-tp4", "hf-megatron", "megatron", {"tp": 4}),
    Direction("megatron-legacy", "hf-megatron", "megatron-legacy", _RANKS),
    Direction("legacy-megatron", "hf-legacy", "megatron", _RANKS),
    Direction("megatron-trtllm", "hf-megatron", "trtllm", {"tp": 2}),
    Direction("legacy-trtllm", "hf-legacy", "trtllm", {"tp": 2}),
    Direction("trtllm-megatron", "hf-trtllm", "megatron", _RANKS),
    Direction("transpose-megatron", "gpt2", "megatron", _RANKS),
    Direction("transpose-hf", "transpose-megatron", "huggingface"),
    Direction("cast-fp16-trtllm", "llama", "trtllm", {"tp": 2}, "float16"),
    Direction("cast-transpose", "gpt2", "trtllm", {"tp": 2}, "float16"),
    Direction("dequantise", "fp8", "huggingface", dtype="bfloat16"),
]


def arguments(direction: Direction, durable: bool) -> tuple[object, ...]:
    """What the job `convert` is given beside source and target."""
    return direction.to, direction.parallel, direction.dtype, durable, direction.options


def build(name: str, directory: Path, size: int) -> Path:
    """The checkpoint that a direction reads: a model, or what another direction writes; kept from run to run."""
    path = directory / f"{name}-{size >> 20}"
    if name in _MODELS:
        make, part = _MODELS[name]
        return models.write(path, *make(size // part))
    if not path.exists():
        direction = next(d for d in DIRECTIONS if d.name == name)
        measure.job("convert", build(direction.source, directory, size), path, *arguments(direction, durable=False))
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


def _said(plans: dict[str, dict[str, float]], starts: dict[str, float]) -> Iterator[str]:
    for to, times in plans.items():
        steps = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items() if name != "tensors")
        yield f"plan to {to}, {times['tensors']:.0f} tensors: {steps}"
    yield ", ".join(f"{name} {seconds:.2f} s" for name, seconds in starts.items())


def main(argv: list[str] | None = None) -> None:
    """Measure, and print a table."""
    names = ", ".join(direction.name for direction in DIRECTIONS)
    parser = measure.options(__doc__, "bench")
    parser.add_argument("--size", type=measure.size, default="4.4GB", help="bytes of the Llama (default 4.4GB)")
    parser.add_argument("--only", action="append", help=f"plan, start, or one of {names}")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of runs of each direction")
    parser.add_argument("--durable", choices=["no", "yes", "both"], default="no", help="with syncing, or without")
    chosen = parser.parse_args(argv)
    modes = {"no": [False], "yes": [True], "both": [False, True]}[chosen.durable]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=measure.made(chosen.dir)) as scratch:
        for direction in (d for d in DIRECTIONS if not chosen.only or d.name in chosen.only):
            source = build(direction.source, chosen.dir, chosen.size)
            for durable in modes:
                found = measure.beside_cp(
                    "convert",
                    source,
                    Path(scratch),
                    *arguments(direction, durable),
                    pairs=chosen.pairs,
                    durable=durable,
                )
                rows.append({"name": direction.name, **found})
                print(*measure.table(rows[-1:], measure.BESIDE_CP), sep="\n", flush=True)
    targets = ("megatron", "megatron-legacy", "trtllm") if not chosen.only or "plan" in chosen.only else ()
    plans = {to: planning(chosen.dir, to) for to in targets}
    starts = startup() if not chosen.only or "start" in chosen.only else {}
    print("", *measure.table(rows, measure.BESIDE_CP), *_said(plans, starts), sep="\n")
    measure.write(chosen.output, chosen.dir, rows, planning=plans, startup=starts, pairs=chosen.pairs)


if __name__ == "__main__":
    main()
