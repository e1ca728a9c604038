"""Quantised weights, read as plain ones: what a scheme of the format's spec stored is multiplied out again.

Where a checkpoint says that it is quantised, each weight and its scales give one piece in a file on no disk, as other
encodings do in `registry.decoding`. What was lost when it was quantised stays lost, and is said.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import field, frozen

from registry import expressions
from registry.assemble import array
from registry.casts import rounded
from registry.computed import Computed, Ints
from registry.documents import read_json
from registry.dtypes import ITEMSIZE, is_float, torch_dtype
from registry.errors import CheckpointError
from registry.files import SourceFiles
from registry.places import is_path
from registry.problems import collapse
from registry.quantization import formulas
from registry.quantization.declared import Quantizations, Scheme
from registry.quantization.layouts import stored_name
from registry.specs import FormatSpec
from registry.storage import Opened, Piece, Rank

if TYPE_CHECKING:
    import torch

_HINT = "get the model that it was made of, and convert that"
#: Bytes of a file that lists how layers are quantised.
_MAX_LIST = 1 << 28


def decode_quantized(opened: Opened, spec: FormatSpec) -> None:
    """Put plain pieces in the place of quantised weights. Raises CheckpointError for what cannot be read."""
    quantizations = spec.quantizations
    if quantizations is None:
        return
    name = _read(spec, quantizations.option, opened)
    further = _read(spec, quantizations.further.option, opened) if quantizations.further else None
    if not name and not further:
        return
    besides = [f"{quantizations.further.prefix}{further}"] if quantizations.further and further else []
    reader = _Reader(opened, quantizations, dict(_schemes(opened, quantizations, name)), besides)
    files, pieces = list(opened.files), []
    for piece in opened.pieces:
        found = reader.take(piece, len(files))
        if found is None:
            pieces.append(piece)
        else:
            pieces.append(found[0])
            files.append(found[1])
    gone = reader.gone
    opened.files, opened.pieces = files, [piece for piece in pieces if (piece.rank, piece.name) not in gone]
    if reader.problems:
        raise CheckpointError(
            f"the checkpoint is quantised as {name}, which cannot be read", where=opened.path,
            expected="each weight with its scales", details=collapse(reader.problems, 12), hint=_HINT,
        )  # fmt: skip
    count = len(files) - len(reader.opened_files)
    if count:
        opened.notes.append(f"read {count} weights from {name}, which is lossy: they are not those that were quantised")
    fields = {path.split(".")[0] for scheme in quantizations.schemes.values() for path in scheme.config}
    opened.document = {key: value for key, value in opened.document.items() if key not in fields}


def _read(spec: FormatSpec, option: str, opened: Opened) -> Any:
    """What a checkpoint says of an option."""
    read = spec.options[option].read
    return expressions.parse(read)(opened.document) if read else None


def _schemes(opened: Opened, quantizations: Quantizations, name: Any) -> Iterator[tuple[str, str]]:
    """(glob over modules, name of the scheme) of everything that is said to be quantised."""
    mixed = quantizations.mixed
    if mixed is not None and name == mixed.scheme:
        for module, entry in read_layers(opened.path / mixed.file, mixed.layers).items():
            yield module, str(entry.get(mixed.algorithm))
    elif name:
        yield "*", str(name)


def read_layers(path: Path, field: str) -> dict[str, Any]:
    """The modules of a file that says how each is quantised. Raises CheckpointError."""
    try:
        data = read_json(path, _MAX_LIST)
        layers = data.get(field, data)
        if not all(isinstance(entry, dict) for entry in layers.values()):
            raise ValueError(f"{field} is no object of objects")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            "the list of quantised layers cannot be read", where=path, expected=f"a JSON object with {field!r}",
            found=error, hint="docs/quantization.md shows one",
        ) from None  # fmt: skip
    return dict(layers)


class _Reader:
    """Finds the parts of quantised weights; what is wrong with them is collected."""

    def __init__(
        self, opened: Opened, quantizations: Quantizations, schemes: dict[str, str], besides: list[str]
    ) -> None:
        self.quantizations, self.schemes, self.besides = quantizations, schemes, besides
        self.opened_files = list(opened.files)
        self.problems: list[str] = []
        self.gone: set[tuple[Rank | None, str]] = set()
        self._table: dict[Rank | None, dict[str, Piece]] = defaultdict(dict)
        for piece in opened.pieces:
            self._table[piece.rank][piece.name] = piece
        said = opened.document.get("dtype")
        self._dtype = said if isinstance(said, str) and said in ITEMSIZE and is_float(said) else "bfloat16"

    def take(self, piece: Piece, file: int) -> tuple[Piece, Restored] | None:
        """The plain piece in a weight's place, with its file; None for what stays as it is."""
        ending = f".{self.quantizations.weight}"
        if not piece.name.endswith(ending):
            return None
        module = piece.name.removesuffix(ending)
        for name in self.besides:
            if (scheme := self.quantizations.schemes.get(name)) and self.quantizations.applies(scheme, module):
                self._drop(piece.rank, module, scheme)
        name = self.schemes.get(module, self.schemes.get("*", ""))
        if not name or is_float(piece.dtype):
            return None
        scheme = self.quantizations.schemes.get(name)
        formula = None if scheme is None else scheme.restored or scheme.decoded
        if scheme is None or formula is None or not formulas.parse(formula).names <= scheme.tensors.keys():
            self.problems.append(f"{piece.name}: {name} cannot be turned back into plain weights")
            return None
        try:
            made = self._restored(piece, module, scheme, formula)
        except _Unfit as error:
            self.problems.append(str(error))
            return None
        self._drop(piece.rank, module, scheme)
        self.gone.discard((piece.rank, piece.name))
        return Piece(piece.name, self._dtype, made.shape, file, 0, piece.rank), made

    def _drop(self, rank: Rank | None, module: str, scheme: Scheme) -> None:
        self.gone |= {(rank, stored_name(module, key, stored)) for key, stored in scheme.tensors.items()}

    def _restored(self, weight: Piece, module: str, scheme: Scheme, formula: str) -> Restored:
        parts = {}
        for key in sorted(formulas.parse(formula).names):
            stored = scheme.tensors[key]
            name = stored_name(module, key, stored)
            piece = self._table[weight.rank].get(name)
            if piece is None:
                raise _Unfit(f"{name}: missing, and {weight.name} is nothing without it")
            if stored.dtype not in ("model", piece.dtype):
                raise _Unfit(f"{name}: expected {stored.dtype}, found {piece.dtype}")
            parts[key] = piece
        sizes = _sizes(weight, scheme.tensors[self.quantizations.weight].shape.split())
        group = 1
        for key, piece in parts.items():
            dims = scheme.tensors[key].shape.split()
            if "in/group" in dims:
                group = sizes["in"] // max(piece.shape[-1], 1) if piece.shape else 1
        for key, piece in parts.items():
            dims = [d for d in scheme.tensors[key].shape.split() if d != "expert" or "expert" in sizes]
            expected = tuple(_size(d, sizes, group) for d in dims)
            if piece.shape != expected or sizes["in"] % group:
                raise _Unfit(f"{piece.name}: expected the shape {expected}, found {piece.shape}")
        shape = tuple(sizes[d] for d in ("expert", "out", "in") if d in sizes)
        path = self.opened_files[weight.file]
        return Restored(path if is_path(path) else path.path, self._dtype, shape, scheme, formula, parts, group)


