"""Files that are on no disk: a matrix whose values are made when they are read, a few thousand at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from registry.assemble import array
from registry.dtypes import ITEMSIZE
from registry.files import SourceFiles

if TYPE_CHECKING:
    from pathlib import Path

    import torch

Ints = NDArray[np.int64]

#: Values that are made at a time: what is needed for them stays in the cache.
_STEP = 1 << 19
#: Values that are made before they are copied to their places; what does not fit is cut.
_WINDOW = 1 << 20


class Computed(ABC):
    """A matrix of `width` columns in a type, whose values are made when they are read. See `registry.files.Virtual`.

    `label` tells apart the buffers of matrices that are made of each other.
    """

    __slots__ = ()
    label: ClassVar[str]
    path: Path
    dtype: str

    @property
    @abstractmethod
    def width(self) -> int:
        """Its columns: how many values lie in a row."""

    @abstractmethod
    def values(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """Columns [begin, end) of some rows, which rise; a hundred thousand values or so, of the file's type."""

    def read_into(self, files: SourceFiles, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset`: whole rows together, and parts of rows at either end."""
        item, width = ITEMSIZE[self.dtype], self.width
        while len(buffer):
            element, skip = divmod(offset, item)
            row, column = divmod(element, width)
            wanted = min(-(-(skip + len(buffer)) // item), _WINDOW)
            rows = 1 if column else max(1, wanted // width)
            columns = min(width - column, wanted)
            data = self._window(files, np.arange(row, row + rows), column, column + columns)[skip:]
            n = min(len(data), len(buffer))
            buffer[:n] = data[:n]
            buffer, offset = buffer[n:], offset + n

    def boxes(
        self, files: SourceFiles, offset: int, size: Sequence[int], stride: Sequence[int]
    ) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
        """A strided box that begins at byte `offset`, in parts: (where in the box, its raw elements)."""
        item, width = ITEMSIZE[self.dtype], self.width
        for low, part in _cut(offset // item, tuple(size), tuple(stride), width):
            first = offset // item + sum(i * s for i, s in zip(low, stride, strict=True))
            at = (*(slice(i, i + n) for i, n in zip(low, part, strict=True)), ...)
            window = _window(first, part, stride, width)
            if window is None:
                last = first + sum((n - 1) * s for n, s in zip(part, stride, strict=True))
                stretch = files.scratch(f"{self.label} stretch", (last + 1 - first) * item)
                self.read_into(files, first * item, stretch)
                yield at, array(stretch, item, part, stride, 0)
            else:
                values = self._window(files, window.rows, window.begin, window.end)
                yield at, array(values, item, part, window.stride, 0)

    def _window(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> memoryview:
        """Columns [begin, end) of some rows, in this thread's scratch."""
        item = ITEMSIZE[self.dtype]
        scratch = files.scratch(f"{self.label} window", len(rows) * (end - begin) * item)
        values = array(scratch, item, (len(rows), end - begin), (end - begin, 1), 0)
        step = max(1, _STEP // (end - begin))
        for i in range(0, len(rows), step):
            for at in range(begin, end, _STEP):
                to = min(at + _STEP, end)
                found = self.values(files, rows[i : i + step], at, to)
                values[i : i + step, at - begin : to - begin] = _raw(found, values.dtype)
        return scratch


def _raw(values: torch.Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    """Values as raw elements."""
    import torch

    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return values.contiguous().view(width).numpy().view(dtype)


class _Window(NamedTuple):
    """Rows and columns that hold a box, and the strides of the box in a matrix of them."""

    rows: Ints
    begin: int
    end: int
    stride: tuple[int, ...]


def _columns(first: int, size: Sequence[int], stride: Sequence[int], width: int) -> tuple[int, int]:
    """[begin, end) of the columns that a box reaches into; its end is beyond the row where it runs on into the next."""
    begin = first % width
    return begin, begin + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True) if s % width)


def _window(first: int, size: Sequence[int], stride: Sequence[int], width: int) -> _Window | None:
    """The rows and columns of a box; None for one that runs on from row to row."""
    begin, end = _columns(first, size, stride, width)
    if end > width:
        return None
    steps = list(stride)
    rows = np.array([first // width], dtype=np.int64)
    across = end - begin
    for axis in sorted((d for d in range(len(size)) if stride[d] % width == 0), key=lambda d: -stride[d]):
        rows = (rows[:, None] + np.arange(size[axis]) * (stride[axis] // width)).ravel()
    for axis in sorted((d for d in range(len(size)) if stride[d] % width == 0), key=lambda d: stride[d]):
        steps[axis], across = across, across * size[axis]
    return _Window(rows, begin, end, tuple(steps))


def _cut(
    first: int, size: tuple[int, ...], stride: tuple[int, ...], width: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Parts of a box that decode little enough at a time, as (where it begins, its size)."""
    waiting = [((0,) * len(size), size)] if math.prod(size) else []
    while waiting:
        low, part = waiting.pop()
        start = first + sum(i * s for i, s in zip(low, stride, strict=True))
        begin, end = _columns(start, part, stride, width)
        if end > width:
            count = 1 + sum((n - 1) * s for n, s in zip(part, stride, strict=True))
        else:
            count = (end - begin) * math.prod(n for n, s in zip(part, stride, strict=True) if s % width == 0)
        axes = [d for d, n in enumerate(part) if n > 1]
        if count <= _WINDOW or not axes:
            yield low, part
            continue
        # Halves along the axis that reaches furthest: what lies together is decoded together.
        axis = max(axes, key=lambda d: stride[d])
        half = part[axis] // 2
        upper = tuple(i + half if d == axis else i for d, i in enumerate(low))
        waiting.append((upper, tuple(n - half if d == axis else n for d, n in enumerate(part))))
        waiting.append((low, tuple(half if d == axis else n for d, n in enumerate(part))))
