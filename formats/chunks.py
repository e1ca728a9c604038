"""Where the chunks of a torch_dist checkpoint lie, and which part of its tensor each is, as `.metadata` says."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from registry.errors import CheckpointError
from registry.reading import each, reading
from registry.storage import Piece

from . import torchzip
from .pickles import Call, attr, brief

METADATA = ".metadata"
AGAIN = "copy the checkpoint again, or use another iteration"


class Items:
    """Where each item lies: (name, offsets or None) -> (file index, offset, length)."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.where: dict[tuple[str, tuple[int, ...] | None], tuple[int, int, int]] = {}


class _Chunk(NamedTuple):
    name: str
    size: tuple[int, ...]
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    length: int


def read_pieces(path: Path, tensors: dict[Any, Any], items: Items) -> tuple[list[Piece], list[str]]:
    """The chunks of all tensors in the order of the metadata, and the names of what is none. Raises CheckpointError."""
    chunks: dict[int, list[tuple[int, _Chunk]]] = defaultdict(list)
    entries: list[str] = []
    count = 0
    for name, stored in tensors.items():
        if not isinstance(stored, Call) or stored.func.name != "TensorStorageMetadata":
            entries.append(name)
            continue
        size, told = whole_numbers(attr(stored, "size")), attr(stored, "chunks")
        for one in told if isinstance(told, list) else [told]:
            origin, shape = whole_numbers(attr(one, "offsets")), whole_numbers(attr(one, "sizes"))
            if size is None or origin is None or shape is None or not len(size) == len(origin) == len(shape):
                raise CheckpointError(
                    "bad chunk in the metadata", where=path / METADATA,
                    expected="a size, offsets and sizes of as many dimensions", found=brief(name), hint=AGAIN,
                )  # fmt: skip
            file, chunk = _placed(path, name, size, origin, shape, items)
            chunks[file].append((count, chunk))
            count += 1
    pieces: dict[int, Piece] = {}
    for found in each(lambda file: _in_file(path / items.files[file], file, chunks[file]), sorted(chunks), path):
        pieces |= found
    return [pieces[i] for i in range(count)], entries


def _placed(
    path: Path, name: str, size: tuple[int, ...], origin: tuple[int, ...], shape: tuple[int, ...], items: Items
) -> tuple[int, _Chunk]:
    """The file that a chunk is in, and where."""
    if any(o + n > whole for o, n, whole in zip(origin, shape, size, strict=True)):
        raise CheckpointError(
            "a chunk leaves its tensor", where=path / METADATA, expected=f"chunks of {name} within {size}",
            found=f"{shape} at {origin}", hint=AGAIN,
        )  # fmt: skip
    try:
        file, offset, length = items.where[name, origin]
    except KeyError:
        raise CheckpointError(
            "the metadata does not say where a chunk lies", where=path / METADATA,
            expected=f"a file and an offset for {name} at {origin}", found="no such entry", hint=AGAIN,
        ) from None  # fmt: skip
    return file, _Chunk(name, size, origin, shape, offset, length)


def _in_file(where: Path, file: int, chunks: list[tuple[int, _Chunk]]) -> dict[int, Piece]:
    """The pieces of one file, by their numbers."""
    pieces: dict[int, Piece] = {}
    with reading(where) as reader:
        reader.want([(chunk.offset, min(torchzip.HEAD, chunk.length)) for _, chunk in chunks])
        for number, chunk in chunks:
            ref = torchzip.probe_tensor(reader, chunk.offset, chunk.length, str(where))
            if ref.shape != chunk.shape:
                raise CheckpointError(
                    "an item disagrees with the metadata", where=where, expected=f"{chunk.name} {chunk.shape}",
                    found=ref.shape, hint="the checkpoint mixes files of several saves",
                )  # fmt: skip
            strides = None if ref.is_contiguous else ref.stride
            pieces[number] = Piece(
                chunk.name, ref.dtype, chunk.shape, file, ref.offset, None, chunk.origin, chunk.size, strides
            )
    return pieces


def whole_numbers(values: object) -> tuple[int, ...] | None:
    """A row of sizes or offsets; None for anything else."""
    if isinstance(values, tuple | list) and all(type(n) is int and 0 <= n < 1 << 62 for n in values):
        return tuple(values)
    return None


#: Where megatron-core before 0.16 says of which shape a tensor is that it has stored as flattened shards.
_ORIGINAL = "nd_reformulated_orig_global_shape"


def unflatten(where: Path, pieces: list[Piece], told: object) -> None:
    """Give flattened shards the place that they have in their tensor.

    megatron-core before 0.16 stored a tensor that is cut into a grid of equal shards, each of them laid out in a row
    and cut anew, with the axes of the grid and one of the row. A piece is then a stretch of one shard.
    Source: megatron/core/dist_checkpointing/strategies/torch.py (sharded_tensor_to_torch_sharded_tensor).
    """
    if not isinstance(told, dict):
        return
    for i, piece in enumerate(pieces):
        known = told.get(piece.name)
        if not isinstance(known, dict) or _ORIGINAL not in known or piece.whole is None or piece.origin is None:
            continue
        original = whole_numbers(known[_ORIGINAL])
        *grid, row = piece.whole
        fits = original is not None and len(grid) == len(original) and 0 not in grid
        fits = fits and not any(n % parts for n, parts in zip(original or (), grid, strict=True))
        shard = tuple(n // parts for n, parts in zip(original or (), grid, strict=True)) if fits else ()
        if not fits or row != math.prod(shard) or set(piece.shape[:-1]) - {1} or piece.strides is not None:
            raise CheckpointError(
                "the grid of a flattened tensor does not fit its shape", where=where,
                expected=f"equal shards of {piece.name} {brief(known[_ORIGINAL])}",
                found=f"{piece.shape} of {piece.whole}", hint=AGAIN,
            )  # fmt: skip
        origin = tuple(at * n for at, n in zip(piece.origin, shard, strict=False))
        stretch = (piece.origin[-1], piece.shape[-1])
        pieces[i] = piece._replace(shape=shard, origin=origin, whole=original, stretch=stretch)
