"""The directory of a zip archive whose members are stored, not compressed: where each member's bytes lie.

The standard `zipfile` would do for one friendly file. Here an archive may be a stretch of a larger file, there are
100,000 of them, and everything a hostile one may claim has to be checked against the bytes that are there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, NoReturn

from registry.errors import CheckpointError
from registry.reading import Reader, open_reader

_EOCD = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_EOCD64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY = 1 << 30  # bytes; 100,000 members take 10 MB
_BATCH = 4096
_AGAIN = "get the file again; it is incomplete or was changed after it was written"


class Member(NamedTuple):
    """Where a member's bytes lie in the file."""

    offset: int
    size: int


class Source:
    """A stretch of an open file, read by offsets relative to its start."""

    def __init__(self, reader: Reader, base: int, length: int, where: str) -> None:
        self.reader = reader
        self.base = base
        self.length = length
        self.where = where

    def read(self, offset: int, size: int, what: str) -> bytes:
        """Exactly `size` bytes; anything that is not there is an error that says what was looked for."""
        if offset < 0 or size < 0 or offset + size > self.length:
            self.corrupt(f"{what} lies outside the file", f"within {self.length} bytes", f"{size} bytes at {offset}")
        parts = []
        while size:
            try:
                part = self.reader.pread(size, self.base + offset)
            except OSError as error:
                raise CheckpointError(f"cannot read {what}", where=self.where, found=error.strerror or error) from error
            if not part:
                self.corrupt(f"the file ends within {what}", f"{size} more bytes at {offset}", "the end of the file")
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def want(self, spans: Sequence[tuple[int, int]]) -> None:
        """These (offset, size) are read next."""
        try:
            self.reader.want([(self.base + offset, size) for offset, size in spans])
        except OSError as error:
            raise CheckpointError("a file cannot be read", where=self.where, found=error.strerror or error) from error

    def corrupt(self, problem: str, expected: object = None, found: object = None) -> NoReturn:
        raise CheckpointError(problem, where=self.where, expected=expected, found=found, hint=_AGAIN)


@contextmanager
def open_source(file: Reader | str | os.PathLike[str], base: int, length: int | None, where: str) -> Iterator[Source]:
    """The stretch of `file` (a path or a reader) from `base` on; `length` None: to its end."""
    given = not isinstance(file, str | os.PathLike)
    try:
        reader = open_reader(file) if isinstance(file, str | os.PathLike) else file
    except OSError as error:
        raise CheckpointError("a file cannot be opened", where=where, found=error.strerror or error) from error
    try:
        size = reader.size
        if base < 0 or (length is not None and length < 0) or base + (length or 0) > size:
            found = f"{length} bytes at {base}"
            raise CheckpointError(
                "an item lies outside its file", where=where, expected=f"within {size} bytes", found=found
            )
        yield Source(reader, base, size - base if length is None else length, where)
    finally:
        if not given:
            reader.close()


def read_directory(source: Source) -> dict[str, Member]:
    """The members by name, in file order; offsets are those in the file. Raises CheckpointError on anything odd."""
    start, size, count = _find_directory(source)
    if size > _MAX_DIRECTORY or count * _CENTRAL.size > size:
        source.corrupt("a zip directory has an absurd size", found=f"{count} members in {size} bytes")
    data = source.read(start, size, "the zip directory")
    members: dict[str, Member] = {}
    spans: list[tuple[int, int, str]] = []
    for name, header, length in _entries(source, data, count):
        if name in members:
            source.corrupt("two zip members have the same name", found=name)
        offset = _data_offset(source, name, header)
        if offset + length > start:
            found = f"{name}: {length} bytes at {offset}"
            source.corrupt("a zip member lies outside the file", f"to end before {start}", found)
        members[name] = Member(source.base + offset, length)
        spans.append((header, offset + length, name))
    spans.sort()
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            source.corrupt("two zip members overlap", found=f"{name} and {other}")
    return {name: members[name] for _, _, name in spans}


def _entries(source: Source, data: bytes, count: int) -> Iterator[tuple[str, int, int]]:
    """Name, local header offset and size of every entry; headers are asked for many at a time."""
    at = 0
    for first in range(0, count, _BATCH):
        batch = []
        for _ in range(min(_BATCH, count - first)):
            name, header, length, at = _entry(source, data, at)
            batch.append((name, header, length))
        source.want([(header, LOCAL.size + len(name.encode())) for name, header, _ in batch])
        yield from batch


