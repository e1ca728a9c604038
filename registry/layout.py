"""The layout notation: how a stored tensor is made of logical tensors.

    (group@tp [attention.q.weight: rep | attention.k.weight: | attention.v.weight:] head_dim) hidden

A layout lists the dimensions of one stored tensor. A dimension is an axis, a product `(a b c)` of axes (the last one
varies fastest), or a sum `[x: a b | y: c]`: a stretch cut into consecutive parts, each belonging to the logical tensor
that its label names. Products and sums nest. `1` is a dimension of size one that no axis names. A layout without a sum
starts with the name of its one tensor: `mlp.down.weight: hidden ffn@tp`. An axis may be taken apart: `2` counts the
halves of the axis that is written `head_dim/2`, the place within a half, so that `(head_dim/2 2)` takes turns between
them where `(2 head_dim/2)` is `head_dim`.

`axis@tp` says that the parallel dimension `tp` partitions the axis: a rank stores the same layout on its own interval.
`(...)@tp` says that this stretch is cut into equal parts, whatever the axes inside (query heads of one group on two
ranks).

This module parses, checks and prints; `registry.boxes` evaluates a layout on sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache

from attrs import evolve, field, frozen

from registry.errors import LayoutError

_TOKEN = re.compile(r"\s*(?:(?P<name>[^\W\d][\w.]*)|(?P<number>[1-9]\d{0,3}(?!\w))|(?P<mark>[()\[\]|:@/]))")
MAX_LENGTH = 4096
MAX_DEPTH = 16


@frozen
class Axis:
    """A named axis; `shard` is the parallel dimension that partitions it, if any.

    `at`, here and in every other node, is where the node stands in the text, for errors.
    """

    name: str
    shard: str | None = None
    at: int = field(default=0, eq=False, repr=False)

    def __str__(self) -> str:
        return f"{self.name}@{self.shard}" if self.shard else self.name


@frozen
class Product:
    """Factors multiplied, the last varying fastest; an empty product has size one.

    With `parts`, one axis stands for the place within one of so many equal parts of it, and no factor for which of the
    parts it is.
    """

    factors: tuple[Node, ...]
    cut: str | None = None
    at: int = field(default=0, eq=False, repr=False)
    parts: int = 1

    def __str__(self) -> str:
        if self.parts > 1:
            return f"{self.factors[0]}/{self.parts}" if self.factors else str(self.parts)
        inner = " ".join(str(factor) for factor in self.factors)
        text = f"({inner})" if len(self.factors) != 1 or self.cut else inner
        return f"{text}@{self.cut}" if self.cut else (text if self.factors else "1")


@frozen
class Part:
    """One summand: the factors that follow each other in memory, and the logical tensor that they belong to."""

    label: str | None
    factors: tuple[Node, ...]
    at: int = field(default=0, eq=False, repr=False)

    def __str__(self) -> str:
        inner = " ".join(str(factor) for factor in self.factors)
        return f"{self.label}: {inner}".rstrip() if self.label else inner


@frozen
class Sum:
    """Consecutive parts of one stretch."""

    parts: tuple[Part, ...]
    cut: str | None = None
    at: int = field(default=0, eq=False, repr=False)

    def __str__(self) -> str:
        return "[" + " | ".join(str(part) for part in self.parts) + "]" + (f"@{self.cut}" if self.cut else "")


Node = Axis | Product | Sum


@frozen
class Layout:
    """A parsed layout. `tensors` are the logical tensors in order; `axes[t]` the axes of tensor t in stored order."""

    dims: tuple[Node, ...]
    label: str | None
    tensors: tuple[str, ...] = field(init=False)
    axes: dict[str, tuple[str, ...]] = field(init=False, eq=False)

    def __attrs_post_init__(self) -> None:
        tensors = (self.label,) if self.label else tuple(_labels(self.dims))
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "axes", {name: tuple(a.name for a in path(self.dims, name)) for name in tensors})

    def __str__(self) -> str:
        dims = " ".join(str(dim) for dim in self.dims)
        return f"{self.label}: {dims}".rstrip() if self.label else dims

    def __hash__(self) -> int:
        return hash((self.dims, self.label))

    def shards(self) -> dict[str, str]:
        """Axis name -> the parallel dimension that partitions it."""
        return {axis.name: axis.shard for axis in _walk_axes(self.dims) if axis.shard}

    def cuts(self) -> set[str]:
        """The parallel dimensions that cut a stretch without regard to its axes."""
        return set(_cuts(self.dims))

    def split(self) -> set[str]:
        """The axes that are taken apart."""
        return {name for node in _walk_split(self.dims) for name in [axis.name for axis in _walk_axes(node.factors)]}

    def sharded_over(self) -> set[str]:
        """Every parallel dimension that the layout names."""
        return {axis.shard for axis in _walk_axes(self.dims) if axis.shard} | self.cuts()

    def relabel(self, change: Callable[[str], str]) -> Layout:
        """This layout of other tensors: `change` gives each one's new name."""
        return Layout(_relabel(self.dims, change), change(self.label) if self.label else None)

    def prepend(self, axis: Axis) -> Layout:
        """This layout with one more leading dimension (stacked layers)."""
        return Layout((axis, *self.dims), self.label)


