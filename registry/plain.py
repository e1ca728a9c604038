"""Plain data with tensors in it, as it passes between a training process and the containers, which know no torch."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import numpy as np
from attrs import frozen

from registry.dtypes import ITEMSIZE, torch_dtype
from registry.errors import ArgumentError


@frozen
class TensorData:
    """A small tensor by its bytes, row by row."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@frozen
class ElementType:
    """A torch dtype by its name."""

    name: str


_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, np.ndarray, TensorData, ElementType)


def packed(value: Any, where: str = "extra") -> Any:
    """The same data with torch's objects in it by name and bytes. Raises ArgumentError for what is no plain data."""
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return TensorData(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)
    if isinstance(value, torch.dtype):
        return ElementType(str(value).removeprefix("torch."))
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        made |= {packed(k, where): packed(v, f"{where}[{k!r}]") for k, v in value.items()}
        return made
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(packed(inner, f"{where}[{i}]") for i, inner in enumerate(value))
    if isinstance(value, tuple):  # torch.Size and named tuples
        return tuple(packed(inner, f"{where}[{i}]") for i, inner in enumerate(value))
    if isinstance(value, argparse.Namespace | SimpleNamespace):
        return type(value)(**{k: packed(v, f"{where}.{k}") for k, v in vars(value).items()})
    if isinstance(value, PurePath | torch.device):
        return str(value)
    raise ArgumentError(
        "not plain data", where=where, expected="numbers, text, tensors, arrays, lists, dictionaries, namespaces",
        found=f"{type(value).__module__}.{type(value).__qualname__}", hint="save its state_dict(), or plain data",
    )  # fmt: skip


def unpacked(value: Any) -> Any:
    """The inverse of `packed`: new tensors that share nothing."""
    import torch

    if isinstance(value, TensorData):
        if value.dtype not in ITEMSIZE or not value.data:
            return torch.empty(value.shape, dtype=torch_dtype(value.dtype))
        flat = torch.frombuffer(bytearray(value.data), dtype=torch.uint8).view(torch_dtype(value.dtype))
        return flat.reshape(value.shape)
    if isinstance(value, ElementType):
        return torch_dtype(value.name)
    if isinstance(value, dict):
        made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        made |= {unpacked(k): unpacked(v) for k, v in value.items()}
        return made
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(unpacked, value))
    if isinstance(value, argparse.Namespace | SimpleNamespace):
        return type(value)(**{k: unpacked(v) for k, v in vars(value).items()})
    return value
