"""The executor against numpy on small plans: every byte of a target, its sums, and files that misbehave."""

from __future__ import annotations

import errno
import itertools
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import assemble, crc, execute
from registry.errors import CheckpointError, MappingError, TargetError
from registry.execute import array
from registry.groups import Coding
from registry.losses import Loss, Watch
from registry.planning import Copies, Plan, Values, merge
from registry.storage import FilePlan, Laid, Opened, Piece, Rank, Slot, slot_bytes

CODING = Coding()
DTYPES = {1: "uint8", 2: "bfloat16", 4: "float32", 8: "int64", 16: "complex128"}


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


class Case:
    """A source file of one piece, a target file of slots, and one strided copy for each slot."""

    def __init__(self, tmp: Path, dtype: str = "uint8", to: str | None = None, seed: int = 0) -> None:
        self.tmp, self.dtype, self.to = tmp, dtype, to or dtype
        self.item = execute.ITEMSIZE[dtype]
        self.random = np.random.default_rng(seed)
        self.plan, self.pieces, self.slots = Plan(), [], []
        self.source = b""
        self.expected: list[bytes] = []

    def add(self, size: tuple[int, ...], order: tuple[int, ...], cut: int = 0, pad: int = 0) -> None:
        """A box of `size`, whose axes lie in `order` in the source, whose last axis is `cut` out of a longer one."""
        stored = [size[axis] for axis in order]
        stored[-1] += cut
        raw = self.random.integers(0, 256, int(np.prod(stored)) * self.item, dtype=np.uint8).tobytes()
        begin = len(self.source)
        self.source += raw
        steps = np.cumprod([1, *stored[:0:-1]])[::-1].tolist()
        stride = [0] * len(size)
        for axis, step in zip(order, steps, strict=True):
            stride[axis] = step
        to = np.cumprod([1, *size[:0:-1]])[::-1].tolist() if size else []
        k, volume = len(self.slots), int(np.prod(size))
        box, of, into = merge(size, stride, to)
        values = Values(self.dtype, self.to, CODING, CODING)
        self.plan.copies.append(Copies("t", box, of, into, values, ints(k), ints(cut), ints(k), ints(pad)))
        self.pieces.append(Piece(f"s{k}", self.dtype, (int(np.prod(stored)),), 0, begin))
        self.slots.append(Slot(f"t{k}", self.to, (volume + 2 * pad,), Rank()))
        whole = array(raw, self.item, size, stride, cut * self.item).tobytes()
        self.expected.append(bytes(pad * self.item) + whole + bytes(pad * self.item))

    def run(self, gap: int = 0, seal: bool = True, **options: Any) -> tuple[list[bytes], list[int]]:
        """Execute; gives each slot's bytes, and the sums that were given to `seal`."""
        (self.tmp / "source").write_bytes(self.source)
        opened = Opened(self.tmp, "f", [self.tmp / "source"], self.pieces, {})
        places, literals, at, found = [], [], 0, []
        for slot in self.slots:
            if gap:
                literals.append((at, b"#" * gap))
            places.append((0, at + gap))
            at += gap + slot_bytes(slot)

        def keep(sums: Any) -> list[tuple[int, int, bytes]]:
            found.extend(sums)
            return [(0, at, b"end")]

        laid = Laid([FilePlan("target", at + 3, literals)], places, seal=keep if seal else None)
        execute.execute(self.plan, opened, laid, self.slots, self.tmp / "out", **options)
        data = (self.tmp / "out" / "target").read_bytes()
        assert data[at:] == (b"end" if seal else bytes(3))
        assert all(data[offset : offset + gap] == b"#" * gap for offset, _ in literals)
        return [data[o : o + slot_bytes(s)] for (_, o), s in zip(places, self.slots, strict=True)], found


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    size = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    order = tuple(draw(st.permutations(range(len(size)))))
    return size, order, draw(st.integers(0, 40)), draw(st.integers(0, 3))


@given(
    st.lists(boxes(), min_size=1, max_size=4), st.sampled_from(sorted(DTYPES)), st.sampled_from([16, 48, 256, 1 << 20]),
    st.integers(0, 70), st.sampled_from([1, 16, 1 << 20]), st.sampled_from([0, 1, 4]), st.booleans(),
)  # fmt: skip
def test_any_strided_copy(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[Any], width: int, tile: int, gap: int, run: int,
    dense: float, seal: bool,
) -> None:  # fmt: skip
    case = Case(tmp_path_factory.mktemp("case"), DTYPES[width])
    for shape in shapes:
        case.add(*shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "TILE", tile)
        patch.setattr(execute, "_PART", 2)
        patch.setattr(assemble, "RUN", run)
        patch.setattr(assemble, "DENSE", dense)
        patch.setattr(assemble, "_BLOCK", 8)
        slots, sums = case.run(gap, seal, durable=False)
    assert slots == case.expected
    assert not seal or sums == [zlib.crc32(data) for data in case.expected]


@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("width", sorted(DTYPES))
def test_large_transposes(tmp_path: Path, order: tuple[int, ...], width: int) -> None:
    case = Case(tmp_path, DTYPES[width])
    case.add((300, 520, 5)[: len(order)], order)
    assert case.run() == (case.expected, [zlib.crc32(case.expected[0])])


