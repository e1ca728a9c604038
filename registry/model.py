"""Facts of a model, read from and written to config documents, and the logical tensors that follow from them.

A fact is a named property of the model that no format owns (`layers`, `kv_heads`, `rope_theta`). Every format's config
document maps to facts and back as its spec declares; an architecture's axes and conditions are expressions over facts.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from registry import expressions
from registry.config_rules import ConfigMap
from registry.errors import MappingError, SpecError
from registry.specs import ArchitectureSpec, Extension, FormatSpec, Spec
from registry.states import state_tensor
from registry.tensor_rules import Rule, named_axes

_ABSENT = object()
#: Tensors that one pattern may name. The largest mixtures of experts have a tenth; a config that says more is damaged.
MAX_NAMES = 1 << 19


def _get(document: Mapping[str, Any], dotted: str) -> Any:
    value: Any = document
    for step in dotted.split("."):
        if not isinstance(value, Mapping) or step not in value:
            return _ABSENT
        value = value[step]
    return value


def _set(document: dict[str, Any], dotted: str, value: Any) -> None:
    *steps, last = dotted.split(".")
    for step in steps:
        inner = document.get(step)
        document[step] = document = dict(inner) if isinstance(inner, Mapping) else {}
    document[last] = value


def read_facts(document: Mapping[str, Any], config: ConfigMap) -> dict[str, Any]:
    """The facts that a document holds; a fact that it is silent about takes its default, or is left out.

    Raises MappingError for a document that says what no expression can work with.
    """
    facts: dict[str, Any] = {}
    problems = []
    inner = document.get(config.within) if config.within is not None else None
    scope = {**document, **inner} if isinstance(inner, Mapping) else document
    for name, entry in config.facts.items():
        paths = config.paths(name)
        if entry.read is not None:
            try:
                value = expressions.parse(entry.read)(scope)
            except SpecError as error:
                problems.append(f"{name}: {error.problem}, with {error.found}")
                continue
        else:
            value = next((v for path in paths if (v := _get(document, path)) is not _ABSENT), None)
        for fact, stored in entry.values:
            if value == stored and type(value) is type(stored):
                value = fact
                break
        if value is None:
            value = entry.default
        if value is not None or entry.read is not None or any(_get(document, path) is not _ABSENT for path in paths):
            facts[name] = value
    if problems:
        raise MappingError("the config does not say what is needed", details=problems, hint="check the config file")
    return facts


def write_document(
    facts: Mapping[str, Any], config: ConfigMap, env: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
    """`base` changed so that it says what `facts` say. Fields that already agree keep their place and spelling."""
    document = copy.deepcopy(dict(base))
    for path, constant in config.constants.items():
        if _get(document, path) is _ABSENT:
            _set(document, path, copy.deepcopy(constant))
    before = read_facts(document, config) if base else {}
    for name, entry in config.facts.items():
        if name not in facts or not entry.field or (name in before and before[name] == facts[name]):
            continue
        value = facts[name]
        for fact, stored in entry.values:
            if value == fact and type(value) is type(fact):
                value = stored
                break
        present = [path for path in config.paths(name) if _get(document, path) is not _ABSENT]
        _set(document, (present or config.paths(name))[0], copy.deepcopy(value))
    for path, text in config.write.items():
        _set(document, path, expressions.parse(text)({**facts, **env}))
    return document


def with_fields(document: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The document with some fields, by dotted path, said as given."""
    said = copy.deepcopy(dict(document))
    for path, value in fields.items():
        _set(said, path, value)
    return said


def extension(spec: FormatSpec, architecture: ArchitectureSpec) -> Extension | None:
    """What an architecture adds to a format, if anything."""
    own = architecture.formats.get(spec.name) or architecture.formats.get(spec.extensions_of or "")
    return own or spec.extensions.get(architecture.name)


