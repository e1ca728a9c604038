"""The manifest of a checkpoint: a digest of every file and of every tensor in it, written last and checked by verify().

The digest is CRC32: what is put together out of order, by several threads and machines, has one all the same, at the
pace of memory. It finds damage, every burst of up to 32 bits and all but one in four billion of the others. It is no
seal against somebody who changes a checkpoint on purpose, for he can write the manifest anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import numpy as np
from attrs import field, frozen
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.commit import write_file
from registry.crc import combine, crc32
from registry.errors import CheckpointError
from registry.planning import Plan
from registry.progress import Tally
from registry.reading import Reader, reading
from registry.storage import Laid, Slot, slot_bytes

#: Hidden, so that no program takes it for a part of the model, and `side_files` do not carry it on.
NAME = ".registry-manifest.json"
_PATTERN = ".registry-manifest*.json"
_LARGEST = 1 << 30
_READ = 2 << 20
_HEAD = b'{"crc32": "%08x", "manifest": '

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Crc = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorSum(_Strict):
    """One stored tensor (or chunk of one): where its bytes lie in the file, and which logical tensors they hold."""

    name: str
    begin: Count
    nbytes: Count
    crc32: Crc
    holds: tuple[str, ...] = Field(default=(), strict=False)


class FileSum(_Strict):
    """One file."""

    size: Count
    crc32: Crc
    tensors: tuple[TensorSum, ...] = Field(default=(), strict=False)


class _Manifest(_Strict):
    version: int = 1
    files: dict[str, FileSum]


Sums = dict[str, FileSum]


@frozen
class Damage:
    """A file that does not agree with the manifest; `tensors` are those of it that do not: stored name -> logical."""

    path: Path
    problem: str
    missing: bool = False
    tensors: dict[str, tuple[str, ...]] = field(factory=dict)


@frozen
class Checked:
    """What a manifest said of a checkpoint."""

    files: int
    tensors: int
    damage: tuple[Damage, ...]
    strange: tuple[str, ...]


def data_sums(root: Path, laid: Laid, slots: Sequence[Slot], plan: Plan, crcs: Sequence[int]) -> Sums:
    """The sums of data files just written below `root`, from those of their tensors. Only what lies between is read."""
    sums: Sums = {}
    for planned, tensors in zip(laid.files, tensor_sums(laid, slots, plan, crcs), strict=True):
        parts = []
        with reading(root / planned.path) as opened:
            for begin, end, tensor in _stretches(planned.size, tensors):
                crc = int(tensor.crc32, 16) if tensor else _crc(opened, begin, end)
                parts.append((crc, end - begin))
        sums[planned.path] = FileSum(size=planned.size, crc32=f"{combine(parts):08x}", tensors=tuple(tensors))
    return sums


def tensor_sums(laid: Laid, slots: Sequence[Slot], plan: Plan, crcs: Sequence[int]) -> list[list[TensorSum]]:
    """The sums of what each data file holds, in order."""
    holds: dict[int, dict[str, None]] = {}
    for copies in plan.copies:
        for slot in np.unique(copies.target).tolist():
            holds.setdefault(slot, {})[copies.tensor] = None
    by_file: dict[int, list[TensorSum]] = {}
    for i, (slot, (file, begin)) in enumerate(zip(slots, laid.places, strict=True)):
        name = slot.name if slot.origin is None else f"{slot.name}{list(slot.origin)}"
        held = tuple(tensor for tensor in holds.get(i, ()) if tensor != slot.name)
        by_file.setdefault(file, []).append(
            TensorSum.model_construct(
                name=name, begin=begin, nbytes=slot_bytes(slot), crc32=f"{crcs[i]:08x}", holds=held
            )
        )
    return [sorted(by_file.get(file, []), key=lambda tensor: tensor.begin) for file in range(len(laid.files))]


def _file_sums(root: Path, names: Iterable[str]) -> Sums:
    """The sums of whole files below `root`."""
    sums: Sums = {}
    for name in names:
        with reading(root / name) as opened:
            sums[name] = FileSum(size=opened.size, crc32=f"{_crc(opened, 0, opened.size):08x}")
    return sums


def write(root: Path, laid: Laid, data: Sums, *, durable: bool, apart: bool = False) -> None:
    """Write the manifest of a checkpoint whose other files lie below `root`; `data` are its data files' sums.

    `apart`: one for each data file, where other machines write others beside it.
    """
    home = f"{laid.home}/" if laid.home else ""
    small = [name for name in (*laid.small, *laid.copies) if name.startswith(home)]
    sums = {name.removeprefix(home): found for name, found in {**_file_sums(root, small), **data}.items()}
    if not apart:
        write_file(root / home / NAME, text(sums), durable)
        return
    for name in data:
        own = {name: sums[name]} | {other: sums[other] for other in small}
        write_file(root / own_name(name), text(own), durable)


def own_name(file: str) -> str:
    """The manifest of one data file."""
    return f"{NAME.removesuffix('.json')}.{file}.json"


def text(sums: Mapping[str, FileSum]) -> bytes:
    """The manifest of these files."""
    manifest = {"version": 1, "files": {name: _plain(found) for name, found in sorted(sums.items())}}
    body = json.dumps(manifest, separators=(",", ":")).encode()
    return _HEAD % crc32(body) + body + b"}\n"


def _plain(found: FileSum) -> dict[str, object]:
    return {
        "size": found.size, "crc32": found.crc32,
        "tensors": [
            {"name": t.name, "begin": t.begin, "nbytes": t.nbytes, "crc32": t.crc32}
            | ({"holds": list(t.holds)} if t.holds else {})
            for t in found.tensors
        ],
    }  # fmt: skip


def _stretches(size: int, tensors: Sequence[TensorSum]) -> Iterator[tuple[int, int, TensorSum | None]]:
    """[begin, end) of the tensors in order, and of what lies between them."""
    at = 0
    for tensor in tensors:
        if tensor.begin > at:
            yield at, tensor.begin, None
        at = tensor.begin + tensor.nbytes
        if tensor.nbytes:
            yield tensor.begin, at, tensor
    if at < size:
        yield at, size, None


def _crc(file: Reader, begin: int, end: int) -> int:
    """The CRC32 of a stretch of a file. What has become shorter has another than it had."""
    crc = 0
    while begin < end and (data := file.pread(min(_READ, end - begin), begin)):
        crc = crc32(data, crc)
        begin += len(data)
    return crc


def is_manifest(name: str) -> bool:
    """Is this what a manifest is called?"""
    return fnmatchcase(name, _PATTERN)


def present(home: Path) -> bool:
    """Is there a manifest in this directory?"""
    return home.is_dir() and any(home.glob(_PATTERN))


def read(home: Path) -> Sums:
    """What the manifests in a directory say. Raises CheckpointError for a damaged one."""
    return {name: found for path in sorted(home.glob(_PATTERN)) for name, found in _parsed(path).items()}


def _parsed(path: Path) -> Sums:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise ValueError(f"no file of at most {_LARGEST} bytes")
        raw = path.read_bytes()
        size = len(_HEAD % 0)
        body = raw[size:-2]
        if raw[:size] != _HEAD % crc32(body) or raw[-2:] != b"}\n":
            raise ValueError("its own digest is another")
        found = _Manifest.model_validate_json(body).files
        for name, file in found.items():
            _check_names(name, file)
    except (OSError, ValueError) as error:  # pydantic's error is a ValueError
        said = "not the fields that it has" if isinstance(error, ValidationError) else error
        raise CheckpointError(
            "the manifest is damaged", where=path, expected="what this library wrote", found=said,
            hint="get it again; or remove it, and compare the checkpoint with another by verify(a, b)",
        ) from None  # fmt: skip
    return found


def _check_names(name: str, file: FileSum) -> None:
    parts = name.split("/")
    if not name or len(name) > 4096 or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name[:200]!r} is no path inside the checkpoint")
    at = 0
    for tensor in file.tensors:
        if tensor.begin < at or tensor.begin + tensor.nbytes > file.size:
            raise ValueError(f"{tensor.name[:200]!r} lies outside {name[:200]!r}, or over another tensor")
        at = tensor.begin + tensor.nbytes


def check(home: Path, threads: int, tally: Tally | None = None) -> Checked:
    """Read every file that a manifest in `home` names and compare digests. Raises CheckpointError as `read` does."""
    sums = read(home)
    tally = tally or Tally(None, 0)
    largest_first = sorted(sums, key=lambda name: -sums[name].size)
    with ThreadPoolExecutor(threads) as pool:
        looked = pool.map(lambda name: _damage(home / name, sums[name], tally), largest_first)
        found = dict(zip(largest_first, looked, strict=True))
    damage = [one for name in sums if (one := found[name]) is not None]
    there = (p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())
    strange = sorted(name for name in there if name not in sums and not Path(name).name.startswith("."))
    return Checked(len(sums), sum(len(file.tensors) for file in sums.values()), tuple(damage), tuple(strange))


def _damage(path: Path, expected: FileSum, tally: Tally) -> Damage | None:
    try:
        if not path.is_file():
            return Damage(path, "the file is missing", missing=True)
        with reading(path) as opened:
            size = opened.size
            if size != expected.size:
                return Damage(path, f"{size} bytes, not {expected.size}")
            parts, bad = [], []
            for begin, end, tensor in _stretches(size, expected.tensors):
                crc = _crc(opened, begin, end)
                tally.add(end - begin)
                parts.append((crc, end - begin))
                if tensor is not None and f"{crc:08x}" != tensor.crc32:
                    bad.append(tensor)
    except OSError as error:
        return Damage(path, f"cannot be read: {error.strerror or error}")
    if f"{combine(parts):08x}" == expected.crc32 and not bad:
        return None
    if bad:
        return Damage(path, "the values differ", tensors={tensor.name: tensor.holds for tensor in bad})
    where = "its header, or what lies between tensors, differs" if expected.tensors else "the content differs"
    return Damage(path, where)
