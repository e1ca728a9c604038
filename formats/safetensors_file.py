"""The header of safetensors files: read with every rule of the format checked, and laid out for writing.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes without gaps. Only the header
passes through here; callers move tensor bytes themselves, at the absolute offsets given.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Never

from registry.collector import no_collection
from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError, TargetError
from registry.reading import Reader, read_all, reading

Path = str | os.PathLike[str]

#: Codes in the header by dtype name. The order is the declaration order in the reference implementation, which writes
#: tensors by descending position in it, then by name.
CODES: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}

_RANK = {dtype: rank for rank, dtype in enumerate(CODES)}
_BY_CODE = {code: (dtype, ITEMSIZE[dtype]) for dtype, code in CODES.items()}
_SUB_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # the reference implementation's limit; it keeps a hostile length from filling the memory
_LARGE, _PART = 8 << 20, 1 << 20  # headers above the first are looked over by parts of the second
_MAX_SIZE = 2**63 - 1
_AGAIN = "the file is incomplete: download it again"
_NOT_ONE = "this is no safetensors file, or a Git LFS pointer in the place of one (`git lfs pull` fetches the real one)"

#: repr, cut short and not too deep: what a hostile file holds goes into messages, and may be huge or nested.
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200
_repr.maxlist = _repr.maxtuple = 16
_show = _repr.repr


class Entry(NamedTuple):
    """A tensor in a file; `begin` and `end` are absolute offsets of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of the file in the order of their bytes, and its `__metadata__`.

    Raises CheckpointError, naming file and tensor, when any rule of the format is broken.
    """
    raw, size = _read_raw(path)
    start = _LENGTH_BYTES + len(raw)
    with no_collection():
        document, integers = _parse(path, raw)
        metadata = _checked_metadata(path, document.pop(_METADATA, None))
        if integers:
            entries = _entries(path, document, start)
        else:
            entries = {name: _checked_entry(path, name, value, start) for name, value in document.items()}
        bounds = [start, *[entry.end for entry in entries.values()]]
        if bounds[-1] == size and bounds[:-1] == [entry.begin for entry in entries.values()]:
            return entries, metadata  # in the order of their bytes, as the reference implementation writes them
        # The header may list tensors in any order. Sorting by both ends puts empty tensors before the one they touch.
        ordered = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    _check_cover(path, ordered, start, size)
    return ordered, metadata


def layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, Entry], int]:
    """Where (name, dtype, shape) tensors go in a new file: its header with the length, the entries, the file size.

    The bytes equal those the reference implementation writes, but for two things: it writes metadata keys in random
    order, here they are sorted, so that the same content gives the same file; and for no tensors with empty metadata
    it writes JSON that nothing can read. Raises TargetError for what the format cannot hold.
    """
    ordered = _write_order(tensors)
    table: dict[str, object] = {}
    if metadata is not None:
        for key, value in metadata.items():
            if not (_is_text(key) and _is_text(value)):
                raise TargetError("safetensors metadata must be text", where=f"key {_show(key)}", found=_show(value))
        table[_METADATA] = dict(sorted(metadata.items()))
    offset = 0
    relative: list[tuple[int, int]] = []
    for name, dtype, shape in ordered:
        end = offset + _nbytes(shape, ITEMSIZE[dtype])
        table[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (offset, end)}
        relative.append((offset, end))
        offset = end
    body = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    body += b" " * (-len(body) % _LENGTH_BYTES)  # so that the data starts at a multiple of 8
    start = _LENGTH_BYTES + len(body)
    if len(body) > _MAX_HEADER or start + offset > _MAX_SIZE:
        limits = f"a header of at most {_MAX_HEADER} bytes, a file of at most {_MAX_SIZE}"
        found = f"{len(body)} and {start + offset} bytes"
        raise TargetError("too much for one safetensors file", expected=limits, found=found, hint="write several files")
    entries = {
        name: Entry(dtype, shape, start + begin, start + end)
        for (name, dtype, shape), (begin, end) in zip(ordered, relative, strict=True)
    }
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body, entries, start + offset


def _write_order(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The tensors, checked, in the order of the reference implementation."""
    checked: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for name, dtype, shape in tensors:
        problem, expected, found = "", None, None
        if not _is_text(name):
            problem = "a tensor's name must be text that UTF-8 can encode"
        elif name == _METADATA:
            problem = "safetensors keeps this name for itself: the tensor needs another"
        elif name in checked:
            problem = "two tensors of one name"
        elif dtype not in CODES:
            problem, expected, found = "safetensors cannot hold this dtype", ", ".join(CODES), _show(dtype)
        elif not _are_sizes(shape):
            problem, expected, found = "not a shape", f"integers from 0 to {_MAX_SIZE}", _show(shape)
        if problem:
            raise TargetError(problem, where=f"tensor {_show(name)}", expected=expected, found=found)
        checked[name] = (name, dtype, tuple(shape))
    # Names are compared by code point, which is also the order of their UTF-8 bytes that the reference compares.
    return sorted(checked.values(), key=lambda item: (-_RANK[item[1]], item[0]))


