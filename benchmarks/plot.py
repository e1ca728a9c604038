"""`python -m benchmarks.plot`: docs/performance/*.svg, drawn from benchmarks/results/*.json with matplotlib."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "performance"
_OURS, _OTHERS = "#1f6feb", "#8b949e"

Found = dict[str, dict[str, Any]]


def _bars(axes: Any, rows: list[dict[str, Any]], limit: float | None = None) -> None:
    """Lying bars of the ratio to cp, with the least and the most where they are known."""
    names, ratios = [row["name"] for row in rows][::-1], [row["ratio"] for row in rows][::-1]
    ours = ["registry" in name or limit is not None for name in names]
    bars = axes.barh(names, ratios, color=[_OURS if own else _OTHERS for own in ours])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    if limit:
        axes.axvline(limit, color="black", linewidth=1, linestyle=":")
    axes.set_xlim(0, max([*ratios, limit or 1]) * 1.15)
    axes.set_xlabel("time of the call / time of cp of the same bytes")


def ratio(axes: Any, found: Found) -> None:
    """Conversions against cp."""
    _bars(axes, [row for row in found["bench"]["rows"] if not row["durable"]], 1.1)
    axes.set_title("Conversions, warm cache")


def peers(axes: Any, found: Found) -> None:
    """Others against cp."""
    rows = [*found["peers"]["rows"], *(row for row in found["training"]["rows"] if "ratio" in row)]
    _bars(axes, rows)
    axes.set_title("Copies, loads and saves by other libraries")


def memory(axes: Any, found: Found) -> None:
    """Memory against the size of the model."""
    rows = found["memory"]["rows"]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        style = "o-" if "registry" in name else "s--"
        axes.plot([row["nbytes"] / 1e9 for row in own], [row["peak"] / 2**20 for row in own], style, label=name)
    axes.axhline(512, color="black", linewidth=1, linestyle=":")
    axes.set(xlabel="GB of the model", ylabel="peak of anonymous memory, MiB", yscale="log", title="Memory")
    axes.legend()


def planning(axes: Any, found: Found) -> None:
    """Planning against the number of tensors."""
    rows = sorted(found["scale"]["rows"], key=lambda row: row["tensors"])
    axes.plot([row["tensors"] / 1000 for row in rows], [row["total"] for row in rows], "o", color=_OURS)
    for row in rows:
        changes = "".join(f", {value} experts" for value in row["changes"].values())
        axes.annotate(row["name"] + changes, (row["tensors"] / 1000, row["total"]), xytext=(5, -3),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.axhline(2, color="black", linewidth=1, linestyle=":")
    axes.set(
        xlabel="thousands of stored tensors", ylabel="seconds of the processor", title="A plan, and its description"
    )
    axes.set_xlim(0, max(row["tensors"] for row in rows) / 1000 * 1.3)
    axes.set_ylim(0)


def workers(axes: Any, found: Found) -> None:
    """Speed against the number of workers."""
    rows = found["workers"]["rows"]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        axes.plot([r["workers"] for r in own], [r["nbytes"] / r["seconds"] / 1e9 for r in own], "o-", label=engine)
    axes.set(xlabel="workers", ylabel="GB/s", title=f"Workers, {found['workers']['machine']['processors']} processors")
    axes.set_xticks(sorted({row["workers"] for row in rows}))
    axes.set_ylim(0)
    axes.legend()


#: File -> what draws it, the results that it needs, and inches.
PLOTS: dict[str, tuple[Callable[[Any, Found], None], tuple[str, ...], tuple[float, float]]] = {
    "ratio": (ratio, ("bench",), (8, 4)),
    "peers": (peers, ("peers", "training"), (8, 5)),
    "memory": (memory, ("memory",), (7, 4)),
    "planning": (planning, ("scale",), (7, 4)),
    "workers": (workers, ("workers",), (7, 4)),
}


def main() -> None:
    """Draw what there are results for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=FOLDER)
    chosen = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plots need matplotlib: pip install matplotlib") from None

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "registry", "font.size": 10})
    from matplotlib import pyplot

    chosen.output.mkdir(parents=True, exist_ok=True)
    for name, (draw, needs, inches) in PLOTS.items():
        paths = [chosen.results / f"{need}.json" for need in needs]
        if not all(path.exists() for path in paths):
            print(f"{name}: no results of {', '.join(needs)}")
            continue
        found = {need: json.loads(path.read_text()) for need, path in zip(needs, paths, strict=True)}
        figure, axes = pyplot.subplots(figsize=inches, layout="constrained")
        draw(axes, found)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(chosen.output / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
