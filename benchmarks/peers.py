"""`python -m benchmarks.peers`: what others take to copy a checkpoint, beside this library and `cp`.

Each line is another way to get a checkpoint from one directory into another, or, where a library has no such thing, its
load or its save alone. Our lines do the same from the same source in the same run. Saving and loading of training
states, by torch.distributed.checkpoint, megatron-core and this library, is in benchmarks/training.py.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure, models

#: Name -> (job, source, its other arguments, the package that it needs).
LINES: dict[str, tuple[str, str, tuple[object, ...], str]] = {
    "registry: huggingface to itself": ("convert", "hf", ("huggingface", {}, None, False, {}), "registry"),
    "registry: huggingface to megatron": ("convert", "hf", ("megatron", {"tp": 2}, None, False, {}), "registry"),
    "safetensors: load, save": ("safetensors", "hf", (), "safetensors"),
    "transformers: load, save": ("transformers", "hf", (), "transformers"),
    "mergekit: copy": ("mergekit", "hf", (), "mergekit"),
    "torch dcp: save": ("dcp_save", "hf", (), "torch"),
    "torch dcp: consolidate": ("dcp_consolidate", "dcp", (), "torch"),
    "registry: dcp to huggingface": ("convert", "dcp", ("huggingface", {}, None, False, {}), "registry"),
}


def main(argv: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = measure.options(__doc__, "peers")
    parser.add_argument("--size", type=measure.size, default="1GB", help="bytes of the Llama (default 1GB)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs of each")
    chosen = parser.parse_args(argv)
    folder = measure.made(chosen.dir)
    sources = {"hf": models.write(folder / f"llama-{chosen.size >> 20}", *models.llama(chosen.size))}
    sources["dcp"] = folder / f"dcp-{chosen.size >> 20}"
    if not sources["dcp"].exists():
        measure.job("convert", sources["hf"], sources["dcp"], "dcp", {}, None, False, {})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, (job, source, arguments, needs) in LINES.items():
            if importlib.util.find_spec(needs) is None:
                print(f"{name}: {needs} is not installed")
                continue
            found = measure.beside_cp(job, sources[source], Path(scratch), *arguments, pairs=chosen.pairs)
            rows.append({"name": name, **found})
            print(*measure.table(rows[-1:], measure.BESIDE_CP), sep="\n", flush=True)
    print("", *measure.table(rows, measure.BESIDE_CP), sep="\n")
    measure.write(chosen.output, folder, rows, pairs=chosen.pairs)


if __name__ == "__main__":
    main()