def _read_raw(path: Path) -> tuple[bytes, int]:
    """The JSON bytes of the header, and the size of the file."""
    with reading(path) as file:
        size = file.size
        if size < _LENGTH_BYTES:
            expected = f"at least {_LENGTH_BYTES} bytes"
            _refuse(path, "the file is too short", expected=expected, found=f"{size} bytes", hint=_AGAIN)
        length = int.from_bytes(read_all(file, 0, _LENGTH_BYTES), "little")
        if length > _MAX_HEADER:
            expected, found = f"at most {_MAX_HEADER} bytes", f"{length} bytes"
            _refuse(path, "the header is said to be too long", expected=expected, found=found, hint=_NOT_ONE)
        if length > size - _LENGTH_BYTES:
            expected = f"at least {_LENGTH_BYTES + length} bytes"
            _refuse(path, "the file ends inside its header", expected=expected, found=f"{size} bytes", hint=_AGAIN)
        if length > _LARGE:
            _check_looks(path, file, length)
        return read_all(file, _LENGTH_BYTES, _LENGTH_BYTES + length), size


def _check_looks(path: Path, file: Reader, length: int) -> None:
    """Refuse what cannot be the header of many tensors, before it takes memory: a part at a time."""
    counts = Counter[bytes]()
    first, end = b"", b""
    for at in range(0, length, _PART):
        part = read_all(file, _LENGTH_BYTES + at, _LENGTH_BYTES + min(at + _PART, length))
        first = first or part[:1]
        counts.update({mark: part.count(mark) for mark in (b"[", b"{", b",", b'"')})
        end = part.rstrip()[-1:] or end
    if (first, end) != (b"{", b"}"):
        found = f"{first!r} ... {end!r}"
        _refuse(path, "the header is no JSON object", expected="b'{' ... b'}'", found=found, hint=_NOT_ONE)
    brackets = counts[b"["] + counts[b"{"]
    quotes = counts[b'"']
    if brackets > length // 16 or counts[b","] > length // 8 or quotes < length // 256:
        found = f"{brackets} lists and objects, {counts[b',']} commas, {quotes} quotes in {length} bytes"
        _refuse(path, "the header does not look like that of tensors", expected="some 100 bytes a tensor", found=found)


