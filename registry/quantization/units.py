"""Weights that are quantised when they are read: a file on no disk for each tensor that is stored of them.

A `Unit` is one weight matrix and the scheme that quantises it. Its scales are of the whole matrix, which is read once
for them, a few rows at a time; its values are computed when they are written, for the rows and columns asked for.
"""

from __future__ import annotations

import ast
import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import define, field, frozen

from registry.computed import Computed, Ints
from registry.dtypes import torch_dtype
from registry.encoding import Blocks, block_codec
from registry.errors import MappingError
from registry.files import SourceFiles
from registry.quantization import formulas
from registry.quantization.declared import Range, Scheme, StoredTensor
from registry.quantization.matrices import STEP, Matrix

if TYPE_CHECKING:
    import torch


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

        block = _Block(self, files, np.zeros(1, dtype=np.int64), 0, 1)
        found = block.over_all("absmax", ast.Name("plain"), alone=True)
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
    """Some rows and columns of a unit's matrix, for formulas. See `registry.quantization.formulas.Block`.

    Values are (rows, groups of columns, columns of a group), 1 where they are the same for all: so what is of groups is
    never spread over their columns. A scheme without groups has all of the columns in one.
    """

    def __init__(self, unit: Unit, files: SourceFiles, rows: Ints, begin: int, end: int) -> None:
        self.unit, self.files, self.rows, self.begin, self.end = unit, files, rows, begin, end
        group = unit.constants["group"]
        self.size = group if group > 1 and (end - begin) % group == 0 else end - begin
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
        """What a stored tensor holds, in its type; of a packed one and of blocks the numbers, in float32."""
        if key not in self._raw:
            stored = self.unit.scheme.tensors[key]
            if stored.blocks is not None:
                held = block_codec(stored.blocks).decode(self.blocks(key)).view(len(self.rows), -1, self.size)
            else:
                held = _held(self.formula(stored.value), stored, self.unit.constants["dtype"])
            self._raw[key] = held
        return self._raw[key]

    def blocks(self, key: str) -> torch.Tensor:
        """The bytes of a stored tensor of blocks, one block in a row."""
        stored = self.unit.scheme.tensors[key]
        name = f"{key} in blocks"
        if name not in self._raw:
            values = self.whole(self.formula(stored.value)).reshape(-1, self.unit.constants["group"])
            self._raw[name] = block_codec(str(stored.blocks)).encode(values)
        return self._raw[name]

    def whole(self, value: torch.Tensor) -> torch.Tensor:
        """A value for every row and column, as a matrix."""
        groups = (self.end - self.begin) // self.size
        return value.expand(len(self.rows), groups, self.size).reshape(len(self.rows), self.end - self.begin)

    def _grouped(self, value: torch.Tensor) -> torch.Tensor:
        """(rows, columns), or (rows, 1), as (rows, groups, columns of a group)."""
        return value[:, :, None] if value.shape[1] == 1 else value.reshape(len(value), -1, self.size)

    def _name(self, name: str) -> Any:
        import torch

        unit = self.unit
        if name == "plain":
            return self._grouped(unit.matrix.read(self.files, self.rows, self.begin, self.end))
        if name in unit.scheme.let:
            return self.formula(unit.scheme.let[name])
        if name in unit.scheme.tensors:
            return self.stored(name).to(torch.float32)
        if name in unit.beside:
            first = np.zeros(1, dtype=np.int64)
            return self._grouped(unit.beside[name].read(self.files, first, self.begin, self.end))
        if name in unit.constants:
            return unit.constants[name]
        return self._grouped(self._range(name))

    def given(self, name: str) -> bool:
        """As in `Block`."""
        return name in self.unit.ranges or name in self.unit.beside

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
        matrix = self.unit.matrix
        if function == "row_absmax":
            return _largest(self.wide(0, matrix.shape[2]).value(inner).flatten(1))[:, :, None]
        if function == "group_absmax":
            values = self.whole(self.value(inner))
            return _largest(values.view(-1, self.size)).view(len(self.rows), -1, 1)
        if function == "mean":
            return self.at(matrix.parts, self.begin, self.end).value(inner).mean(0, keepdim=True)
        return self._grouped(self._of_whole(function, inner))

    def _of_whole(self, function: str, inner: ast.expr) -> torch.Tensor:
        import torch

        matrix, found = self.unit.matrix, self.over_all(function, inner)
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

    def over_all(self, function: str, inner: ast.expr, *, alone: bool = False) -> torch.Tensor:
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


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest size of a value in each row."""
    import torch

    size = values.abs()
    if size.shape[1] >= 32:
        return size.amax(1, keepdim=True)
    # The same of short rows, several times as fast.
    return torch.nn.functional.max_pool1d(size.view(1, 1, -1), size.shape[1]).view(-1, 1)


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
        own = block.at(rows, 0, width)
        values = own.whole(own.value(inner))
        at = int(rows[0]) // matrix.shape[1]
        if function == "column_absmax":
            found[at] = torch.maximum(found[at], values.abs().amax(0))
        elif function == "absmax":
            least, most = values.aminmax()
            found[at] = torch.maximum(found[at], most.maximum(-least))
        else:
            for k, (low, high) in enumerate(itertools.pairwise(edges)):
                part = values[torch.from_numpy((rows >= low) & (rows < high))]
                if part.numel():
                    found[k] = torch.maximum(found[k], part.abs().amax())
    return found


def _held(value: Any, stored: StoredTensor, model: str) -> torch.Tensor:
    """A value as the stored tensor holds it; of a packed one the numbers themselves, in float32."""
    import torch

    dtype = "float32" if stored.packed else model if stored.dtype == "model" else stored.dtype
    value = value if torch.is_tensor(value) else torch.tensor(float(value))
    held: torch.Tensor = (value if value.dim() else value.view(1, 1, 1)).to(torch_dtype(dtype))
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
            if (name := self.unit.scheme.tensors[self.key].blocks) is not None:
                return self._bytes(files, rows, begin, end, block_codec(name))
            scale = {"in": 1, "in/2": 2, "in/group": self.unit.constants["group"]}[dims[-1]]
            own = np.stack([2 * rows, 2 * rows + 1], 1).ravel() if "out/2" in dims else rows
            return self._block(files, own, begin * scale, end * scale)
        if dims and dims[-1] == "in":
            return self._block(files, rows * height, begin, end)
        if dims and dims[-1] == "expert":
            return self._block(files, np.arange(begin, end) * height, 0, 1).reshape(1, -1)
        return self._block(files, rows * height, 0, 1).expand(len(rows), end - begin)

    def _bytes(self, files: SourceFiles, rows: Ints, begin: int, end: int, codec: Blocks) -> torch.Tensor:
        """Some bytes of some rows of blocks."""
        import torch

        first, last = begin // codec.nbytes, -(-end // codec.nbytes)
        step = max(1, STEP // self.unit.matrix.shape[2])
        found = []
        for i in range(0, len(rows), step):
            block = _Block(self.unit, files, rows[i : i + step], first * codec.columns, last * codec.columns)
            self._measure(block)
            raw = block.blocks(self.key).view(len(block.rows), -1)
            found.append(raw[:, begin - first * codec.nbytes : end - first * codec.nbytes])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _block(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """What is stored of some rows and columns of the matrix, in its type."""
        import torch

        stored = self.unit.scheme.tensors[self.key]
        step = max(2, STEP // self.unit.matrix.shape[2] // 2 * 2)
        found = [self._part(files, rows[i : i + step], begin, end, stored) for i in range(0, len(rows), step)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _part(self, files: SourceFiles, rows: Ints, begin: int, end: int, stored: StoredTensor) -> torch.Tensor:
        dims, group = stored.shape.split(), self.unit.constants["group"]
        columns = bool(dims) and dims[-1].startswith("in")
        first, last = (begin // group * group, -(-end // group) * group) if columns else (begin, end)
        block = _Block(self.unit, files, rows, first, last)
        value = block.stored(self.key)
        if not columns:
            return value[:, 0, 0, None].expand(len(rows), end - begin)
        if "in/group" in dims:
            return value[:, :, 0].expand(len(rows), (end - begin) // group)
        if any(dim.startswith("out") for dim in dims):
            self._measure(block)
        whole = block.whole(value)[:, begin - first : end - first]
        if stored.packed:
            return _pack(whole, stored, rows="out/2" in dims).to(torch_dtype(self.dtype))
        return whole

    def _measure(self, block: _Block) -> None:
        """Note how far the block's values will be from what they stand for."""
        scheme = self.unit.scheme
        if scheme.decoded is not None:
            low, high = (block.formula(scheme.decoded) - block.formula(scheme.original)).aminmax()
            with self.unit.lock:
                self.unit.error = max(self.unit.error or 0.0, float(high), -float(low))


def _pack(value: torch.Tensor, stored: StoredTensor, *, rows: bool) -> torch.Tensor:
    """Two values in a byte, the first in its low half: of two rows, or of two columns."""
    import torch

    if stored.packed == "fp4":
        return formulas.fp4_pairs(value.contiguous())
    codes = value.to(torch.int8).view(torch.uint8) & 15
    low, high = (codes[0::2], codes[1::2]) if rows else (codes[:, 0::2], codes[:, 1::2])
    packed: torch.Tensor = low | (high << 4)
    return packed.view(torch.int8) if stored.dtype == "int8" else packed
