"""Inert stand-ins for what a pickle names: data that looks like the object, and runs nothing.

A pickle is a program that calls importable things. Here a thing it names is a `Global`, and calling it gives a `Call`:
a record of the callee, the arguments and the state. Nothing is imported and nothing real is called, and the record can
be written back as the same pickle.

`Global` is a metaclass because the C unpickler wants a class for NEWOBJ; so a `Call` is an instance of its callee, and
`type(node)` is the callee. That costs no more than a normal object, which 100,000 checkpoint entries need.
"""

from __future__ import annotations

import copyreg
import threading
import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, NoReturn

from registry.errors import CheckpointError

_LOCK = threading.RLock()
_INTERNED: weakref.WeakValueDictionary[tuple[str, str], Global] = weakref.WeakValueDictionary()

#: Classes whose equality looks at some attributes only (the `index` of a MetadataIndex is a hint).
_IDENTITY = {("torch.distributed.checkpoint.metadata", "MetadataIndex"): ("fqn", "offset")}

#: Classes whose state is a bare tuple (their own `__getstate__`), with the attributes it holds, in order.
_TUPLE_STATE = {
    "TensorProperties": ("dtype", "layout", "requires_grad", "memory_format", "pin_memory"),
    "BytesIO": ("value", "position", "attributes"),
}

#: Dimensions that torch's tensors can have.
MAX_DIMS = 64


