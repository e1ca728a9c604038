"""A closed pickle codec: `loads` runs no code, `dumps` writes the same graph back.

Checkpoints are untrusted input. A pickle may name only the globals allowed here, and those become inert nodes
(`pickle_nodes`): nothing is imported and nothing real is called, so an allowed name is harmless whatever it
stands for in its own program. The list is closed all the same, because a file that names `os.system` is not a
checkpoint, and the user should hear of it. There is no flag that falls back to real unpickling.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

from registry.collector import no_collection
from registry.errors import CheckpointError, RegistryError, UnsafePickleError

from .pickle_nodes import Builder, Call, Global, InertDict, Persistent, Size, attr, attributes, brief
from .pickle_scan import check_opcodes
from .pickle_tree import check_tree
from .pickle_tuples import check_tuples
from .pickle_write import dumps

__all__ = [
    "Call",
    "Global",
    "InertDict",
    "Persistent",
    "Size",
    "attr",
    "attributes",
    "brief",
    "check_start",
    "check_tree",
    "dumps",
    "is_allowed",
    "loads",
]

_NAMES = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "collections": "OrderedDict defaultdict deque Counter",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "signal": "Signals Handlers Sigmasks",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID SafeUUID",
    "_codecs": "encode",
    "copyreg": "_reconstructor",
    "builtins": "object type bool int float complex str bytes bytearray list tuple dict set frozenset slice range",
    "io": "BytesIO",
    "_io": "BytesIO",
    "numpy": "ndarray dtype",
    "numpy.random._pickle": "__generator_ctor __bit_generator_ctor __randomstate_ctor",
    "torch": "Size device Tensor Generator layout memory_format strided sparse_coo Stream "
    "per_tensor_affine per_tensor_symmetric per_channel_affine per_channel_symmetric per_channel_affine_float_qparams",
    "torch.nn.parameter": "Parameter Buffer",
    "torch.serialization": "_get_layout",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch.storage": "TypedStorage UntypedStorage _TypedStorage _UntypedStorage _load_from_bytes",
    "torch.torch_version": "TorchVersion",
}
_EXACT = {(module, name) for module, names in _NAMES.items() for name in names.split()}

_PATTERNS = re.compile(
    r"""
      torch\.(u?int\d+|float\d\w*|bfloat16|complex\d+|bool|half|float|double|q\w*int\w+|bits\w+)
    | torch(\.cuda)?\.\w+Storage
    | torch\._utils\._rebuild_\w+
    | torch\.distributed\.(checkpoint|_shard|tensor|_tensor|device_mesh)\..+
    | numpy\.(_?core)\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)
    | numpy\.(dtypes|random)\.\w+
    | signal\.SIG[A-Z]\w+
    | (megatron|transformer_engine|transformer_engine_torch)\..+
    """,
    re.VERBOSE,
)


def is_allowed(module: str, name: str) -> bool:
    """True if a pickle may name this global."""
    if not all(part.isidentifier() for part in f"{module}.{name}".split(".")):
        return False
    return (module, name) in _EXACT or _PATTERNS.fullmatch(f"{module}.{name}") is not None


def check_start(head: bytes, where: str) -> None:
    """Raises CheckpointError unless a pickle of the protocols that are read, 2 to 5, can begin with `head`."""
    if not re.match(b"\x80[\x02-\x05]", head):
        raise CheckpointError("not a pickle", where=where, expected="protocol 2 or later", found=repr(head[:2]))


def loads(
    data: bytes,
    *,
    where: str,
    persistent: Callable[[Any], object] | None = None,
    build: Mapping[tuple[str, str], Callable[..., object]] | None = None,
) -> Any:
    """The object graph of a pickle, as plain data and inert nodes. `where` names the file in errors.

    `persistent` turns a persistent id into what stands for it (`Persistent` keeps it as it is); without it such an id
    is an error. `build` gives functions that make values of one's own for calls of the named globals; they must be
    safe on any arguments.
    """
    if check_opcodes(data, where):
        check_tuples(data, where)
    unpickler = _Unpickler(data, where, persistent, build or {})
    try:
        with no_collection():
            return unpickler.load()
    except RegistryError:
        raise
    except Exception as error:
        raise CheckpointError(
            "a pickle is corrupt", where=where, expected="a whole pickle", found=f"{type(error).__name__}: {error}"
        ) from error


class _Unpickler(pickle.Unpickler):
    """The C unpickler with its doors shut: each name becomes a stand-in of ours, or an error."""

    def __init__(
        self,
        data: bytes,
        where: str,
        persistent: Callable[[Any], object] | None,
        build: Mapping[tuple[str, str], Callable[..., object]],
    ) -> None:
        # Buffered, because the C unpickler reads ahead only where there is a `peek`.
        super().__init__(io.BufferedReader(io.BytesIO(data)))
        self._where = where
        self._persistent = persistent
        self._build = build
        self._left = len(data)

    def _charged(self, builder: Builder) -> Builder:
        """The builder, made to fail once it has copied more than the pickle holds: a call takes a few bytes, and what
        it copies may be the same million, time and again."""

        def make(*args: Any) -> object:
            made = builder.make(*args)
            self._left -= len(made)
            if self._left < 0:
                raise ValueError("copies of more than the pickle holds")
            return made

        return Builder(builder.module, builder.name, make)

    def find_class(self, module: str, name: str) -> Any:
        module = _PYTHON2.get(module, module)
        if (module, name) == ("builtins", "xrange"):
            name = "range"
        if (module, name) in self._build:
            return Builder(module, name, self._build[module, name])
        if (module, name) in _PLAIN:
            found = _PLAIN[module, name]
            return self._charged(found) if name in _COPIES else found
        if (module, name) == ("builtins", "getattr"):
            return Builder(module, name, self._member)
        if not is_allowed(module, name):
            raise self._unsafe(module, name)
        return Global(module, name)

    def _member(self, *args: Any) -> Call:
        """A member of an enum, as Python 3.11.0 to 3.11.3 spell it: by its name. Nothing else is looked up."""
        plain = len(args) == 2 and isinstance(args[0], Global) and type(args[1]) is str
        if not plain or not args[1].isidentifier() or args[1].startswith("__"):
            raise self._unsafe("builtins", "getattr")
        return Global("builtins", "getattr").call(*args)

    def _unsafe(self, module: str, name: str) -> UnsafePickleError:
        return UnsafePickleError(
            f"a pickle names a global that is not allowed: {module}.{name}",
            where=self._where,
            expected="tensors and plain data",
            found=f"{module}.{name}",
            hint="do not load this file with pickle or torch.load unless you trust who wrote it; "
            "a checkpoint needs no such object: save it again without it",
        )

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            problem = "a pickle refers to a storage, but this file has none"
            raise CheckpointError(problem, where=self._where, found=brief(pid))
        return self._persistent(pid)


# Python 3 writes these names, for Python 2's sake, at protocol 2 and below.
_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _collection(kind: type) -> Callable[..., object]:
    """`set` or `frozenset` of a list; of nothing else, since a range could be endless."""

    def make(items: list[Any] | tuple[Any, ...] = ()) -> object:
        if type(items) not in (list, tuple):
            raise TypeError(f"{kind.__name__} of {type(items).__name__}")
        return kind(items)

    return make


def _latin1(text: str = "", encoding: str = "latin1") -> bytes:
    """Bytes, as protocol 2 spells them: text whose characters are the bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise TypeError(f"bytes from {type(text).__name__} as {encoding!r}")
    return text.encode("latin1")


