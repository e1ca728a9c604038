"""Weights that are quantised when they are read: a file on no disk for each tensor that is stored of them.

A `Unit` is one weight matrix and the scheme that quantises it. Its scales are of the whole matrix, which is read once
for them, a few rows at a time; its values are computed when they are written, for the rows and columns asked for.
"""

from __future__ import annotations

import ast
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import define, field, frozen

from registry.assemble import Assembler, Table, array
from registry.computed import Computed, Ints
from registry.dtypes import ITEMSIZE, torch_dtype
from registry.errors import MappingError
from registry.files import SourceFiles
from registry.quantization import formulas
from registry.quantization.declared import Range, Scheme, StoredTensor

if TYPE_CHECKING:
    import torch

#: Values of the matrix that are worked on at a time.
_STEP = 1 << 18


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
        step = max(1, _STEP // self.shape[2])
        for expert in range(self.shape[0]):
            first = expert * self.shape[1]
            for row in range(first, first + self.shape[1], step):
                yield np.arange(row, min(row + step, first + self.shape[1]))


def _runs(rows: Ints) -> Iterator[tuple[int, int]]:
    """Rows that follow each other, as (first, count)."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(rows, breaks):
        yield int(run[0]), len(run)


@define(eq=False)
class Unit:
    """One matrix under one scheme. `ranges` are by name, one tensor for each part of the matrix.

    `together` are the units that share ranges with it, itself among them; they share `cache` and `lock` too. `error`
    is the largest difference between a value that was written and what it will be read as, and `largest` the largest
    value.
    """

    matrix: Matrix
    name: str
    scheme: Scheme
    declared: Mapping[str, Range]
    ranges: Mapping[str, Sequence[torch.Tensor]]
    constants: Mapping[str, Any]
    beside: Mapping[str, Matrix] = field(factory=dict)
    together: list[Unit] = field(factory=list)
    cache: dict[Any, torch.Tensor] = field(factory=dict)
    lock: threading.RLock = field(factory=threading.RLock)
    error: float | None = None
    largest: float = 0.0

    def check(self, files: SourceFiles) -> None:
        """Read all of the matrix once. Raises MappingError for values that are no finite numbers."""
        import torch

        found = _Block(self, files, np.zeros(1, dtype=np.int64), 0, 1).whole("absmax", ast.Name("plain"), alone=True)
        self.largest = float(found.max())
        if not bool(torch.isfinite(found).all()):
            raise MappingError(
                "a weight holds values that are no finite numbers", where=f"{self.matrix.path}: {self.matrix.name}",
                expected=f"finite numbers, to be quantised as {self.name}", found="infinity or NaN",
                hint="the checkpoint is damaged, or its training diverged",
            )  # fmt: skip
        self._check_calibrated(found)

    def _check_calibrated(self, found: torch.Tensor) -> None:
        """The largest weight that the calibration saw must be the largest that is there, but for rounding."""
        given = self.ranges.get("weight")
        if given is not None and all(part.numel() == 1 for part in given):
            said = max(float(part) for part in given)
            if abs(said - self.largest) > 0.01 * max(said, self.largest):
                raise MappingError(
                    "the calibration is of other weights", where=self.matrix.name,
                    expected=f"{said:.6g} as the largest of them, as the calibration says", found=f"{self.largest:.6g}",
                    hint="calibrate this model, and quantise the weights that were calibrated",
                )  # fmt: skip


class _Block:
    """Some rows and columns of a unit's matrix, for formulas. See `registry.quantization.formulas.Block`."""

    def __init__(self, unit: Unit, files: SourceFiles, rows: Ints, begin: int, end: int) -> None:
        self.unit, self.files, self.rows, self.begin, self.end = unit, files, rows, begin, end
        self._known: dict[str, Any] = {}
        self._raw: dict[str, torch.Tensor] = {}

    def formula(self, text: str) -> Any:
        """The value of a formula."""
        return formulas.parse(text)(self)

    def name(self, name: str) -> Any:
        """As in `Block`."""
        if name not in self._known:
            self._known[name] = self._name(name)
        return self._known[name]

    def stored(self, key: str) -> torch.Tensor:
        """What a stored tensor holds, in its type; of a packed one the numbers, in float32."""
        if key not in self._raw:
            stored = self.unit.scheme.tensors[key]
            self._raw[key] = _held(self.formula(stored.value), stored, self.unit.constants["dtype"])
        return self._raw[key]

    def _name(self, name: str) -> Any:
        import torch

        unit = self.unit
        if name == "plain":
            return unit.matrix.read(self.files, self.rows, self.begin, self.end)
        if name in unit.scheme.let:
            return self.formula(unit.scheme.let[name])
        if name in unit.scheme.tensors:
            return self.stored(name).to(torch.float32)
        if name in unit.beside:
            return unit.beside[name].read(self.files, np.zeros(1, dtype=np.int64), self.begin, self.end)
        if name in unit.constants:
            return unit.constants[name]
        return self._range(name)

    def given(self, name: str) -> bool:
        """As in `Block`."""
        return name in self.unit.ranges

    def _range(self, name: str) -> torch.Tensor:
        """A range, as the rows' parts have it."""
        import torch

        found, parts = self.unit.ranges[name], self.unit.matrix.parts
        at = np.searchsorted(parts, self.rows, "right") - 1
        if self.unit.declared[name].shape == "out":
            flat = torch.cat([part.reshape(-1) for part in found]).to(torch.float32)
            return flat[torch.from_numpy(self.rows)][:, None]
        table = torch.stack([part.reshape(-1) for part in found]).to(torch.float32)
        if table.shape[1] > 1:
            table = table[:, self.begin : self.end]
        return table[at[:1]] if at[0] == at[-1] else table[at]

    def reduce(self, function: str, inner: ast.expr) -> torch.Tensor:
        """As in `Block`."""
        import torch

        matrix = self.unit.matrix
        if function == "row_absmax":
            return self.wide(0, matrix.shape[2]).value(inner).abs().amax(1, keepdim=True)
        if function == "group_absmax":
            return self._groups(inner)
        if function == "mean":
            return self.at(matrix.parts, self.begin, self.end).value(inner).mean(0, keepdim=True)
        found = self.whole(function, inner)
        if function.endswith("largest"):
            return found
        index = np.searchsorted(matrix.parts, self.rows, "right") - 1 if function == "part_absmax" else (
            self.rows // matrix.shape[1])  # fmt: skip
        chosen = found[torch.from_numpy(index)]
        return chosen[:, self.begin : self.end] if function == "column_absmax" else chosen

    def at(self, rows: Ints, begin: int, end: int) -> _Block:
        """Other rows and columns of the same matrix."""
        return _Block(self.unit, self.files, rows, begin, end)

    def wide(self, begin: int, end: int) -> _Block:
        """Other columns of the same rows."""
        return self if (begin, end) == (self.begin, self.end) else self.at(self.rows, begin, end)

    def value(self, inner: ast.expr) -> torch.Tensor:
        """The value of a part of a formula."""
        found: torch.Tensor = formulas.evaluate(inner, self)
        return found

    def _groups(self, inner: ast.expr) -> torch.Tensor:
        size = self.unit.constants["group"]
        first, last = self.begin // size * size, -(-self.end // size) * size
        block = self.wide(first, last)
        values = block.value(inner).expand(len(self.rows), last - first)
        found = values.reshape(len(self.rows), -1, size).abs().amax(2).repeat_interleave(size, 1)
        return found[:, self.begin - first : self.end - first]

    def whole(self, function: str, inner: ast.expr, *, alone: bool = False) -> torch.Tensor:
        """A reduction over whole matrices, computed once: of each expert, of each part, or of everything."""
        import torch

        unit = self.unit
        units = [unit] if alone or function in ("part_absmax", "own_largest") else unit.together or [unit]
        text = ast.dump(inner)
        with unit.lock:
            for u in units:
                if (function, text, id(u)) not in unit.cache:
                    found = _over(_Block(u, self.files, self.rows, 0, 1), function, inner)
                    unit.cache[function, text, id(u)] = found
            return torch.stack([unit.cache[function, text, id(u)] for u in units]).amax(0)


def _over(block: _Block, function: str, inner: ast.expr) -> torch.Tensor:
    """One matrix's share of a reduction, in a pass over its rows."""
    import torch

    matrix = block.unit.matrix
    experts, _, width = matrix.shape
    if function.endswith("largest"):
        names = {node.id for node in ast.walk(inner) if isinstance(node, ast.Name)}
        by_row = any(n in block.unit.ranges and block.unit.declared[n].shape == "out" for n in names)
        rows = np.arange(matrix.rows) if by_row else matrix.parts
        everything: torch.Tensor = block.at(rows, 0, 1 if by_row else width).value(inner)
        return everything.amax().reshape(1, 1)
    if function == "part_absmax":
        edges = [*matrix.parts.tolist(), matrix.rows]
        found = torch.zeros(len(matrix.parts), 1)
    else:
        edges = []
        found = torch.zeros(experts, width if function == "column_absmax" else 1)
    for rows in matrix.blocks():
        values = block.at(rows, 0, width).value(inner).abs()
        if function == "column_absmax":
            at = int(rows[0]) // matrix.shape[1]
            found[at] = torch.maximum(found[at], values.amax(0))
        elif function == "absmax":
            at = int(rows[0]) // matrix.shape[1]
            found[at] = torch.maximum(found[at], values.amax())
        else:
            for k, (low, high) in enumerate(itertools.pairwise(edges)):
                own = values[torch.from_numpy((rows >= low) & (rows < high))]
                if own.numel():
                    found[k] = torch.maximum(found[k], own.amax())
    return found


def _held(value: Any, stored: StoredTensor, model: str) -> torch.Tensor:
    """A value as the stored tensor holds it; of a packed one the numbers themselves, in float32."""
    import torch

    dtype = "float32" if stored.packed else model if stored.dtype == "model" else stored.dtype
    if not torch.is_tensor(value):
        value = torch.full((1, 1), float(value))
    held: torch.Tensor = value.to(torch_dtype(dtype))
    return held


@frozen(eq=False)
class Stored(Computed):
    """The file that one stored tensor of a unit would be in."""

    unit: Unit
    key: str
    shape: tuple[int, ...]
    dtype: str
    label = "stored"

    @property
    def path(self) -> Path:  # type: ignore[override]  # an attribute there
        """As in `registry.files.Virtual`."""
        return self.unit.matrix.path

    @property
    def width(self) -> int:
        """As in `Computed`."""
        return self.shape[-1] if self.shape else 1

    def values(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """As in `Computed`."""
        import torch

        height = self.unit.matrix.shape[1]
        dims = self.unit.scheme.tensors[self.key].shape.split()
        if dims and dims[-1] == "out":
            blocks = [self._block(files, int(e) * height + np.arange(begin, end), 0, 1) for e in rows]
            return torch.stack([block.reshape(-1) for block in blocks])
        if any(dim.startswith("out") for dim in dims):
            scale = {"in": 1, "in/2": 2, "in/group": self.unit.constants["group"]}[dims[-1]]
            own = np.stack([2 * rows, 2 * rows + 1], 1).ravel() if "out/2" in dims else rows
            return self._block(files, own, begin * scale, end * scale)
        if dims and dims[-1] == "in":
            return self._block(files, rows * height, begin, end)
        if dims and dims[-1] == "expert":
            return self._block(files, np.arange(begin, end) * height, 0, 1).reshape(1, -1)
        return self._block(files, rows * height, 0, 1).expand(len(rows), end - begin)

    def _block(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """What is stored of some rows and columns of the matrix, in its type."""
        import torch

        stored = self.unit.scheme.tensors[self.key]
        step = max(2, _STEP // self.unit.matrix.shape[2] // 2 * 2)
        found = [self._part(files, rows[i : i + step], begin, end, stored) for i in range(0, len(rows), step)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _part(self, files: SourceFiles, rows: Ints, begin: int, end: int, stored: StoredTensor) -> torch.Tensor:
        block = _Block(self.unit, files, rows, begin, end)
        value = block.stored(self.key)
        dims = stored.shape.split()
        whole = any(d.startswith("out") for d in dims) and any(d.startswith("in") for d in dims)
        value = value.expand(len(rows), end - begin if dims and dims[-1].startswith("in") else 1)
        if whole and "in/group" not in dims:
            self._measure(block)
        if "in/group" in dims:
            value = value[:, :: self.unit.constants["group"]]
        if stored.packed:
            return _pack(value, stored, rows="out/2" in dims).to(torch_dtype(self.dtype))
        return value.to(torch_dtype(self.dtype))

    def _measure(self, block: _Block) -> None:
        """Note how far the block's values will be from what they stand for."""
        scheme = self.unit.scheme
        if scheme.decoded is not None:
            off = (block.formula(scheme.decoded) - block.formula(scheme.original)).abs().max()
            with self.unit.lock:
                self.unit.error = max(self.unit.error or 0.0, float(off))


def _pack(value: torch.Tensor, stored: StoredTensor, *, rows: bool) -> torch.Tensor:
    """Two values in a byte, the first in its low half: of two rows, or of two columns."""
    import torch

    if stored.packed == "int4":
        codes = value.to(torch.int8).view(torch.uint8) & 15
    else:
        size = value.abs()
        order = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4)).to(torch.uint8)
        codes = order | torch.signbit(value).to(torch.uint8) << 3
    low, high = (codes[0::2], codes[1::2]) if rows else (codes[:, 0::2], codes[:, 1::2])
    packed: torch.Tensor = low | (high << 4)
    return packed.view(torch.int8) if stored.dtype == "int8" else packed
