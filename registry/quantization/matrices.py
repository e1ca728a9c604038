"""Weights of the unquantised target on one rank, which is never written: read as they are needed, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from attrs import define, frozen

from registry.assemble import Assembler, Table, array
from registry.computed import Ints
from registry.dtypes import ITEMSIZE, torch_dtype
from registry.files import SourceFiles

if TYPE_CHECKING:
    import torch

#: Values of the matrix that are worked on at a time.
STEP = 1 << 18


@define(eq=False)
class Stage:
    """The unquantised target on one rank, whose tensors are read row by row. `table` is made when first read from."""

    table: Callable[[], Table]
    _last: tuple[SourceFiles, Assembler] | None = None

    def read(self, files: SourceFiles, slot: int, begin: int, buffer: memoryview) -> None:
        """The bytes of one tensor from `begin` on."""
        last = self._last
        if last is None or last[0] is not files:
            self._last = last = files, Assembler(files, self.table())
        last[1].fill(buffer, slot, 0, begin, begin + len(buffer))


@frozen(eq=False)
class Matrix:
    """A weight of the unquantised target as (experts, rows, columns), and where the parts that it is made of begin."""

    stage: Stage
    slot: int
    name: str
    dtype: str
    shape: tuple[int, int, int]
    parts: Ints
    path: Path

    @property
    def rows(self) -> int:
        """Rows of all experts."""
        return self.shape[0] * self.shape[1]

    def read(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """Columns [begin, end) of some rows, as float32."""
        import torch

        width, item = self.shape[2], ITEMSIZE[self.dtype]
        scratch = files.scratch("plain rows", len(rows) * width * item)
        at = 0
        for first, count in _runs(rows):
            size = count * width * item
            self.stage.read(files, self.slot, first * width * item, scratch[at : at + size])
            at += size
        raw = array(scratch, item, (len(rows), end - begin), (width, 1), begin * item)
        return torch.from_numpy(raw).view(torch_dtype(self.dtype)).to(torch.float32, copy=True)

    def blocks(self) -> Iterator[Ints]:
        """All rows, some at a time, and never those of two experts."""
        step = max(1, STEP // self.shape[2])
        for expert in range(self.shape[0]):
            first = expert * self.shape[1]
            for row in range(first, first + self.shape[1], step):
                yield np.arange(row, min(row + step, first + self.shape[1]))


def _runs(rows: Ints) -> Iterator[tuple[int, int]]:
    """Rows that follow each other, as (first, count)."""
    if int(rows[-1]) - int(rows[0]) + 1 == len(rows):
        yield int(rows[0]), len(rows)
        return
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(rows, breaks):
        yield int(run[0]), len(run)
