"""Damage to real files: to their bytes, and to what the bytes mean."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from formats import pickles

NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    63,
    64,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
]
TEXTS = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "x" * 5000,
    "\u00e9",
    "0",
    "-1",
    "1e999",
    "NaN",
    "{",
    "%s",
    "\ud800",
]


def mutate(data: bytes, kind: str, rng: random.Random) -> bytes:
    """`data` with some damage. Never raises: what cannot be taken apart is damaged as bytes."""
    structured = _STRUCTURED.get(kind)
    if structured is not None and rng.random() < 0.7:
        try:
            data = structured(data, rng)
        except Exception:
            data = _bytes(data, rng)
        return _bytes(data, rng) if rng.random() < 0.1 else data
    return _bytes(data, rng)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(9):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            case 2:
                del out[at : at + rng.choice([1, 2, 8, 100, 10_000])]
            case 3:
                out[at:at] = rng.randbytes(rng.choice([1, 2, 8]))
            case 4:
                size = rng.choice([1, 8, 64])
                other = rng.randrange(len(out) + 1)
                out[at : at + size] = out[other : other + size]
            case 5:
                del out[at:]
            case 6:
                width, number = rng.choice([1, 2, 4, 8]), rng.choice(NUMBERS)
                out[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
            case 7:
                stretch = out[at : at + rng.choice([1, 4, 32, 256])]
                out[at:at] = stretch * rng.choice([1, 2, 30])
            case _:
                out[at : at + 1] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(out[: 4 << 20])


def scalar(rng: random.Random) -> Any:
    """A value that is seldom where it is expected."""
    return rng.choice(
        [rng.choice(NUMBERS), rng.choice(TEXTS), None, True, False, 0.5, -1.5, 1e308, [], {}, [[]], [1, 2], {"a": 1}]
    )


# JSON.


def _json(data: bytes, rng: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        value = _json_node(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.1:
        old, new = rng.choice(
            [("1", "NaN"), ("0", "1e999"), ("{", '{"a": 1, "a": 2, '), ('"', '"\\ud800'), ("1", "9" * 5000),
             ("null", "[" * 2000 + "]" * 2000), (":", ": Infinity, "), ("true", "-0"), ('"', "\u00ff")]
        )  # fmt: skip
        text = text.replace(old, new, rng.choice([1, 1, -1]))
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(inner, dict | list):
            _places(inner, found)
    return found


def _json_node(value: Any, rng: random.Random) -> Any:
    places = _places(value, []) if isinstance(value, dict | list) else []
    if not places or rng.random() < 0.02:
        return scalar(rng)
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1:
            other, there = rng.choice(places)
            holder[key] = copy.deepcopy(other[there]) if there in other or isinstance(other, list) else None
        case 2 if isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = scalar(rng)
        case 3 if isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice([-1, 1, 2, -holder[key] * 2, 2**40])
        case 4 if isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice([0, 2, 1000])
        case _:
            holder[key] = scalar(rng)
    return value


# Pickles.


def _graph_places(value: Any, found: list[Callable[[Any], None]], values: list[Any], seen: set[int]) -> None:
    """How to put another value in the place of each value of a graph."""
    if id(value) in seen:
        return
    seen.add(id(value))

    def place(put: Callable[[Any], None], inner: Any) -> None:
        found.append(put)
        values.append(inner)
        _graph_places(inner, found, values, seen)

    if isinstance(value, dict):
        for key in list(value):
            place(lambda new, key=key: value.__setitem__(key, new), value[key])  # type: ignore[misc]
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            place(lambda new, i=i: value.__setitem__(i, new), inner)  # type: ignore[misc]
    if isinstance(value, pickles.Call | pickles.InertDict):
        place(lambda new: setattr(value, "state", new), value.state)
        place(lambda new: setattr(value, "args", new if isinstance(new, tuple) else (new,)), value.args)
        for i, inner in enumerate(value.args):
            place(lambda new, i=i: setattr(value, "args", (*value.args[:i], new, *value.args[i + 1 :])), inner)  # type: ignore[misc]
        if isinstance(value.state, tuple):
            for i, inner in enumerate(value.state):
                place(
                    lambda new, i=i: setattr(value, "state", (*value.state[:i], new, *value.state[i + 1 :])),  # type: ignore[misc]
                    inner,
                )


def _thing(rng: random.Random, values: list[Any]) -> Any:
    names = [
        ("torch", "float32"),
        ("torch", "Size"),
        ("argparse", "Namespace"),
        ("numpy", "dtype"),
        ("torch", "device"),
    ]
    match rng.randrange(9):
        case 0:
            return rng.choice(values) if values else None
        case 1:
            return pickles.Global(*rng.choice(names))
        case 2:
            return pickles.Global(*rng.choice(names)).call(scalar(rng), state=scalar(rng))
        case 3:
            return pickles.Size([rng.choice([0, 1, 64, 2**40, 2**62, 2**63 - 1]) for _ in range(rng.randrange(4))])
        case 4:
            return tuple(scalar(rng) for _ in range(rng.randrange(4)))
        case 5:
            return {rng.choice([0, 1, "a", "optimizer", "state", "param_groups", (1,)]): scalar(rng)}
        case 6:
            return b"x" * rng.choice([0, 3, 300])
        case _:
            return scalar(rng)


def change_graph(graph: Any, rng: random.Random) -> Any:
    """A graph of nodes with some values in it changed, dropped or exchanged."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        places: list[Callable[[Any], None]] = []
        values: list[Any] = []
        _graph_places(graph, places, values, set())
        if not places:
            return _thing(rng, [])
        if rng.random() < 0.25 and (dicts := [v for v in [graph, *values] if isinstance(v, dict) and v]):
            chosen = rng.choice(dicts)
            chosen.pop(rng.choice(list(chosen)))
            continue
        rng.choice(places)(_thing(rng, values))
    return graph


