"""Encodings: tensors that are stored as several, such as low-precision values and the scales of their blocks.

A format spec lists its encodings: which stored tensors belong together, by name and type, and the codec that knows what
they stand for. On reading, `registry.decoding` puts one plain tensor in their place. Here are what a spec may say, what
a codec does, and the codecs that come with the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from registry.casts import from_float8, rounded
from registry.dtypes import ITEMSIZE, torch_dtype
from registry.errors import SpecError

if TYPE_CHECKING:
    import torch

#: What the tensor itself is called among the parts that a codec reads.
TENSOR = "tensor"

Ints = NDArray[np.int64]
#: (part, columns that it has where it is seen as a matrix, rows, begin, end) -> columns [begin, end) of those rows. The
#: rows rise. What is given holds until the same part is read again.
Read = Callable[[str, int, Ints, int, int], "torch.Tensor"]


class Model(BaseModel):
    """Base: unknown keys are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _known(dtype: str) -> str:
    if dtype not in ITEMSIZE:
        raise ValueError(f"unknown dtype {dtype!r}")
    return dtype


def _pattern(name: str) -> str:
    if name.count("*") != 1:
        raise ValueError(f"{name!r} must hold one *, for what the names of a tensor and its parts share")
    return name


Dtype = Annotated[str, AfterValidator(_known)]


class Stored(Model):
    """One of the tensors that an encoded one is stored as."""

    name: Annotated[str, AfterValidator(_pattern)] = Field(description="its name, with * for what all parts share")
    dtype: Annotated[list[Dtype], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        description="the types that it may have"
    )

    def named(self, stem: str) -> str:
        """The name with the * filled in."""
        return self.name.replace("*", stem)


class Parameter(Model):
    """Something that a codec must know and that the checkpoint's config says."""

    field: str = Field(description="a dotted path in the HuggingFace config")
    default: Any = Field(default=None, description="the value where the config is silent")


class ConfigEdit(Model):
    """What the HuggingFace config must no longer say once the tensors are decoded."""

    remove: list[str] = Field(default=[], description="dotted paths of fields that go")
    replace: dict[str, Any] = Field(default={}, description="dotted path -> what a field that is there says instead")


class Encoding(Model):
    """How a tensor is stored as several, which are read as the one that they stand for.

    The tensor keeps the name of the one that holds its values.
    """

    codec: str = Field(description="the registered codec that decodes it")
    tensor: Stored = Field(description="the stored tensor that holds the values")
    parts: dict[str, Stored] = Field(description="the codec's name for each further part -> how it is stored")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="the type that values are decoded to"
    )
    parameters: dict[str, Parameter] = Field(default={}, description="what else the codec must know")
    beside: list[Annotated[str, AfterValidator(_pattern)]] = Field(
        default=[],
        description="further tensors of a layer that say nothing about its weights: they are kept as ranges, for a"
        " target that is quantised again",
    )
    config: ConfigEdit = Field(default=ConfigEdit(), description="how decoding changes the HuggingFace config")

    @property
    def stored(self) -> dict[str, Stored]:
        """Every part, the tensor first."""
        return {TENSOR: self.tensor, **self.parts}


class Part(NamedTuple):
    """The type and shape of one stored part."""

    dtype: str
    shape: tuple[int, ...]


class Unfit(ValueError):
    """Raised by a codec: parts that do not belong together, or a parameter that makes no sense."""

    def __init__(self, what: str, expected: object, found: object) -> None:
        self.what, self.expected, self.found = what, expected, found
        super().__init__(f"{what}: expected {expected}, found {found}")


