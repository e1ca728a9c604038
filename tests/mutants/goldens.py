"""Damages goldens: what Megatron and TensorRT-LLM wrote, and the same written by us, with a manifest beside it.

Of theirs, a bit of a weight and exchanged weights or files have to be refused, or to give another model than the one
that was written. Of ours, one bit anywhere, in data, index or metadata, has to be found by `verify` alone.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import registry
from registry.errors import RegistryError
from registry.source import load
from registry.storage import Piece, slot_bytes
from registry.testing.comparison import names_in, same_bits
from tests import test_golden_megatron, test_golden_trtllm
from tests.goldens import golden
from tests.mutants.runner import Outcome

#: How many damages of each kind one golden gets.
EACH = 4


@dataclass(frozen=True)
class Golden:
    """A checkpoint of another program, and the config of the HuggingFace model that it was made of."""

    name: str
    path: Path
    config: Path


def every() -> list[Golden]:
    """Megatron's and TensorRT-LLM's goldens that are here; not those whose weights were quantised."""
    megatron = [Golden(str(case), case.path, golden(case.hf)) for case in test_golden_megatron.CASES]
    return megatron + [Golden(str(c), c.path, golden(c.input)) for c in test_golden_trtllm.CASES]


def run(chosen: list[Golden], seed: int = 0) -> Iterator[Outcome]:
    """The outcome of every damage of some goldens."""
    for one in chosen:
        draw = random.Random(f"{seed} {one.name}")
        with tempfile.TemporaryDirectory(prefix="goldens-") as scratch:
            theirs, ours = Path(scratch, "theirs"), Path(scratch, "ours")
            shutil.copytree(one.path, theirs)
            yield from _theirs(one, theirs, draw)
            registry.convert(
                one.path, ours, to=registry.open(one.path, config=one.config).format, config=one.config, durable=False
            )
            yield from _ours(one, ours, draw)


def _theirs(one: Golden, folder: Path, draw: random.Random) -> Iterator[Outcome]:
    source = load(folder, config=one.config)
    expected = _read(folder, one.config)
    held = sorted({int(m) for group in source.bound.groups for m in group.members})
    pieces = [p for p in (source.opened.pieces[i] for i in held) if slot_bytes(p) and p.strides is None]
    files = [path for path in source.opened.files if isinstance(path, Path)]
    for piece in draw.sample(pieces, min(EACH, len(pieces))):
        path = files[piece.file]
        yield _tried("flip a bit of a weight", one, folder, path, expected, piece.name, [(piece.begin, _flipped)])
    alike = _alike(pieces, files)
    for a, b in draw.sample(alike, min(EACH, len(alike))):
        path, size = files[a.file], slot_bytes(a)
        data = path.read_bytes()
        edits = [(a.begin, data[b.begin : b.begin + size]), (b.begin, data[a.begin : a.begin + size])]
        yield _tried("exchange weights", one, folder, path, expected, f"{a.name} <-> {b.name}", edits)
    named = sorted({p for p in files if p.exists()})
    for a_file, b_file in list(pairwise(named))[:EACH]:
        _exchange(a_file, b_file)
        said = _differs(folder, one.config, expected)
        _exchange(a_file, b_file)
        yield Outcome(f"{one.name} | exchange files | {a_file.name} <-> {b_file.name}", "exchange files", said, 1)


def _alike(pieces: list[Piece], files: list[Path]) -> list[tuple[Piece, Piece]]:
    """Pairs of weights in one file that are as long as each other, and not the same."""
    found = []
    contents = {i: files[i].read_bytes() for i in {piece.file for piece in pieces}}
    for a, b in pairwise(pieces):
        size = slot_bytes(a)
        alike = a.file == b.file and a.name != b.name and (a.shape, a.dtype) == (b.shape, b.dtype)
        data = contents[a.file]
        if alike and data[a.begin : a.begin + size] != data[b.begin : b.begin + size]:
            found.append((a, b))
    return found


def _exchange(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def _flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def _tried(
    kind: str, one: Golden, folder: Path, path: Path, expected: dict[str, Any], what: str, edits: list[tuple[int, Any]]
) -> Outcome:
    sound = path.read_bytes()
    changed = bytearray(sound)
    for begin, edit in edits:
        new = edit(bytes(changed[begin : begin + 1])) if callable(edit) else edit
        changed[begin : begin + len(new)] = new
    path.write_bytes(changed)
    said = _differs(folder, one.config, expected)
    path.write_bytes(sound)
    return Outcome(f"{one.name} | {kind} | {path.name} | {what}", kind, said, 1)


def _read(folder: Path, config: Path) -> dict[str, Any]:
    return dict(registry.stream(folder, config=config))


def _differs(folder: Path, config: Path, expected: dict[str, Any]) -> str | None:
    try:
        same_bits(_read(folder, config), expected)
    except RegistryError:
        return "refused"
    except AssertionError:
        return "comparison"
    return None


def _ours(one: Golden, folder: Path, draw: random.Random) -> Iterator[Outcome]:
    assert registry.verify(folder), f"{one.name}: verify finds damage in what was just written"
    for name in names_in(folder, own=True):
        path = folder / name
        sound = path.read_bytes()
        for bit in sorted({draw.randrange(8 * len(sound)) for _ in range(EACH)}) if sound else ():
            changed = bytearray(sound)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            kind = "flip any bit of ours"
            yield Outcome(f"{one.name} | {kind} | {name} | bit {bit}", kind, _found(folder), 1)
        path.write_bytes(sound)


def _found(folder: Path) -> str | None:
    try:
        return None if registry.verify(folder) else "verify"
    except RegistryError:
        return "refused"
