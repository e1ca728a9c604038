"""Draws docs/pictures/*.svg, one for each construct of the notation. `python -m docs.pictures`

Each is drawn from a layout, or from tiny specs bound as for a conversion. tests/test_pages.py fails where one is stale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from registry import boxes
from registry.boxes import Box, Fragment
from registry.layout import parse
from registry.model import LogicalModel, format_rules, logical_model, rules_spec
from registry.parallel import Parallel
from registry.pictures.geometry import picture
from registry.pictures.svg import Panel, svg
from registry.specs import ArchitectureSpec, FormatSpec
from registry.target import bind_target

FOLDER = Path(__file__).resolve().parent / "pictures"
Steps = Mapping[str, int]


def drawings() -> dict[str, str]:
    """File name -> its SVG."""
    return {f"{name}.svg": text for name, text in (*_layouts(), *_specs())}


# --- layouts: the logical tensors, and what one stored tensor makes of them ------------------------------------------


def _layouts() -> Iterator[tuple[str, str]]:
    abc = {"a": 2, "b": 3, "c": 4}
    yield "axes", _of("t: a b", ["t: a b"], abc, cut={"a": 1})
    yield "transpose", _of("t: b a", ["t: a b"], abc, cut={"a": 1})
    yield "product", _of("t: (a b) c", ["t: a b c"], abc, cut={"a": 1, "b": 1})
    yield "sum", _of("[x: a | y: b] c", ["x: a c", "y: b c"], abc)
    yield "sum-of-one", _of("[x: a | y:] c", ["x: a c", "y: c"], abc)
    yield "interleave", _of("(a [x: b | y:]) c", ["x: a b c", "y: a c"], abc, cut={"a": 1})
    yield "apart", _of("t: (c/2 2) b", ["t: c b"], abc, cut={"c": 1})
    yield "nested", _of("[[x: a | y: b] | z: c]", ["x: a", "y: b", "z: c"], abc)

    heads = {"group": 2, "rep": 2, "head_dim": 2, "hidden": 4}
    qkv = ["q: group rep head_dim hidden", "k: group head_dim hidden", "v: group head_dim hidden"]
    yield "fused", _of("hidden [q: group rep head_dim | k: group head_dim | v: group head_dim]", qkv, heads)
    interleaved = "(group [q: rep | k: | v:] head_dim)"
    yield "groups", _of(f"{interleaved} hidden", qkv, heads, cut={"group": 1})
    one = {"group": 1, "rep": 4, "head_dim": 2, "hidden": 4}
    yield "cut", _of(f"{interleaved}@tp hidden", qkv, one, cut={"rep": 1}, ranks={"tp": 2})
    repeated = {"tp": frozenset({"group"})}
    key = "k: group@tp head_dim hidden"
    yield "replicate", _of(key, qkv[1:2], heads, cut={"group": 1}, ranks={"tp": 4}, replicate=repeated)

    mlp, both = {"ffn": 4, "hidden": 4}, ["gate: ffn hidden", "up: ffn hidden"]
    yield "sharding", _of("[gate: ffn@tp | up: ffn@tp] hidden", both, mlp, cut={"ffn": 2}, ranks={"tp": 2})
    yield "absent", _of("[gate: ffn | up: ffn] hidden", both[1:], mlp, present=frozenset({"up"}))
    experts, sizes = ["gate: expert hidden ffn", "up: expert hidden ffn"], {"expert": 2, "hidden": 3, "ffn": 3}
    yield "experts", _of("expert@ep hidden (ffn [gate: | up:])", experts, sizes, cut={"expert": 1}, ranks={"ep": 2})
    padded = {"sizes": {"vocab": 8, "hidden": 4}, "limits": {"vocab": 5}}
    yield (
        "padding",
        _of("embedding: vocab@tp hidden", ["embedding: vocab hidden"], cut={"vocab": 4}, ranks={"tp": 2}, **padded),
    )


def _of(
    layout: str, tensors: Sequence[str], sizes: Steps, *, cut: Steps | None = None, ranks: Steps | None = None,
    limits: Steps | None = None, **box: Any,
) -> str:  # fmt: skip
    """A picture of logical tensors beside what a layout stores of them, on every rank."""
    cut, limits = cut or {}, limits or {}
    whole = Box({**sizes, **limits})
    logical = [_panel(text.partition(":")[0], text, whole, cut) for text in tensors]
    shares = [(f"{dim} {i}", {dim: (i, n)}) for dim, n in (ranks or {}).items() for i in range(n)] or [("", {})]
    stored = [_panel(name, layout, Box(sizes, ranks=at, limits=limits, **box), cut) for name, at in shares]
    colours = {panel.name: n for n, panel in enumerate(logical)}
    return svg([("logical", logical), (f"stored: {layout}", stored)], colours, list(cut))


def _panel(name: str, layout: str, box: Box, cut: Steps) -> Panel:
    parsed = parse(layout)
    found = [part for fragment in boxes.fragments(parsed, box) for part in _cut(fragment, list(cut.items()))]
    return Panel(name, picture(boxes.shape(parsed, box), found))


def _cut(fragment: Fragment, steps: Sequence[tuple[str, int]]) -> Iterator[Fragment]:
    """The fragment in smaller ones, so that the same blocks can be told on both sides."""
    if not steps:
        yield fragment
        return
    (axis, step), *rest = steps
    if axis not in fragment.axes:
        yield from _cut(fragment, rest)
        return
    k = fragment.axes.index(axis)
    low, end = fragment.lo[k], fragment.lo[k] + fragment.size[k]
    for start in range(low - low % step, end, step):
        first, last = max(start, low), min(start + step, end)
        lo = (*fragment.lo[:k], first, *fragment.lo[k + 1 :])
        size = (*fragment.size[:k], last - first, *fragment.size[k + 1 :])
        offset = fragment.offset + (first - low) * fragment.stride[k]
        yield from _cut(fragment._replace(lo=lo, size=size, offset=offset), rest)


# --- specs: the tensors of a tiny model under its architecture's names, and in a format -------------------------------

STACK = """
axes: {layer: "4", hidden: "4"}
tensors: {"layers.{layer}.norm": "norm: hidden"}
"""
STAGES = """
ranked: true
parallel: [pp]
tensors: {"layers.{layer@pp}.norm": "norm: hidden"}
"""
FOLDED = """
variants: {layers: {stacked: {fold: layer}}}
tensors: {"layers.{layer}.norm": "norm: hidden"}
"""
TIED = """
axes: {layer: "2", vocab: "3", hidden: "4"}
tied: [{tensor: output, to: embedding, when: "true"}]
tensors:
  embedding: "embedding: vocab hidden"
  "layers.{layer}.norm": "norm: hidden"
  head: "output: vocab hidden"