def _relabel(nodes: tuple[Node, ...], change: Callable[[str], str]) -> tuple[Node, ...]:
    def part(old: Part) -> Part:
        return evolve(old, label=change(old.label) if old.label else None, factors=_relabel(old.factors, change))

    def again(node: Node) -> Node:
        if isinstance(node, Product):
            return evolve(node, factors=_relabel(node.factors, change))
        return evolve(node, parts=tuple(map(part, node.parts))) if isinstance(node, Sum) else node

    return tuple(map(again, nodes))


def _walk_axes(nodes: tuple[Node, ...]) -> Iterator[Axis]:
    for node in nodes:
        if isinstance(node, Axis):
            yield node
        elif isinstance(node, Product):
            yield from _walk_axes(node.factors)
        else:
            for part in node.parts:
                yield from _walk_axes(part.factors)


def _walk_split(nodes: tuple[Node, ...]) -> Iterator[Product]:
    for node in nodes:
        if isinstance(node, Product):
            yield from (node,) if node.parts > 1 else _walk_split(node.factors)
        elif isinstance(node, Sum):
            for part in node.parts:
                yield from _walk_split(part.factors)


def _cuts(nodes: tuple[Node, ...]) -> Iterator[str]:
    for node in nodes:
        if not isinstance(node, Axis):
            if node.cut:
                yield node.cut
            for inner in (node.factors,) if isinstance(node, Product) else (part.factors for part in node.parts):
                yield from _cuts(inner)


def _labelled(nodes: tuple[Node, ...]) -> Iterator[Part]:
    for node in nodes:
        if isinstance(node, Product):
            yield from _labelled(node.factors)
        elif isinstance(node, Sum):
            for part in node.parts:
                if part.label:
                    yield part
                yield from _labelled(part.factors)


def _labels(nodes: tuple[Node, ...]) -> Iterator[str]:
    return (str(part.label) for part in _labelled(nodes))


def holds(part: Part, tensor: str) -> bool:
    """Does this summand belong to `tensor`, itself or through a nested sum?"""
    return part.label == tensor or tensor in _labels(part.factors)


def _on_path(nodes: tuple[Node, ...], tensor: str) -> Iterator[Node]:
    """The nodes that `tensor` goes through, outer ones first."""
    for node in nodes:
        yield node
        if isinstance(node, Product):
            yield from _on_path(node.factors, tensor)
        elif isinstance(node, Sum):
            for part in node.parts:
                if holds(part, tensor):
                    yield from _on_path(part.factors, tensor)


def path(nodes: tuple[Node, ...], tensor: str) -> Iterator[Axis]:
    """The axes of `tensor`, in stored order."""
    return (node for node in _on_path(nodes, tensor) if isinstance(node, Axis))


@lru_cache(maxsize=4096)
def parse(text: str) -> Layout:
    """Parse and check a layout. Raises LayoutError, which quotes the pattern and points at the place."""
    if len(text) > MAX_LENGTH:
        raise LayoutError("layout too long", expected=f"at most {MAX_LENGTH} characters", found=len(text))
    parser = _Parser(text)
    layout = parser.layout()
    _check(layout, text)
    return layout