def _pickle(data: bytes, rng: random.Random) -> bytes:
    graph = pickles.loads(data, where="seed", persistent=pickles.Persistent)
    return pickles.dumps(change_graph(graph, rng), protocol=rng.choice([2, 4]))


# Archives.


def _zip(data: bytes, rng: random.Random) -> bytes:
    """A torch.save archive: its pickle, its members or its directory changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    what = rng.randrange(8)
    i = rng.randrange(len(members))
    name, content = members[i]
    if what < 5:
        i = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
        name, content = members[i]
        content = _pickle(content, rng) if rng.random() < 0.85 else _bytes(content, rng)
        members[i] = (name, content)
    elif what == 5:
        members.insert(i, (rng.choice([name, "x", "../x", "/etc/x", "archive/data/../../y", name + "0"]), content))
    elif what == 6:
        members[i] = (name, content[: rng.randrange(len(content) + 1)])
    else:
        del members[i]
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


# Safetensors.


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    (size,) = struct.unpack_from("<Q", data)
    head = _json(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


# Text of a grammar.

_GRAMMAR = ("*a", "&a", "!!python/name:os.system", "(", ")", "[", "**", "<<: *a")


def _text(data: bytes, rng: random.Random) -> bytes:
    text = data.decode()
    for _ in range(rng.choice([1, 2, 4])):
        words = text.split(rng.choice([" ", "\n"]))
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        match rng.randrange(4):
            case 0:
                words[i], words[j] = words[j], words[i]
            case 1:
                words[i] = rng.choice(
                    ["", *TEXTS, "*a", "&a", "!!python/name:os.system", "(", ")", "[", "**", "<<: *a"]
                )
            case 2:
                words[i:i] = words[j : j + rng.randrange(5)]
            case _:
                del words[i]
        text = rng.choice([" ", "\n"] if rng.random() < 0.02 else [" "]).join(words) if words else ""
    return text.encode("utf-8", "surrogatepass")


_STRUCTURED = {"json": _json, "pickle": _pickle, "zip": _zip, "safetensors": _safetensors, "text": _text}
