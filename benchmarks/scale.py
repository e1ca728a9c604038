"""`python -m benchmarks.scale`: opening and planning the largest published models, from headers whose data are holes.

Each row is a process of its own: the processor time to open a checkpoint, to plan it to Megatron at TP8 PP16 EP64
(which opens it again), and to say what the plan would do, file by file and in JSON. The total is that of a plan that is
said, by the processor and by the clock; the time to import what is needed stands apart. The memory is the most that the
process had, and the most beyond the imports. The last rows have the same model with fewer experts: the cost must grow
no faster than the number of tensors.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measure as shared

#: Published config, what is changed in it, and the stages: 16 do not divide 61 layers.
DEEPSEEK_STAGES = [4] * 13 + [3] * 3
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Llama-3.1-405B", {}, {"tp": 8, "pp": [7] * 2 + [8] * 14}),
    ("DeepSeek-V3", {}, {"tp": 8, "pp": DEEPSEEK_STAGES, "ep": 64, "etp": 1}),
    ("Kimi-K2-Instruct", {}, {"tp": 8, "pp": DEEPSEEK_STAGES, "ep": 64, "etp": 1}),
    ("DeepSeek-V3", {"n_routed_experts": 64}, {"tp": 8, "pp": DEEPSEEK_STAGES, "ep": 64, "etp": 1}),
    ("DeepSeek-V3", {"n_routed_experts": 128}, {"tp": 8, "pp": DEEPSEEK_STAGES, "ep": 64, "etp": 1}),
    ("DeepSeek-V3", {"n_routed_experts": 512}, {"tp": 8, "pp": DEEPSEEK_STAGES, "ep": 64, "etp": 1}),
]


def write(name: str, changes: dict[str, Any], folder: Path) -> tuple[int, float]:
    """A directory with the headers of a model. Returns its tensors and its parameters in billions."""
    from tests import test_released_shapes as released

    config = released.config_of(name) | changes
    tensors = released.published_tensors(name, config)
    stored = released.quantised(tensors, config)
    released.write_headers(folder, stored, config)
    return len(stored), sum(tensor.numel() for tensor in tensors.values()) / 1e9


def measure(folder: str, parallel: dict[str, Any]) -> dict[str, float]:
    """Open, plan and describe, in this process: seconds of the processor, and bytes."""
    begin = time.process_time()
    import torch
    from transformers import CONFIG_MAPPING

    import registry.checkpoint
    import registry.conversion

    registry.formats()
    # The class that is asked what a config leaves unsaid; Kimi-K2's config is one of DeepSeek-V3.
    name = json.loads(Path(folder, "config.json").read_text())["model_type"].replace("kimi_k2", "deepseek_v3")
    assert torch.__version__ and CONFIG_MAPPING[name]
    start, before = time.process_time(), peak()
    checkpoint = registry.open(folder)
    assert checkpoint.architecture
    del checkpoint
    opened, clock = time.process_time(), time.perf_counter()
    plan = registry.plan(folder, to="megatron", parallel=registry.Parallel(**parallel))
    planned = time.process_time()
    text, data = str(plan), json.dumps(plan.as_dict())
    said, wall = time.process_time(), time.perf_counter() - clock
    assert text and data
    return {
        "import": start - begin, "open": opened - start, "plan": planned - opened, "say": said - planned,
        "total": said - opened, "wall": wall, "peak": peak(), "own": peak() - before,
    }  # fmt: skip


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print the table."""
    chosen = shared.options(__doc__, "scale").parse_args()
    rows: list[dict[str, Any]] = []
    seconds = ("import", "open", "plan", "say", "total", "wall")
    columns = ("tensors", "billions", *(f"{key} s" for key in seconds), "MiB", "own MiB", "µs a tensor")
    print(f"{'model':<34}" + "".join(f"{name:>12}" for name in columns))
    for name, changes, parallel in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            tensors, billions = write(name, changes, Path(folder))
            line = [sys.executable, "-m", "benchmarks.scale", "--child", folder, json.dumps(parallel)]
            found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
        rows.append({"name": name, "changes": changes, "tensors": tensors, "billions": billions, **found})
        shown = "".join(f" {key}={value}" for key, value in changes.items())
        cells = [
            f"{tensors:,}", f"{billions:,.0f}", *(f"{found[key]:.2f}" for key in seconds),
            *(f"{found[key] / 2**20:,.0f}" for key in ("peak", "own")), f"{found['total'] / tensors * 1e6:.1f}",
        ]  # fmt: skip
        print(f"{name + shown:<34}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    shared.write(chosen.output, shared.made(chosen.dir), rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], json.loads(sys.argv[3]))))
    else:
        main()
