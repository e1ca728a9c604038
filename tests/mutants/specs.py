"""The damages that are done to a spec: each is the spec's data with one thing changed, and words for what it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

from attrs import evolve

from registry import catalog
from registry.layout import Axis, Layout, Node, Part, Product, parse

Data = dict[str, Any]
Step = str | int


@dataclass(frozen=True)
class Mutant:
    """One damaged spec. `pattern` is the rule that was changed, where one was.

    A `wide` change may show itself in models that have nothing to do with the rule, such as those that it was not for.
    """

    spec: tuple[str, str]  # kind and name
    kind: str
    where: str
    what: str
    data: Data = field(repr=False)
    pattern: str | None = None
    wide: bool = False

    def __str__(self) -> str:
        return f"{self.spec[1]} | {self.kind} | {self.where} | {self.what}"


def mutants(kind: str, name: str) -> Iterator[Mutant]:
    """Every damage of one built-in spec, of its own file only: what it extends has mutants of its own."""
    data = catalog._read_yaml(catalog._files(kind)[name])
    seen = set()
    for mutant in _all(kind, name, data):
        if str(mutant) not in seen and mutant.data != data:
            seen.add(str(mutant))
            yield mutant


def _all(kind: str, name: str, data: Data) -> Iterator[Mutant]:
    def made(what_kind: str, where: str, what: str, changed: Data, pattern: str = "", wide: bool = False) -> Mutant:
        return Mutant((kind, name), what_kind, where, what, changed, pattern or None, wide or not pattern)

    for pattern, index, rule in _rules(data):
        ones = _ones(kind, data, pattern)
        where = pattern if index is None else f"{pattern}.{index}"
        if isinstance(rule.get("layout"), str):
            before = parse(" ".join(rule["layout"].split()))
            for op, layout in _layouts(before):
                if _without(layout, ones) == _without(before, ones):
                    continue
                changed = _with(data, _place(pattern, index), {**rule, "layout": str(layout)})
                yield made(op, where, str(layout), changed, pattern)
        for op, key, value in _fields(rule):
            changed_rule = {k: v for k, v in rule.items() if k != key} | ({} if value is None else {key: value})
            changed = _with(data, _place(pattern, index), changed_rule)
            yield made(op, where, f"{key}: {value}", changed, pattern, key in _DECIDE)
        yield made("drop a rule", where, "dropped", _dropped(data, _place(pattern, index)), pattern, wide=True)
    yield from (made("exchange names", f"{a} <-> {b}", "exchanged", changed, a) for a, b, changed in _exchanged(data))
    for op, path, value in _elsewhere(data):
        where = ".".join(map(str, path))
        changed = _dropped(data, path) if value is _DROP else _with(data, path, value)
        yield made(op, where, "dropped" if value is _DROP else str(value), changed)


_DROP = object()
#: Which models a rule is for: a change shows itself in those that the rule was not for.
_DECIDE = ("when", "stage", "choice", "optional", "replica")


def _rules(data: Data) -> Iterator[tuple[str, int | None, Data]]:
    """(pattern, index in a list of rules, the rule as a mapping) of every rule that the file itself says."""
    for pattern, said in (data.get("tensors") or {}).items():
        for index, rule in enumerate(said) if isinstance(said, list) else [(None, said)]:
            if rule is not None:
                yield pattern, index, {"layout": rule} if isinstance(rule, str) else dict(rule)


def _ones(kind: str, data: Data, pattern: str) -> set[str]:
    """The axes that have one index in every model that a rule of a spec is for: they stand anywhere.

    Those of the specs that extend it too, but for what has the rule's name and is their own.
    """
    whole = catalog._load(kind, data["name"]).source()
    axes, facts = whole.get("axes") or {}, (whole.get("config") or {}).get("facts") or {}
    found = {axis for axis, size in axes.items() if size == "1"}
    alike = isinstance(facts.get("kv_heads"), dict) and facts["kv_heads"].get("read") == facts.get("heads")
    others = map(catalog._read_yaml, catalog._files(kind).values())
    heirs = any(pattern not in (heir.get("tensors") or {}) for heir in others if heir.get("extends") == data["name"])
    return found | ({"rep"} if alike and not heirs and axes.get("rep") == "heads // kv_heads" else set())


def _without(layout: Layout, axes: set[str]) -> list[str]:
    """The words of a layout less the names of some axes."""
    return [word for word in re.findall(r"[\w.@]+|[^\w\s]", str(layout)) if word not in axes]


def _place(pattern: str, index: int | None) -> tuple[Step, ...]:
    return ("tensors", pattern) if index is None else ("tensors", pattern, index)


def _with(data: Data, path: tuple[Step, ...], value: Any) -> Data:
    changed = copy.deepcopy(data)
    inner: Any = changed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = copy.deepcopy(value)
    return changed


def _dropped(data: Data, path: tuple[Step, ...]) -> Data:
    changed = copy.deepcopy(data)
    inner: Any = changed
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return changed


# Layouts


def _layouts(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """(kind, layout) of every change of one layout."""
    for i in range(len(layout.dims) - 1):
        dims = list(layout.dims)
        dims[i : i + 2] = reversed(dims[i : i + 2])
        yield "change an axis", Layout(tuple(dims), layout.label)
    for op, dims in _changed(layout.dims):
        yield op, Layout(dims, layout.label)


def _changed(nodes: tuple[Node, ...]) -> Iterator[tuple[str, tuple[Node, ...]]]:
    for i, node in enumerate(nodes):
        for op, changed in _node(node):
            yield op, (*nodes[:i], changed, *nodes[i + 1 :])


def _node(node: Node) -> Iterator[tuple[str, Node]]:
    if isinstance(node, Axis):
        if node.shard:
            yield "change the sharded axis", evolve(node, shard=None)
        return
    if node.cut:
        yield "change the sharded axis", evolve(node, cut=None)
    if isinstance(node, Product):
        for i in range(len(node.factors) - 1):
            factors = list(node.factors)
            factors[i : i + 2] = reversed(factors[i : i + 2])
            yield "change an axis", evolve(node, factors=tuple(factors))
        for op, factors in _resharded(node.factors):
            yield op, evolve(node, factors=factors)
        for op, inner in _changed(node.factors):
            yield op, evolve(node, factors=inner)
        return
    for i in range(len(node.parts) - 1):
        parts = list(node.parts)
        parts[i : i + 2] = reversed(parts[i : i + 2])
        yield "swap two parts of a sum", evolve(node, parts=tuple(parts))
    for i, part in enumerate(node.parts):
        for op, factors in (*_changed(part.factors), *_resharded(part.factors), *_reordered(part)):
            parts = [*node.parts[:i], evolve(part, factors=factors), *node.parts[i + 1 :]]
            yield op, evolve(node, parts=tuple(parts))


def _reordered(part: Part) -> Iterator[tuple[str, tuple[Node, ...]]]:
    for i in range(len(part.factors) - 1):
        factors = list(part.factors)
        factors[i : i + 2] = reversed(factors[i : i + 2])
        yield "change an axis", tuple(factors)


def _resharded(factors: tuple[Node, ...]) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """The mark of one axis on another one beside it."""
    for i, factor in enumerate(factors):
        if isinstance(factor, Axis) and factor.shard:
            for j, other in enumerate(factors):
                if j != i and isinstance(other, Axis) and not other.shard:
                    moved = list(factors)
                    moved[i], moved[j] = evolve(factor, shard=None), evolve(other, shard=factor.shard)
                    yield "change the sharded axis", tuple(moved)


# The rest of a rule


def _fields(rule: Data) -> Iterator[tuple[str, str, Any]]:
    """(kind, field of the rule, its new value or None for none)."""
    if rule.get("when") is not None:
        yield "drop a condition", "when", None
        yield "turn a condition round", "when", f"not ({rule['when']})"
    if "offset" in rule:
        yield "alter an offset", "offset", None
        yield "alter an offset", "offset", f"-({rule['offset']})"
    elif isinstance(rule.get("layout"), str) and "dtype" not in rule and "scale" not in rule:
        yield "alter an offset", "offset", "1"
    yield "alter a scale", "scale", 2 * rule.get("scale", 1)
    for key, kind in (
        ("stage", "change a stage"), ("replica", "drop a replica"), ("tied", "drop a tie"), ("pad", "drop padding"),
        ("codec", "drop a codec"), ("dtype", "alter a type"), ("optional", "drop an optional part"),
        ("choice", "drop a choice"), ("shape", "change a shape"), ("cast_first", "alter a scale"),
    ):  # fmt: skip
        if key in rule:
            yield kind, key, None
    if rule.get("stage") in ("first", "last"):
        yield "change a stage", "stage", "last" if rule["stage"] == "first" else "first"
    for choice in rule.get("names") or {}:
        yield "drop a name", "names", {k: v for k, v in rule["names"].items() if k != choice}
    for alias in rule.get("aliases") or []:
        yield "drop a name", "aliases", [a for a in rule["aliases"] if a != alias]


def _exchanged(data: Data) -> Iterator[tuple[str, str, Data]]:
    """Each name and the next one whose layout has the same axes, with their layouts exchanged."""
    by_axes: dict[tuple[Any, ...], list[tuple[str, int | None, Data]]] = {}
    for pattern, index, rule in _rules(data):
        if isinstance(rule.get("layout"), str):
            parsed = parse(" ".join(rule["layout"].split()))
            key = (pattern.count("{"), *(tuple(sorted(axes)) for axes in parsed.axes.values()))
            by_axes.setdefault(key, []).append((pattern, index, rule))
    for alike in by_axes.values():
        for (a, i, one), (b, j, other) in pairwise(alike):
            if one["layout"] == other["layout"]:
                continue
            changed = _with(data, _place(a, i), {**one, "layout": other["layout"]})
            yield a, b, _with(changed, _place(b, j), {**other, "layout": one["layout"]})


# What is not a rule


def _elsewhere(data: Data) -> Iterator[tuple[str, tuple[Step, ...], Any]]:
    """(kind, path, new value) of every change outside the rules."""
    for axis, text in (data.get("axes") or {}).items():
        yield "change a size", ("axes", axis), f"({text}) + 1"
        yield "change a size", ("axes", axis), _DROP
    for name, value in (data.get("facts") or {}).items():
        others = [other for other in _said(name) if other != value and type(other) is type(value)]
        yield "change a fact", ("facts", name), others[0] if others else _other(value)
    for i, tie in enumerate(data["tied"] if isinstance(data.get("tied"), list) else []):
        yield "drop a tie", ("tied", i), _DROP
        yield "drop a tie", ("tied", i, "when"), f"not ({tie['when']})"
    for name, text in (data.get("define") or {}).items():
        yield "turn a condition round", ("define", name), f"not ({text})"
    for section in ("ignored", "repeats"):
        for i in range(len(data.get(section) or [])):
            yield f"drop one of {section}", (section, i), _DROP
    for name in data.get("optional") or {}:
        yield "drop an optional part", ("optional", name), _DROP
    for dim, axes in (data.get("replicate") or {}).items():
        for i in range(len(axes)):
            yield "drop a replica", ("replicate", dim, i), _DROP
    for name, text in (data.get("objects") or {}).items():
        yield "drop an object", ("objects", name), _DROP
        if text is not None:
            yield "turn a condition round", ("objects", name), f"not ({text})"
    for name, option in (data.get("options") or {}).items():
        if isinstance(option, dict) and len(option.get("choices") or []) > 1:
            other = next(c for c in option["choices"] if c != option.get("default"))
            yield "change a default", ("options", name, "default"), other
    yield from _config(data.get("config") or {}, ("config",))
    for to, added in (data.get("formats") or {}).items():
        yield from _config((added or {}).get("config") or {}, ("formats", to, "config"))
        for section in ("requires", "limits", "options"):
            for key in (added or {}).get(section) or {}:
                yield "drop what a family adds", ("formats", to, section, key), _DROP


@cache
def _said(fact: str) -> list[Any]:
    """What the built-in architectures say a fact is."""
    files = catalog._files("architecture").values()
    return list(
        {
            repr(v): v for path in files if (v := (catalog._read_yaml(path).get("facts") or {}).get(fact)) is not None
        }.values()
    )


def _config(config: Mapping[str, Any], at: tuple[Step, ...]) -> Iterator[tuple[str, tuple[Step, ...], Any]]:
    facts = config.get("facts") or {}
    for name, entry in facts.items():
        yield "drop a fact", (*at, "facts", name), _DROP
        if isinstance(entry, str):
            yield "change a field", (*at, "facts", name), entry + "_x"
            continue
        for key, value in (entry or {}).items():
            if key == "field" and value is not None:
                fields = [value] if isinstance(value, str) else value
                yield "change a field", (*at, "facts", name, "field"), [f"{f}_x" for f in fields]
            elif key == "default" and value is not None:
                yield "change a default", (*at, "facts", name, "default"), _other(value)
            elif key == "values":
                yield "change a value", (*at, "facts", name, "values"), _DROP
            elif key == "read":
                yield "change a field", (*at, "facts", name, "read"), f"none_of_it if {value} else none_of_it"
    named = [name for name, entry in facts.items() if isinstance(entry, str)]
    for a, b in pairwise(named):
        changed = {**facts, a: facts[b], b: facts[a]}
        yield "exchange fields", (*at, "facts"), changed
    for section in ("write", "constants"):
        for name, value in (config.get(section) or {}).items():
            yield f"drop one of {section}", (*at, section, name), _DROP
            if section == "constants":
                yield "change a constant", (*at, section, name), _other(value)


def _other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}_x" if isinstance(value, str) else [*value, "x"] if isinstance(value, list) else {"x": value}
