"""Writes plain data and inert nodes as a pickle.

The standard pickler cannot: it looks every global up by importing it, and ours name things that need not be installed.
The opcodes and their order are the standard pickler's, down to the memo, so that a tensor's `data.pkl` comes out byte
for byte as torch writes it.
"""

from __future__ import annotations

import gc
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from registry.errors import CheckpointError

from .pickle_nodes import Builder, Call, Global, InertDict, Kind, Persistent, Record, Size, brief

_BATCH = 1000  # items an APPENDS or SETITEMS takes, as in the standard pickler
_INT4 = struct.Struct("<i")
_UINT4 = struct.Struct("<I")
_JINT4 = struct.Struct("<Bi")
_PUTS4 = struct.Struct("<I2sI")
_FLOAT = struct.Struct(">d")
_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
_ENCODE = Global("_codecs", "encode")
_ORDERED = Global("collections", "OrderedDict")


def dumps(obj: object, *, protocol: int = 2, replace: Callable[[Any], object] | None = None) -> bytes:
    """The pickle of a graph of plain data and inert nodes; torch.save's protocol is 2, and 3 and 4 are also written.

    `replace` is asked for every object of another type and gives the node to write in its place; an object that occurs
    several times is replaced once, and its node is shared.
    """
    if protocol not in (2, 3, 4):
        raise CheckpointError("a pickle protocol that is not written here", expected="2, 3 or 4", found=protocol)
    writer = _Writer(protocol, replace)
    writer.out += b"\x80" + bytes([protocol])
    collecting = gc.isenabled()  # as in loads: nothing here becomes garbage, and looking for it takes half of the time
    gc.disable()
    try:
        writer.save(obj)
    except RecursionError as error:
        raise CheckpointError("an object is nested too deeply to be pickled", found=type(obj).__name__) from error
    finally:
        if collecting:
            gc.enable()
    writer.out += b"."
    return bytes(writer.out)


