"""Evaluate a layout on sizes: shapes, strided views, a rank's box, and the pull of a stored box back to logical boxes.

Everything is one idea. Along a stored dimension, the elements of one logical tensor lie at `base + sum(stride * index)`
over that dimension's axes. So a box of a stored tensor is, for each logical tensor in it, an affine map from logical
indices to element offsets: a `Fragment`. Copies between formats are copies between fragments of the same tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from attrs import frozen

from registry.errors import LayoutError, ParallelError
from registry.layout import Axis, Layout, Node, Part, Product, Sum, holds

if TYPE_CHECKING:
    import torch


class Fragment(NamedTuple):
    """Where a box of one logical tensor lies in a stored piece.

    The element with logical index `i` (with `lo <= i < lo + size`, axis by axis) lies at element
    `offset + sum((i - lo) * stride)` of the piece.
    """

    tensor: str
    axes: tuple[str, ...]
    lo: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def volume(self) -> int:
        return math.prod(self.size)


class _Along(NamedTuple):
    """One logical tensor along one stored dimension: its base, and (axis, lo, size, stride) outermost first."""

    base: int
    axes: tuple[tuple[str, int, int, int], ...]


def clip(base: int, size: Sequence[int], stride: Sequence[int], lo: int, hi: int) -> list[tuple[tuple[int, int], ...]]:
    """Cut the nested positions `base + sum(stride * i)` to those in [lo, hi).

    Strides must be nested: each at least the extent of what lies inside it, as in any product of axes. Returns disjoint
    boxes, each a (start, count) per axis; at most two per nesting level, so their number does not grow with the sizes.
    """
    inner = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 in size or base >= hi or base + inner <= lo:
        return []
    if lo <= base and base + inner <= hi:
        return [tuple((0, n) for n in size)]
    count, step = size[0], stride[0]
    inner -= (count - 1) * step
    full_from = min(max(-(-(lo - base) // step), 0), count)
    full_to = max(min((hi - inner - base) // step + 1, count), full_from)
    touched_from = max((lo - base - inner) // step + 1, 0)
    touched_to = min(-(-(hi - base) // step), count)
    rest = tuple((0, n) for n in size[1:])
    boxes = [((full_from, full_to - full_from), *rest)] if full_to > full_from else []
    for i in (*range(touched_from, full_from), *range(max(full_to, touched_from), touched_to)):
        boxes += [((i, 1), *box) for box in clip(base + i * step, size[1:], stride[1:], lo, hi)]
    return boxes


@frozen
class Box:
    """The sizes that a layout is evaluated on, and whose part of it: what every evaluation takes.

    `sizes` are the stored sizes of the axes; `present` the logical tensors that exist (None: all), for the parts of
    absent ones take no room; `ranks` the (index, count) along each parallel dimension that a shard is taken of (a
    dimension that is not listed is not sharded: the global tensor); `replicate` the axes that are repeated where they
    are shorter than a dimension has ranks; `limits` the logical sizes of padded axes, beyond which stored elements are
    padding and belong to no tensor.
    """

    sizes: Mapping[str, int]
    present: frozenset[str] | None = None
    ranks: Mapping[str, tuple[int, int]] = {}
    replicate: Mapping[str, frozenset[str]] = {}
    limits: Mapping[str, int] = {}

    def has(self, part: Part) -> bool:
        """Does the tensor of this summand exist?"""
        return self.present is None or any(holds(part, tensor) for tensor in self.present)

    def extent(self, axis: Axis) -> tuple[int, int]:
        """The (first, number) of the axis that this rank stores."""
        try:
            size = self.sizes[axis.name]
        except KeyError:
            known = ", ".join(sorted(self.sizes))
            raise LayoutError(f"axis {axis.name!r} has no size", found=f"sizes of {known}") from None
        if axis.shard is None or axis.shard not in self.ranks:
            return 0, size
        repeated = axis.name in self.replicate.get(axis.shard, ())
        return interval(size, *self.ranks[axis.shard], what=str(axis), replicate=repeated)


def _product_size(factors: Sequence[Node], box: Box) -> int:
    return math.prod(node_size(factor, box) for factor in factors)


def _part_size(node: Product, box: Box) -> int:
    """How long each of the parts of an axis is that a layout takes apart."""
    size = _product_size(node.factors, box)
    if size % node.parts:
        raise LayoutError(
            f"{node} does not divide", expected=f"a size that {node.parts} divides", found=f"size {size}",
            hint="check the sizes that the config says",
        )  # fmt: skip
    return size // node.parts


def _whole_size(node: Product | Sum, box: Box) -> int:
    if isinstance(node, Product) and node.parts > 1:
        return _part_size(node, box) if node.factors else node.parts
    if isinstance(node, Product):
        return _product_size(node.factors, box)
    return sum(_product_size(part.factors, box) for part in node.parts if box.has(part))


def node_size(node: Node, box: Box) -> int:
    """Elements along one factor of a layout, on one rank."""
    if isinstance(node, Axis):
        return box.extent(node)[1]
    whole = _whole_size(node, box)
    if node.cut is not None and node.cut in box.ranks:
        return interval(whole, *box.ranks[node.cut], what=str(node))[1]
    return whole


def shape(layout: Layout, box: Box) -> tuple[int, ...]:
    """The shape of the stored tensor, on one rank."""
    return tuple(node_size(dim, box) for dim in layout.dims)


def _along(node: Node, tensor: str, box: Box) -> list[_Along]:
    """`tensor` along one node, in positions of that node."""
    if isinstance(node, Axis):
        lo, size = box.extent(node)
        if node.name in box.limits:
            size = max(0, min(size, box.limits[node.name] - lo))
        return [_Along(0, ((node.name, lo, size, 1),))]
    if isinstance(node, Product) and node.parts > 1:
        if not node.factors:  # which of the parts: each is a box of its own, see `_joined`
            return [_Along(part, ((f"/{node.parts}", part, 1, 1),)) for part in range(node.parts)]
        found = [_Along(0, ((str(node), 0, _part_size(node, box), 1),))]
    elif isinstance(node, Product):
        found = _along_product(node.factors, tensor, box)
    else:
        found, base = [], 0
        for part in node.parts:
            if holds(part, tensor):
                found = [_Along(base + inner.base, inner.axes) for inner in _along_product(part.factors, tensor, box)]
                break
            if box.has(part):
                base += _product_size(part.factors, box)
    if node.cut is not None and node.cut in box.ranks:
        offset, size = interval(_whole_size(node, box), *box.ranks[node.cut], what=str(node))
        found = [piece for along in found for piece in _cut(along, offset, size)]
    return found


def _along_product(factors: Sequence[Node], tensor: str, box: Box) -> list[_Along]:
    found, step = [_Along(0, ())], 1
    for factor in reversed(factors):
        found = [
            _Along(
                inner.base * step + outer.base,
                (*((name, lo, size, stride * step) for name, lo, size, stride in inner.axes), *outer.axes),
            )
            for inner in _along(factor, tensor, box)
            for outer in found
        ]
        step *= node_size(factor, box)
    return found


def contiguous(sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides = [1] * len(sizes)
    for i in range(len(sizes) - 2, -1, -1):
        strides[i] = strides[i + 1] * sizes[i + 1]
    return tuple(strides)


def fragments(
    layout: Layout,
    box: Box,
    *,
    piece: Sequence[tuple[int, int]] | None = None,
    strides: Sequence[int] | None = None,
) -> list[Fragment]:
    """The logical boxes that a stored piece holds, and where.

    `piece` is the (offset, size) of the piece in each stored dimension (default: the whole tensor); `strides` those of
    the piece's storage in elements (default: row-major). Raises LayoutError for a piece outside the stored tensor.
    """
    whole = shape(layout, box)
    piece = [(0, n) for n in whole] if piece is None else list(piece)
    if len(piece) != len(whole) or any(o < 0 or n < 0 or o + n > w for (o, n), w in zip(piece, whole, strict=True)):
        raise LayoutError("a piece outside its tensor", where=str(layout), expected=f"within {whole}", found=piece)
    steps = contiguous([n for _, n in piece]) if strides is None else tuple(strides)
    found = []
    for tensor in layout.tensors:
        if box.present is not None and tensor not in box.present:
            continue
        per_dim = [
            [cut for along in _along(dim, tensor, box) for cut in _cut(along, offset, size)]
            for dim, (offset, size) in zip(layout.dims, piece, strict=True)
        ]
        found += [_fragment(tensor, combination, steps, box) for combination in itertools.product(*per_dim)]
    return [fragment for fragment in found if fragment.volume]


def _cut(along: _Along, offset: int, size: int) -> list[_Along]:
    pieces = []
    for boxes in clip(along.base, [a[2] for a in along.axes], [a[3] for a in along.axes], offset, offset + size):
        starts = [start for start, _ in boxes]
        base = along.base - offset + sum(i * a[3] for i, a in zip(starts, along.axes, strict=True))
        axes = tuple((a[0], a[1] + i, n, a[3]) for a, (i, n) in zip(along.axes, boxes, strict=True))
        pieces.append(_Along(base, axes))
    return pieces


def stretch(fragment: Fragment, first: int, count: int) -> list[Fragment]:
    """The parts of a fragment of a row-major box in the stretch [first, first + count) of the box laid out in a row.

    Offsets of the parts count from the beginning of the stretch.
    """
    found = []
    for box in clip(fragment.offset, fragment.size, fragment.stride, first, first + count):
        lo = tuple(low + start for low, (start, _) in zip(fragment.lo, box, strict=True))
        at = fragment.offset - first + sum(i * s for (i, _), s in zip(box, fragment.stride, strict=True))
        found.append(Fragment(fragment.tensor, fragment.axes, lo, tuple(n for _, n in box), fragment.stride, at))
    return found


def _fragment(tensor: str, per_dim: Sequence[_Along], steps: Sequence[int], box: Box) -> Fragment:
    axes = [
        (name, lo, size, stride * step)
        for along, step in zip(per_dim, steps, strict=True)
        for name, lo, size, stride in along.axes
    ]
    if any("/" in a[0] for a in axes):
        axes = list(_joined(axes, box))
    return Fragment(
        tensor,
        tuple(a[0] for a in axes),
        tuple(a[1] for a in axes),
        tuple(a[2] for a in axes),
        tuple(a[3] for a in axes),
        sum(along.base * step for along, step in zip(per_dim, steps, strict=True)),
    )


def _joined(axes: Sequence[tuple[str, int, int, int]], box: Box) -> Iterator[tuple[str, int, int, int]]:
    """The axes with those that are taken apart in one again: where its part begins, and the places within the part."""
    parts = {name[1:]: lo for name, lo, _, _ in axes if name.startswith("/")}
    for name, lo, size, stride in axes:
        axis, _, count = name.partition("/")
        if axis:
            first = parts[count] * (box.sizes[axis] // int(count)) if count else 0
            yield axis, first + lo, size, stride


def interval(size: int, index: int, count: int, what: str, *, replicate: bool = False) -> tuple[int, int]:
    """The (first, number) of rank `index` of `count` along an axis of `size`.

    With `replicate`, an axis shorter than the number of ranks is repeated, each entry on `count / size` consecutive
    ranks (TensorRT-LLM's KV heads, tensorrt_llm/models/convert_utils.py). Raises ParallelError.
    """
    if size % count == 0:
        return index * (size // count), size // count
    if replicate and size and count % size == 0:
        return index * size // count, 1
    raise ParallelError(
        f"{what} does not divide",
        expected=f"a size that {count} ranks divide" + (", or ranks that the size divides" if replicate else ""),
        found=f"size {size} over {count} ranks",
        hint="choose another parallel size",
    )


def views(layout: Layout, stored: torch.Tensor, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Logical tensor -> its view of `stored`, axes in stored order. No element is copied.

    `stored` is a torch tensor of shape `shape(layout, Box(sizes))`, of any strides. Raises LayoutError, also where axes
    are taken apart: those are no views.
    """
    if axes := layout.split():
        raise LayoutError("no view has an axis that is taken apart", where=layout, found=", ".join(sorted(axes)))
    expected, found = shape(layout, Box(sizes)), tuple(stored.shape)
    if found != expected:
        raise LayoutError("shape disagrees with the layout", where=layout, expected=expected, found=found)
    result: dict[str, torch.Tensor] = {}
    for fragment in fragments(layout, Box(sizes), strides=stored.stride()):
        result[fragment.tensor] = stored.as_strided(
            fragment.size, fragment.stride, stored.storage_offset() + fragment.offset
        )
    for name in layout.tensors:
        if name not in result:  # a tensor without elements
            result[name] = stored.new_empty([sizes[axis] for axis in layout.axes[name]])
    return result


def assemble(layout: Layout, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> torch.Tensor:
    """The inverse of `views`: the stored tensor made of logical ones (axes in stored order). Raises LayoutError."""
    if missing := [name for name in layout.tensors if name not in tensors]:
        raise LayoutError("a stored tensor lacks parts", where=layout, found="no " + ", ".join(missing))
    if len(types := {str(tensors[name].dtype) for name in layout.tensors}) > 1:
        raise LayoutError(
            "parts of one stored tensor have different types", where=layout, found=", ".join(sorted(types))
        )
    stored = tensors[layout.tensors[0]].new_zeros(shape(layout, Box(sizes)))
    for name, view in views(layout, stored, sizes).items():
        expected, found = tuple(view.shape), tuple(tensors[name].shape)
        if found != expected:
            raise LayoutError(
                f"shape of {name} disagrees with the layout", where=layout, expected=expected, found=found
            )
        view.copy_(tensors[name])
    return stored
