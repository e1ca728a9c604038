"""Are two checkpoints the same, to the last bit?"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


#: What the library writes beside a checkpoint for its own `verify`, and no other program reads.
_OWN = ".registry-manifest*.json"


def names_in(folder: Path, own: bool = False) -> list[str]:
    """The files of a directory, below it too, by relative name; with `own`, the library's manifest among them."""
    files = (path for path in folder.rglob("*") if path.is_file() and (own or not path.match(_OWN)))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def same_directory(a: Path, b: Path) -> None:
    """Assert that two directories hold the same names with the same bytes, but for the library's own manifest."""
    assert names_in(a) == names_in(b), f"{a} and {b} hold other files"
    for name in names_in(a):
        assert filecmp.cmp(a / name, b / name, shallow=False), f"{name} differs in {a} and {b}"


def same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str = "tensors") -> None:
    """Assert that two sets of tensors have the same names, types, shapes and bits; NaN is NaN, and -0.0 is not 0.0."""
    assert set(found) == set(expected), f"{what}: the names differ"
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), f"{what}: type or shape of {name} differs"
        assert _bytes(other) == _bytes(tensor), f"{what}: bits of {name} differ"


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
