"""What a module of Transformer-Engine keeps beside its weights: the scales of FP8.

Version 1 kept a torch.save archive in a BytesIO, later ones keep a pickle in a tensor of bytes, in which every tensor's
storage is one more file of torch.save, of the form from before version 1.6.
Source: transformer_engine/pytorch/module/base.py, get_extra_state; torch/storage.py, __reduce__.
"""

from __future__ import annotations

import math
import pickletools
import re
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError

from . import torchzip
from .pickle_nodes import Call, Global, attributes, brief
from .pickles import loads
from .plain import plain

ENTRY = re.compile(r"(?P<module>.+)\._extra_state(?:/shard_(?P<index>\d+(?:\.\d+)*)_\d+(?:\.\d+)*)?")
#: Where names of modules lack the index that the entry has: that of a layer, and that of an expert.
_INDEXED = (re.compile(r"(?<=layers\.)(?!\d)"), re.compile(r"(?<=experts\.experts\.)(?!\d)"))
#: Scales are a few numbers for each module; histories of ranges a few thousand.
_MAX = 1 << 26


def module_of(entry: str) -> str | None:
    """The module whose state an entry holds, its layer and its expert in its name."""
    match = ENTRY.fullmatch(entry)
    if match is None:
        return None
    module, index = match["module"], (match["index"] or "").split(".")
    for place in _INDEXED:
        if index and index[0] and place.search(module):
            module = place.sub(f"{index.pop(0)}.", module, count=1)
    return module


def content(value: Any, where: Path) -> bytes:
    """The bytes of a module's state, of an object that a file holds; none where there is no state."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, torchzip.TensorRef):
        return bytes(plain(value, where).data) if value.numel else b""
    if isinstance(value, Call) and value.func.name == "BytesIO":
        held = attributes(value).get("value")
        held = value.args[0] if held is None and value.args else held
        return held if isinstance(held, bytes) else b""
    return b""


def scales(data: bytes, where: Path) -> dict[str, list[float]]:
    """The numbers of a module's state, by name. Raises CheckpointError."""
    if not data:
        return {}
    state = _archive(data, where) if data.startswith(b"PK") else _pickled(data, where)
    if not isinstance(state, dict):
        raise CheckpointError(
            "a module's state is no dictionary", where=where, expected="the state of Transformer-Engine's FP8",
            found=brief(state),
        )  # fmt: skip
    return {str(name): value for name, value in state.items() if _are_numbers(value)}


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is float for number in value)


def _archive(data: bytes, where: Path) -> Any:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        loaded = plain(torchzip.read(file.name, where=str(where)).load(), Path(file.name))
    if not isinstance(loaded, dict):
        return loaded
    return {k: _numbers(v.dtype, v.shape, bytes(v.data)) for k, v in loaded.items() if hasattr(v, "data")}


@attrs.frozen(getstate_setstate=False)
class _Stretch:
    """The bytes of a storage."""

    dtype: str
    data: bytes

    def __setstate__(self, state: object) -> None:
        raise TypeError("a stretch of bytes has no state")  # a BUILD opcode could make it another


def _pickled(data: bytes, where: Path) -> Any:
    if len(data) > _MAX:
        raise CheckpointError("a module's state is too large", where=where, found=f"{len(data)} bytes")

    left = 2 * len(data)

    def take(held: bytes) -> bytes:
        """The bytes, if no more are asked for in all than a pickle that names each of them once has."""
        nonlocal left
        left -= len(held)
        if left < 0:
            raise ValueError("copies of more than the pickle holds")
        return held

    def storage(inner: object) -> object:
        return _storage(take(inner), where) if isinstance(inner, bytes) else None

    def tensor(held: object, offset: object, shape: object, *_: object) -> object:
        if isinstance(held, _Stretch) and offset == 0 and isinstance(shape, tuple):
            return _numbers(held.dtype, shape, take(held.data))
        return None

    build: dict[tuple[str, str], Callable[..., object]] = {
        ("torch.storage", "_load_from_bytes"): storage,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
    }
    return loads(data, where=str(where), build=build)


def _numbers(dtype: str, shape: tuple[Any, ...], data: bytes) -> list[float] | None:
    """A small tensor of float32."""
    count = math.prod(n for n in shape[:8] if type(n) is int)
    if dtype != "float32" or not 0 <= 4 * count <= len(data):
        return None
    return [float(x) for x in np.frombuffer(data, "<f4", count)]


def _storage(data: bytes, where: Path) -> object:
    """The one storage of a file of torch.save from before version 1.6: five pickles, and its length and bytes."""
    stretches = list(_pickles(data, where))
    if len(stretches) != 5:
        return None
    found: list[_Stretch] = []

    def persistent(pid: object) -> object:
        kind = pid[1] if isinstance(pid, tuple) and len(pid) > 4 and pid[0] == "storage" else None
        name = _KINDS.get(kind.name if isinstance(kind, Global) else "", "")
        if name and type(pid[4]) is int:  # type: ignore[index]
            begin = stretches[-1][1] + 8
            found.append(_Stretch(name, data[begin : begin + pid[4] * ITEMSIZE[name]]))  # type: ignore[index]
        return None

    begin, end = stretches[3]
    loads(data[begin:end], where=str(where), persistent=persistent)
    return found[0] if len(found) == 1 else None


_KINDS = {"FloatStorage": "float32"}


def _pickles(data: bytes, where: Path) -> Iterator[tuple[int, int]]:
    """Where each of the pickles at the start of a file begins and ends."""
    stream, begin = BytesIO(data), 0
    for _ in range(5):
        try:
            for opcode, _, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    break
        except Exception as error:
            raise CheckpointError("a pickle is corrupt", where=where, found=error) from None
        yield begin, stream.tell()
        begin = stream.tell()
