"""The `.metadata` file of torch's distributed checkpoints, written: what its FileSystemReader unpickles.

Source: torch/distributed/checkpoint/{metadata,filesystem}.py. A large model has 100,000 items, each of several objects:
these are records, and sizes that repeat are made once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from registry.collector import no_collection
from registry.plain import TensorData
from registry.storage import ObjectSlot, Slot

from .pickle_nodes import Kind, Record
from .pickles import Call, Global, Size, dumps

_DCP = "torch.distributed.checkpoint.metadata"
_INDEX = Kind(Global(_DCP, "MetadataIndex"), "fqn", "offset", "index")
_INFO = Kind(
    Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), "relative_path", "offset", "length"
)  # fmt: skip
_CHUNK = Kind(Global(_DCP, "ChunkStorageMetadata"), "offsets", "sizes")
_BYTES = Record(Kind(Global(_DCP, "BytesStorageMetadata")), ())
_TENSOR = Kind(Global(_DCP, "TensorStorageMetadata"), "properties", "size", "chunks")


@no_collection()
def render(
    items: Iterable[tuple[Slot | ObjectSlot, str, int, int]], payloads: Mapping[ObjectSlot, Any],
    paths: Mapping[str, tuple[str | int, ...]] | None,
) -> bytes:  # fmt: skip
    """The file for (what it holds, file name, offset, length) of every item.

    `payloads` are what objects hold; `paths`, for checkpoints of nested state dicts, where in them each name stands.
    """
    size = cache(Size)
    suffix = cache(_suffix)
    tensors: dict[str, Record] = {}
    chunks: dict[str, list[Record]] = {}
    stored: dict[Record, Record] = {}

    def add(name: str, dtype: str, at: Size, shape: Sequence[int], whole: Sequence[int]) -> None:
        found = chunks.get(name)
        if found is None:
            found = chunks[name] = []
            tensors[name] = Record(_TENSOR, (_properties(dtype), size(whole), found))
        found.append(Record(_CHUNK, (at, size(shape))))

    for entry, file, offset, length in items:
        name: str = entry.name
        at: Size | None = None
        if isinstance(entry, Slot):
            at = size(entry.origin if entry.origin is not None else (0,) * len(entry.shape))
            add(name, entry.dtype, at, entry.shape, entry.shape if entry.whole is None else entry.whole)
        elif paths is not None and isinstance(value := payloads.get(entry), TensorData):
            at, shape = size((0,) * len(value.shape)), tuple(value.shape)
            add(name, value.dtype, at, shape, shape)
        else:
            name = name if paths is not None else name + suffix(entry.origin, entry.whole)
            tensors[name] = _BYTES
        stored[Record(_INDEX, (name, at, None))] = Record(_INFO, (file, offset, length))
    state = {
        "state_dict_metadata": tensors, "planner_data": paths, "storage_data": stored,
        "storage_meta": None, "version": "1.0.0",
    }  # fmt: skip
    return dumps(Global(_DCP, "Metadata").new(state=state), protocol=2)


def _suffix(origin: tuple[int, ...], whole: tuple[int, ...]) -> str:
    """What the name of an object says of its place among the ranks'."""
    origin, whole = (origin, whole) if whole else ((0,), (1,))
    return f"/shard_{'.'.join(map(str, origin))}_{'.'.join(map(str, whole))}"


def _properties(dtype: str) -> Call:
    layout = Global("torch.serialization", "_get_layout").call("torch.strided")
    memory = Global(_DCP, "_MEM_FORMAT_ENCODING").call(0)
    state = (Global("torch", dtype), layout, False, memory, False)
    return Global(_DCP, "TensorProperties").new(state=state)
