"""Casts against torch's own, value by value."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from registry import casts

EIGHT = ("float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("dtype", EIGHT)
def test_every_finite_byte(dtype: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    values = torch.from_numpy(every).view(getattr(torch, dtype)).to(torch.float32)
    finite = values.isfinite().numpy()
    quick = casts.from_float8(every[finite].reshape(2, -1), dtype)
    assert quick is not None
    found, factor = quick
    expected = values.numpy()[finite].reshape(2, -1)
    assert (found * np.float32(factor)).tobytes() == expected.tobytes()  # the signs of zeros too


@pytest.mark.parametrize("dtype", [*EIGHT, "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_bytes_that_are_no_numbers(dtype: str) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    special = every[~every.view(getattr(torch, dtype)).to(torch.float32).isfinite()]
    for byte in special.tolist():
        assert casts.from_float8(np.array([[1, byte, 2]], dtype=np.uint8), dtype) is None
    assert len(special)


def test_types_that_are_not_like_it() -> None:
    assert casts.from_float8(np.array([1], dtype=np.uint8), "float8_e8m0fnu") is None
    assert casts.from_float8(np.array([], dtype=np.uint8), "float8_e4m3fn") is None


@given(st.integers(0, 2**32), st.integers(0, 3), st.sampled_from([1, 31, casts.PIECE, casts.PIECE + 1, 70_000]))
def test_rounded(seed: int, specials: int, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 1e3
    values[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:specials]] = torch.nan
    for dtype in (torch.bfloat16, torch.float16):
        expected = values.to(dtype)
        expected[values.isnan()] = torch.nan
        found = casts.rounded(values, str(dtype).removeprefix("torch."))
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_buffers_are_each_threads_own() -> None:
    mine = casts.rounded(torch.ones(8), "bfloat16")
    other = threading.Thread(target=lambda: casts.rounded(torch.zeros(8), "bfloat16"))
    other.start()
    other.join()
    assert mine.tolist() == [1] * 8
    assert casts.rounded(torch.zeros(8), "float16").tolist() == [0] * 8 and mine.tolist() == [1] * 8


def test_one_thread_alone_changes_no_other() -> None:
    said: list[int] = []

    def work() -> None:
        casts.alone()
        said.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for target in (work, lambda: said.append(torch.get_num_threads())):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert (said, torch.get_num_threads()) == ([1, 3], 3)
    finally:
        torch.set_num_threads(before)
