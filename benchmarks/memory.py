"""`python -m benchmarks.memory`: the most anonymous memory of a conversion against the size of the model.

Memory that is mapped from a file, which the system can take back at any time, is not counted. Other libraries are
measured beside ours; the sizes double from line to line.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure, models

WAYS: dict[str, tuple[str, str, tuple[object, ...]]] = {
    "registry": ("convert", "hf", ("megatron", {"tp": 2, "pp": 2}, None, False, {})),
    "registry, cast": ("convert", "hf", ("trtllm", {"tp": 2}, "float16", False, {})),
    "transformers": ("transformers", "hf", ()),
    "torch dcp consolidate": ("dcp_consolidate", "dcp", ()),
}


def main(argv: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = measure.options(__doc__, "memory")
    parser.add_argument(
        "--sizes", type=measure.size, nargs="+", default=[1_000_000_000, 2_000_000_000, 4_000_000_000],
        help="bytes of the models (default 1, 2 and 4GB)",
    )  # fmt: skip
    chosen = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for size in chosen.sizes:
        with tempfile.TemporaryDirectory(dir=measure.made(chosen.dir)) as scratch:
            sources = {"hf": models.write(Path(scratch, "hf"), *models.llama(size)), "dcp": Path(scratch, "dcp")}
            measure.job("convert", sources["hf"], sources["dcp"], "dcp", {}, None, False, {})
            for name, (job, source, arguments) in WAYS.items():
                target = Path(scratch, "target")
                run, _ = measure.job(job, sources[source], target, *arguments)
                measure.clean(target)
                nbytes = measure.nbytes_of(sources[source])
                rows.append({"name": name, "nbytes": nbytes, "peak": run.peak, "over": run.over})
                print(*measure.table(rows[-1:], {"MB": "nbytes", "anon MiB": "peak", "over": "over"}), sep="\n")
    print("", *measure.table(rows, {"MB": "nbytes", "anon MiB": "peak", "over": "over"}), sep="\n")
    measure.write(chosen.output, chosen.dir, rows)


if __name__ == "__main__":
    main()
