"""`python -m benchmarks.use`: tensors straight into use, from a Megatron checkpoint and without another directory.

* `stream` of all tensors in HuggingFace's names, beside safetensors' load of a HuggingFace directory of the same bytes;
* a transformers model filled from the checkpoint: its peak of anonymous memory, in models;
* one tensor of a lazy view: the bytes that are read and the data files that are opened.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks import measure, models

ONE = "model.layers.1.self_attn.q_proj.weight"


def main(argv: list[str] | None = None) -> None:
    """Measure, and print."""
    parser = measure.options(__doc__, "use")
    parser.add_argument("--size", type=measure.size, default="2.2GB", help="bytes of the Llama (default 2.2GB)")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each")
    chosen = parser.parse_args(argv)
    folder = measure.made(chosen.dir)
    source = models.write(folder / f"llama-{chosen.size >> 20}", *models.llama(chosen.size))
    megatron = folder / f"hf-megatron-{chosen.size >> 20}"
    if not megatron.exists():
        measure.job("convert", source, megatron, "megatron", {"tp": 2, "pp": 2}, None, False, {})
    jobs: dict[str, tuple[object, ...]] = {
        "safetensors_load": (source,), "stream": (megatron, "huggingface"), "fill_transformers": (megatron,),
        "view": (megatron, "huggingface", ONE),
    }  # fmt: skip
    runs: dict[str, list[tuple[measure.Run, dict[str, Any]]]] = {name: [] for name in jobs}
    for _ in range(chosen.pairs + 1):
        for name, arguments in jobs.items():
            runs[name].append(measure.job(name, *arguments))
    rows: list[dict[str, Any]] = []
    for name, found in runs.items():
        measured = found[1:]  # the first has brought the files in
        nbytes = measured[0][1]["nbytes"]
        rows.append({
            "name": name, "nbytes": nbytes, "call": median(run.call for run, _ in measured),
            "cpu": median(run.cpu for run, _ in measured), "over": max(run.over for run, _ in measured),
            "GB/s": median(nbytes / run.call for run, _ in measured) / 1e9,
            "copies": max(run.over for run, _ in measured) / nbytes,
            **{key: measured[0][1].get(key) for key in ("read", "opened")},
        })  # fmt: skip
    columns = ("call", "cpu", "GB/s", "copies", "read", "opened")
    print(*measure.table(rows, {"MB": "nbytes", **{key: key for key in columns}, "over MiB": "over"}), sep="\n")
    files = sum(path.suffix == ".distcp" for path in measure.files_of(megatron))
    print(f"the checkpoint has {files} data files, {measure.nbytes_of(megatron):,} bytes")
    measure.write(chosen.output, folder, rows, files=files)


if __name__ == "__main__":
    main()
