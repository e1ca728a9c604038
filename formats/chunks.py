"""Which part of its tensor a chunk of a torch_dist checkpoint is, as `.metadata` says."""

from __future__ import annotations

import math
from pathlib import Path

from registry.errors import CheckpointError
from registry.storage import Piece

from .pickles import brief

_AGAIN = "copy the checkpoint again, or use another iteration"


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
                found=f"{piece.shape} of {piece.whole}", hint=_AGAIN,
            )  # fmt: skip
        origin = tuple(at * n for at, n in zip(piece.origin, shard, strict=False))
        stretch = (piece.origin[-1], piece.shape[-1])
        pieces[i] = piece._replace(shape=shard, origin=origin, whole=original, stretch=stretch)
