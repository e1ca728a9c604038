"""A look at a pickle's opcodes before they are run.

The C unpickler is fast but trusting: one LONG_BINPUT with a large index makes it reserve gigabytes, an extension code
takes an object out of the process's own registry, a million empty lists take a megabyte here and a hundred there, and
tuples in tuples may take for ever to hash. All are seen by reading the opcodes first. Stretches of opcodes of fixed
length are matched by one regular expression, so that the look costs a fraction of the load.
"""

from __future__ import annotations

import pickletools
import re
import sys
from functools import lru_cache

from registry.errors import CheckpointError, UnsafePickleError

# What the picklers of protocol 2 and later write. Left out: text opcodes (protocol 0), INST and OBJ, extension codes,
# out-of-band buffers, DUP, and numbers of more than 255 bytes.
_FIXED = {
    0: b"(01N\x88\x89)]}\x8ft\x85\x86\x87aesu\x90bR\x81\x93\x94Qld\x91",
    1: b"Kqh\x80",
    2: b"M",
    4: b"Jj",
    8: b"G",
}
#: Opcodes that carry a length: opcode -> bytes of the length.
COUNTED = {
    **dict.fromkeys(b"\x8cUC\x8a", 1),
    **dict.fromkeys(b"XTB", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
_FRAME = 0x95
#: Opcodes of fixed length, with a frame's too: opcode -> bytes of its argument.
WIDTHS = {code: width for width, codes in _FIXED.items() for code in codes} | {ord("r"): 4, _FRAME: 8}
#: What makes an object that takes memory. (A call's arguments and an object's attributes are counted too.)
_MAKERS = b"]}\x8ft\x85\x86\x87R\x81ld\x91"
_OTHERS = bytes(set(range(256)) - set(_MAKERS))
#: Objects that a small pickle may make, and bytes of a large one for each: `.metadata` has nine for each of its own.
_OBJECTS = 200_000
_BYTES_EACH = 8
_NAMES = {opcode.code.encode("latin1")[0]: opcode.name for opcode in pickletools.opcodes}


#: Before Python 3.11.5 possessive repeats of what has alternatives may end in the middle of one.
POSSESSIVE = sys.version_info >= (3, 11, 5)
_MANY = b"++" if POSSESSIVE else b"{1,4096}"


@lru_cache(maxsize=64)
def _stretch(top: int) -> re.Pattern[bytes]:
    """Opcodes of fixed length. A memo index must be below `top + 1` times 64 Ki."""
    parts = [b"[" + re.escape(codes) + b"]" + b"." * width for width, codes in _FIXED.items()]
    high, low = top >> 8, top & 0xFF
    bounds = [b"[\\x00-\\x%02x]\\x%02x" % (low, high)]
    if high:
        bounds.append(b".[\\x00-\\x%02x]" % (high - 1))
    parts.append(b"r..(?:" + b"|".join(bounds) + b")")
    return re.compile(b"(?:" + b"|".join(parts) + b")" + _MANY, re.DOTALL)


def check_opcodes(data: bytes, where: str) -> int:
    """How many tuples hold many values, or something that may be a tuple, as seen by a quick look.

    Raises unless `data` is a whole pickle made of opcodes that plain data needs, and of a sane number of them.
    """
    stretch = _stretch(min(len(data) >> 16, 0xFFFF))  # no pickle has more memo entries than bytes
    skeleton: list[bytes] = []  # with an opcode that pushes a scalar in the place of those of other lengths
    at, end = 0, len(data)
    while at < end:
        if found := stretch.match(data, at):
            skeleton.append(found[0])
            at = found.end()
            if at >= end:
                break
        code = data[at]
        if code in COUNTED:
            start = at + 1 + COUNTED[code]
            at = start + int.from_bytes(data[at + 1 : start], "little")
            skeleton.append(b"N")
        elif code == 0x63:  # GLOBAL: two lines
            first = data.find(b"\n", at)
            at = data.find(b"\n", first + 1) + 1
            skeleton.append(b"N")
            if first < 0 or at <= 0:
                break
        elif code == _FRAME:
            if at + 9 + int.from_bytes(data[at + 1 : at + 9], "little") > end:
                break
            at += 9
        elif code == 0x2E:  # STOP
            return _check_amount(b"".join(skeleton), len(data), where)
        elif not found:  # else it may be what a stretch goes on with
            _refuse(data, at, where)
    raise CheckpointError("a pickle is cut short", where=where, expected="a STOP opcode", found=f"{len(data)} bytes")


_MEMO = rb"(?:\x94|q.|r.{4})?+"
_SCALAR = rb"(?:[N\x88\x89]|K.|M..|J.{4}|G.{8})" + _MEMO
_SCALARS = b"N\x88\x89KMJG"
_TUPLES = b"t\x85\x86\x87"
_SINGLE = b"|".join(
    b"[" + re.escape(bytes(set(codes) - set(_SCALARS + _TUPLES + b"("))) + b"]" + b"." * width
    for width, codes in {0: _FIXED[0], 1: _FIXED[1], 4: b"jr"}.items()
)
#: All up to a tuple, but for those of a few scalars alone, and those that are a call's arguments or an object's state,
#: which hold tuples but are in none.
_TO_TUPLE = re.compile(
    rb"(?:(?:%(o)s)++|%(s)s(?:\x85|%(s)s(?:[\x85\x86]|(?:%(s)s)++[\x85-\x87]?+)?+)?+"
    rb"|\((?:(?:%(s)s){0,64}+t)?+|[t\x85-\x87]%(m)s[RbQ])*+([t\x85-\x87]|\Z)"
    % {b"s": _SCALAR, b"m": _MEMO, b"o": _SINGLE},
    re.DOTALL,
)


def _check_amount(skeleton: bytes, size: int, where: str) -> int:
    """Raises where so many objects are made that they would take far more memory than those of an honest pickle."""
    made = len(skeleton.translate(None, _OTHERS))
    allowed = _OBJECTS + size // _BYTES_EACH
    if made > allowed:
        raise CheckpointError(
            "a pickle of too many objects", where=where, expected=f"at most {allowed} in {size} bytes", found=made
        )
    return sum(1 for found in _TO_TUPLE.finditer(skeleton) if found[1]) if POSSESSIVE else made


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
