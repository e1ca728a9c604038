"""CRC32 at the pace of memory, also of bytes that were summed in parts, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

try:  # zlib's takes as long as writing the bytes does, ISA-L's a tenth of that
    from isal.isal_zlib import crc32
except ImportError:  # a platform without a wheel of it
    from zlib import crc32

__all__ = ["combine", "crc32"]

_POLYNOMIAL = 0xEDB88320


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo that of CRC32, lowest power in the highest bit."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _shift(nbytes: int) -> int:
    """x ** (8 * nbytes): what a CRC is multiplied by where so many bytes follow."""
    power, square = 1 << 31, 1 << 23  # x ** 0 and x ** 8
    while nbytes:
        if nbytes & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        nbytes >>= 1
    return power


def combine(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC32 of parts one after another, each given as (its CRC32, its bytes)."""
    total = 0
    for crc, nbytes in parts:
        total = (_multiply(_shift(nbytes), total) if total else 0) ^ crc
    return total
