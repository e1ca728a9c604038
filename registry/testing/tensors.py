"""Tensors whose every bit matters: NaNs with payloads, -0.0, denormals and infinities, which careless copies change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from registry.dtypes import ITEMSIZE, torch_dtype

if TYPE_CHECKING:
    import torch

#: The types that weights are stored in, by name.
DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "int64", "uint8", "bool")
#: Bit patterns of a floating-point type: (sign, exponent all ones, lowest bit of the exponent, lowest and highest of
#: the fraction). In order: -0.0, both infinities, the smallest and the largest denormal, and NaNs, quiet and
#: signalling, with a payload.
_LAYOUTS = {"float64": (11, 52), "float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7), "float8_e5m2": (5, 2)}


def awkward_bits(dtype: str) -> list[int]:
    """The values of a type that only a copy of the bytes keeps, as whole numbers; none for integers."""
    if dtype == "float8_e4m3fn":  # without infinities; NaN is all ones
        return [0x80, 0x7F, 0xFF, 0x01, 0x07]
    if dtype not in _LAYOUTS:
        return []
    exponent, fraction = _LAYOUTS[dtype]
    sign, ones, quiet = 1 << exponent + fraction, ((1 << exponent) - 1) << fraction, 1 << fraction - 1
    payload = max(1, (quiet - 1) & 0x5A5A5A5A5A5A5)
    return [sign, ones, sign | ones, 1, quiet * 2 - 1, ones | quiet | payload, sign | ones | quiet, ones | payload]


def random_bits(shape: Sequence[int], dtype: str, seed: int) -> torch.Tensor:
    """A tensor with every bit random, and the awkward values among its first elements. A bool has only two patterns."""
    import torch

    count, size = math.prod(shape), ITEMSIZE[dtype]
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == "bool" else 256
    raw = torch.randint(0, high, (max(count, 1), size), dtype=torch.uint8, generator=generator)
    for i, bits in enumerate(awkward_bits(dtype)[:count]):
        raw[(seed + i) % count] = torch.tensor(list(bits.to_bytes(size, "little")), dtype=torch.uint8)
    return raw.reshape(-1).view(torch_dtype(dtype))[:count].reshape(tuple(shape))


@st.composite
def tensors(
    draw: st.DrawFn,
    dtypes: Sequence[str] = DTYPES,
    shapes: st.SearchStrategy[Sequence[int]] | None = None,
) -> torch.Tensor:
    """A tensor of random bits; by default of up to four dimensions, of which some have one element or none."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4) if shapes is None else shapes)
    return random_bits(shape, draw(st.sampled_from(list(dtypes))), draw(st.integers(0, 2**31)))