def config_map(spec: FormatSpec, architecture: ArchitectureSpec) -> ConfigMap:
    """The config map of a format for one architecture: the format's own, with the architecture's additions over it."""
    if spec.rules_from == "architecture":
        return architecture.config
    own, added = spec.config, extension(spec, architecture)
    if added is None:
        return own
    return ConfigMap(
        facts={**own.facts, **added.config.facts},
        write={**own.write, **added.config.write},
        constants={**own.constants, **added.config.constants},
        within=added.config.within or own.within,
    )


def loose_facts(config: ConfigMap) -> set[str]:
    """The facts that a document may say otherwise without harm."""
    return {name for name, entry in config.facts.items() if entry.loose}


def rules_spec(spec: FormatSpec, architecture: ArchitectureSpec) -> Spec:
    """The spec whose rules lay this architecture out in this format: the format's own, or the architecture's."""
    return architecture if spec.rules_from == "architecture" else spec


def format_rules(spec: FormatSpec, architecture: ArchitectureSpec) -> Iterator[tuple[str, Rule]]:
    """The rules that lay this architecture out in this format."""
    return rules_spec(spec, architecture).rules()


@frozen(eq=False)
class Kind:
    """The indices of one axis at which a model has the same tensors of the same sizes, such as its dense layers.

    `present` are the names that a layout may use there: the tensors, and the names tied to them. A model whose layers
    are all alike has one kind, of no axis.
    """

    axis: str | None
    indices: tuple[int, ...]
    sizes: Mapping[str, int]
    present: frozenset[str]

    def env(self, env: Mapping[str, Any]) -> dict[str, Any]:
        """What a condition may read about these indices, which are all alike to it: any of them will do."""
        own: dict[str, Any] = {self.axis: self.indices[0]} if self.axis is not None else {}
        return {**dict.fromkeys(self.sizes, 0), **env, **own, "has": self.present.__contains__}


@frozen(eq=False)
class LogicalModel:
    """One model: its architecture, facts, axis sizes, and logical tensors with their axes in canonical order.

    `sizes` holds the largest size of an axis that differs between layers; `varying` the kinds of index along every axis
    whose indices are not all alike; `optional` the part of the model that a tensor belongs to, where that may be
    absent, and `without` the parts that are.
    """

    architecture: ArchitectureSpec
    facts: dict[str, Any]
    sizes: dict[str, int]
    tensors: dict[str, tuple[str, ...]]
    ties: dict[str, str]
    whole: Kind
    varying: dict[str, tuple[Kind, ...]]
    optional: dict[str, str]
    without: frozenset[str]
    states: tuple[str, ...] = ()

    def with_states(self, states: Sequence[str], held: Collection[str] | None = None) -> LogicalModel:
        """This model with optimizer state: of every weight, or of those whose state is in `held`."""

        def grown(present: frozenset[str]) -> frozenset[str]:
            names = (state_tensor(state, tensor) for state in states for tensor in present)
            return present.union(name for name in names if held is None or ties.get(name, name) in held)

        tensors = {state_tensor(state, tensor): axes for state in states for tensor, axes in self.tensors.items()}
        ties = {state_tensor(state, a): state_tensor(state, b) for state in states for a, b in self.ties.items()}
        return evolve(
            self,
            tensors=self.tensors | {t: axes for t, axes in tensors.items() if held is None or t in held},
            ties=self.ties | {a: b for a, b in ties.items() if held is None or b in held},
            whole=evolve(self.whole, present=grown(self.whole.present)),
            varying={axis: tuple(evolve(k, present=grown(k.present)) for k in ks) for axis, ks in self.varying.items()},
            states=tuple(states),
        )

    def home(self, tensor: str) -> str:
        """The tensor itself, or the one that it is tied to."""
        return self.ties.get(tensor, tensor)

    def kinds(self, pattern: str) -> tuple[Kind, ...]:
        """The kinds of index that the names of one pattern spell."""
        found = next((self.varying[n.axis] for n in named_axes(pattern) if n.axis in self.varying), None)
        return (self.whole,) if found is None else found

    def parts(self, tensor: str) -> Iterator[tuple[Kind, tuple[int, ...]]]:
        """Every kind of index at which the model has a tensor, and the tensor's shape over those indices."""
        axes = self.tensors[tensor]
        for kind in next((self.varying[axis] for axis in axes if axis in self.varying), (self.whole,)):
            if tensor in kind.present:
                yield kind, tuple(len(kind.indices) if axis == kind.axis else kind.sizes[axis] for axis in axes)

    def volume(self, tensor: str) -> int:
        """How many elements the tensor has."""
        return sum(math.prod(shape) for _, shape in self.parts(tensor))

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The whole logical shape, in canonical axis order; the largest, where it differs between layers."""
        shapes = [shape for _, shape in self.parts(tensor)]
        axes = self.tensors[tensor]
        sums = [axis in self.varying for axis in axes]
        return tuple(
            (sum if total else max)(sizes) for total, sizes in zip(sums, zip(*shapes, strict=True), strict=True)
        )

    @property
    def functions(self) -> dict[str, Any]:
        """What expressions may ask about the model as a whole."""
        return {"has": self.whole.present.__contains__, "each": self._each}

    def _each(self, tensor: str) -> list[int]:
        """1 or 0 for every index of the tensor's first axis: does the model have it there?"""
        axis = self.architecture.logical().get(tensor, ("",))[0]
        here = [0] * self.sizes.get(axis, 0)
        for kind in self.varying.get(axis, (self.whole,)):
            for i in kind.indices if kind.axis is not None else range(len(here)):
                here[i] = int(tensor in kind.present)
        return here