"""
COPIED = """
ranked: true
parallel: [pp]
tensors:
  embedding: {layout: "embedding: vocab hidden", stage: first}
  "layers.{layer@pp}.norm": "norm: hidden"
  output: {layout: "output: vocab hidden", stage: last, tied: pp > 1}
"""
MIXED = """
axes: {layer: "3", ffn: "3", expert: "2", hidden: "4"}
define: {moe_layer: layer >= 1}
tensors:
  "layers.{layer}.up": {layout: "up: ffn hidden", when: not moe_layer}
  "layers.{layer}.router": {layout: "router: expert hidden", when: moe_layer}
"""
REPEATED = """
axes: {layer: "2", mtp: "1", hidden: "4"}
facts: {layers: 2}
tensors: {"layers.{layer}.norm": "norm: hidden"}
repeats: [{of: "layers.{layer}.", to: "layers.{mtp+layers}.", prefix: "mtp."}]
"""


def _specs() -> Iterator[tuple[str, str]]:
    yield "stages", _bound(STACK, STAGES, Parallel(pp=2))
    yield "folded", _bound(STACK, FOLDED, Parallel())
    yield "tied", _bound(TIED, COPIED, Parallel(pp=2))
    yield "differ", _bound(MIXED, None, Parallel())
    yield "repeats", _bound(REPEATED, None, Parallel())


def _bound(architecture: str, other: str | None, parallel: Parallel) -> str:
    """A picture of every tensor under the names of an architecture, above those of a format."""
    family = ArchitectureSpec.model_validate({"name": "tiny", **yaml.safe_load(architecture)})
    model = logical_model(family, family.facts)
    own = FormatSpec.model_validate({"name": "own", "container": "none", "rules_from": "architecture"})
    heads = [("the architecture's names", _panels(own, model, Parallel()))]
    if other is not None:
        spec = FormatSpec.model_validate({"name": "other", "container": "none", **yaml.safe_load(other)})
        heads.append(("the format's names", _panels(spec, model, parallel)))
    return svg(heads, {name: n for n, name in enumerate(model.tensors)}, ["layer", "mtp"])


def _panels(spec: FormatSpec, model: LogicalModel, parallel: Parallel) -> list[Panel]:
    """Every tensor that a format stores, rank by rank."""
    rules = list(format_rules(spec, model.architecture))
    choices = {v: next(iter(named)) for v, named in rules_spec(spec, model.architecture).variants.items()}
    target = bind_target(spec, rules, model, parallel, {}, choices, lambda _: "float32", None)
    found: dict[tuple[int, str], tuple[tuple[int, ...], list[Fragment]]] = {}
    for group in target.groups:
        for k, member in enumerate(group.members.tolist()):
            at = [(axis, int(column[k])) for axis, column in group.index.items()]
            slot = target.slots[member]
            _, held = found.setdefault((slot.rank.pp, slot.name), (slot.shape, []))
            held += [part for f in group.fragments for part in _cut(_indexed(f, model, at), [("layer", 1)])]
    return [
        Panel(f"pp {pp}: {name}" if spec.ranked else name, picture(shape, held))
        for (pp, name), (shape, held) in sorted(found.items(), key=lambda item: item[0][0])
    ]


def _indexed(fragment: Fragment, model: LogicalModel, at: Sequence[tuple[str, int]]) -> Fragment:
    """A fragment of the tensor itself, with the axes too along which the stored tensor has a single index."""
    names, indices = [axis for axis, _ in at], [index for _, index in at]
    return Fragment(
        model.home(fragment.tensor), (*fragment.axes, *names), (*fragment.lo, *indices),
        (*fragment.size, *[1] * len(at)), (*fragment.stride, *[0] * len(at)), fragment.offset,
    )  # fmt: skip


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.svg"):
        old.unlink()
    for file, text in drawings().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