def _bytearray(value: str | bytes = b"", encoding: str = "latin1") -> bytearray:
    return bytearray(value if type(value) is bytes else _latin1(value, encoding))  # type: ignore[arg-type]


def _bytes() -> bytes:
    """Only the empty one is written as a call; `bytes(10**15)` would be memory."""
    return b""


def _complex(real: float, imag: float) -> complex:
    return complex(float(real), float(imag))


def _inert_dict(func: Global) -> Callable[..., object]:
    def make(*args: Any) -> InertDict:
        made = InertDict(func, args)
        if func.name == "OrderedDict" and args:  # the old spelling: a list of pairs
            made.args = ()
            made.update(*args)
        return made

    return make


_PLAIN: dict[tuple[str, str], Any] = {
    (module, name): Builder(module, name, make)
    for module, name, make in (
        ("builtins", "set", _collection(set)),
        ("builtins", "frozenset", _collection(frozenset)),
        ("builtins", "bytearray", _bytearray),
        ("builtins", "bytes", _bytes),
        ("builtins", "complex", _complex),
        ("_codecs", "encode", _latin1),
        ("collections", "OrderedDict", _inert_dict(Global("collections", "OrderedDict"))),
        ("collections", "defaultdict", _inert_dict(Global("collections", "defaultdict"))),
    )
}
_PLAIN["torch", "Size"] = Size
_COPIES = ("set", "frozenset", "bytearray", "encode", "OrderedDict")
