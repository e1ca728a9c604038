"""Small files that strangers wrote: read whole with a bound, and JSON taken strictly."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Never

from registry.reading import read_all, reading

#: Bytes of a config, and nesting of any document.
MAX_CONFIG = 32 << 20
_MAX_DEPTH = 64
_MAX_DIGITS = 64
#: Lists, objects and commas in a small document, and bytes of a large one for each: what is denser is no document.
_BRACKETS, _BYTES_A_BRACKET = 100_000, 32
_COMMAS, _BYTES_A_COMMA = 200_000, 8


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a plain file. Raises OSError, and ValueError for one that is longer or is no plain file: a pipe
    would be waited for."""
    with reading(path) as file:
        if file.size > limit:
            raise ValueError(f"{file.size} bytes; at most {limit} bytes are read")
        return read_all(file)


def read_json(path: Path, limit: int = MAX_CONFIG) -> Any:
    """What a JSON file holds. Raises OSError, and ValueError where anything is wrong with it."""
    return parse_json(read_bytes(path, limit))


def parse_json(data: bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also for what json itself takes: duplicate keys, numbers that are
    none or endless, absurd nesting, half characters."""
    brackets, commas = data.count(b"[") + data.count(b"{"), data.count(b",")
    if brackets > _BRACKETS + len(data) // _BYTES_A_BRACKET or commas > _COMMAS + len(data) // _BYTES_A_COMMA:
        raise ValueError(f"{brackets} lists and objects, and {commas} commas, in {len(data)} bytes")
    try:
        found = json.loads(
            data.decode("utf-8"), parse_constant=_constant, parse_float=_real, parse_int=_integer,
            object_pairs_hook=_unique,
        )  # fmt: skip
        check_depth(found, _MAX_DEPTH)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if b"\\u" in data:
        json.dumps(found, ensure_ascii=False).encode()  # raises for half of a character, which is no text
    return found


def _constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number")


def _real(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {twice[:200]!r}")
    return found


def check_depth(value: Any, left: int) -> None:
    """Raises ValueError where lists and objects are nested deeper than `left`."""
    if left < 0:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(inner, dict | list):
            check_depth(inner, left - 1)
