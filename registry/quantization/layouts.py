"""How the tensors that are stored of a quantised weight are cut for the ranks: rules derived of the weight's own rule.

A scale of rows is cut as the weight's rows are, a scale of groups of columns as its columns; so the shards of what was
encoded are the shards of the whole matrix, and its scales are never those of a shard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, NamedTuple

from attrs import evolve, field, frozen

from registry import expressions
from registry.encoding import block_codec
from registry.errors import MappingError, ParallelError, SpecError
from registry.groups import holds
from registry.layout import Axis, Layout, Node, Part, Product, Sum, parse
from registry.model import Kind, LogicalModel
from registry.parallel import Parallel
from registry.quantization.declared import Quantizations, Scheme, StoredTensor
from registry.tensor_rules import AXIS, Rule, named_axes

#: (the module's pattern, the index along its pipeline axis) -> the schemes that it is stored under, by name.
Chosen = Callable[[str, int], tuple[str, ...]]


class Module(NamedTuple):
    """A rule whose weights are quantised, in the kinds of layers where they are."""

    pattern: str
    rule: Rule
    schemes: tuple[str, ...]
    kinds: tuple[Kind, ...]


@frozen
class Derived:
    """The model of what is stored of quantised weights, and the rules that lay it out.

    `rest` is the model of what stays plain, `modules` are the rules whose weights do not, and `further` those of what
    is stored anew besides.
    """

    model: LogicalModel
    rest: LogicalModel
    rules: list[tuple[str, Rule]]
    modules: list[Module]
    further: list[tuple[str, Rule]]


def stored_name(module: str, key: str, stored: StoredTensor) -> str:
    """What a stored tensor of a module is called."""
    return filled(stored.name or f"{{module}}.{key}", module)


def filled(name: str, module: str) -> str:
    """A name beside a module, with the modules around it filled in."""
    parent = module.rpartition(".")[0]
    return name.format(module=module, parent=parent, layer=parent.rpartition(".")[0])


def beside(scheme: Scheme, module: str) -> dict[str, str]:
    """The further tensors that a scheme stores anew with a module, by their names in formulas."""
    return {
        name: filled(entry.tensor, module)
        for name, entries in scheme.beside.items()
        for entry in entries
        if any(fnmatchcase(module, glob) for glob in entry.modules)
    }


def columns(rule: Rule, sizes: Mapping[str, int]) -> int:
    """How many columns the weights of a rule have."""
    return math.prod(sizes[axis] for axis in _axes(rule.parsed.dims[-1]))


def shard(node: Node) -> str | None:
    """The parallel dimension that cuts a stored dimension, if any."""
    if isinstance(node, Axis):
        return node.shard
    inner = next((s for factor in getattr(node, "factors", ()) if (s := shard(factor))), None)
    return node.cut or inner


def _axes(node: Node) -> list[str]:
    if isinstance(node, Axis):
        return [node.name]
    parts = node.parts if isinstance(node, Sum) else (node,)
    return [axis for part in parts for factor in part.factors for axis in _axes(factor)]


def _halved(node: Node, halves: dict[str, tuple[str, int]]) -> Node:
    """The dimension with two of its elements in one: the innermost axis of every part is half as long."""
    if isinstance(node, Axis):
        halves[f"{node.name}_half"] = (node.name, 2)
        return evolve(node, name=f"{node.name}_half")
    if isinstance(node, Product):
        return evolve(node, factors=(*node.factors[:-1], _halved(node.factors[-1], halves)))
    return evolve(node, parts=tuple(_halved_part(part, halves) for part in node.parts))


def _halved_part(part: Part, halves: dict[str, tuple[str, int]]) -> Part:
    return evolve(part, factors=(*part.factors[:-1], _halved(part.factors[-1], halves)))


class _Shape:
    """A stored tensor's layout. `made` is each axis that it invents: (the axes that it is made of, the divisor).

    Bytes of blocks are divided by what a byte holds, which is no whole number.
    """

    def __init__(self, rule: Rule, stored: StoredTensor, group: int, number: int, label: str) -> None:
        layout = rule.parsed
        *experts, out, columns = layout.dims
        self.made: dict[str, tuple[tuple[str, ...], int | Fraction]] = {}
        blocks = None if stored.blocks is None else block_codec(stored.blocks)
        if blocks is not None and blocks.columns != group:
            raise SpecError(f"blocks of {blocks.columns} columns in groups of {group}", where=str(stored.blocks))
        halves: dict[str, tuple[str, int]] = {}
        dims: list[str] = []
        rows = any(dim.startswith("out") for dim in stored.shape.split())
        for dim in stored.shape.split():
            if dim == "expert":
                dims += map(str, experts)
            elif dim == "out":
                dims.append(str(out))
            elif dim == "out/2":
                dims.append(str(_halved(out, halves)))
            elif dim == "in" and rows:
                dims.append(str(columns))
            elif dim == "1":
                dims.append("1")
            else:
                divisor = {"in": 1, "in/2": 2, "in/group": group}[dim]
                name = f"columns{number}_{divisor}"
                if blocks is not None:
                    name = f"{name}_bytes"
                self.made[name] = tuple(_axes(columns)), Fraction(group, blocks.nbytes) if blocks else divisor
                dims.append(str(Axis(name, shard(columns))))
        self.made |= {name: ((axis,), divisor) for name, (axis, divisor) in halves.items()}
        text = " ".join(dims)
        if rows:
            text = f"{layout.label}: {text}" if layout.label else text
            self.layout = _relabelled(text, label)
        else:
            self.layout = f"all.{number}.{label}: {text}".replace(".", "_", 1)

    @property
    def parsed(self) -> Layout:
        return parse(self.layout)


def _relabelled(text: str, label: str) -> str:
    return str(parse(text).relabel(lambda tensor: f"{tensor}.{label}"))


@frozen
class _Maker:
    """Gathers what a derived model is made of."""

    quantizations: Quantizations
    model: LogicalModel
    groups: Mapping[str, int]
    dtype: str
    given: Sequence[tuple[str, Rule]]
    rules: list[tuple[str, Rule]] = field(factory=list)
    further: list[tuple[str, Rule]] = field(factory=list)
    tensors: dict[str, tuple[str, ...]] = field(factory=dict)
    made: dict[str, tuple[tuple[str, ...], int | Fraction]] = field(factory=dict)
    #: kind -> labels of derived tensors, and tensors that are quantised
    present: dict[int, set[str]] = field(factory=dict)
    gone: dict[int, set[str]] = field(factory=dict)

    def add(self, number: int, module: Module, scheme_name: str, env: Mapping[str, Any]) -> None:
        """The rules of what one scheme stores of the weights of one rule."""
        scheme = self.quantizations.schemes[scheme_name]
        base = module.pattern.removesuffix(f".{self.quantizations.weight}")
        for key, stored in scheme.tensors.items():
            if (stored.when and not expressions.parse(stored.when)(env)) or not self.quantizations.stores(stored, base):
                continue
            label = f"{re.sub(r'[^0-9a-zA-Z_]', '_', scheme_name)}.{key}"
            shape = _Shape(module.rule, stored, self.groups[scheme_name], number, label)
            self.made.update(shape.made)
            named = [n.axis for n in named_axes(module.pattern)]
            for tensor, axes in shape.parsed.axes.items():
                self.tensors[tensor] = (*named, *axes)
                for kind in module.kinds:
                    origin = tensor.removesuffix(f".{label}")
                    if not tensor.endswith(f".{label}") or origin in kind.present or tensor.startswith("all_"):
                        self.present.setdefault(id(kind), set()).add(tensor)
            rule = Rule(
                layout=shape.layout, when=module.rule.when, stage=module.rule.stage, choice=module.rule.choice,
                dtype=self.dtype if stored.dtype == "model" else stored.dtype,
            )  # fmt: skip
            named_rule = stored_name(base, key, stored), rule
            if named_rule not in self.rules:  # further kinds of layers have other schemes besides
                self.rules.append(named_rule)
        if self.quantizations.weight in scheme.tensors:
            for kind in module.kinds:
                self.gone.setdefault(id(kind), set()).update(module.rule.parsed.tensors)
        for pattern in beside(scheme, base).values():
            self.further.extend((name, rule) for name, rule in self.given if name == pattern)
            for kind in module.kinds:
                for _, rule in self.further:
                    self.gone.setdefault(id(kind), set()).update(rule.parsed.tensors)

    def kind(self, kind: Kind) -> Kind:
        """A kind of layer with the derived tensors and axes besides."""
        own = {
            name: int(math.prod(kind.sizes.get(axis, 0) for axis in axes) // divisor)
            for name, (axes, divisor) in self.made.items()
        }
        present = kind.present | self.present.get(id(kind), set())
        return evolve(kind, sizes={**kind.sizes, **own}, present=frozenset(present))

    def rest(self, kind: Kind) -> Kind:
        """A kind of layer without what is quantised there."""
        return evolve(kind, present=kind.present - self.gone.get(id(kind), set()))


def derive(
    quantizations: Quantizations, rules: Sequence[tuple[str, Rule]], model: LogicalModel, chosen: Chosen,
    groups: Mapping[str, int], dtype: str, env: Mapping[str, Any], choices: Mapping[str, str],
) -> Derived:  # fmt: skip
    """What is stored of the weights that are quantised, and what is left. `groups` are the schemes' group sizes.

    Raises MappingError for weights that a scheme has no form for.
    """
    weights = [(p, r) for p, r in rules if p.endswith(f".{quantizations.weight}") and len(r.parsed.dims) > 1]
    model = _split(model, weights, quantizations, chosen)
    maker = _Maker(quantizations, model, groups, dtype, rules)
    modules = []
    for number, (pattern, rule) in enumerate(weights):
        by_schemes: dict[tuple[str, ...], list[Kind]] = {}
        for kind in model.kinds(pattern):
            here = [t for t in rule.parsed.tensors if t in kind.present]
            if not here or not holds(rule, kind, env, choices):
                continue
            first = kind.indices[0] if kind.indices else 0
            schemes = tuple(_applying(quantizations, rule, pattern, chosen(pattern, first)))
            by_schemes.setdefault(schemes, []).append(kind)
        for schemes, kinds in by_schemes.items():
            if schemes:
                modules.append(Module(pattern, rule, schemes, tuple(kinds)))
                for name in schemes:
                    maker.add(number, modules[-1], name, env)
    tensors = {**model.tensors, **maker.tensors}
    whole, varying = maker.kind(model.whole), {a: tuple(map(maker.kind, kinds)) for a, kinds in model.varying.items()}
    left = {a: tuple(map(maker.rest, kinds)) for a, kinds in model.varying.items()}
    gone = maker.gone.get(id(model.whole), set())
    derived = evolve(
        model, tensors=maker.tensors, ties={}, sizes={**model.sizes, **whole.sizes}, whole=whole, varying=varying
    )
    rest = evolve(
        model, tensors={t: a for t, a in tensors.items() if t in model.tensors and t not in gone},
        whole=maker.rest(model.whole), varying=left,
    )  # fmt: skip
    return Derived(derived, rest, maker.rules, modules, maker.further)


def _applying(quantizations: Quantizations, rule: Rule, pattern: str, names: Sequence[str]) -> Iterator[str]:
    """Those of the chosen schemes that take a rule's weights."""
    module = pattern.removesuffix(f".{quantizations.weight}")
    for name in names:
        scheme = quantizations.schemes[name]
        if not scheme.tensors or not quantizations.applies(scheme, module):
            continue
        if len(rule.parsed.dims) > 2 and scheme.experts != "quantized":
            if scheme.experts == "refused":
                raise MappingError(
                    f"{name} has no form for weights of experts", where=pattern, expected="a model without experts",
                    found=rule.layout, hint="choose another quantization for this model",
                )  # fmt: skip
            continue
        yield name


