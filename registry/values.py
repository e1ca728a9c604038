"""Value rules: casts, affine rules and codecs between a source's stored values and a target's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from registry import catalog
from registry.dtypes import torch_dtype

if TYPE_CHECKING:
    from registry.planning import Values


def convert(target: np.ndarray, source: np.ndarray, values: Values) -> None:
    """Fill `target` with the values of `source`. Both are arrays of raw elements (unsigned integers of their width).

    The stored value of a rule is `encode(logical * scale + offset)`. Affine rules are applied in float32, or in float64
    where either side is; a cast alone rounds to nearest even, as torch does.
    """
    import torch

    a, b = values.source_rule, values.target_rule
    raw = torch.from_numpy(np.ascontiguousarray(source).reshape(-1).view(np.uint8))
    tensor = raw.view(torch_dtype(values.source_dtype)).reshape(source.shape)
    if a.codec:
        tensor = catalog.codec(a.codec).decode(tensor)
    if (a.scale, a.offset) != (b.scale, b.offset):
        wide = "float64" in (values.source_dtype, values.target_dtype)
        tensor = tensor.to(torch.float64 if wide else torch.float32)
        tensor = (tensor - a.offset) / a.scale * b.scale + b.offset
    if b.codec:
        tensor = catalog.codec(b.codec).encode(tensor)
    tensor = tensor.to(torch_dtype(values.target_dtype)).contiguous()
    target[...] = tensor.reshape(-1).view(torch.uint8).numpy().view(target.dtype).reshape(target.shape)
