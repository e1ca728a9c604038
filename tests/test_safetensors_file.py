"""The safetensors header: the same bytes as the reference implementation, and every rule of the format enforced."""

from __future__ import annotations

import gc
import json
import math
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, TensorSpec, safe_open, serialize
from safetensors.torch import load_file, save_file

from formats.safetensors_file import CODES, Entry, layout, read_header
from registry.dtypes import ITEMSIZE, torch_dtype
from registry.errors import CheckpointError, TargetError

# Surrogates are what no UTF-8 file can hold. Low characters are listed so that JSON's escapes come up often.
TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\/\n\r\t\b\f\x00\x1f\x7f\u2028é😀'), max_size=8
)
NAMES = TEXT.filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(CODES)), SHAPES), max_size=6)
Specs = dict[str, tuple[str, tuple[int, ...]]]
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if not nbytes:
        return torch.empty(shape, dtype=torch_dtype(dtype))
    raw = random.Random(seed).randbytes(nbytes) if dtype != "bool" else bytes(i % 2 for i in range(nbytes))
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(torch_dtype(dtype)).reshape(shape)


def bytes_of(value: torch.Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def compose(state: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> bytes:
    """A whole file, made the way the library makes one."""
    header, entries, size = layout(
        ((name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in state.items()), metadata
    )
    content = bytearray(size)
    content[: len(header)] = header
    for name, entry in entries.items():
        content[entry.begin : entry.end] = bytes_of(state[name])
    assert len(content) == size
    return bytes(content)


def file(folder: Path, header: object, data: bytes = b"") -> Path:
    """A file with `header` as given (bytes, text, or something for json) and `data` after it."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def refused(path: Path, *parts: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert gc.isenabled()
    return caught.value


# what is written


@settings(max_examples=80, deadline=None)
@given(TENSORS, st.none() | st.dictionaries(TEXT, TEXT, max_size=1))
def test_bytes_equal_the_reference(
    tmp_path_factory: pytest.TempPathFactory, specs: Specs, metadata: dict[str, str] | None
) -> None:
    folder = tmp_path_factory.getbasetemp()
    state = {name: tensor(*spec, seed=i) for i, (name, spec) in enumerate(specs.items())}
    ours = compose(state, metadata)
    (folder / "ours").write_bytes(ours)
    if state or metadata != {}:  # for that the reference writes JSON that nobody can read
        save_file(state, folder / "theirs", metadata)
        assert ours == (folder / "theirs").read_bytes()
    loaded = load_file(folder / "ours")
    assert {name: (v.dtype, v.shape, bytes_of(v)) for name, v in loaded.items()} == {
        name: (v.dtype, v.shape, bytes_of(v)) for name, v in state.items()
    }
    entries, found = read_header(folder / "ours")
    _, laid_out, _ = layout([(n, d, s) for n, (d, s) in specs.items()], metadata)
    assert list(entries.items()) == list(laid_out.items())
    assert found == (metadata or {})


def test_all_dtypes_in_the_order_of_the_reference() -> None:
    state = {f"{i}{dtype}": tensor(dtype, (3,)) for dtype in CODES for i in (1, 0)}
    specs = {
        name: TensorSpec(
            dtype=str(v.dtype).removeprefix("torch."), shape=[3], data_ptr=v.data_ptr(), data_len=len(bytes_of(v))
        )
        for name, v in state.items()
    }
    assert compose(state, {"format": "pt"}) == serialize(specs, {"format": "pt"})
    assert set(ITEMSIZE) - set(CODES) == {"complex128"}


def test_metadata_is_sorted_and_otherwise_as_the_reference_has_it(tmp_path: Path) -> None:
    metadata = {key: key * 2 for key in "cabd"}
    header, _, size = layout([], metadata)
    assert len(header) == size
    assert json.loads(header[8:]) == {"__metadata__": metadata}
    assert header == layout([], dict(sorted(metadata.items())))[0]
    save_file({}, tmp_path / "theirs", metadata)
    assert sorted(header) == sorted((tmp_path / "theirs").read_bytes())
    (tmp_path / "ours").write_bytes(header)
    assert read_header(tmp_path / "ours") == ({}, metadata)


def test_no_tensors_and_empty_metadata_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(layout([], {})[0])
    assert read_header(path) == ({}, {})
    assert load_file(path) == {}


@pytest.mark.parametrize(
    ("tensors", "metadata", "parts"),
    [
        ([("__metadata__", "int8", (1,))], None, ["keeps this name", "'__metadata__'"]),
        ([("a", "int8", (1,)), ("a", "int16", (1,))], None, ["two tensors of one name", "'a'"]),
        ([("a\ud800", "int8", (1,))], None, ["UTF-8", r"'a\ud800'"]),
        ([("a", "complex128", (1,))], None, ["cannot hold this dtype", "'a'", "'complex128'"]),
        ([("a", "int8", (1, -1))], None, ["not a shape", "'a'", "(1, -1)"]),
        ([("a", "int8", (True,))], None, ["not a shape", "'a'", "(True,)"]),
        ([("a", "int8", (2**62, 4))], None, ["too much for one safetensors file"]),
        ([("a" * 100_000_000, "int8", (1,))], None, ["too much for one safetensors file", "100000000"]),
        ([], {"k": 1}, ["must be text", "'k'", "1"]),
        ([], {"k": "\udfff"}, ["must be text", "'k'", r"'\udfff'"]),
    ],
    ids=range(10),
)
def test_what_the_format_cannot_hold(tensors: Any, metadata: Any, parts: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        layout(tensors, metadata)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 2000


# what is read


@settings(max_examples=40, deadline=None)
@given(TENSORS, st.none() | st.dictionaries(TEXT, TEXT, min_size=1, max_size=3))
def test_reads_what_the_reference_wrote(
    tmp_path_factory: pytest.TempPathFactory, specs: Specs, metadata: dict[str, str] | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "theirs"
    save_file({name: tensor(*spec, seed=i) for i, (name, spec) in enumerate(specs.items())}, path, metadata)
    entries, found = read_header(path)
    content = path.read_bytes()
    with safe_open(path, "pt") as reference:
        assert entries.keys() == set(reference.keys())
        assert found == (reference.metadata() or {})
        for name, entry in entries.items():
            value = reference.get_tensor(name)
            assert (torch_dtype(entry.dtype), entry.shape) == (value.dtype, tuple(value.shape))
            assert content[entry.begin : entry.end] == bytes_of(value)


def test_order_is_that_of_the_data(tmp_path: Path) -> None:
    header = {
        "last": {"dtype": "U8", "shape": [], "data_offsets": [4, 5]},
        "none": {"dtype": "F64", "shape": [3, 0], "data_offsets": [4, 4]},
        "first": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "__metadata__": None,
    }
    path = file(tmp_path, header, bytes(5))
    start = path.stat().st_size - 5
    entries, metadata = read_header(path)
    assert list(entries.items()) == [
        ("first", Entry("float32", (1,), start, start + 4)),
        ("none", Entry("float64", (3, 0), start + 4, start + 4)),
        ("last", Entry("uint8", (), start + 4, start + 5)),
    ]
    assert metadata == {}
    assert load_file(path).keys() == entries.keys()


def test_100_000_tensors_are_read_fast(tmp_path: Path) -> None:
    specs = [(f"model.layers.{i % 90}.experts.{i}.weight", "bfloat16", (16, 2)) for i in range(100_000)]
    header, entries, size = layout(specs, {"format": "pt"})
    path = tmp_path / "model.safetensors"
    with path.open("wb") as target:
        target.write(header)
        target.truncate(size)
    before = time.process_time()
    found, _ = read_header(path)
    took = time.process_time() - before
    assert found == entries
    assert took < 2  # a fifth of that on a quiet machine


# what is refused


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0"])
def test_shorter_than_the_length(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = refused(path, "too short", "at least 8 bytes", f"{len(content)} bytes")
    assert "download it again" in str(error.hint)


def test_length_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    refused(path, "too long", "100000001")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(path, "too long", "git lfs pull")


def test_length_beyond_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100) + b"{}")
    refused(path, "ends inside its header", "108 bytes", "10 bytes", "download it again")


def test_data_cut_off(tmp_path: Path) -> None:
    header = {"whole": A, "cut": {"dtype": "I8", "shape": [9], "data_offsets": [8, 17]}}
    path = file(tmp_path, header, bytes(16))
    size = path.stat().st_size
    refused(path, "ends before its last tensor", "'cut'", f"{size + 1} bytes", f"{size} bytes", "download it again")


DEEP = "[" * 1_000_000


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        (b"", ["does not start with '{'", "b''"]),
        (' {"a":{}}', ["does not start with '{'"]),
        ("[]", ["does not start with '{'", "b'[]'"]),
        ("\ufeff{}", ["does not start with '{'"]),
        (b'{"\xff":1}', ["not UTF-8", "0xff at 2"]),
        (b'{"\xed\xa0\x80":1}', ["not UTF-8", "0xed at 2"]),
        ('{"a":', ["not JSON", "char 5"]),
        ("{}\0", ["not JSON", "char 2"]),
        ('{},"__metadata__":{}}', ["not JSON", "char 2"]),
        ('{"a\x01":1}', ["not JSON", "control character"]),
        ('{"a":' + "9" * 10_000 + "}", ["not JSON", "digits"]),
        ('{"a":1,"b":2,"a":1}', ["a key twice", "'a'"]),
        ('{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', ["a key twice", "'shape'"]),
        ('{"__metadata__":{},"__metadata__":{}}', ["a key twice", "'__metadata__'"]),
        ('{"__metadata__":{"a":"","a":"::"}}', ["a key twice", "'a'"]),
        ('{":":[{"b":1,"b":1}]}', ["a key twice", "'b'"]),
        ('{"a":NaN}', ["constant", "NaN"]),
        ('{"a":Infinity}', ["constant", "Infinity"]),
        ('{"a":[-Infinity]}', ["constant", "-Infinity"]),
        ('{"a":' + DEEP + "}", ["nested too deep"]),
        ('{"a":' + '{"b":' * 1_000_000, ["nested too deep"]),
        ('{"a":' + "[" * 300 + "]" * 300 + "}", ["wrong fields", "'a'", "[...]"]),
        ('{"__metadata__":[]}', ["__metadata__ is not an object", "[]"]),
        ('{"__metadata__":{"k":1}}', ["something other than text", "'k': 1"]),
        ('{"__metadata__":{"k":null}}', ["something other than text", "'k': None"]),
        ('{"__metadata__":{"k":"\\ud800"}}', ["something other than text", r"'k': '\ud800'"]),
        ('{"a\\udc00":{}}', ["UTF-8", r"'a\udc00'"]),
    ],
    ids=range(27),
)
def test_malformed_header(tmp_path: Path, header: str | bytes, parts: list[str]) -> None:
    refused(file(tmp_path, header), *parts)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        (1, ["wrong fields", "1"]),
        (["F32", [2], [0, 8]], ["wrong fields", "['F32', [2], [0, 8]]"]),
        ({"dtype": "F32", "shape": [2]}, ["wrong fields", "{'dtype': 'F32', 'shape': [2]}"]),
        ({**A, "x": 1}, ["wrong fields", "'x': 1"]),
        ({**A, "dtype": "F33"}, ["unknown dtype", "'F33'"]),
        ({**A, "dtype": "f32"}, ["unknown dtype", "'f32'"]),
        ({**A, "dtype": ["F32"]}, ["unknown dtype", "['F32']"]),
        ({**A, "dtype": "F4"}, ["not supported", "F4"]),
        ({**A, "dtype": "F6_E2M3"}, ["not supported", "F6_E2M3"]),
        ({**A, "dtype": "F6_E3M2"}, ["not supported", "F6_E3M2"]),
        ({**A, "shape": 2}, ["not a shape", "2"]),
        ({**A, "shape": None}, ["not a shape", "None"]),
        ({**A, "shape": {"2": 2}}, ["not a shape", "{'2': 2}"]),
        ({**A, "shape": [-2]}, ["not a shape", "[-2]"]),
        ({**A, "shape": [2.0]}, ["not a shape", "[2.0]"]),
        ({**A, "shape": [2, True]}, ["not a shape", "[2, True]"]),
        ({**A, "shape": ["2"]}, ["not a shape", "['2']"]),
        ({**A, "shape": [2**63, 0]}, ["not a shape", "[9223372036854775808, 0]"]),
        ({**A, "data_offsets": [0]}, ["not data_offsets", "[0]"]),
        ({**A, "data_offsets": [0, 8, 8]}, ["not data_offsets", "[0, 8, 8]"]),
        ({**A, "data_offsets": "08"}, ["not data_offsets", "'08'"]),
        ({**A, "data_offsets": [-8, 0]}, ["not data_offsets", "[-8, 0]"]),
        ({**A, "data_offsets": [False, 8]}, ["not data_offsets", "[False, 8]"]),
        ({**A, "data_offsets": [0.0, 8]}, ["not data_offsets", "[0.0, 8]"]),
        ({**A, "data_offsets": [0, 2**63]}, ["not data_offsets", "[0, 9223372036854775808]"]),
        ({**A, "data_offsets": [8, 0]}, ["ends before it begins", "[8, 0]"]),
        ({**A, "shape": [3]}, ["disagree", "12 bytes for F32 [3]", "8 bytes, data_offsets [0, 8]"]),
        ({**A, "shape": []}, ["disagree", "4 bytes for F32 []", "[0, 8]"]),
        ({**A, "data_offsets": [0, 2**62]}, ["disagree", "8 bytes for F32 [2]", str(2**62)]),
        # A product that wraps to 8 in 64 bits.
        ({**A, "shape": [2**62, 4, 2]}, ["disagree", f"over {2**63 - 1} bytes", str([2**62, 4, 2])]),
        ({**A, "shape": [2**62] * 300_000}, ["disagree", f"over {2**63 - 1} bytes"]),
        ({**A, "shape": [*[2**62] * 300_000, 0]}, ["disagree", "0 bytes for F32"]),
    ],
    ids=range(32),
)
def test_bad_entry(tmp_path: Path, entry: Any, parts: list[str]) -> None:
    name = 'layer "0"\n'
    refused(file(tmp_path, {name: entry}, bytes(8)), f"tensor {name!r}", *parts)


@pytest.mark.parametrize("shape", [{}, "", None])
def test_what_looks_like_a_shape_seen_before_is_none(tmp_path: Path, shape: object) -> None:
    entries = {
        name: {"dtype": "U8", "shape": [] if name == "a" else shape, "data_offsets": [i, i + 1]}
        for i, name in enumerate("ab")
    }
    refused(file(tmp_path, entries, bytes(2)), "tensor 'b'", "not a shape", repr(shape))


def spans(*offsets: tuple[int, int]) -> dict[str, object]:
    return {
        f"t{i}": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for i, (begin, end) in enumerate(offsets)
    }


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        (spans((0, 8), (0, 8)), ["overlap", "'t1'", "begin at 8", "begin at 0"]),
        (spans((4, 8), (0, 5)), ["overlap", "'t0'", "begin at 5", "begin at 4"]),
        (spans((0, 8), (3, 3)), ["overlap", "'t1'", "begin at 8", "begin at 3"]),
        (spans((1, 8)), ["not entirely covered", "'t0'", "begin at 0", "begin at 1"]),
        (spans((0, 4), (5, 8)), ["not entirely covered", "'t1'", "begin at 4", "begin at 5"]),
        (spans((2**62, 2**62 + 8)), ["not entirely covered", "'t0'", f"begin at {2**62}"]),
    ],
    ids=range(6),
)
def test_data_not_covered_once(tmp_path: Path, header: object, parts: list[str]) -> None:
    refused(file(tmp_path, header, bytes(8)), *parts)


@pytest.mark.parametrize("header", [{}, spans((0, 7)), {"__metadata__": {"k": "v"}}], ids=range(3))
def test_bytes_left_at_the_end(tmp_path: Path, header: dict[str, object]) -> None:
    path = file(tmp_path, header, bytes(8))
    size = path.stat().st_size
    left = 1 if "t0" in header else 8
    refused(path, "not entirely covered", "after the last tensor", f"{size - left} bytes", f"{size} bytes")


# fuzz

VALID = compose({"a": tensor("float32", (2, 1)), "é\n": tensor("int8", (3,)), "c": tensor("bool", ())}, {"k": "v"})
HEADER = VALID[: 8 + struct.unpack("<Q", VALID[:8])[0]]


def survives(path: Path, content: bytes) -> bool:
    """True if `content` is accepted, and then the reference must accept it too; else it is a CheckpointError."""
    path.write_bytes(content)
    try:
        entries, metadata = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    if b"-0" not in content:  # which JSON calls an integer, but the reference a float
        with safe_open(path, "pt") as reference:
            assert entries.keys() == set(reference.keys())
            assert metadata == (reference.metadata() or {})
    return True


def test_every_truncation(tmp_path: Path) -> None:
    assert survives(tmp_path / "cut", VALID)
    for size in range(len(VALID)):
        assert not survives(tmp_path / "cut", VALID[:size])


def test_every_byte_replaced(tmp_path: Path) -> None:
    accepted = 0
    for i in range(len(HEADER)):
        for byte in b'\0\x1f "\\{}[],:-0189eNua\x80\xff':
            accepted += survives(tmp_path / "flip", VALID[:i] + bytes([byte]) + VALID[i + 1 :])
    assert accepted > len(HEADER)  # replacing a byte by itself, and letters in names


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(HEADER) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 8)
)
def test_several_bytes_flipped(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(VALID)
    for position, mask in flips:
        content[position] ^= mask
    survives(tmp_path_factory.getbasetemp() / "flips", bytes(content[: len(content) - cut]))


def test_the_reference_still_writes_unreadable_json_for_nothing(tmp_path: Path) -> None:
    """The one case where the bytes differ: if this fails, the reference was mended and the exception can go."""
    save_file({}, tmp_path / "theirs", {})
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "theirs")
    refused(tmp_path / "theirs", "not JSON")