def _fail(text: str, at: int, problem: str, hint: str | None = None) -> LayoutError:
    line = "".join(c if c.isprintable() else " " for c in text)
    return LayoutError(problem, where=f"\n    {line}\n    {' ' * at}^", hint=hint)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while at < len(text.rstrip()):
            match = _TOKEN.match(text, at)
            if not match:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise _fail(text, at, f"unexpected character {text[at]!r} in a layout")
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            at = match.end()
        self.tokens.append(("end", "end of layout", len(text)))
        self.position = 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[min(self.position + ahead, len(self.tokens) - 1)][1]

    def kind(self) -> str:
        return self.tokens[self.position][0]

    def at(self) -> int:
        return self.tokens[self.position][2]

    def take(self) -> str:
        token = self.tokens[self.position][1]
        self.position += 1
        return token

    def error(self, problem: str, hint: str | None = None) -> LayoutError:
        return _fail(self.text, self.at(), problem, hint)

    def layout(self) -> Layout:
        label = self.label()
        dims = self.factors(0)
        if self.kind() != "end":
            raise self.error(f"unexpected {self.peek()!r} in a layout")
        return Layout(dims, label)

    def label(self) -> str | None:
        if self.kind() == "name" and self.peek(1) == ":":
            name = self.take()
            self.take()
            return name
        return None

    def factors(self, depth: int) -> tuple[Node, ...]:
        if depth > MAX_DEPTH:
            raise self.error(f"layout nested deeper than {MAX_DEPTH}")
        nodes: list[Node] = []
        while self.kind() in ("name", "number") or self.peek() in ("(", "["):
            if self.kind() == "number":
                at = self.at()
                nodes.append(Product((), None, at, int(self.take())))
            elif self.kind() == "name":
                if self.peek(1) == ":":
                    raise self.error(
                        f"label {self.peek()!r} in the middle of a product",
                        "a label opens a layout or a part of a sum: `[label: axes | label: axes]`",
                    )
                nodes.append(self.axis())
            else:
                nodes.append(self.group(depth))
        return tuple(nodes)

    def axis(self) -> Node:
        at, name = self.at(), self.take()
        if self.peek() != "/":
            return Axis(name, self.suffix(), at)
        self.take()
        if self.kind() != "number" or self.peek() == "1":
            raise self.error("expected the number of parts of an axis, at least 2, after '/'")
        return Product((Axis(name, None, at),), None, at, int(self.take()))

    def group(self, depth: int) -> Node:
        at = self.at()
        if self.take() == "(":
            inner = self.factors(depth + 1)
            self.close(")")
            cut = self.suffix()
            return inner[0] if len(inner) == 1 and not cut else Product(inner, cut, at)
        parts = [self.part(depth)]
        while self.peek() == "|":
            self.take()
            parts.append(self.part(depth))
        self.close("]")
        return Sum(tuple(parts), self.suffix(), at)

    def part(self, depth: int) -> Part:
        at = self.at()
        return Part(self.label(), self.factors(depth + 1), at)

    def close(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.error(f"expected {mark!r}, found {self.peek()!r}")
        self.take()

    def suffix(self) -> str | None:
        if self.peek() != "@":
            return None
        self.take()
        if self.kind() != "name":
            raise self.error("expected the name of a parallel dimension after '@'")
        return self.take()


def _check(layout: Layout, text: str) -> None:
    start = len(text) - len(text.lstrip())
    sums = _independent_sums(layout.dims)
    if layout.label and sums:
        raise _fail(text, start, "a layout with a sum takes its labels from the parts, not from the front")
    if not layout.label and not sums:
        raise _fail(text, start, "no tensor is named", "write `tensor.name: axes`, or label the parts of a sum")
    if len(sums) > 1:
        raise _fail(
            text,
            sums[1].at,
            "two sums side by side leave the off-diagonal blocks to no tensor",
            "nest one sum inside a part of the other, or drop one",
        )
    _check_parts(layout.dims, text)
    parts = list(_labelled(layout.dims))
    for i, part in enumerate(parts):
        if part.label in [before.label for before in parts[:i]]:
            raise _fail(text, part.at, f"tensor {part.label!r} appears twice")
    for tensor in layout.tensors:
        _check_path(list(_on_path(layout.dims, tensor)), tensor, text)


def _check_path(nodes: list[Node], tensor: str, text: str) -> None:
    """A tensor has each axis once, and ranks partition it once: two shards leave blocks that no rank stores."""
    axes: set[str] = set()
    shards: set[str] = set()
    _check_split([node for node in nodes if isinstance(node, Product) and node.parts > 1], tensor, text)
    for node in nodes:
        if isinstance(node, Axis) and node.name in axes:
            raise _fail(text, node.at, f"axis {node.name!r} appears twice in tensor {tensor!r}")
        shard = node.shard if isinstance(node, Axis) else node.cut
        if shard in shards:
            raise _fail(text, node.at, f"{shard!r} shards tensor {tensor!r} twice")
        axes |= {node.name} if isinstance(node, Axis) else set()
        shards |= {shard} if shard else set()


def _check_split(nodes: list[Product], tensor: str, text: str) -> None:
    """What is taken apart is all there: for `axis/2` one `2`, and no other number."""
    axes, counts = ([node for node in nodes if bool(node.factors) == of] for of in (True, False))
    for those, others in ((axes, counts), (counts, axes)):
        for i, node in enumerate(those):
            if node.parts in [before.parts for before in those[:i]]:
                raise _fail(text, node.at, f"two parts of tensor {tensor!r} are counted by {node.parts}")
            if node.parts not in [other.parts for other in others]:
                problem = f"{node} of tensor {tensor!r} is only one half of an axis that is taken apart"
                raise _fail(text, node.at, problem, f"write both `axis/{node.parts}` and `{node.parts}`")


def _independent_sums(nodes: tuple[Node, ...]) -> list[Sum]:
    """Sums that no other sum holds, or those of the part of a sum that has most of them."""
    found: list[Sum] = []
    for node in nodes:
        if isinstance(node, Product):
            found += _independent_sums(node.factors)
        elif isinstance(node, Sum):
            inner = max((_independent_sums(part.factors) for part in node.parts), key=len)
            found += inner if len(inner) > 1 else [node]
    return found


def _check_parts(nodes: tuple[Node, ...], text: str) -> None:
    for node in nodes:
        if isinstance(node, Product):
            _check_parts(node.factors, text)
        elif isinstance(node, Sum):
            for part in node.parts:
                nested = bool(list(_labels(part.factors)))
                if part.label and nested:
                    raise _fail(text, part.at, f"part {part.label!r} has labelled parts of its own")
                if not part.label and not nested:
                    raise _fail(text, part.at, "a part of a sum names no tensor", "write `[label: axes | ...]`")
                _check_parts(part.factors, text)
