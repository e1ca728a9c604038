"""Q8_0: 32 values of a row in 34 bytes, a scale in float16 and an int8 each. Bit for bit what the gguf package makes.

Source: quantize_blocks and dequantize_blocks of Q8_0 in gguf/quants.py.
"""

from __future__ import annotations

import torch

from registry.encoding import Blocks

COLUMNS, NBYTES = 32, 34


def encode(values: torch.Tensor) -> torch.Tensor:
    """float32 (blocks, 32) -> uint8 (blocks, 34)."""
    scale = values.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    scaled = values * inverse
    size = scaled.abs()
    whole = size.floor()
    rounded = scaled.sign() * (whole + (2 * (size - whole)).floor())  # halves away from zero
    parts = scale.to(torch.float16).view(torch.uint8), rounded.to(torch.int8).view(torch.uint8)
    return torch.cat(parts, 1)


def decode(raw: torch.Tensor) -> torch.Tensor:
    """uint8 (blocks, 34) -> float32 (blocks, 32)."""
    scale = raw[:, :2].contiguous().view(torch.float16).to(torch.float32)
    return raw[:, 2:].contiguous().view(torch.int8).to(torch.float32) * scale


Q8_0 = Blocks(COLUMNS, NBYTES, encode, decode)
