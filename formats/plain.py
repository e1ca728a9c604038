"""Plain data as nodes of a pickle and back: namespaces, arrays and small tensors, whoever wrote them.

Reading is closed as everywhere here: what is not plain data stays the inert node that it is.
"""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from registry.dtypes import ITEMSIZE
from registry.errors import CheckpointError
from registry.plain import ElementType, TensorData
from registry.reading import read_all, reading

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


class Tensors:
    """Tensors of a file, read into memory: each stretch once, and all together no more than twice the file, however
    many a hostile pickle makes of it."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self._left: int | None = None  # until the first is read: state that a run holds in memory is in no file yet
        self._known: dict[TensorRef, bytes] = {}

    def read(self, ref: TensorRef) -> bytes:
        """The bytes of a tensor whose elements lie in a row. Raises CheckpointError."""
        if ref not in self._known:
            left = 2 * self.where.stat().st_size if self._left is None else self._left
            self._left = left - ref.nbytes
            if self._left < 0:
                raise CheckpointError(
                    "tensors of more than the file holds", where=self.where, expected="each part of the file once",
                    found=f"{ref.dtype} {ref.shape} and others",
                )  # fmt: skip
            with reading(self.where) as file:
                self._known[ref] = read_all(file, ref.offset, ref.offset + ref.nbytes)
        return self._known[ref]


def plain(value: Any, where: Path) -> Any:
    """The plain data of a graph, the tensors in it read from the file. Raises CheckpointError."""
    try:
        return _plain(value, Tensors(where))
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise CheckpointError(
            "pickled state is corrupt", where=where, expected="plain data and arrays", found=str(error)[:200]
        ) from None


def _plain(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, TensorRef):
        return _read(value, tensors)
    if isinstance(value, NewTensor):
        return TensorData(value.dtype, value.shape, value.data)
    if isinstance(value, Size):
        return tuple(value)
    if isinstance(value, InertDict):
        made: dict[Any, Any] = OrderedDict() if value.func.name == "OrderedDict" else {}
        made |= {_plain(k, tensors): _plain(v, tensors) for k, v in value.items()}
        return made
    if isinstance(value, dict):
        return {_plain(k, tensors): _plain(v, tensors) for k, v in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_plain(inner, tensors) for inner in value)
    if isinstance(value, Global):
        return ElementType(value.name) if value.module == "torch" and value.name in ITEMSIZE else value
    if isinstance(value, Call):
        return _object(value, tensors)
    return value


def _object(value: Call, tensors: Tensors) -> Any:
    for kind, name in _NAMESPACES.items():
        if value.func is name:
            return kind(**{str(k): _plain(v, tensors) for k, v in attributes(value).items()})
    if value.func.name == "_reconstruct" and isinstance(value.state, tuple) and len(value.state) == 5:
        return _stored_array(value, tensors.where)
    if value.func.name == "scalar" and value.func.module.startswith("numpy.") and len(value.args) == 2:
        return np.frombuffer(value.args[1], _element(value.args[0], tensors.where))[0].item()
    if value.func.name.endswith("Path") and all(isinstance(part, str) for part in value.args):
        return str(Path(*value.args))
    return value


def _element(node: Any, where: Path) -> np.dtype[Any]:
    """The element type of a pickled array."""
    if isinstance(node, Call) and node.func is _DTYPE and node.args and isinstance(node.args[0], str):
        name, state = node.args[0], node.state
        order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else ""
        if re.fullmatch("[biufc][0-9]{1,2}", name):
            return np.dtype(order + name)
    raise CheckpointError("an array of an element type that is not known here", where=where, expected="numbers")


def _stored_array(value: Call, where: Path) -> np.ndarray:
    _, shape, kind, fortran, data = value.state
    try:
        flat = np.frombuffer(data, _element(kind, where))
        return flat.reshape(shape, order="F" if fortran else "C").copy()
    except (ValueError, TypeError) as error:
        raise CheckpointError("a pickled array is corrupt", where=where, found=error) from None


def _read(ref: TensorRef, tensors: Tensors) -> TensorData:
    if not ref.is_contiguous or ref.nbytes > _LARGE:
        raise CheckpointError(
            "a tensor beside the model's that cannot be read", where=tensors.where,
            expected=f"at most {_LARGE} bytes in a row", found=f"{ref.dtype} {ref.shape}", hint="save it again in rows",
        )  # fmt: skip
    return TensorData(ref.dtype, ref.shape, tensors.read(ref))
