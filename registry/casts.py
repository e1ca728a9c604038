"""Casts of floating-point values: to nearest even, as torch does them, and every NaN the same one wherever it stands.

They are done in pieces that stay in the processor's cache, and in buffers that are kept: fresh memory costs more than a
cast.
"""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from registry.dtypes import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

#: Elements of a piece.
PIECE = 1 << 17

_local = threading.local()
_dtype = cache(torch_dtype)


def alone() -> None:
    """Have torch take no threads of its own in the calling thread, from now on: others do the same work beside it."""
    import torch

    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
        # Threads that begin later would have as few. They get back what they had, from a thread that ends with it.
        again = threading.Thread(target=torch.set_num_threads, args=(before,))
        again.start()
        again.join()


def spare(name: str, shape: Sequence[int], dtype: str = "float32") -> torch.Tensor:
    """This thread's own buffer of that name and type, in a shape. It holds until it is asked for again."""
    import torch

    count = math.prod(shape)
    have = getattr(_local, f"{name} {dtype}", None)
    if have is None or have.numel() < count:
        have = torch.empty(max(PIECE, count), dtype=_dtype(dtype))
        setattr(_local, f"{name} {dtype}", have)
    found: torch.Tensor = have[:count].view(tuple(shape))
    return found


def extremes(values: torch.Tensor) -> tuple[float, float]:
    """The least and the largest value, both NaN where any is; zeros where there is none."""
    if not values.numel():
        return 0.0, 0.0
    low, high = values.aminmax()
    return float(low), float(high)


def cast(values: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Fill `target`, of the shape of `values` and another floating-point type, both a piece or less.

    Returns the values, widened where that was needed, and the least and the largest of them.
    """
    if values.itemsize == target.itemsize == 2:  # exact, and torch has fast code for both steps, but none for the one
        values = spare("wide", values.shape).copy_(values)
    target.copy_(values)
    low, high = extremes(values)
    if math.isnan(low):
        target.masked_fill_(values.isnan(), math.nan)
    return values, low, high


def _pieces(values: torch.Tensor) -> Sequence[torch.Tensor]:
    flat = values.view(-1)
    return [flat[i : i + PIECE] for i in range(0, flat.numel(), PIECE)]


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Values in another type: any number of them, in a buffer of this thread's that holds until the next call."""
    found, values = spare("rounded", values.shape, dtype), values.contiguous()
    for piece, target in zip(_pieces(values), _pieces(found), strict=True):
        cast(piece, target)
    return found


#: FP8 type -> the bits that are all set in what is no number; how far down float16 has the others, and which of them
#: count, for the sign is there twice then; and what values are divided by, for exponents count from elsewhere.
_AS_HALF = {"float8_e4m3fn": (0x7F, 1, ~0x4000, 256.0), "float8_e5m2": (0x7C, 0, ~0, 1.0)}


def from_float8(raw: NDArray[np.uint8], dtype: str) -> tuple[NDArray[np.float32], float] | None:
    """Values in FP8, in a buffer of this thread's, and a power of two that they are to be multiplied by.

    Their bits are moved to where float16 has them, which takes a quarter of the time that torch takes. None for types
    that are not made like it, and where a value is no number or infinite.
    """
    if dtype not in _AS_HALF or not raw.size:
        return None
    special, shift, mask, factor = _AS_HALF[dtype]
    if (raw & np.uint8(special)).max() == special:
        return None
    half = spare("half", raw.shape, "int16")
    bits = half.numpy()
    np.left_shift(raw, np.int16(8), out=bits, dtype=np.int16, casting="unsafe")
    if shift:
        np.right_shift(bits, np.int16(shift), out=bits)
        np.bitwise_and(bits, np.int16(mask), out=bits)
    found = spare("from float8", raw.shape)
    for piece, target in zip(_pieces(half), _pieces(found), strict=True):
        target.copy_(piece.view(_dtype("float16")))
    return found.numpy(), factor
