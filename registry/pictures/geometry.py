"""Where the blocks of logical tensors lie in a stored tensor that is drawn as a matrix of rows and columns.

The last dimension runs across and all others run down. A fragment is affine in its axes, so that along each direction
its blocks begin at `base + sum(step * index)`: a few numbers, however many blocks there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice, product
from typing import NamedTuple

from attrs import frozen

from registry.boxes import Fragment, contiguous

#: Blocks of one stored tensor that are all drawn; of one that has more only a corner is, with about so many.
MOST = 256
CORNER = 64


class Along(NamedTuple):
    """One axis of a logical box: its first index and its extent, and the rows or columns from one index to the next."""

    axis: str
    lo: int
    size: int
    rows: int
    columns: int


@frozen
class Part:
    """A fragment in rows and columns: where it begins, and its axes."""

    tensor: str
    row: int
    column: int
    axes: tuple[Along, ...]

    def down(self, most: int) -> tuple[list[int], int]:
        """The first rows of its blocks, no more than `most` of them, and how many rows each has."""
        return spans(self.row, [(a.size, a.rows) for a in self.axes], most)

    def across(self, most: int) -> tuple[list[int], int]:
        """The same in columns."""
        return spans(self.column, [(a.size, a.columns) for a in self.axes], most)


@frozen
class Picture:
    """A stored tensor as a matrix. `shown` are the rows and columns, from the first on, that are drawn.

    `begin` counts the elements of the tensor, laid out in a row, that come before the picture's first.
    """

    shape: tuple[int, ...]
    rows: int
    columns: int
    begin: int
    shown: tuple[int, int]
    parts: tuple[Part, ...]


def spans(base: int, axes: Iterable[tuple[int, int]], most: int) -> tuple[list[int], int]:
    """The runs that a box makes along one direction: their first positions, rising, and the length of each.

    `axes` are (extent, step). Steps nest, as in any product of axes, so the innermost ones merge into runs.
    """
    outer = sorted(((step, n) for n, step in axes if step and n > 1), reverse=True)
    run = 1
    while outer and outer[-1][0] == run:
        run *= outer.pop()[1]
    indices = product(*(range(n) for _, n in outer))
    starts = (base + sum(i * step for i, (step, _) in zip(at, outer, strict=True)) for at in indices)
    return list(islice(starts, most)), run


def picture(
    shape: Sequence[int], fragments: Sequence[Fragment], *, strides: Sequence[int] | None = None,
    stretch: tuple[int, int] | None = None,
) -> Picture:  # fmt: skip
    """The picture of a piece of this shape; `strides` and `stretch` are those of `registry.storage.Piece`."""
    if strides is not None:
        fragments = [_row_major(f, shape, strides) for f in fragments]
    begin, volume = stretch or (0, math.prod(shape))
    width = _width(shape, fragments, begin, volume)
    parts = tuple(_part(f, width) for f in fragments)
    rows = volume // width if width else 0
    return Picture(tuple(shape), rows, width, begin, _shown(parts, rows, width), parts)


def position(offset: int, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The index of the element at an offset of a tensor of this shape with these strides."""
    index = [0] * len(shape)
    for d in sorted((d for d, n in enumerate(shape) if n > 1 and strides[d]), key=lambda d: -strides[d]):
        index[d], offset = divmod(offset, strides[d])
    return tuple(index)


def _row_major(fragment: Fragment, shape: Sequence[int], strides: Sequence[int]) -> Fragment:
    """The fragment of the same tensor, were it stored row by row."""
    steps = contiguous(shape)

    def at(offset: int) -> int:
        return sum(index * step for index, step in zip(position(offset, shape, strides), steps, strict=True))

    return fragment._replace(stride=tuple(map(at, fragment.stride)), offset=at(fragment.offset))


def _width(shape: Sequence[int], fragments: Sequence[Fragment], begin: int, volume: int) -> int:
    """The columns of the picture: the last dimension, unless an axis runs on from one row into the next.

    That is so where bytes lie in another order than the shape says; then the nearest extent that holds whole axes.
    """
    own = shape[-1] if shape else 1
    inner = {step for f in fragments for step in f.stride if step > 1}
    for width in sorted({own, *inner}, key=lambda n: (n > own, abs(n - own))):
        if width and not begin % width and not volume % width and all(_fits(f, width) for f in fragments):
            return width
    return volume


def _fits(fragment: Fragment, width: int) -> bool:
    last = fragment.offset % width
    for n, step in zip(fragment.size, fragment.stride, strict=True):
        if n > 1 and step % width:
            last += (n - 1) * step
    return last < width


def _part(fragment: Fragment, width: int) -> Part:
    row, column = divmod(fragment.offset, width)
    axes = []
    for axis, lo, n, step in zip(fragment.axes, fragment.lo, fragment.size, fragment.stride, strict=True):
        down, across = (step // width, 0) if step % width == 0 else (0, step)
        axes.append(Along(axis, lo, n, down, across) if n > 1 else Along(axis, lo, n, 0, 0))
    return Part(fragment.tensor, row, column, tuple(axes))


def _shown(parts: Sequence[Part], rows: int, columns: int) -> tuple[int, int]:
    """All rows and columns where the blocks are few, else a corner that holds about `CORNER` blocks."""
    begins = [(part.down(MOST + 1)[0], part.across(MOST + 1)[0]) for part in parts]

    def within(starts: Iterable[int], end: int) -> int:
        return sum(start < end for start in starts)

    def blocks() -> int:
        return sum(within(down, rows) * within(across, columns) for down, across in begins)

    if blocks() <= MOST:
        return rows, columns
    while blocks() > CORNER:
        down = sorted({start for starts, _ in begins for start in starts if start < rows})
        across = sorted({start for _, starts in begins for start in starts if start < columns})
        if len(down) >= len(across):
            rows = down[(len(down) + 1) // 2]
        else:
            columns = across[(len(across) + 1) // 2]
    return rows, columns
