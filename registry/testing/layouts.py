"""Random layouts in the notation, as plain tuples with a printer of their own, which shares no code with the parser.

tree = layouts()          # a strategy
show(tree)                # the text that `registry.layout.parse` reads
axes_of(tree[1]), all_tensors(tree)
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

# A node is ("axis", name, shard), ("product", nodes, cut) or ("sum", [(label, nodes), ...], cut).
# A layout is (label, nodes).
Node = tuple[str, Any, str | None]
Tree = tuple[str | None, list[Node]]

AXES = ["layer", "group", "rep", "head_dim", "hidden", "größe", "f_1", "β"]
LABELS = ["attention.q.weight", "k", "v.0", "mlp.вес", "x_1", "w", "y", "z"]
SHARDS = ["tp", "ep"]


def show(tree: Tree) -> str:
    """The text of a random layout."""
    label, dims = tree
    return (f"{label}: " if label else "") + _show(dims)


def _show(nodes: list[Node]) -> str:
    return " ".join(_show_node(*node) for node in nodes)


def _show_node(kind: str, inner: Any, mark: str | None) -> str:
    if kind == "axis":
        text = inner
    elif kind == "sum":
        text = "[" + " | ".join((f"{label}: " if label else "") + _show(nodes) for label, nodes in inner) + "]"
    else:
        text = "(" + _show(inner) + ")" if inner or mark else "1"
    return f"{text}@{mark}" if mark else text


class _Draw:
    """Draws valid trees: on the way to any one tensor, every axis and every parallel dimension comes once."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.labels = list(draw(st.permutations(LABELS)))

    def chance(self, one_in: int) -> bool:
        return self.draw(st.integers(1, one_in)) == one_in

    def mark(self, shards: list[str]) -> str | None:
        """One of the parallel dimensions that are still free on this path, or none."""
        if shards and self.chance(4):
            return shards.pop(self.draw(st.integers(0, len(shards) - 1)))
        return None

    def nodes(self, axes: list[str], shards: list[str], depth: int, with_sum: bool) -> list[Node]:
        """A few nodes; `axes` and `shards` lose what they use. Exactly one of them holds a sum if `with_sum`."""
        found = [self.plain(axes, shards, depth) for _ in range(self.draw(st.integers(0 if with_sum else 1, 2)))]
        nodes = [node for node in found if node is not None]
        if with_sum:
            nodes.insert(self.draw(st.integers(0, len(nodes))), self.holder(axes, shards, depth))
        return nodes

    def plain(self, axes: list[str], shards: list[str], depth: int) -> Node | None:
        if self.chance(8):
            return ("product", [], None)
        if depth < 3 and self.chance(3):
            cut = self.mark(shards)
            inner = self.nodes(axes, shards, depth + 1, False)
            # One node in brackets is that node; only a cut makes it more.
            return ("product", inner, cut) if len(inner) != 1 or cut else inner[0]
        return ("axis", axes.pop(), self.mark(shards)) if axes else None

    def holder(self, axes: list[str], shards: list[str], depth: int) -> Node:
        """A sum, perhaps inside a product."""
        if depth < 3 and self.chance(3):
            cut = self.mark(shards)
            inner = self.nodes(axes, shards, depth + 1, True)
            return ("product", inner, cut) if len(inner) != 1 or cut else inner[0]
        cut = self.mark(shards)
        parts = []
        for _ in range(self.draw(st.integers(1, 3))):
            nested = depth < 2 and len(self.labels) > 4 and self.chance(5)
            label = None if nested else self.labels.pop()
            own = list(axes)
            some = self.chance(4)
            parts.append((label, [] if some and not nested else self.nodes(own, list(shards), depth + 1, nested)))
            if not self.labels:
                break
        axes.clear()
        shards.clear()
        return ("sum", parts, cut)


@st.composite
def layouts(draw: st.DrawFn) -> Tree:
    """A random valid layout."""
    drawer = _Draw(draw)
    axes = list(draw(st.permutations(AXES)))[: draw(st.integers(0, 5))]
    with_sum = draw(st.booleans())
    label = None if with_sum else drawer.labels.pop()
    dims = [] if not with_sum and drawer.chance(10) else drawer.nodes(axes, list(SHARDS), 0, with_sum)
    return label, dims


def tensors_of(nodes: list[Node]) -> list[str]:
    """The labels of the parts of sums, in order."""
    found: list[str] = []
    for kind, inner, _ in nodes:
        for label, below in inner if kind == "sum" else [(None, inner)] if kind == "product" else []:
            found += [label] if label else tensors_of(below)
    return found


def axes_of(nodes: list[Node]) -> list[str]:
    """The axes of some nodes, each as often as it is there."""
    found: list[str] = []
    for kind, inner, _ in nodes:
        if kind == "axis":
            found.append(inner)
        for _, below in inner if kind == "sum" else [(None, inner)] if kind == "product" else []:
            found += axes_of(below)
    return found


def all_tensors(tree: Tree) -> list[str]:
    """The logical tensors of a layout."""
    return [tree[0]] if tree[0] else tensors_of(tree[1])
