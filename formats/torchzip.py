"""torch.save archives read without torch: the object graph, and where each tensor's bytes lie in the file.

Such a file is a zip of stored members: `data.pkl`, a pickle whose tensors refer to storages, and `data/<key>`, the
storages' bytes. Writing is in `torchzip_write`; its names are also here.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import attrs

from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError
from registry.reading import Reader

from . import pickles
from .pickle_nodes import MAX_DIMS
from .torchzip_write import STORAGES, NewTensor, Skeleton, layout, tensor_item, whole
from .zips import LOCAL, Member, Source, open_source, read_directory

__all__ = [
    "Archive",
    "Member",
    "NewTensor",
    "Skeleton",
    "TensorRef",
    "layout",
    "probe_tensor",
    "read",
    "tensor_item",
    "whole",
]

_DTYPES = {name: dtype for dtype, name in STORAGES.items()}
_MAX_PICKLE = 1 << 30
_MAX_BYTES = 1 << 62
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that files before torch 1.6 start with
#: Bytes in which the head of an archive of one tensor is.
HEAD = 2048


@attrs.frozen(getstate_setstate=False)
class TensorRef:
    """A tensor in a file: what it is and where its bytes lie. Bounds have been checked against its storage."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    #: Elements into the storage.
    storage_offset: int
    storage_key: str
    #: The storage's bytes in the file.
    data_offset: int
    data_size: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements; of a contiguous tensor also the bytes it takes in the file."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def offset(self) -> int:
        """Where the first element lies in the file."""
        return self.data_offset + self.storage_offset * ITEMSIZE[self.dtype]

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last one."""
        return _reach(self.shape, self.stride) * ITEMSIZE[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """True if the elements lie densely in row-major order."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return self.numel == 0
            expected *= size
        return True

    def span(self) -> tuple[int, int]:
        """Offset in the file, and length, of the bytes that hold the elements."""
        return self.offset, self.extent

    def __setstate__(self, state: object) -> None:
        raise TypeError("a tensor reference has no state")  # a BUILD opcode would get around the checks

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorRef, attrs.astuple(self, recurse=False)


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


class _Storage(NamedTuple):
    kind: str
    key: str
    numel: int
    member: Member


@attrs.frozen
class Archive:
    """An opened archive. It holds no file open: the pickle has been read, the tensors are left where they are."""

    where: str
    #: The folder in the zip that all members are in.
    prefix: str
    #: Name without the prefix ("data/0") -> where its bytes lie in the file.
    members: dict[str, Member]
    pickle: bytes

    def load(self) -> Any:
        """The object graph: plain data, inert nodes and `TensorRef`s; a tree, which may be walked by recursion."""
        graph = _Graph(self.members, self.where)
        found = pickles.loads(self.pickle, where=self.where, persistent=graph.storage, build=graph.build)
        return pickles.check_tree(found, self.where)


def read(file: Reader | str | os.PathLike[str], *, base: int = 0, length: int | None = None, where: str) -> Archive:
    """Opens the archive in `file` (a path or a reader), or in `length` bytes of it from `base` on.

    `where` names the file in errors. Raises CheckpointError on anything that torch.save would not have written.
    """
    with open_source(file, base, length, where) as source:
        _refuse_legacy(source)
        members = read_directory(source)
        names = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            source.corrupt("not a torch.save archive", "one member <name>/data.pkl", names or list(members)[:5])
        prefix = names[0].removesuffix("data.pkl")
        inside = {name.removeprefix(prefix): member for name, member in members.items() if name.startswith(prefix)}
        if len(inside) != len(members):
            strays = [name for name in members if not name.startswith(prefix)]
            source.corrupt("a zip member lies outside the archive's folder", prefix, strays[:5])
        order = inside.get("byteorder")
        if order and (text := _content(source, order, 16, "byteorder")) != b"little":
            source.corrupt("an archive that is not little-endian", "little", text)
        pickled = inside["data.pkl"]
        if HEAD < pickled.size <= _MAX_PICKLE:  # a stretch of holes need not be read
            pickles.check_start(source.read(pickled.offset - base, 2, "data.pkl"), where)
        data = _content(source, pickled, _MAX_PICKLE, "data.pkl")
    return Archive(where, prefix.removesuffix("/"), inside, data)


