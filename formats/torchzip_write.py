"""The layout of a torch.save archive, computed before any tensor byte exists.

A `Skeleton` says where each tensor's bytes go and holds every other byte of the file; so tensors can be written in any
order, by several threads, straight to their place. The CRC32 of each is patched in once it is known. The result is,
byte for byte, what torch.save writes (but for the serialization id, a hash nobody reads back, and the second size in
the header of a storage beyond 4 GiB, which torch leaves zero).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

import attrs

from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError

from . import pickles
from .pickles import Call, Global, Persistent

#: The typed storage class of a dtype. The other dtypes (float8, the wider unsigned integers) came after typed storages.
STORAGES = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
_MAX32 = 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in value)


@attrs.frozen(eq=False)
class NewTensor:
    """A tensor to be written, contiguous and with a storage of its own. Two of them are two, however alike."""

    dtype: str
    shape: tuple[int, ...] = attrs.field(converter=_shape)
    #: Its bytes, where they are known: `whole` writes them.
    data: bytes = b""

    def __attrs_post_init__(self) -> None:
        if self.dtype not in ITEMSIZE or any(size < 0 for size in self.shape):
            found = f"{self.dtype} {self.shape}"
            raise CheckpointError("a tensor that cannot be written", expected=", ".join(ITEMSIZE), found=found)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * ITEMSIZE[self.dtype]


@attrs.frozen
class Skeleton:
    """An archive without its tensors' bytes. Offsets are relative to the archive's start."""

    #: Bytes of the whole archive.
    size: int
    #: (offset, bytes) of everything that is not tensor data.
    literals: tuple[tuple[int, bytes], ...]
    #: (tensor, offset of its bytes), in the order of their storage keys.
    tensors: tuple[tuple[NewTensor, int], ...]
    _crc_fields: tuple[tuple[int, ...], ...] = attrs.field(alias="crc_fields")

    def crc_patches(self, crcs: Mapping[int, int]) -> list[tuple[int, bytes]]:
        """The (offset, bytes) to write over the literals, given the CRC32 of tensors' bytes by index in `tensors`."""
        return [(at, crc.to_bytes(4, "little")) for index, crc in crcs.items() for at in self._crc_fields[index]]


def layout(graph: object, *, prefix: str = "archive", alignment: int = 64) -> Skeleton:
    """The archive that torch.save writes for a graph of plain data, inert nodes and `NewTensor` leaves.

    A `NewTensor` that occurs several times is one tensor. Every storage starts at a multiple of `alignment`.
    """
    tensors: list[NewTensor] = []

    def replace(obj: Any) -> Call | None:
        if not isinstance(obj, NewTensor):
            return None
        tensors.append(obj)
        return _tensor_node(obj, str(len(tensors) - 1))

    data = pickles.dumps(graph, replace=replace)
    zipped = _Zip(prefix, alignment)
    zipped.member("data.pkl", data)
    zipped.member(".format_version", b"1")
    zipped.member(".storage_alignment", str(alignment).encode())
    zipped.member("byteorder", b"little")
    places = [(tensor, *zipped.gap(f"data/{key}", tensor.nbytes)) for key, tensor in enumerate(tensors)]
    zipped.member("version", b"3\n")
    identity = int.from_bytes(hashlib.sha256(data).digest(), "little") % 10**40
    zipped.member(".data/serialization_id", b"%040d" % identity)
    start = zipped.finish()
    fields = tuple(
        (at + tensor.nbytes + 4, start + entry + 16) if tensor.nbytes else () for tensor, at, entry in places
    )
    return Skeleton(zipped.cursor, tuple(zipped.literals), tuple((tensor, at) for tensor, at, _ in places), fields)


def whole(skeleton: Skeleton) -> bytes:
    """The archive with the data that its tensors bring; others are zeros without a checksum."""
    blob = bytearray(skeleton.size)
    for offset, literal in skeleton.literals:
        blob[offset : offset + len(literal)] = literal
    for index, (tensor, at) in enumerate(skeleton.tensors):
        if tensor.data:
            blob[at : at + len(tensor.data)] = tensor.data
            for offset, patch in skeleton.crc_patches({index: zlib.crc32(tensor.data)}):
                blob[offset : offset + len(patch)] = patch
    return bytes(blob)