@pytest.mark.parametrize("durable", [False, True])
def test_a_large_slot_is_summed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool) -> None:
    monkeypatch.setattr(execute, "TILE", 4096)
    monkeypatch.setattr("registry.files._FLUSH", 8192)
    case = Case(tmp_path)
    case.add((1_000_003,), (0,))
    case.add((7, 11), (1, 0))
    calls: list[tuple[int, int]] = []
    progress: Callable[[int, int], None] = lambda done, total: calls.append((done, total))  # noqa: E731
    assert case.run(64, threads=4, progress=progress, durable=durable)[0] == case.expected
    assert calls[-1][0] == calls[-1][1] and [done for done, _ in calls] == sorted(done for done, _ in calls)


FLOATS = ("bfloat16", "float16", "float32", "float64")


def cast(data: bytes, source: str, target: str) -> bytes:
    """What torch makes of all values one by one, with one NaN for every NaN."""
    torch = pytest.importorskip("torch")
    values = torch.frombuffer(bytearray(data), dtype=getattr(torch, source))
    found = torch.stack([value.to(getattr(torch, target)) for value in values])
    found[values.isnan()] = torch.nan
    return bytes(found.view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("tile", [48, 1 << 20])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FLOATS, 2)))
def test_casts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...], tile: int, source: str, target: str
) -> None:
    monkeypatch.setattr(execute, "TILE", tile)
    monkeypatch.setattr(assemble, "DENSE", 0 if tile == 48 else 2)
    case = Case(tmp_path, source, target)
    case.add((40, 30), order)
    assert case.run()[0] == [cast(case.expected[0], source, target)]


@pytest.mark.parametrize(("source", "target"), [("bfloat16", "float32"), ("bfloat16", "float16")])
def test_large_casts_are_done_in_blocks(tmp_path: Path, source: str, target: str) -> None:
    case = Case(tmp_path, source, target)
    case.add((300, 400), (1, 0))
    assert case.run()[0] == [cast(case.expected[0], source, target)]


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FLOATS, 2)))
def test_what_a_cast_loses(tmp_path: Path, source: str, target: str) -> None:
    torch = pytest.importorskip("torch")
    case = Case(tmp_path, source, target)
    case.add((300, 400), (1, 0))
    numbers = torch.empty(300 * 400, dtype=getattr(torch, source)).normal_(generator=torch.Generator().manual_seed(1))
    case.source = numbers.view(torch.uint8).numpy().tobytes()
    watch = Watch()
    case.run(watch=watch)
    wide = torch.float64 if source == "float64" else torch.float32
    off = (numbers.to(getattr(torch, target)).to(wide) - numbers.to(wide)).abs().max().item()
    expected = {"t": Loss(f"{source} to {target}", off, off / numbers.abs().max().item())} if off else {}
    assert watch.losses() == expected
    assert bool(expected) == (FLOATS.index(source) >= FLOATS.index(target) or (source, target) == FLOATS[:2])


def test_replicas_that_differ_are_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.add((16,), (0,))
    case.source += case.source
    case.pieces.append(Piece("twin", "uint8", (16,), 0, 16))
    values = Values("uint8", "uint8", CODING, CODING)
    case.plan.replicas.append(Copies("t", (16,), (1,), (1,), values, ints(0), ints(0), ints(1), ints(0)))
    assert case.run()[0] == case.expected
    (tmp_path / "out" / "target").unlink()
    case.source = case.source[:-1] + bytes([case.source[-1] ^ 1])
    with pytest.raises(MappingError, match="copies of t differ"):
        case.run()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("dense", [0, 4])
def test_a_source_that_shrinks_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...], dense: int
) -> None:
    monkeypatch.setattr(execute, "TILE", 4096)
    monkeypatch.setattr(assemble, "DENSE", dense)
    case = Case(tmp_path)
    case.add((200, 300), order)
    with pytest.raises(CheckpointError, match="ends early"):
        case.run(threads=1, progress=lambda done, _: os.truncate(tmp_path / "source", 20_000) if done > 8192 else None)


def test_a_source_that_is_too_short(tmp_path: Path) -> None:
    for case in (Case(tmp_path / "a"), Case(tmp_path / "b")):
        case.tmp.mkdir()
        case.add((20, 30), (0, 1) if case.tmp.name == "a" else (1, 0))
        case.source = case.source[:-1]
        with pytest.raises(CheckpointError):
            case.run()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_target_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    case = Case(tmp_path)
    case.add((5000,), (0,))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TargetError, match=os.strerror(code)):
        case.run(threads=2)


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 2)], at))
    case = Case(tmp_path)
    case.add((5000,), (0,))
    assert case.run()[0] == case.expected


def test_an_error_of_progress_is_the_callers_own(tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyError(done)

    case = Case(tmp_path)
    case.add((5000,), (0,))
    with pytest.raises(KeyError):
        case.run(progress=fail)


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_sums_combine(parts: list[bytes]) -> None:
    assert crc.combine((zlib.crc32(part), len(part)) for part in parts) == zlib.crc32(b"".join(parts))
    assert all(crc.crc32(memoryview(bytearray(part)), 5) == zlib.crc32(part, 5) for part in parts)