class _Writer:
    def __init__(self, protocol: int, replace: Callable[[Any], object] | None) -> None:
        self.out = bytearray()
        self._replace = replace
        self._protocol = protocol
        self._count = 0
        # What is in the memo, with the opcode that fetches it: by identity, and strings, sizes and globals by value.
        self._memo: dict[int, bytes] = {}
        self._values: dict[object, bytes] = {}
        self._alive: list[object] = []  # ids stay unique only while their objects live
        # What is written of each record of a kind: up to the memo, before each value, and at the end.
        self._rendered: dict[Kind, tuple[bytes, list[bytes], bytes]] = {}
        self._table: dict[type, Callable[[Any], None]] = {
            type(None): lambda _: self.out.extend(b"N"),
            bool: lambda value: self.out.extend(b"\x88" if value else b"\x89"),
            int: self._int,
            float: lambda value: self.out.extend(b"G" + _FLOAT.pack(value)),
            complex: lambda value: self._reduce(value, Global("builtins", "complex"), (value.real, value.imag)),
            str: self._str,
            bytes: self._bytes,
            bytearray: self._bytearray,
            tuple: self._tuple,
            list: self._list,
            dict: self._dict,
            set: lambda value: self._reduce(value, Global("builtins", "set"), (list(value),)),
            frozenset: lambda value: self._reduce(value, Global("builtins", "frozenset"), (list(value),)),
            Size: self._size,
            InertDict: self._inert_dict,
            OrderedDict: self._ordered_dict,
            Persistent: self._persistent,
            Global: lambda value: self._global(value.module, value.name, value),
            Builder: lambda value: self._global(value.module, value.name, value),
        }

    def save(self, obj: Any) -> None:
        kind = type(obj)
        if kind is Record:
            self._record(obj)
            return
        # Called millions of times for a large checkpoint's metadata, mostly for known strings: hence no calls here.
        known = self._values.get(obj) if kind is str else self._memo.get(id(obj))
        if known is not None:
            self.out += known
            return
        handler = self._table.get(kind)
        if handler is not None:
            handler(obj)
        elif type(kind) is Global:
            self._call(obj)
        elif obj is Size:
            self._global("torch", "Size", obj)
        else:
            self._other(obj)

    def _other(self, obj: Any) -> None:
        node = self._replace(obj) if self._replace else obj
        if node is obj or node is None:
            raise CheckpointError(
                "an object that cannot be pickled",
                expected="plain data or inert nodes",
                found=brief(obj),
            )
        self.save(node)
        if id(node) in self._memo:
            self._memo[id(obj)] = self._memo[id(node)]
            self._alive.append(obj)

    # memo

    def _put(self, obj: object) -> None:
        self._memo[id(obj)] = self._put_next()
        self._alive.append(obj)

    def _put_next(self) -> bytes:
        """Writes the opcode that puts the top of the stack into the memo; gives the one that fetches it."""
        index = self._count
        self._count = index + 1
        if index < 256:
            self.out += b"\x94" if self._protocol >= 4 else b"q%c" % index
            return b"h%c" % index
        raw = _UINT4.pack(index)
        self.out += b"\x94" if self._protocol >= 4 else b"r" + raw
        return b"j" + raw

    # plain data

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K%c" % value
        elif 0 <= value < 65536:
            self.out += b"M" + value.to_bytes(2, "little")
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + _INT4.pack(value)
        else:
            raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            short = len(raw) < 256
            self.out += (b"\x8a%c" % len(raw) if short else b"\x8b" + _INT4.pack(len(raw))) + raw

    def _str(self, value: str) -> None:
        known = self._values.get(value)
        if known is not None:
            self.out += known
            return
        raw = value.encode("utf-8", "surrogatepass")
        short = self._protocol >= 4 and len(raw) < 256
        self.out += (b"\x8c%c" % len(raw) if short else b"X" + _UINT4.pack(len(raw))) + raw
        self._values[value] = self._put_next()

    def _bytes(self, value: bytes) -> None:
        if self._protocol >= 3:
            head = b"C%c" % len(value) if len(value) < 256 else b"B" + _UINT4.pack(len(value))
            self.out += head + value
            self._put(value)
        elif value:
            self._reduce(value, _ENCODE, (value.decode("latin1"), "latin1"))
        else:
            self._reduce(value, Global("builtins", "bytes"), ())

    def _bytearray(self, value: bytearray) -> None:
        self._reduce(value, Global("builtins", "bytearray"), (value.decode("latin1"), "latin-1") if value else ())

    def _tuple(self, value: tuple[Any, ...]) -> None:
        count = len(value)
        if not count:
            self.out += b")"
            return
        if count > 3:
            self.out += b"("
        for item in value:
            self.save(item)
        known = self._memo.get(id(value))
        if known is not None:  # the tuple holds itself, through a list: it has been written meanwhile
            self.out += b"1" if count > 3 else b"0" * count
            self.out += known
            return
        self.out += _TUPLES.get(count, b"t")
        self._put(value)

    def _size(self, value: Size) -> None:
        known = self._values.get(value)
        if known is not None:
            self.out += known
            return
        self.save(Size)
        if len(value) > 3:
            self.out += b"("
        for size in value:
            self._int(size)
        self.out += _TUPLES.get(len(value), b"t" if value else b")")
        self.out += b"\x85R"
        self._values[value] = self._put_next()

    def _list(self, value: list[Any]) -> None:
        self.out += b"]"
        self._put(value)
        self._appends(value)

    def _dict(self, value: dict[Any, Any]) -> None:
        self.out += b"}"
        self._put(value)
        self._setitems(value.items(), len(value))

    def _appends(self, items: list[Any]) -> None:
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            single = len(batch) == 1
            if not single:
                self.out += b"("
            for item in batch:
                self.save(item)
            self.out += b"a" if single else b"e"

    def _setitems(self, pairs: Iterable[tuple[Any, Any]], count: int) -> None:
        save, out, known_value = self.save, self.out, self._values.get
        left = 0
        for key, value in pairs:
            if not left:
                left = batch = min(count, _BATCH)
                count -= batch
                if batch > 1:
                    out += b"("
            if type(key) is str and (known := known_value(key)):
                out += known
            else:
                save(key)
            save(value)
            left -= 1
            if not left:
                out += b"u" if batch > 1 else b"s"

    # nodes

    def _global(self, module: str, name: str, obj: object) -> None:
        key = (Global, module, name)
        known = self._values.get(key)
        if known is not None:  # another spelling of the same name: a Builder, or Size
            self.out += known
            return
        if self._protocol >= 4:
            self._str(module)
            self._str(name)
            self.out += b"\x93"
        else:
            self.out += b"c%s\n%s\n" % (module.encode(), name.encode())
        self._put(obj)
        self._values[key] = self._memo[id(obj)]

    def _reduce(self, obj: object, func: object, args: tuple[Any, ...], opcode: bytes = b"R") -> None:
        self.save(func)
        if args:
            self._tuple(args)
            self.out += opcode
        else:
            self.out += b")" + opcode
        self._put(obj)

    def _call(self, node: Call) -> None:
        self._reduce(node, type(node), node.args, b"\x81" if node.is_new else b"R")
        if node.items:
            self._appends(node.items)
        if node.pairs:
            self._setitems(node.pairs, len(node.pairs))
        self._build(node.state)

    def _record(self, record: Record) -> None:
        kind, values = record
        rendered = self._rendered.get(kind)
        index = self._count
        if rendered is None or index < 256:
            self._call(kind.func.new(state=dict(zip(kind.names, values, strict=True))))
            if index >= 256:
                self._render(kind)
            return
        head, names, tail = rendered
        out, known_value = self.out, self._values.get
        self._count = index + 2
        out += head
        out += _PUTS4.pack(index, b"}r", index + 1) if self._protocol < 4 else b"\x94}\x94"
        for name, value in zip(names, values, strict=True):
            out += name
            what = type(value)
            if what is str or what is Size:
                known = known_value(value)
                if known is None:
                    self.save(value)
                else:
                    out += known
            elif what is int:
                if 65536 <= value < 2**31:
                    out += _JINT4.pack(74, value)
                else:
                    self._int(value)
            elif value is None:
                out += b"N"
            else:
                self.save(value)
        out += tail

    def _render(self, kind: Kind) -> None:
        """Keep what is the same in all further records of a kind: class, names and opcodes."""
        head = self._memo[id(kind.func)] + (b")\x81" if self._protocol >= 4 else b")\x81r")
        names = [self._values[name] for name in kind.names]
        if len(names) > 1:
            names[0] = b"(" + names[0]
        self._rendered[kind] = head, names, b"ub" if len(names) > 1 else b"sb" if names else b"b"

    def _inert_dict(self, node: InertDict) -> None:
        self._reduce(node, node.func, node.args)
        self._setitems(node.items(), len(node))
        self._build(node.state)

    def _ordered_dict(self, value: OrderedDict[Any, Any]) -> None:
        self._reduce(value, _ORDERED, ())
        self._setitems(value.items(), len(value))
        self._build(value.__dict__ or None)

    def _build(self, state: Any) -> None:
        if state is not None:
            self.save(state)
            self.out += b"b"

    def _persistent(self, node: Persistent) -> None:
        self.save(node.pid)
        self.out += b"Q"
