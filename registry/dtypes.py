"""Element types by name. The names are torch's (`torch.bfloat16` is "bfloat16"); torch itself is not imported here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registry.errors import ArgumentError

if TYPE_CHECKING:
    import torch

#: Bytes an element takes, by name.
ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

_SHORT = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
}


def is_float(name: str) -> bool:
    """True for types that a dtype cast applies to: floating point of at least 16 bits (not the quantised float8s)."""
    return name.startswith(("float", "bfloat")) and ITEMSIZE[name] > 1


def dtype_name(dtype: Any) -> str:
    """The name of `dtype`: a torch dtype, its name ("bfloat16", "torch.bfloat16") or a usual short form ("bf16")."""
    name = str(dtype).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in ITEMSIZE:
        raise ArgumentError("unknown dtype", expected=", ".join(ITEMSIZE), found=repr(dtype))
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