class Decoder(Protocol):
    """A codec at work on one encoded tensor. Its values are seen as a matrix whose columns are the last axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that the parts stand for."""

    def decode(self, read: Read, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """The values in columns [begin, end) of some rows, which rise; a hundred thousand of them or so.

        They are rounded to the type that the encoding declares, unless they have it.
        """


#: Makes a decoder: made(parts, dtype, **parameters), as `register_encoding_codec` says. Raises Unfit. One decoder may
#: serve all tensors whose parts have the same types and shapes, in several threads.
Codec = Callable[..., Decoder]

_codecs: dict[str, Codec] = {}


def register_encoding_codec(name: str, made: Codec) -> None:
    """Add a codec that encodings may name, for this process.

    `made(parts, dtype, **parameters)` gives a Decoder, or raises Unfit. `parts` maps what the encoding calls the parts,
    and "tensor", to their types and shapes; `dtype` and `parameters` are the encoding's.
    """
    _codecs[name] = made


def encoding_codecs() -> dict[str, Codec]:
    """All of them, by name."""
    return dict(_codecs)


def encoding_codec(name: str) -> Codec:
    """The codec called `name`. Raises SpecError."""
    if name not in _codecs:
        raise SpecError(
            f"unknown codec {name!r} of an encoding", expected="one of " + ", ".join(sorted(_codecs)),
            hint="register_encoding_codec() first",
        )  # fmt: skip
    return _codecs[name]


def block_codec(name: str) -> Blocks:
    """The codec called `name`, which writes too. Raises SpecError."""
    found = encoding_codec(name)
    if not isinstance(found, Blocks):
        raise SpecError(
            f"the codec {name!r} is only read", expected="one that is registered as Blocks",
            hint="register_encoding_codec(name, Blocks(...))",
        )  # fmt: skip
    return found


class ScaledBlocks:
    """Values of one byte, each times the scale of its block of rows and columns: float32(value) * float32(scale)."""

    def __init__(self, parts: Mapping[str, Part], dtype: str, block: Any) -> None:
        self.shape, scale = parts[TENSOR].shape, parts["scale"].shape
        self._types = parts[TENSOR].dtype, dtype
        if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise Unfit("the size of a block", "[rows, columns]", block)
        if len(self.shape) < 2:
            raise Unfit(TENSOR, "rows and columns", self.shape)
        self._rows, self._columns = self.shape[-2:]
        self._block = block
        expected = (*self.shape[:-2], -(-self._rows // block[0]), -(-self._columns // block[1]))
        if scale != expected:
            raise Unfit("scale", f"{expected}, a scale for every {block[0]} x {block[1]} of {self.shape}", scale)
        self._grid = expected[-2:]

    def decode(self, read: Read, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """As in `Decoder`."""
        import torch

        tall, wide = self._block
        matrix, row = np.divmod(rows, self._rows)
        bands, band = np.unique(matrix * self._grid[0] + row // tall, return_inverse=True)
        first, last = begin // wide, (end - 1) // wide + 1
        scale = read("scale", self._grid[1], bands, first, last).to(torch.float32)
        stored, dtype = self._types
        raw = read(TENSOR, self._columns, rows, begin, end).view(torch.uint8).numpy()
        if (quick := from_float8(raw, stored)) and (by := scale * quick[1]).isfinite().all():
            columns = np.repeat(by.numpy(), wide, axis=1)[:, begin - first * wide : end - first * wide]
            starts = np.searchsorted(band, np.arange(len(bands) + 1))
            for i in range(len(bands)):
                quick[0][starts[i] : starts[i + 1]] *= columns[i]
            return torch.from_numpy(quick[0])
        # What each byte stands for in each block, in a table, which has more bytes than that.
        table = rounded(_byte_values(stored) * scale[:, :, None], dtype).view(torch.uint8).numpy()
        index = raw + (np.arange(begin, end) // wide - first) * 256
        if len(bands) > 1:
            index += (band * (last - first) * 256)[:, None]
        return _looked_up(table.view(f"u{ITEMSIZE[dtype]}").ravel(), index, dtype)


class ScaledRows:
    """Values of one byte, all times one scale, or each row times its own: float32(value) * float32(scale)."""

    def __init__(self, parts: Mapping[str, Part], dtype: str) -> None:
        self.shape, scale = parts[TENSOR].shape, parts["scale"].shape
        if len(self.shape) != 2:
            raise Unfit(TENSOR, "rows and columns", self.shape)
        if scale not in ((), (1,), self.shape[:1], (self.shape[0], 1)):
            raise Unfit("scale", f"one scale, or {(self.shape[0], 1)}, one for each row", scale)
        self._each = scale not in ((), (1,))
        self._stored = parts[TENSOR].dtype

    def decode(self, read: Read, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """As in `Decoder`."""
        import torch

        scale = read("scale", 1, rows if self._each else np.zeros(1, dtype=np.int64), 0, 1).to(torch.float32)
        values = read(TENSOR, self.shape[1], rows, begin, end)
        quick = from_float8(values.view(torch.uint8).numpy(), self._stored)
        if quick and (by := scale * quick[1]).isfinite().all():
            return torch.from_numpy(np.multiply(quick[0], by.numpy(), out=quick[0]))
        return values.to(torch.float32) * scale


class Nvfp4:
    """FP4 (E2M1) values, two in a byte, low half first: each 16 times a scale in 8 bits, and all times another one."""

    def __init__(self, parts: Mapping[str, Part], dtype: str) -> None:
        packed, scale = parts[TENSOR].shape, parts["scale"].shape
        if len(packed) != 2:
            raise Unfit(TENSOR, "rows and columns", packed)
        self.shape = (packed[0], packed[1] * 2)
        if scale != (packed[0], packed[1] // 8) or packed[1] % 8:
            raise Unfit("scale", f"{(packed[0], packed[1] // 8)}, a scale for every 16 of {self.shape}", scale)
        if parts["global_scale"].shape not in ((), (1,)):
            raise Unfit("global_scale", "one number", parts["global_scale"].shape)

    def decode(self, read: Read, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """As in `Decoder`."""
        import torch

        first, last = begin // 16, -(-end // 16)
        packed = read(TENSOR, self.shape[1] // 2, rows, first * 8, last * 8).numpy()
        scale = read("scale", self.shape[1] // 16, rows, first, last).to(torch.float32)
        whole = read("global_scale", 1, np.zeros(1, dtype=np.int64), 0, 1).to(torch.float32)
        pairs = _fp4_pairs("float32")[127 << 8 : 128 << 8]  # those of the scale 1
        values = _looked_up(pairs, packed.reshape(len(rows), -1, 8), "float32")
        values *= (scale * whole)[:, :, None]
        return values.flatten(1)[:, begin - first * 16 : end - first * 16]


class Mxfp4:
    """Blocks of 32 FP4 (E2M1) values in 16 bytes, low nibble first, times a power of two in one byte (E8M0)."""

    def __init__(self, parts: Mapping[str, Part], dtype: str) -> None:
        blocks, scales = parts[TENSOR].shape, parts["scales"].shape
        if len(blocks) < 2 or blocks[-1] != 16:
            raise Unfit(TENSOR, "16 bytes along its last axis, for 32 values", blocks)
        if scales != blocks[:-1]:
            raise Unfit("scales", f"{blocks[:-1]}, a byte for every block", scales)
        self.shape = (*blocks[:-2], blocks[-2] * 32)
        self._groups = blocks[-2]
        self._dtype = dtype

    def decode(self, read: Read, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """As in `Decoder`."""
        first, last = begin // 32, -(-end // 32)
        packed = read(TENSOR, self._groups * 16, rows, first * 16, last * 16).numpy()
        scales = read("scales", self._groups, rows, first, last).numpy().astype(np.intp)
        index = packed.reshape(*scales.shape, 16) + (scales * 256)[:, :, None]
        values = _looked_up(_fp4_pairs(self._dtype), index, self._dtype).flatten(1)
        return values[:, begin - first * 32 : end - first * 32]


@frozen
class Blocks:
    """A codec of one tensor of bytes: every `columns` values of a row in a block of `nbytes` bytes, read and written.

    `encode` makes bytes, (blocks, `nbytes`), of float32 values, (blocks, `columns`), and `decode` values of bytes. A
    quantisation may name it too (`blocks`).
    """

    columns: int
    nbytes: int
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, parts: Mapping[str, Part], dtype: str) -> Decoder:
        """As in `Codec`."""
        shape = parts[TENSOR].shape
        if not shape or shape[-1] % self.nbytes:
            raise Unfit(TENSOR, f"rows of {self.nbytes} bytes for every {self.columns} values", shape)
        return _InBlocks(self, (*shape[:-1], shape[-1] // self.nbytes * self.columns))


@frozen
class _InBlocks:
    """Values of a tensor of blocks."""

    blocks: Blocks
    shape: tuple[int, ...]

    def decode(self, read: Read, rows: Ints, begin: int, end: int) -> torch.Tensor:
        """As in `Decoder`."""
        columns, nbytes = self.blocks.columns, self.blocks.nbytes
        first, last = begin // columns, -(-end // columns)
        raw = read(TENSOR, self.shape[-1] // columns * nbytes, rows, first * nbytes, last * nbytes)
        values = self.blocks.decode(raw.reshape(-1, nbytes)).reshape(len(rows), -1)
        return values[:, begin - first * columns : end - first * columns]


def _looked_up(table: NDArray[Any], index: NDArray[np.intp], dtype: str) -> torch.Tensor:
    """The values at some entries of a table, which holds one or several in each. To compute them takes several times
    as long, and torch does it in threads of its own, beside those of the conversion."""
    import torch

    found = np.empty(index.shape, table.dtype)
    np.take(table, index, out=found, mode="wrap")  # any mode but the default writes to `out` at once
    return torch.from_numpy(found.view(np.uint8)).view(torch_dtype(dtype))


@cache
def _byte_values(dtype: str) -> torch.Tensor:
    """What each byte stands for, as float32."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch_dtype(dtype)).to(torch.float32)


@cache
def _fp4_pairs(dtype: str) -> NDArray[Any]:
    """For each scale, the two values of each byte in one entry.

    E8M0 keeps byte 255 for NaN, but the programs that make and read these files take it for a power like any other.
    """
    import torch

    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values, byte = torch.cat([positive, -positive]), torch.arange(256)
    powers = torch.exp2(torch.arange(256, dtype=torch.float64) - 127)
    pairs = rounded(torch.stack([values[byte & 15], values[byte >> 4]], -1) * powers[:, None, None], dtype)
    return pairs.clone().view(torch.uint8).numpy().view(f"u{2 * ITEMSIZE[dtype]}").ravel()


register_encoding_codec("fp8_block", ScaledBlocks)
register_encoding_codec("mxfp4", Mxfp4)
register_encoding_codec("fp8_rows", ScaledRows)
register_encoding_codec("nvfp4", Nvfp4)