def said(architecture: ArchitectureSpec, known: Mapping[str, Any], name: str) -> str:
    """What the config says about a fact, in the config's own terms."""
    entry = architecture.config.facts.get(name)
    field = entry.field[0] if entry is not None and entry.field else name
    return f"{field} is {known[name]!r}" if known.get(name) is not None else f"the config says nothing about {field}"


class _Sizes:
    """Sizes of axes by the facts; what is wrong with them is collected."""

    def __init__(self, architecture: ArchitectureSpec, known: Mapping[str, Any]) -> None:
        self.architecture, self.known = architecture, known
        self.sizes: dict[str, int] = {}
        self.problems: list[str] = []

    def size(self, axis: str, env: Mapping[str, Any]) -> int | None:
        """The size of one axis."""
        text = self.architecture.axes[axis]
        expression = expressions.parse(text)
        try:
            size = None if any(env.get(name) is None for name in expression.names) else expression(env)
        except SpecError:
            size = None
        if type(size) is int and 0 <= size < 1 << 48:
            return size
        names = sorted(expression.names - {self.architecture.along(text)})
        self.problems.append(
            f"axis {axis!r} = {text} is no size: " + ", ".join(said(self.architecture, self.known, n) for n in names)
        )
        return None

    def read(self) -> dict[str, str]:
        """Fill in the sizes that hold everywhere. Axes that differ along another one are returned with that one."""
        along: dict[str, str] = {}
        for axis, text in self.architecture.axes.items():
            if other := self.architecture.along(text):
                along[axis] = other
            elif (size := self.size(axis, self.known)) is not None:
                self.sizes[axis] = size
        return along

    def check_names(self) -> None:
        """A config that calls for absurdly many tensors is refused before anything is made for each."""
        for pattern in self.architecture.tensors:
            named = [n.axis for n in named_axes(pattern) if n.axis in self.sizes]
            if math.prod(self.sizes[axis] for axis in named) > MAX_NAMES:
                used = [name for axis in named for name in expressions.parse(self.architecture.axes[axis]).names]
                found = ", ".join(said(self.architecture, self.known, name) for name in used)
                self.problems.append(f"more than {MAX_NAMES} tensors {pattern}: {found}")
                return

    def fail(self) -> None:
        """Raise MappingError if anything is wrong."""
        if self.problems:
            raise MappingError(
                f"the config does not describe a {self.architecture.name} model", details=self.problems,
                hint="check the config file",
            )  # fmt: skip


