"""Plain data as nodes of a pickle and back: namespaces, arrays and small tensors, whoever wrote them.

Reading is closed as everywhere here: what is not plain data stays the inert node that it is.
"""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError
from registry.plain import ElementType, TensorData

from .pickles import Call, Global, InertDict, Size, attributes
from .torchzip import NewTensor, TensorRef

_NAMESPACES = {
    argparse.Namespace: Global("argparse", "Namespace"),
    SimpleNamespace: Global("types", "SimpleNamespace"),
}
#: The old name of numpy's module, which old and new releases both know.
_ARRAY = Global("numpy.core.multiarray", "_reconstruct")
_DTYPE = Global("numpy", "dtype")
_NDARRAY = Global("numpy", "ndarray")
#: Bytes of a tensor beside the model's that are read into memory.
_LARGE = 1 << 30


def nodes(value: Any) -> Any:
    """The graph that is pickled for plain data."""
    if isinstance(value, TensorData):
        return NewTensor(value.dtype, value.shape, value.data)
    if isinstance(value, ElementType):
        return Global("torch", value.name)
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, OrderedDict):
        return OrderedDict((nodes(k), nodes(v)) for k, v in value.items())
    if isinstance(value, dict):
        return {nodes(k): nodes(v) for k, v in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(nodes, value))
    if type(value) in _NAMESPACES:
        return _NAMESPACES[type(value)].new(state={k: nodes(v) for k, v in vars(value).items()})
    return value


def _array(value: np.ndarray) -> Call:
    """As numpy pickles an array."""
    if value.dtype.kind not in "biufc":
        raise CheckpointError("an array that cannot be pickled", expected="numbers", found=str(value.dtype))
    small = value.astype(value.dtype.newbyteorder("<"), order="C")
    order = "|" if value.dtype.itemsize == 1 else "<"
    kind = _DTYPE.call(f"{value.dtype.kind}{value.dtype.itemsize}", False, True)
    kind.state = (3, order, None, None, None, -1, -1, 0)
    return _ARRAY.call(_NDARRAY, (0,), b"b", state=(1, value.shape, kind, False, small.tobytes()))


def plain(value: Any, where: Path) -> Any:
    """The plain data of a graph, the tensors in it read from the file. Raises CheckpointError."""
    if isinstance(value, TensorRef):
        return _read(value, where)
    if isinstance(value, NewTensor):
        return TensorData(value.dtype, value.shape, value.data)
    if isinstance(value, Size):
        return tuple(value)
    if isinstance(value, InertDict):
        made: dict[Any, Any] = OrderedDict() if value.func.name == "OrderedDict" else {}
        made |= {plain(k, where): plain(v, where) for k, v in value.items()}
        return made
    if isinstance(value, dict):
        return {plain(k, where): plain(v, where) for k, v in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(plain(inner, where) for inner in value)
    if isinstance(value, Global):
        return ElementType(value.name) if value.module == "torch" and value.name in ITEMSIZE else value
    if isinstance(value, Call):
        return _object(value, where)
    return value


def _object(value: Call, where: Path) -> Any:
    for kind, name in _NAMESPACES.items():
        if value.func is name:
            return kind(**{str(k): plain(v, where) for k, v in attributes(value).items()})
    if value.func.name == "_reconstruct" and isinstance(value.state, tuple) and len(value.state) == 5:
        return _stored_array(value, where)
    if value.func.name == "scalar" and value.func.module.startswith("numpy.") and len(value.args) == 2:
        return np.frombuffer(value.args[1], _element(value.args[0], where))[0].item()
    if value.func.name.endswith("Path") and all(isinstance(part, str) for part in value.args):
        return str(Path(*value.args))
    return value


def _element(node: Any, where: Path) -> np.dtype[Any]:
    """The element type of a pickled array."""
    if isinstance(node, Call) and node.func is _DTYPE and node.args and isinstance(node.args[0], str):
        name, state = node.args[0], node.state
        order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else ""
        if name[:1] in "biufc" and name[1:].isdigit() and int(name[1:]) <= 16:
            return np.dtype(order + name)
    raise CheckpointError("an array of an element type that is not known here", where=where, expected="numbers")


def _stored_array(value: Call, where: Path) -> np.ndarray:
    _, shape, kind, fortran, data = value.state
    try:
        flat = np.frombuffer(data, _element(kind, where))
        return flat.reshape(shape, order="F" if fortran else "C").copy()
    except (ValueError, TypeError) as error:
        raise CheckpointError("a pickled array is corrupt", where=where, found=error) from None


def _read(ref: TensorRef, where: Path) -> TensorData:
    if not ref.is_contiguous or ref.nbytes > _LARGE:
        raise CheckpointError(
            "a tensor beside the model's that cannot be read", where=where, expected=f"at most {_LARGE} bytes in a row",
            found=f"{ref.dtype} {ref.shape}", hint="save it again in rows",
        )  # fmt: skip
    with where.open("rb") as file:
        return TensorData(ref.dtype, ref.shape, os.pread(file.fileno(), ref.nbytes, ref.offset))