def _split(
    model: LogicalModel, weights: Sequence[tuple[str, Rule]], quantizations: Quantizations, chosen: Chosen
) -> LogicalModel:
    """The model with its layers told apart by the schemes that they are quantised with, if they differ."""
    varying = dict(model.varying)
    axes = dict.fromkeys(n.axis for pattern, _ in weights for n in named_axes(pattern) if n.shard == "pp")
    for axis in axes:
        patterns = [p for p, _ in weights if any(n.axis == axis for n in named_axes(p))]
        signature = {i: tuple(chosen(p, i) for p in patterns) for i in range(model.sizes[axis])}
        if len(set(signature.values())) < 2:
            continue
        kinds = varying.get(axis, (Kind(axis, tuple(signature), model.whole.sizes, model.whole.present),))
        varying[axis] = tuple(
            evolve(kind, indices=indices)
            for kind in kinds
            for key in dict.fromkeys(signature[i] for i in kind.indices)
            if (indices := tuple(i for i in kind.indices if signature[i] == key))
        )
    return evolve(model, varying=varying)


def check_groups(derived: Derived, quantizations: Quantizations, groups: Mapping[str, int], parallel: Parallel) -> None:
    """Refuse columns or rows that groups, halves and ranks do not divide. Raises ParallelError listing them all."""
    problems: dict[str, int] = {}
    fitting: set[int] | None = None
    for module in derived.modules:
        for name in module.schemes:
            shapes = " ".join(stored.shape for stored in quantizations.schemes[name].tensors.values()).split()
            step = groups[name] if "in/group" in shapes else 2 if "in/2" in shapes else 1
            for kind in module.kinds if step > 1 else ():
                width = columns(module.rule, kind.sizes)
                dim = shard(module.rule.parsed.dims[-1])
                ranks = parallel.size(dim) if dim else 1
                able = {n for n in range(1, width // step + 1) if width % (step * n) == 0}
                fitting = able if fitting is None or not dim else fitting & able
                if ranks not in able:
                    what = f"{AXIS.sub('*', module.pattern)}: {width} columns on {ranks} ranks in groups of {step}"
                    problems[f"{name}: {what}"] = step
    if problems:
        sizes = " or ".join(map(str, sorted(fitting or ())))
        raise ParallelError(
            "groups of columns do not divide a rank's columns", details=list(problems),
            expected="columns / ranks as a multiple of the group size",
            hint=f"choose tp as {sizes}" if sizes else "choose another group_size or another quantization",
        )  # fmt: skip