class _Inert(type):
    """Metaclass of the stand-in classes: a BUILD opcode must not change a class, which every later load would see."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"{cls.__name__} is a stand-in and cannot be changed")

    def __setstate__(cls, state: object) -> NoReturn:
        raise TypeError(f"{cls.__name__} is a stand-in and cannot be given a state")


def _flat(value: Any) -> Any:
    """The value, where its hash is soon found. Raises TypeError."""
    if value is None or type(value) in _SCALARS:
        return value
    inner = value if isinstance(value, tuple | frozenset) else (value,)
    if len(inner) > MAX_DIMS or any(isinstance(one, tuple | frozenset | Call) for one in inner):
        raise TypeError("a key that is more than scalars")
    return value


class Call(metaclass=_Inert):
    """An object as its pickle made it: `func(*args)` (or `func.__new__`), then appended items, set pairs and a state.

    Built by `Global.call` and `Global.new`. Equal by value; hashable, so that it can be a dict key.
    """

    __slots__ = ("args", "is_new", "items", "pairs", "state")
    _key: tuple[str, ...] | None = None
    args: tuple[Any, ...]
    state: Any
    is_new: bool
    items: list[Any] | None
    pairs: list[tuple[Any, Any]] | None

    def __new__(cls, *args: Any) -> Call:
        self = object.__new__(cls)
        self.args = args
        self.state = None
        self.is_new = True
        self.items = None
        self.pairs = None
        return self

    @property
    def func(self) -> Global:
        """What was called."""
        func: Any = type(self)
        assert type(func) is Global
        return func

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """What APPEND does to a list-like object."""
        self.extend((item,))

    def extend(self, items: Iterable[Any]) -> None:
        """What APPENDS does to a list-like object."""
        if self.items is None:
            self.items = []
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.pairs is None:
            self.pairs = []
        self.pairs.append((key, value))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, Call):
            return NotImplemented
        if self._key and isinstance(self.state, dict) and isinstance(other.state, dict):
            return all(self.state.get(name) == other.state.get(name) for name in self._key)
        return (self.args, self.state, self.items, self.pairs) == (other.args, other.state, other.items, other.pairs)

    def __hash__(self) -> int:
        """Raises TypeError where more than scalars is inside: hash and comparison of a graph could take for ever."""
        state = self.state
        if isinstance(state, dict):
            if self._key:
                return hash(tuple([_flat(state.get(name)) for name in self._key]))
            state = frozenset([(key, _flat(value)) for key, value in state.items()])
        else:
            state = _flat(state)
        return hash((type(self), *map(_flat, self.args), state))

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__}({', '.join(map(brief, self.args[:8]))})>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), self.args, self.is_new, self.items, self.pairs), self.state


def _remake(
    func: Global, args: tuple[Any, ...], is_new: bool, items: list[Any] | None, pairs: list[tuple[Any, Any]] | None
) -> Call:
    node = func.new(*args) if is_new else func.call(*args)
    node.items, node.pairs = items, pairs
    return node


class Global(_Inert):
    """The inert name of an importable thing: `Global("torch", "bfloat16")`. One object a name, so `is` compares."""

    def __new__(mcls, module: str, name: str) -> Global:
        with _LOCK:
            found = _INTERNED.get((module, name))
            if found is None:
                body: dict[str, Any] = {"__module__": module, "__qualname__": name, "__slots__": ()}
                body["_key"] = _IDENTITY.get((module, name))
                found = super().__new__(mcls, name, (Call,), body)
                _INTERNED[module, name] = found
            return found

    def __init__(cls, module: str, name: str) -> None:
        """Nothing more: `type.__init__` would refuse the arguments."""

    @property
    def module(cls) -> str:
        """The module that the thing is in."""
        return cls.__module__

    @property
    def name(cls) -> str:
        """Its name there; dotted if it is nested in a class."""
        return cls.__qualname__

    def __call__(cls, *args: Any) -> Call:
        """What REDUCE does."""
        node = cls.new(*args)
        node.is_new = False
        return node

    def call(cls, *args: Any, state: Any = None) -> Call:
        """The node of `thing(*args)`: functions, enum members, devices."""
        node = cls(*args)
        node.state = state
        return node

    def new(cls, *args: Any, state: Any = None) -> Call:
        """The node of an instance made without its `__init__`: most objects; `state` is its attributes."""
        made: Any = Call.__new__
        node: Call = made(cls, *args)
        node.state = state
        return node

    def __repr__(cls) -> str:
        return f"<global {cls.module}.{cls.name}>"


# A helper process may be handed nodes by ordinary pickling: a Global then travels as its two names.
copyreg.pickle(Global, lambda cls: (Global, (cls.module, cls.name)))


class Size(tuple[int, ...], metaclass=_Inert):
    """A `torch.Size`: a tuple that is written back as one. Raises TypeError for what is no size of a tensor."""

    __slots__ = ()

    def __new__(cls, sizes: Iterable[int] = ()) -> Size:
        made = super().__new__(cls, islice(sizes, MAX_DIMS + 1))
        if len(made) > MAX_DIMS or set(map(type, made)) - {int}:
            raise TypeError(f"no sizes of a tensor: {brief(sizes)}")
        return made

    def __repr__(self) -> str:
        return f"Size({list(self)})"


#: Types of values that are hashed at once.
_SCALARS = frozenset({str, int, bool, float, bytes, Size})


class Kind:
    """What records have in common: the class and the names of their attributes, in order; fewer than 1000."""

    __slots__ = ("func", "names")

    def __init__(self, func: Global, *names: str) -> None:
        self.func = func
        self.names = names


class Record(NamedTuple):
    """`kind.func.new(state=dict(zip(kind.names, values)))`, to be written one time wherever it stands.

    For what is made by the hundred thousand: a fifth of the work.
    """

    kind: Kind
    values: tuple[Any, ...]


class InertDict(dict[Any, Any]):
    """A dict of another class (OrderedDict, defaultdict): `func(*args)` made it, and it may have a `state`."""

    __slots__ = ("args", "func", "state")

    def __init__(self, func: Global, args: tuple[Any, ...] = (), state: Any = None, /) -> None:
        self.func = func
        self.args = args
        self.state = state

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.func.module}.{self.func.name} of {len(self)} items>"

    def __reduce__(self) -> tuple[Any, ...]:
        return InertDict, (self.func, self.args), self.state, None, iter(self.items())


class Persistent:
    """A persistent id, standing for what lies outside the pickle (torch.save: a storage)."""

    __slots__ = ("pid",)

    def __init__(self, pid: Any) -> None:
        self.pid = pid

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Persistent) and self.pid == other.pid

    def __hash__(self) -> int:
        return hash(self.pid)

    def __repr__(self) -> str:
        parts = self.pid if isinstance(self.pid, tuple) else (self.pid,)
        return f"Persistent({', '.join(map(brief, parts[:8]))})"

    def __setstate__(self, state: object) -> NoReturn:
        raise TypeError("a persistent id has no state")

    def __reduce__(self) -> tuple[Any, ...]:
        return Persistent, (self.pid,)


class Builder:
    """A global that makes plain data when called, such as `builtins.set`; `make` must be safe on any arguments."""

    __slots__ = ("make", "module", "name")

    def __init__(self, module: str, name: str, make: Any) -> None:
        self.module = module
        self.name = name
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: object) -> NoReturn:
        raise TypeError(f"{self.name} has no state")


_MISSING = object()


def brief(value: object) -> str:
    """A value for an error's text. Not its repr: that of a small hostile graph can be larger than memory."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float | Global):
        return repr(value)
    if isinstance(value, str | bytes):
        return repr(value[:80])
    if isinstance(value, tuple | list) and len(value) <= 16 and all(type(item) is int for item in value):
        return f"({', '.join(map(brief, value))})"
    return f"a {type(value).__name__}"


def attributes(node: object) -> dict[str, Any]:
    """The attributes of an object node, such as the arguments in an `argparse.Namespace`."""
    return {name: value for name, value in _attributes(node) if isinstance(name, str)}


def _attributes(node: object) -> Iterator[tuple[str, Any]]:
    state = getattr(node, "state", None)
    if isinstance(state, dict):
        yield from state.items()
    elif isinstance(state, tuple) and isinstance(node, Call) and node.func.name in _TUPLE_STATE:
        yield from zip(_TUPLE_STATE[node.func.name], state, strict=False)
    elif isinstance(state, tuple):  # (dict or None, slots)
        for part in state:
            if isinstance(part, dict):
                yield from part.items()


def attr(node: object, name: str, default: Any = _MISSING) -> Any:
    """One attribute of an object node. Without a `default` it must be there."""
    state = getattr(node, "state", None)
    found = state.get(name, default) if isinstance(state, dict) else attributes(node).get(name, default)
    if found is _MISSING:
        what = f"{type(node).__module__}.{type(node).__qualname__}"
        names = list(attributes(node))
        raise CheckpointError("a pickled object lacks an attribute", where=what, expected=name, found=names)
    return found