@lru_cache(maxsize=65536)
def tensor_item(dtype: str, shape: tuple[int, ...], alignment: int = 64) -> Skeleton:
    """The archive of a single tensor, as a .distcp file holds them. Equal tensors share one skeleton."""
    return layout(NewTensor(dtype, shape), alignment=alignment)


def _tensor_node(tensor: NewTensor, key: str) -> Call:
    """The node that torch pickles for a contiguous tensor."""
    typed = STORAGES.get(tensor.dtype)
    kind = Global("torch", typed) if typed else Global("torch.storage", "UntypedStorage")
    storage = Persistent(("storage", kind, key, "cpu", tensor.numel if typed else tensor.nbytes))
    strides = []
    step = 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    hooks = Global("collections", "OrderedDict").call()
    args = (storage, 0, tensor.shape, tuple(reversed(strides)), False, hooks)
    if typed:
        return Global("torch._utils", "_rebuild_tensor_v2").call(*args)
    return Global("torch._utils", "_rebuild_tensor_v3").call(*args, Global("torch", tensor.dtype))


class _Zip:
    """Lays members one after another as torch's zip writer does, leaving gaps for the tensors' bytes."""

    def __init__(self, prefix: str, alignment: int) -> None:
        self.cursor = 0
        self.literals: list[tuple[int, bytes]] = []
        self._prefix = prefix
        self._alignment = alignment
        self._open = bytearray()  # the literal being built; it ends at the cursor
        self._directory = bytearray()
        self._count = 0

    def member(self, name: str, content: bytes) -> None:
        crc = zlib.crc32(content)
        wide = self._begin(name, len(content), crc)
        self._write(content)
        self._end(len(content), crc, wide)

    def gap(self, name: str, size: int) -> tuple[int, int]:
        """A member whose bytes come later: where they go, and where its entry lies in the directory."""
        entry = len(self._directory)
        wide = self._begin(name, size, 0)
        start = self.cursor
        if size:
            self._flush()
            self.cursor += size
        self._end(size, 0, wide)
        return start, entry

    def finish(self) -> int:
        """Writes the directory; gives its offset."""
        start, size, count = self.cursor, len(self._directory), self._count
        self._write(self._directory)
        record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, size, start)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, self.cursor, 1)
        few, short = min(count, 0xFFFF), min(size, _MAX32)
        self._write(record + locator)
        self._write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, few, few, short, min(start, _MAX32), 0))
        self._flush()
        return start

    def _write(self, data: bytes | bytearray) -> None:
        self._open += data
        self.cursor += len(data)

    def _flush(self) -> None:
        if self._open:
            self.literals.append((self.cursor - len(self._open), bytes(self._open)))
            self._open.clear()

    def _begin(self, name: str, size: int, crc: int) -> bool:
        """Local header and directory entry; True if the sizes after the data take 64 bits."""
        raw = f"{self._prefix}/{name}".encode()
        at = self.cursor
        wide = [size, size] * (size >= _MAX32) + [at] * (at >= _MAX32)
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        flags = 0x0808 if size else 0x0800  # a descriptor follows the data, if there are any; the name is UTF-8
        unpadded = at + _LOCAL.size + len(raw) + len(extra) + 4
        padding = -unpadded % self._alignment
        padded = extra + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        self._write(_LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(raw), len(padded)) + raw + padded)
        short, offset = min(size, _MAX32), min(at, _MAX32)
        self._directory += _CENTRAL.pack(
            b"PK\x01\x02", 0, 0, flags, 0, 0, 0, crc, short, short, len(raw), len(extra), 0, 0, 0, 0, offset
        )
        self._directory += raw + extra
        self._count += 1
        return bool(wide)

    def _end(self, size: int, crc: int, wide: bool) -> None:
        if size:
            self._write(struct.pack("<4sL2Q" if wide else "<4s3L", b"PK\x07\x08", crc, size, size))
