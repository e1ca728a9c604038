"""A look at a pickle's opcodes before they are run.

The C unpickler is fast but trusting: one LONG_BINPUT with a large index makes it reserve gigabytes, and an extension
code takes an object out of the process's own registry. Both are seen by reading the opcodes first. Stretches of
opcodes of fixed length are matched by one regular expression, so that the look costs a tenth of the load.
"""

from __future__ import annotations

import pickletools
import re
from functools import lru_cache

from registry.errors import CheckpointError, UnsafePickleError

# What the picklers of protocol 2 and later write. Left out: text opcodes (protocol 0), INST and OBJ, extension codes,
# out-of-band buffers, and DUP.
_FIXED = {
    0: b"(01N\x88\x89)]}\x8ft\x85\x86\x87aesu\x90bR\x81\x93\x94Qld\x91",
    1: b"Kqh\x80",
    2: b"M",
    4: b"Jj",
    8: b"G\x95",
}
#: Opcodes that carry a length: opcode -> bytes of the length. (LONG4's is signed; a negative one fails on loading.)
_COUNTED = {
    **dict.fromkeys(b"\x8cUC\x8a", 1),
    **dict.fromkeys(b"XTB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
_NAMES = {opcode.code.encode("latin1")[0]: opcode.name for opcode in pickletools.opcodes}


@lru_cache(maxsize=64)
def _stretch(top: int) -> re.Pattern[bytes]:
    """Opcodes of fixed length. A memo index must be below `top + 1` times 64 Ki."""
    parts = [b"[" + re.escape(codes) + b"]" + b"." * width for width, codes in _FIXED.items()]
    high, low = top >> 8, top & 0xFF
    bounds = [b"[\\x00-\\x%02x]\\x%02x" % (low, high)]
    if high:
        bounds.append(b".[\\x00-\\x%02x]" % (high - 1))
    parts.append(b"r..(?:" + b"|".join(bounds) + b")")
    return re.compile(b"(?:" + b"|".join(parts) + b")++", re.DOTALL)


def check_opcodes(data: bytes, where: str) -> None:
    """Raises unless `data` is a whole pickle made of opcodes that plain data needs."""
    stretch = _stretch(min(len(data) >> 16, 0xFFFF))  # no pickle has more memo entries than bytes
    at, end = 0, len(data)
    while at < end:
        if found := stretch.match(data, at):
            at = found.end()
            if at >= end:
                break
        code = data[at]
        if code in _COUNTED:
            start = at + 1 + _COUNTED[code]
            at = start + int.from_bytes(data[at + 1 : start], "little")
        elif code == 0x63:  # GLOBAL: two lines
            first = data.find(b"\n", at)
            at = data.find(b"\n", first + 1) + 1
            if first < 0 or at <= 0:
                break
        elif code == 0x2E:  # STOP
            return
        else:
            _refuse(data, at, where)
    raise CheckpointError("a pickle is cut short", where=where, expected="a STOP opcode", found=f"{len(data)} bytes")


def _refuse(data: bytes, at: int, where: str) -> None:
    code = data[at]
    if code in b"".join(_FIXED.values()) + b"r":  # known, but cut short, or a memo index beyond reason
        found = f"{_NAMES[code]} at byte {at} has a bad argument"
        raise CheckpointError("a pickle is corrupt", where=where, expected="a whole pickle", found=found)
    raise UnsafePickleError(
        "a pickle uses an opcode that plain data never needs",
        where=where,
        expected="tensors and plain data",
        found=f"{_NAMES.get(code, f'byte {code:#04x}')} at byte {at}",
        hint="if you trust the file, load it in its own program and save it again at protocol 2 or later",
    )