class _Unfit(ValueError):
    """Parts that do not belong together."""


def _sizes(weight: Piece, dims: list[str]) -> dict[str, int]:
    """The sizes of the plain weight."""
    dims = dims if len(weight.shape) == len(dims) else [d for d in dims if d != "expert"]
    if len(dims) != len(weight.shape):
        raise _Unfit(f"{weight.name}: expected {len(dims)} dimensions, found {weight.shape}")
    return {d.split("/")[0]: n * (2 if d.endswith("/2") else 1) for d, n in zip(dims, weight.shape, strict=True)}


def _size(dim: str, sizes: Mapping[str, int], group: int) -> int:
    name, _, divisor = dim.partition("/")
    return 1 if dim == "1" else sizes[name] // (group if divisor == "group" else int(divisor or 1))


@frozen(eq=False)
class Restored(Computed):
    """The file that a quantised weight's values would be in."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    scheme: Scheme
    formula: str
    parts: Mapping[str, Piece]
    group: int
    label = "restored"
    _cache: dict[str, torch.Tensor] = field(factory=dict)

    @property
    def width(self) -> int:
        """As in `Computed`."""
        return self.shape[-1]

    def values(self, files: SourceFiles, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """As in `Computed`."""
        found: torch.Tensor = formulas.parse(self.formula)(_Parts(self, files, rows, begin, end))
        found = found.expand(len(rows), end - begin)
        return rounded(found, self.dtype)


@frozen
class _Parts:
    """Rows and columns of a weight, for the formula that restores it. See `registry.quantization.formulas.Block`."""

    of: Restored
    files: SourceFiles
    rows: Ints
    begin: int
    end: int

    def given(self, name: str) -> bool:
        """As in `Block`."""
        return name in self.of.parts

    def reduce(self, function: str, inner: ast.expr) -> torch.Tensor:
        """As in `Block`: formulas over what is stored reduce nothing."""
        raise TypeError(f"{function}() of what is stored")

    def name(self, name: str) -> torch.Tensor:
        """As in `Block`: what a stored tensor has for the rows and columns."""
        import torch

        stored, piece = self.of.scheme.tensors[name], self.of.parts[name]
        dims = [d for d in stored.shape.split() if d != "expert" or len(self.of.shape) > 2]
        if not any(d.startswith("out") for d in dims) or not dims[-1].startswith("in"):
            return self._scale(piece, dims)
        step = {"in": 1, "in/2": 2, "in/group": self.of.group}[dims[-1]]
        halved = "out/2" in dims
        rows = self.rows // 2 if halved else self.rows
        first, last = self.begin // step, -(-self.end // step)
        values = self._read(piece, np.unique(rows), first, last)[
            torch.from_numpy(np.unique(rows, return_inverse=True)[1])
        ]
        if stored.packed is None:
            values = values.to(torch.float32)
            return values if step == 1 else self._wide(values, step, first)
        odd = torch.from_numpy(self.rows % 2)[:, None] if halved else torch.arange(2)
        values = values.view(torch.uint8)
        nibbles = (values >> (4 * odd)) & 15 if halved else ((values[..., None] >> (4 * odd)) & 15).flatten(1)
        plain = _nibbles(nibbles.to(torch.int64), stored.packed)
        return plain if halved else plain[:, self.begin - 2 * first : self.end - 2 * first]

    def _wide(self, values: torch.Tensor, step: int, first: int) -> torch.Tensor:
        wide = values.repeat_interleave(step, 1)
        return wide[:, self.begin - step * first : self.end - step * first]

    def _read(self, piece: Piece, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """Columns of some rows of a stored matrix."""
        import torch

        width, item = piece.shape[-1], ITEMSIZE[piece.dtype]
        first, count = int(rows[0]), int(rows[-1] - rows[0]) + 1
        scratch = self.files.scratch(f"stored {piece.dtype}", count * width * item)
        self.files.read_into(piece.file, piece.begin + first * width * item, scratch)
        raw = array(scratch, item, (count, end - begin), (width, 1), begin * item)[rows - first]
        return torch.from_numpy(raw).view(torch_dtype(piece.dtype))

    def _scale(self, piece: Piece, dims: list[str]) -> torch.Tensor:
        """A scale of rows, of columns, of experts or of everything: small, and read whole."""
        import torch

        height = self.of.shape[-2]
        key = piece.name
        if key not in self.of._cache:
            size = int(np.prod(piece.shape, dtype=np.int64))
            buffer = bytearray(size * ITEMSIZE[piece.dtype])
            self.files.read_into(piece.file, piece.begin, memoryview(buffer))
            self.of._cache[key] = torch.frombuffer(buffer, dtype=torch_dtype(piece.dtype)).to(torch.float32)
        found = self.of._cache[key]
        if "out" in dims:
            found = found.reshape(-1, height)
            at = self.rows // height if "expert" in dims else np.zeros_like(self.rows)
            return found[torch.from_numpy(at), torch.from_numpy(self.rows % height)][:, None]
        if "in" in dims:
            found = found.reshape(-1, self.of.shape[-1])[:, self.begin : self.end]
            return found[torch.from_numpy(self.rows // height)] if "expert" in dims else found
        return found.reshape(-1, 1)[torch.from_numpy(self.rows // height)] if "expert" in dims else found.reshape(1, 1)


def _nibbles(codes: torch.Tensor, packed: str) -> torch.Tensor:
    """What four bits stand for."""
    import torch

    if packed == "int4":
        return ((codes ^ 8) - 8).to(torch.float32)
    positive = torch.tensor(formulas.FP4)
    return torch.cat([positive, -positive])[codes]
