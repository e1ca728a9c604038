"""Damages copies of a checkpoint's files, to see that readers refuse them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random


def truncated(data: bytes, points: int = 4) -> Iterator[tuple[str, bytes]]:
    """(what was done, bytes) of a file cut off: empty, after a byte, near its end, and at places between."""
    cuts = {0, 1, len(data) - 1, len(data) // 2, *(len(data) * i // points for i in range(points))}
    for cut in sorted(cut for cut in cuts if 0 <= cut < len(data)):
        yield f"cut to {cut} of {len(data)} bytes", data[:cut]


def flipped(data: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(what was done, bytes) of a file with one bit changed, at random places and in its first and last bytes."""
    random = Random(seed)
    bits = [random.randrange(8 * len(data)) for _ in range(count)] if data else []
    for bit in sorted({*bits, *([0, 8 * len(data) - 1] if data else [])}):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit % 8} of byte {bit // 8} flipped", bytes(changed)


def damaged(path: Path, kinds: Sequence[str], flips: int = 12) -> Iterator[str]:
    """Write each damage of some kinds ("cut", "flip", "gone") to the file at `path` in turn, and undo it afterwards."""
    data = path.read_bytes()
    made = [*(truncated(data) if "cut" in kinds else ()), *(flipped(data, flips) if "flip" in kinds else ())]
    try:
        for what, content in made:
            path.write_bytes(content)
            yield f"{path.name} {what}"
        if "gone" in kinds:
            path.unlink()
            yield f"{path.name} removed"
    finally:
        path.write_bytes(data)
