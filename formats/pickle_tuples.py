"""How deep a pickle nests tuples, and what the keys of its dictionaries cost, found without making any of them.

The hash of a tuple is that of all it holds, to any depth and never kept: in C, where no limit of Python's is looked at.
So a few bytes can overrun the stack, or keep a process busy for years, as soon as such a tuple becomes a key. Pickles
of checkpoints seldom have tuples in tuples, and `pickle_scan` passes them by; the others' opcodes are followed here, by
what they do to the stack and the memo alone.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from registry.errors import CheckpointError

from .pickle_scan import COUNTED, WIDTHS

#: Tuples in tuples; and of all keys together, values that are hashed.
MAX_TUPLES = 64
_MAX_HASHED = 1_000_000
_UINT4 = struct.Struct("<I")
#: Opcodes by what they do to the stack: push a value that is no tuple of any depth (-> bytes of the argument), take all
#: down to the mark, take so many values.
_PUSHES = {code: WIDTHS[code] for code in b"N\x88\x89]})\x8fKMJG"}
_MARKED = frozenset(b"tud\x90\x91el1")
_TAKES = {**dict.fromkeys(b"R\x81\x93s\x86", 2), **dict.fromkeys(b"abQ\x85", 1), 0x87: 3}


class _Tuple(NamedTuple):
    """A tuple: how many values are in it in all, and how deep."""

    size: int
    depth: int


_Value = _Tuple | None  # None: anything else


def check_tuples(data: bytes, where: str) -> None:
    """Raises CheckpointError unless all tuples of a pickle, whose opcodes have been checked, can be hashed."""
    try:
        _run(data, _MAX_HASHED + 16 * len(data))
    except (IndexError, KeyError, ValueError, struct.error) as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError("a pickle is corrupt", where=where, expected="a whole pickle", found=found) from None
    except _TooMuch as error:
        raise CheckpointError("a pickle's tuples are too much to hash", where=where, expected=f"at most {error.limit}",
                              found=f"{error.found} {error.what}") from None  # fmt: skip


def _run(data: bytes, most: int) -> None:
    """Do what a pickle does with tuples, where at most so many values may be hashed. No calls for what is frequent: a
    large pickle has ten million opcodes. Raises IndexError and KeyError for what no machine can do."""
    stack: list[_Value] = []
    memo: dict[int, _Value] = {}
    marks: list[int] = []
    push, index_at, left = stack.append, _UINT4.unpack_from, most
    at, end = 0, len(data)
    while at < end:
        code = data[at]
        at += 1
        if code == 0x6A:  # LONG_BINGET
            push(memo[index_at(data, at)[0]])
            at += 4
        elif code == 0x68:  # BINGET
            push(memo[data[at]])
            at += 1
        elif code == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif code == 0x72:  # LONG_BINPUT
            memo[index_at(data, at)[0]] = stack[-1]
            at += 4
        elif code == 0x71:  # BINPUT
            memo[data[at]] = stack[-1]
            at += 1
        elif code in _PUSHES:
            push(None)
            at += _PUSHES[code]
        elif code in COUNTED:
            start = at + COUNTED[code]
            at = start + int.from_bytes(data[at:start], "little")
            push(None)
        elif code == 0x28:  # MARK
            marks.append(len(stack))
        elif code in _MARKED:
            values = _cut(stack, marks.pop())
            if code == 0x74:  # TUPLE
                push(_made(values))
            elif code in b"ud\x90\x91":  # SETITEMS, DICT, ADDITEMS, FROZENSET
                left = _hashed(values[::2] if code in b"ud" else values, left, most)
            if code in b"ld\x91":
                push(None)
        elif code in _TAKES:
            values = _cut(stack, len(stack) - _TAKES[code])
            if code in b"\x85\x86\x87":
                push(_made(values))
            elif code == 0x73:  # SETITEM
                left = _hashed(values[:1], left, most)
            elif code in b"R\x81\x93Q":
                push(None)
        elif code == 0x30:  # POP, also of a mark
            if marks and marks[-1] == len(stack):
                marks.pop()
            else:
                stack.pop()
        elif code == 0x63:  # GLOBAL: two lines
            at = data.index(b"\n", data.index(b"\n", at) + 1) + 1
            push(None)
        elif code == 0x2E:  # STOP
            return
        else:
            at += WIDTHS[code]


class _TooMuch(Exception):
    def __init__(self, what: str, limit: int, found: int) -> None:
        self.what, self.limit, self.found = what, limit, found


def _cut(stack: list[_Value], begin: int) -> list[_Value]:
    """What a stack holds from `begin` on, taken off it."""
    if begin < 0:
        raise IndexError("the stack is empty")
    found = stack[begin:]
    del stack[begin:]
    return found


def _hashed(keys: list[_Value], left: int, most: int) -> int:
    """How many more values may be hashed after some keys."""
    left -= sum([1 if key is None else key.size for key in keys])
    if left < 0:
        raise _TooMuch("values in keys", most, most - left)
    return left


def _made(values: list[_Value]) -> _Tuple:
    inner = [value for value in values if value is not None]
    if not inner:
        return _Tuple(1 + len(values), 1)
    depth = 1 + max([value.depth for value in inner], default=0)
    if depth > MAX_TUPLES:
        raise _TooMuch("tuples in each other", MAX_TUPLES, depth)
    return _Tuple(1 + len(values) + sum([value.size for value in inner]), depth)
