"""Value rules: casts, affine rules and codecs between a source's stored values and a target's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from registry import catalog
from registry.dtypes import torch_dtype
from registry.groups import Coding

if TYPE_CHECKING:
    import torch

    from registry.planning import Values


#: Elements at a time: torch takes no threads of its own for so few, and what lies between two steps stays in the cache.
_BLOCK = 1 << 15


#: Takes values before and after they were rounded.
Note = Callable[["torch.Tensor", "torch.Tensor"], None]


def convert(target: np.ndarray, source: np.ndarray, values: Values, note: Note | None = None) -> None:
    """Fill `target` with the values of `source`. Both are arrays of raw elements (unsigned integers of their width).

    The stored value of a rule is `encode(logical * scale + offset)`. Affine rules are applied in float32, or in float64
    where either side is; a cast alone rounds to nearest even, as torch does.
    """
    if target.size > _BLOCK and target.ndim:
        axis = max(range(target.ndim), key=lambda d: target.shape[d] > 1 and target.strides[d])
        step = max(1, target.shape[axis] * _BLOCK // target.size)
        for i in range(0, target.shape[axis], step):
            at = (slice(None),) * axis + (slice(i, i + step),)
            convert(target[at], source[at], values, note)
        return
    a, b = values.source, values.target
    tensor = _tensor(source if source.flags.writeable else source.copy(), values.source_dtype)
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
    if b.codec:
        tensor = catalog.codec(b.codec).encode(tensor)
    found = _tensor(target, values.target_dtype)
    found.copy_(tensor)
    if note is not None:
        note(tensor, found)


def _tensor(raw: np.ndarray, dtype: str) -> torch.Tensor:
    """The elements of an array of raw ones, in place."""
    import torch

    return torch.from_numpy(raw).view(_dtype(dtype))


_dtype = cache(torch_dtype)
