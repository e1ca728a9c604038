"""safetensors files that lie about what they hold and where, and headers that cost more than they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formats.safetensors_file import read_header
from registry.errors import CheckpointError
from tests.attacks.bounded import attack, cases, written


def loading(
    folder: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None
) -> Callable[[], object]:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(body) if length is None else length
    path = written(folder / "hostile.safetensors", size.to_bytes(8, "little") + body + data)
    return lambda: read_header(path)


def entry(begin: int, end: int, shape: Any = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


for title, offsets in {
    "two_to_the_63": [1 << 63, (1 << 63) + 4],
    "two_to_the_64": [0, 1 << 64],
    "negative": [-4, 0],
    "real": [0.0, 4.0],
    "text": ["0", "4"],
    "three": [0, 4, 8],
    "none": None,
    "true": [False, True],
}.items():

    def offsets_of(folder: Path, offsets: Any = offsets) -> Callable[[], object]:
        header = {"a": {"dtype": "U8", "shape": [4], "data_offsets": offsets}}
        return loading(folder, header, bytes(4))

    offsets_of.__name__ = f"offsets_{title}"
    attack(CheckpointError, "hostile.safetensors", "data_offsets", "'a'")(offsets_of)


@attack(CheckpointError, "hostile.safetensors", "'b'", "tensors overlap")
def tensors_that_overlap(folder: Path) -> Callable[[], object]:
    return loading(folder, {"a": entry(0, 4), "b": entry(2, 6)}, bytes(6))


@attack(CheckpointError, "hostile.safetensors", "'b'", "a hole before a tensor")
def a_hole_for_another_file(folder: Path) -> Callable[[], object]:
    return loading(folder, {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))


@attack(CheckpointError, "hostile.safetensors", "bytes after the last tensor")
def bytes_behind_the_last_tensor(folder: Path) -> Callable[[], object]:
    return loading(folder, {"a": entry(0, 4)}, bytes(4) + b"#!/bin/sh")


@attack(CheckpointError, "hostile.safetensors", "ends before its last tensor")
def more_than_there_is(folder: Path) -> Callable[[], object]:
    return loading(folder, {"a": entry(0, 1 << 40)}, bytes(4))


@attack(CheckpointError, "hostile.safetensors", "shape and data_offsets disagree")
def another_shape(folder: Path) -> Callable[[], object]:
    return loading(folder, {"a": entry(0, 4, [1 << 62, 1 << 62])}, bytes(4))


@attack(CheckpointError, "hostile.safetensors", "shape and data_offsets disagree")
def a_million_dimensions(folder: Path) -> Callable[[], object]:
    return loading(folder, {"a": entry(0, 4, [(1 << 63) - 1] * 300_000)}, bytes(4))


@attack(CheckpointError, "hostile.safetensors", "unknown dtype")
def an_unknown_dtype(folder: Path) -> Callable[[], object]:
    return loading(folder, {"a": entry(0, 4, dtype="PICKLE")}, bytes(4))


@attack(CheckpointError, "hostile.safetensors", "a key twice", "'a'")
def a_name_twice(folder: Path) -> Callable[[], object]:
    one = json.dumps(entry(0, 4))
    return loading(folder, f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4))


@attack(CheckpointError, "hostile.safetensors", "a key twice")
def one_name_a_hundred_thousand_times(folder: Path) -> Callable[[], object]:
    return loading(folder, b"{" + b'"a":1,' * 90_000 + b'"a":1}')


@attack(CheckpointError, "hostile.safetensors", "wrong fields")
def a_field_that_is_not_known(folder: Path) -> Callable[[], object]:
    return loading(folder, {"a": {**entry(0, 4), "run": "sh"}}, bytes(4))


@attack(CheckpointError, "hostile.safetensors", "not UTF-8")
def a_name_that_is_no_text(folder: Path) -> Callable[[], object]:
    return loading(folder, b'{"\xff\xfe": ' + json.dumps(entry(0, 4)).encode() + b"}", bytes(4))


@attack(CheckpointError, "hostile.safetensors", "not text that UTF-8 can encode")
def half_a_character(folder: Path) -> Callable[[], object]:
    return loading(folder, b'{"\\ud800": ' + json.dumps(entry(0, 4)).encode() + b"}", bytes(4))


@attack(CheckpointError, "hostile.safetensors", "JSON does not know", "NaN")
def not_a_number(folder: Path) -> Callable[[], object]:
    return loading(folder, b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4))


@attack(CheckpointError, "hostile.safetensors", "not JSON")
def a_number_of_a_million_digits(folder: Path) -> Callable[[], object]:
    return loading(folder, b'{"a": {"dtype": "U8", "shape": [' + b"9" * 1_000_000 + b'], "data_offsets": [0, 4]}}')


@attack(CheckpointError, "hostile.safetensors", "nested too deep")
def lists_in_lists(folder: Path) -> Callable[[], object]:
    return loading(folder, b'{"a": ' + b"[" * 40_000 + b"]" * 40_000 + b"}")


# Headers of 100 MB.

_100_MB = 100_000_000


@attack(CheckpointError, "hostile.safetensors", "ends inside its header")
def a_header_that_is_not_there(folder: Path) -> Callable[[], object]:
    return loading(folder, b"{}", length=_100_MB)


@attack(CheckpointError, "hostile.safetensors", "said to be too long")
def a_header_of_exabytes(folder: Path) -> Callable[[], object]:
    return loading(folder, b"{}", length=(1 << 64) - 1)


@attack(CheckpointError, "hostile.safetensors", "no JSON object", "no safetensors file")
def a_header_of_holes(folder: Path) -> Callable[[], object]:
    run = loading(folder, b"", length=_100_MB)
    with (folder / "hostile.safetensors").open("r+b") as file:
        file.truncate(8 + _100_MB)
    return run


@attack(CheckpointError, "hostile.safetensors", "does not look like that of tensors", "lists and objects")
def a_header_of_empty_objects(folder: Path) -> Callable[[], object]:
    return loading(folder, b'{"a":1' + b',"a":{}' * (_100_MB // 7 - 2) + b"}")


@attack(CheckpointError, "hostile.safetensors", "does not look like that of tensors", "lists and objects")
def a_header_of_open_brackets(folder: Path) -> Callable[[], object]:
    return loading(folder, b"{" + b"[" * (_100_MB - 2) + b"}")


@attack(CheckpointError, "hostile.safetensors", "does not look like that of tensors", "lists and objects")
def a_header_of_short_texts(folder: Path) -> Callable[[], object]:
    return loading(folder, b'{"a":[' + b'"ab",' * (_100_MB // 5 - 3) + b"0]}")


@attack(CheckpointError, "hostile.safetensors", "no JSON object")
def a_header_of_spaces(folder: Path) -> Callable[[], object]:
    return loading(folder, b"{" + b" " * (_100_MB - 1))


@attack(CheckpointError, "hostile.safetensors", "does not look like that of tensors")
def a_header_of_one_text(folder: Path) -> Callable[[], object]:
    return loading(folder, b'{"__metadata__":{"a":"' + b"a" * (_100_MB - 26) + b'"}}')


test_attacks = cases(__name__)