def _parse(path: Path, raw: bytes) -> tuple[dict[str, Any], bool]:
    """The JSON object in `raw`, parsed more strictly than json does by itself, and whether all numbers are integers."""
    floats: list[str] = []

    def real(text: str) -> float:
        floats.append(text)
        return float(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            _refuse(path, "the header has a key twice", found=_show(twice))
        return table

    def constant(text: str) -> Never:
        _refuse(path, "the header has a constant that JSON does not know", found=text)

    if raw[:1] != b"{":
        _refuse(path, "the header does not start with '{'", expected="b'{'", found=_show(raw[:16]), hint=_NOT_ONE)
    try:
        text = raw.decode()
        document = json.loads(text, parse_constant=constant, parse_float=real)
        # Each key has its colon: where there are no more colons than keys are left, no key was there twice.
        if text.count(":") != sum(map(len, _objects(document))):
            json.loads(text, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        _refuse(path, "the header is not UTF-8", found=f"byte {raw[error.start]:#04x} at {error.start} of the header")
    except RecursionError:
        _refuse(path, "the header is nested too deep", expected="objects and lists three deep")
    except ValueError as error:  # JSONDecodeError, and the one for integers of thousands of digits
        _refuse(path, "the header is not JSON", found=_show(str(error)))
    assert isinstance(document, dict)  # it starts with '{'
    return document, not floats and b"true" not in raw and b"false" not in raw


def _objects(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects of a header: itself, its entries, and none for what a header has no place for."""
    yield document
    yield from (value for value in document.values() if type(value) is dict)


def _checked_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:  # the reference implementation takes null for no metadata
        return {}
    if type(metadata) is not dict:
        _refuse(path, "__metadata__ is not an object", expected="text by text", found=_show(metadata))
    for key, value in metadata.items():
        if not (_is_text(key) and _is_text(value)):
            found = f"{_show(key)}: {_show(value)}"
            _refuse(path, "__metadata__ holds something other than text", expected="text by text", found=found)
    return metadata


def _entries(path: Path, document: dict[str, Any], start: int) -> dict[str, Entry]:
    """The entries of a header in which all numbers are integers, each checked; `start` is where the data begins.

    Models repeat few shapes, and each is checked once. (A number that is no integer may equal one, and be none.)
    """
    seen: dict[Any, tuple[str, tuple[int, ...], int]] = {}
    entries: dict[str, Entry] = {}
    for name, value in document.items():
        try:
            sizes = value["shape"]
            begin, end = value["data_offsets"]
            dtype, shape, nbytes = seen[value["dtype"], *sizes]
            fits = begin >= 0 and end - begin == nbytes and end <= _MAX_SIZE
            if fits and len(value) == 3 and type(sizes) is list and name.isascii():
                entries[name] = Entry(dtype, shape, start + begin, start + end)
                continue
        except (KeyError, TypeError, ValueError):
            pass
        entry = entries[name] = _checked_entry(path, name, value, start)
        seen[value["dtype"], *value["shape"]] = entry.dtype, entry.shape, entry.end - entry.begin
    return entries


def _checked_entry(path: Path, name: str, value: Any, start: int) -> Entry:
    if not (name.isascii() or _is_text(name)):
        _refuse(path, "a tensor's name is not text that UTF-8 can encode", name)
    if type(value) is not dict or value.keys() != _KEYS:
        expected = "exactly dtype, shape and data_offsets"
        _refuse(path, "the tensor's entry has the wrong fields", name, expected=expected, found=_show(value))
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    known = _BY_CODE.get(code) if type(code) is str else None
    if known is None:
        if type(code) is str and code in _SUB_BYTE:
            expected = "whole bytes: " + ", ".join(_BY_CODE)
            _refuse(path, "dtypes of less than a byte are not supported", name, expected=expected, found=code)
        _refuse(path, "unknown dtype", name, expected=", ".join(_BY_CODE), found=_show(code))
    if type(shape) is not list or not _are_sizes(shape):
        expected = f"a list of integers from 0 to {_MAX_SIZE}"
        _refuse(path, "not a shape", name, expected=expected, found=_show(shape))
    if type(offsets) is not list or len(offsets) != 2 or not _are_sizes(offsets):
        expected = f"a list of two integers from 0 to {_MAX_SIZE}"
        _refuse(path, "not data_offsets", name, expected=expected, found=_show(offsets))
    begin, end = offsets
    if begin > end:
        _refuse(path, "the tensor ends before it begins", name, expected="begin <= end", found=_show(offsets))
    dtype, itemsize = known
    if end - begin != (nbytes := _nbytes(shape, itemsize)):
        expected = f"{'over ' * (nbytes > _MAX_SIZE)}{min(nbytes, _MAX_SIZE)} bytes for {code} {_show(shape)}"
        found = f"{end - begin} bytes, data_offsets {_show(offsets)}"
        _refuse(path, "shape and data_offsets disagree", name, expected=expected, found=found)
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _check_cover(path: Path, ordered: dict[str, Entry], start: int, size: int) -> None:
    """Refuses anything but one tensor after the other from `start` to `size`: bytes that belong to no tensor could
    hide another file, bytes that belong to two could make a small file expand to a huge one."""
    reached = start
    for name, (_, _, begin, end) in ordered.items():
        if begin != reached:
            hole = "the file is not entirely covered: a hole before a tensor"
            problem = "tensors overlap" if begin < reached else hole
            _refuse(path, problem, name, expected=f"begin at {reached - start}", found=f"begin at {begin - start}")
        reached = end
    if reached > size:
        cut = next(name for name, entry in ordered.items() if entry.end > size)
        expected, found = f"{reached} bytes", f"{size} bytes"
        _refuse(path, "the file ends before its last tensor", cut, expected=expected, found=found, hint=_AGAIN)
    if reached < size:
        problem = "the file is not entirely covered: bytes after the last tensor"
        _refuse(path, problem, expected=f"{reached} bytes", found=f"{size} bytes")


def _nbytes(shape: Iterable[int], itemsize: int) -> int:
    """Bytes of a tensor, or some number above _MAX_SIZE: multiplying out a hostile shape of a million large dims would
    take quadratic time."""
    total = itemsize
    for dim in shape:
        total *= dim
        if total > _MAX_SIZE:
            return 0 if 0 in shape else total
    return total


def _are_sizes(values: Iterable[object]) -> bool:
    for value in values:  # noqa: SIM110 - all() over a generator takes three times as long for two dims
        if type(value) is not int or not 0 <= value <= _MAX_SIZE:  # `type`: bool is a subclass of int, true is no size
            return False
    return True


def _is_text(value: object) -> bool:
    """True for str without lone surrogates, which JSON escapes can spell but no file name or log can hold."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _refuse(
    path: Path, problem: str, tensor: str | None = None, *, expected: str = "", found: str = "", hint: str | None = None
) -> Never:
    where = os.fspath(path) if tensor is None else f"{os.fspath(path)}, tensor {_show(tensor)}"
    # `from None`: the exception of json or the codec would only repeat what is said here
    raise CheckpointError(problem, where=where, expected=expected or None, found=found or None, hint=hint) from None