def _content(source: Source, member: Member, limit: int, name: str) -> bytes:
    if member.size > limit:
        source.corrupt(f"{name} is too large", f"at most {limit} bytes", member.size)
    return source.read(member.offset - source.base, member.size, name)


def _refuse_legacy(source: Source) -> None:
    head = source.read(0, min(512, source.length), "the start of the file")
    if head.startswith(_LEGACY) or head[257:262] == b"ustar":
        raise CheckpointError(
            "a file in torch's format from before version 1.6",
            where=source.where,
            expected="a zip archive, as torch.save writes",
            hint="load it with torch.load in the program it came from and torch.save it again",
        )
    if not head.startswith(b"PK"):
        source.corrupt("not a torch.save archive", "a zip archive", f"it starts with {head[:8]!r}")


class _Graph:
    """Turns the tensors of one pickle into `TensorRef`s, checked against the members that hold their storages."""

    def __init__(self, members: dict[str, Member], where: str) -> None:
        self._members = members
        self._where = where
        self.build: dict[tuple[str, str], Callable[..., object]] = {
            ("torch._utils", "_rebuild_tensor"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self.tensor_v3,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self.parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self.subclass,
        }

    def _bad(self, problem: str, expected: object = None, found: object = None) -> CheckpointError:
        return CheckpointError(problem, where=self._where, expected=expected, found=found)

    def storage(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", pickles.Global() as kind, str(key), str(), int(numel)) if numel >= 0:
                member = self._members.get(f"data/{key}")
                if member is None:
                    raise self._bad("a tensor's bytes are missing from an archive", f"a member data/{key}")
                return _Storage(kind.name, key, numel, member)
        raise self._bad(
            "a persistent id that is no storage", "('storage', type, key, device, size)", f"{pickles.Persistent(pid)}"
        )

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
        kind = storage.kind if isinstance(storage, _Storage) else pickles.brief(storage)
        if kind not in _DTYPES:
            raise self._bad("a tensor of an element type that is not known here", ", ".join(ITEMSIZE), kind)
        return self._ref(_DTYPES[kind], ITEMSIZE[_DTYPES[kind]], storage, offset, shape, stride)

    def tensor_v2(
        self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, meta: Any = None
    ) -> TensorRef:
        self._refuse_lazy(meta)
        return self.tensor(storage, offset, shape, stride)

    def tensor_v3(
        self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, meta: Any = None
    ) -> TensorRef:
        self._refuse_lazy(meta)
        name = dtype.name if isinstance(dtype, pickles.Global) and dtype.module == "torch" else pickles.brief(dtype)
        if name not in ITEMSIZE or not isinstance(storage, _Storage):
            raise self._bad("a tensor of an element type that is not known here", ", ".join(ITEMSIZE), name)
        unit = 1 if storage.kind == "UntypedStorage" else ITEMSIZE.get(_DTYPES.get(storage.kind, ""), 1)
        return self._ref(name, unit, storage, offset, shape, stride)

    def parameter(self, data: Any, *_: Any) -> TensorRef | pickles.Call:
        if not isinstance(data, TensorRef | pickles.Call):
            raise self._bad("a parameter that is no tensor", found=pickles.brief(data))
        return data

    def subclass(self, func: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor with attributes of its own, which nobody needs; a real subclass stays an inert node."""
        plain = kind in (pickles.Global("torch", "Tensor"), pickles.Global("torch.nn.parameter", "Parameter"))
        if plain and type(args) is tuple:
            return func(*args)
        return pickles.Global("torch._tensor", "_rebuild_from_type_v2").call(func, kind, args, state)

    def _refuse_lazy(self, meta: Any) -> None:
        if isinstance(meta, dict) and any(meta.values()):
            raise self._bad("a tensor with a pending conjugation or negation", "resolved values", list(meta))

    def _ref(self, dtype: str, unit: int, storage: _Storage, offset: Any, shape: Any, stride: Any) -> TensorRef:
        numbers = (offset, *shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
        sane = all(type(n) is int and 0 <= n < _MAX_BYTES for n in numbers) and len(numbers) <= 1 + 2 * MAX_DIMS
        if not sane or len(shape) != len(stride):
            found = f"offset {pickles.brief(offset)}, shape {pickles.brief(shape)}, stride {pickles.brief(stride)}"
            raise self._bad("a tensor with an impossible shape", found=found)
        member, itemsize = storage.member, ITEMSIZE[dtype]
        reach = _reach(shape, stride)
        needed = (offset + reach) * itemsize if reach else 0
        have = min(storage.numel * unit, member.size)
        if needed > have or prod(shape) * itemsize > _MAX_BYTES:
            raise self._bad(
                "a tensor reaches beyond its storage",
                f"at most {have} bytes in data/{storage.key}",
                f"{needed} bytes: {dtype} {shape}, stride {stride}, offset {offset}",
            )
        return TensorRef(dtype, tuple(shape), tuple(stride), offset, storage.key, member.offset, member.size)


# One tensor an item: the quick path of .distcp files


def probe_tensor(file: Reader, base: int, length: int, where: str) -> TensorRef:
    """The tensor in an archive that holds a single one, by one short read at its head where the layout is torch's own.

    A file of 100,000 items has few different heads, so that each is parsed once; anything unusual goes the long way.
    """
    if length >= 0 and 0 <= base <= file.size - length:
        head = file.pread(min(HEAD, length), base)
        name = head.find(b"/data/0FB")
        end = name + 11 + int.from_bytes(head[name + 9 : name + 11], "little")
        if 0 < name < end <= len(head) and (ref := _parse_head(head[:end])) and end + ref.data_size <= length - 22:
            return TensorRef(ref.dtype, ref.shape, ref.stride, ref.storage_offset, "0", base + end, ref.data_size)
    found = read(file, base=base, length=length, where=where).load()
    if not isinstance(found, TensorRef):
        raise CheckpointError("an item is not a tensor", where=where, found=pickles.brief(found))
    return found


@lru_cache(maxsize=4096)
def _parse_head(head: bytes) -> TensorRef | None:
    """The tensor that the head describes (up to its first data byte), or None if the head is unusual in any way."""
    at = 0
    data = b""
    for name in (b"data.pkl", b".format_version", b".storage_alignment", b"byteorder"):
        start = _skip_header(head, at, name)
        end = head.find(b"PK\x07\x08", start)
        content = head[start:end]
        if start < 0 or end < 0 or head[end + 4 : end + 16] != _descriptor(content):
            return None
        at = end + 16
        data = data or content
        if name == b"byteorder" and content != b"little":
            return None
    if _skip_header(head, at, b"data/0") != len(head):
        return None
    try:
        ref = pickles.loads(data, where="", persistent=_first_storage, build=_Graph({}, "").build)
    except CheckpointError:
        return None
    return ref if isinstance(ref, TensorRef) and ref.storage_key == "0" else None


def _skip_header(head: bytes, at: int, name: bytes) -> int:
    """Where the data of the member whose header is at `at` starts; -1 if it is not the named one."""
    if at + LOCAL.size > len(head):
        return -1
    signature, _, flags, method, *_, name_size, extra_size = LOCAL.unpack_from(head, at)
    full = head[at + LOCAL.size : at + LOCAL.size + name_size]
    if signature != b"PK\x03\x04" or flags & ~0x0808 or method or not full.endswith(b"/" + name):
        return -1
    return at + LOCAL.size + int(name_size) + int(extra_size)


def _descriptor(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little") + 2 * len(content).to_bytes(4, "little")


def _first_storage(pid: Any) -> _Storage:
    """The storage a head's pickle refers to: its size follows from its type; where it lies, from the head."""
    match pid:
        case ("storage", pickles.Global() as kind, "0", str(), int(numel)) if numel >= 0:
            size = numel * ITEMSIZE.get(_DTYPES.get(kind.name, ""), 1)
            return _Storage(kind.name, "0", numel, Member(0, size))
    raise CheckpointError("an unusual storage", found=pickles.Persistent(pid))