def logical_model(
    architecture: ArchitectureSpec, facts: Mapping[str, Any], without: Collection[str] = ()
) -> LogicalModel:
    """The model that an architecture and facts describe, without some of its optional parts.

    Raises MappingError listing every axis without a size.
    """
    known = {**facts, **architecture.facts}
    sizes = _Sizes(architecture, known)
    along = sizes.read()
    sizes.check_names()
    sizes.fail()
    conditions = _Conditions(architecture, without)
    ties = {tie.tensor: tie.to for tie in architecture.tied if expressions.parse(tie.when)(known)}
    everywhere = frozenset(t for _, r in conditions.plain if conditions.holds(r, known) for t in r.parsed.tensors)
    varying: dict[str, tuple[Kind, ...]] = {}
    for axis in sorted({*along.values(), *conditions.along}):
        inner = [name for name, other in along.items() if other == axis]
        varying[axis] = tuple(_kinds(axis, inner, sizes, conditions, everywhere, ties))
        if len(varying[axis]) == 1 or not varying[axis]:
            alike = varying.pop(axis)
            sizes.sizes |= {name: alike[0].sizes[name] if alike else 0 for name in inner}
            everywhere |= alike[0].present if alike else frozenset()
        else:
            sizes.sizes |= {name: max(kind.sizes[name] for kind in varying[axis]) for name in inner}
    present = everywhere.union(*(kind.present for kinds in varying.values() for kind in kinds))
    axes = architecture.logical()
    tensors = {t: axes[t] for t in axes if t in present and t not in ties}
    present = frozenset({*tensors, *ties})
    rules = [rule for _, rule in architecture.rules() if rule.optional and not rule.replica]
    optional = {tensor: str(rule.optional) for rule in rules for tensor in rule.parsed.tensors}
    return LogicalModel(
        architecture, known, sizes.sizes, tensors, ties, Kind(None, (), sizes.sizes, present), varying, optional,
        frozenset(without),
    )  # fmt: skip


class _Conditions:
    """The conditions of an architecture's rules: those that hold or not everywhere, and those along one axis."""

    def __init__(self, architecture: ArchitectureSpec, without: Collection[str]) -> None:
        self.plain: list[tuple[str, Rule]] = []
        self.along: dict[str, list[tuple[str, Rule]]] = defaultdict(list)
        for pattern, rule in architecture.rules():
            if rule.replica or rule.optional in without:
                continue
            axis = architecture.along(rule.when)
            (self.plain if axis is None else self.along[axis]).append((pattern, rule))

    @staticmethod
    def holds(rule: Rule, env: Mapping[str, Any]) -> bool:
        return rule.when is None or bool(expressions.parse(rule.when)(env))


def _kinds(
    axis: str, inner: list[str], sizes: _Sizes, conditions: _Conditions, everywhere: frozenset[str],
    ties: Mapping[str, str],
) -> Iterator[Kind]:  # fmt: skip
    """Sort the indices of one axis by which rules hold there and how large the `inner` axes are."""
    found: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    shown: dict[tuple[Any, ...], tuple[dict[str, int], frozenset[str]]] = {}
    for i in range(sizes.sizes[axis]):
        env = {**sizes.known, axis: i}
        own = {name: size for name in inner if (size := sizes.size(name, env)) is not None}
        try:
            rules = [rule for _, rule in conditions.along[axis] if conditions.holds(rule, env)]
        except SpecError as error:
            sizes.problems.append(f"{axis} {i}: {error.problem}")
            rules = []
        sizes.fail()
        key = (*own.values(), *map(id, rules))
        found[key].append(i)
        shown[key] = own, frozenset(t for rule in rules for t in rule.parsed.tensors)
    for key, indices in found.items():
        own, tensors = shown[key]
        yield Kind(axis, tuple(indices), {**sizes.sizes, **own}, everywhere | tensors | set(ties))