def _find_directory(source: Source) -> tuple[int, int, int]:
    """Offset, size and number of entries of the central directory."""
    tail_size = min(source.length, _EOCD.size + 0xFFFF)
    if tail_size < _EOCD.size:
        source.corrupt("not a zip archive: too short", found=f"{source.length} bytes")
    tail = source.read(source.length - tail_size, tail_size, "the end of the zip archive")
    at = len(tail) - _EOCD.size
    while (at := tail.rfind(b"PK\x05\x06", 0, at + 4)) >= 0:
        _, disk, disk0, _, count, size, start, comment = _EOCD.unpack_from(tail, at)
        if at + _EOCD.size + comment == len(tail):
            break
        at -= 1
    else:
        source.corrupt(
            "the end of a zip archive is missing", "its directory as the last thing in the file", "no directory"
        )
    if disk or disk0:
        source.corrupt("a zip archive in several volumes", found=f"volume {disk}")
    end = source.length - tail_size + at
    if end >= _LOCATOR.size:
        locator = source.read(end - _LOCATOR.size, _LOCATOR.size, "the zip64 locator")
        signature, _, offset64, _ = _LOCATOR.unpack(locator)
        if signature == b"PK\x06\x07":
            record = _EOCD64.unpack(source.read(offset64, _EOCD64.size, "the zip64 directory record"))
            if record[0] != b"PK\x06\x06":
                source.corrupt("the zip64 directory record is missing", found=f"{record[0]!r} at {offset64}")
            count, size, start, end = record[7], record[8], record[9], offset64
    if start + size > end:
        source.corrupt("a zip directory lies outside the file", f"to end before {end}", f"{size} bytes at {start}")
    return start, size, count


def _entry(source: Source, data: bytes, at: int) -> tuple[str, int, int, int]:
    """Name, local header offset and size of the directory entry at `at`, and where the next one starts."""
    if at + _CENTRAL.size > len(data) or data[at : at + 4] != b"PK\x01\x02":
        source.corrupt("a zip directory is damaged", found=f"no entry at byte {at}")
    entry = _CENTRAL.unpack_from(data, at)
    flags, method, packed, size, name_size, extra_size, comment, header = *entry[3:5], *entry[8:13], entry[16]
    at += _CENTRAL.size
    raw, extra = data[at : at + name_size], data[at + name_size : at + name_size + extra_size]
    at += name_size + extra_size + comment
    if at > len(data):
        source.corrupt("a zip directory is damaged", found="an entry beyond its end")
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        source.corrupt("a zip member's name is not text", found=repr(raw))
    if 0xFFFFFFFF in (size, packed, header):
        size, packed, header = _zip64(source, name, extra, size, packed, header)
    if flags & 0x2041:
        source.corrupt("a zip member is encrypted", found=name)
    if method or packed != size:
        found = f"{name}: method {method}, {packed} bytes for {size}"
        source.corrupt("a zip member is compressed", "stored members, as torch.save writes them", found)
    return name, header, size, at


def _zip64(source: Source, name: str, extra: bytes, *fields: int) -> tuple[int, int, int]:
    """The fields of an entry, with those that did not fit in 32 bits taken from its extra data."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            data = extra[at + 4 : at + 4 + size]
            wide = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data) - 7, 8)]
            if len(wide) < fields.count(0xFFFFFFFF):
                break
            full = [wide.pop(0) if field == 0xFFFFFFFF else field for field in fields]
            return full[0], full[1], full[2]
        at += 4 + size
    source.corrupt("a zip member's 64-bit size is missing", found=name)


def _data_offset(source: Source, name: str, header: int) -> int:
    """Where a member's bytes start, by its local header, which must be there and be this member's."""
    raw = name.encode("utf-8")
    data = source.read(header, LOCAL.size + len(raw), f"the header of {name}")
    signature, *_, name_size, extra_size = LOCAL.unpack_from(data)
    if signature != b"PK\x03\x04" or name_size != len(raw) or data[LOCAL.size :] != raw:
        problem = "a zip member is not where the directory says"
        source.corrupt(problem, f"the header of {name} at {header}", f"{data[:64]!r}")
    return header + LOCAL.size + len(raw) + int(extra_size)
