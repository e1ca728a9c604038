"""Value rules: casts, affine rules and codecs between a source's stored values and a target's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from registry import catalog
from registry.casts import PIECE, cast
from registry.dtypes import is_float, torch_dtype
from registry.groups import Coding

if TYPE_CHECKING:
    import torch

    from registry.planning import Values


#: Takes values before and after they were rounded, and the least and the largest of those before.
Note = Callable[["torch.Tensor", "torch.Tensor", float, float], None]


def convert(target: np.ndarray, source: np.ndarray, values: Values, note: Note | None = None) -> None:
    """Fill `target` with the values of `source`. Both are arrays of raw elements (unsigned integers of their width).

    The stored value of a rule is `encode(logical * scale + offset)`. Affine rules are applied in float32, or in float64
    where either side is; a cast alone rounds to nearest even, as torch does, and every NaN becomes the same one: which
    torch makes of it depends on where in a vector it stands.
    """
    if target.size > PIECE and target.ndim:
        axis = max(range(target.ndim), key=lambda d: target.shape[d] > 1 and target.strides[d])
        step = max(1, target.shape[axis] * PIECE // target.size)
        for i in range(0, target.shape[axis], step):
            at = (slice(None),) * axis + (slice(i, i + step),)
            convert(target[at], source[at], values, note)
        return
    tensor = _coded(_tensor(source if source.flags.writeable else source.copy(), values.source_dtype), values)
    found = _tensor(target, values.target_dtype)
    if not (tensor.dtype.is_floating_point and is_float(values.target_dtype) and tensor.dtype != found.dtype):
        found.copy_(tensor)
        return
    tensor, low, high = cast(tensor, found)
    if note is not None:
        note(tensor, found, low, high)


def _coded(tensor: torch.Tensor, values: Values) -> torch.Tensor:
    """Values of a source as a target's rules have them, but for the target's type."""
    a, b = values.source, values.target
    if a.codec:
        tensor = catalog.codec(a.codec).decode(tensor)
    if b.via:
        if (a.scale, a.offset) != (1, 0):
            tensor, a = (tensor.to(_dtype("float32")) - a.offset) / a.scale, Coding()
        tensor = tensor.to(_dtype(b.via))
    if (a.scale, a.offset) != (b.scale, b.offset):
        wide = "float64" in (values.source_dtype, values.target_dtype)
        tensor = tensor.to(_dtype("float64" if wide else "float32"))
        tensor = (tensor - a.offset) / a.scale * b.scale + b.offset
    return catalog.codec(b.codec).encode(tensor) if b.codec else tensor


def _tensor(raw: np.ndarray, dtype: str) -> torch.Tensor:
    """The elements of an array of raw ones, in place."""
    import torch

    return torch.from_numpy(raw).view(_dtype(dtype))


_dtype = cache(torch_dtype)
