"""Facts of a model, read from and written to config documents, and the logical tensors that follow from them.

A fact is a named property of the model that no format owns (`layers`, `kv_heads`, `rope_theta`). Every format's config
document maps to facts and back as its spec declares; an architecture's axes and conditions are expressions over facts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from registry import expressions
from registry.errors import MappingError, SpecError
from registry.specs import AXIS, ArchitectureSpec, ConfigMap, FormatSpec, Rule, Spec

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
    for name, entry in config.facts.items():
        if entry.read is not None:
            try:
                value = expressions.parse(entry.read)(document)
            except SpecError as error:
                problems.append(f"{name}: {error.problem}, with {error.found}")
                continue
        else:
            value = next((v for path in entry.field if (v := _get(document, path)) is not _ABSENT), None)
        for fact, stored in entry.values:
            if value == stored and type(value) is type(stored):
                value = fact
                break
        if value is None:
            value = entry.default
        if (
            value is not None
            or entry.read is not None
            or any(_get(document, path) is not _ABSENT for path in entry.field)
        ):
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
        present = [path for path in entry.field if _get(document, path) is not _ABSENT]
        _set(document, (present or entry.field)[0], copy.deepcopy(value))
    for path, text in config.write.items():
        _set(document, path, expressions.parse(text)({**facts, **env}))
    return document


def config_map(spec: FormatSpec, architecture: ArchitectureSpec) -> ConfigMap:
    """The config map of a format for one architecture: the format's own, with the architecture's additions over it."""
    if spec.rules_from == "architecture":
        return architecture.config
    own, added = spec.config, architecture.formats.get(spec.name)
    if added is None:
        return own
    return ConfigMap(
        facts={**own.facts, **added.config.facts},
        write={**own.write, **added.config.write},
        constants={**own.constants, **added.config.constants},
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


@frozen
class LogicalModel:
    """One model: its architecture, facts, axis sizes, and logical tensors with their axes in canonical order."""

    architecture: ArchitectureSpec
    facts: dict[str, Any]
    sizes: dict[str, int]
    tensors: dict[str, tuple[str, ...]]
    ties: dict[str, str]

    @property
    def present(self) -> frozenset[str]:
        """Every name that a layout may use: the tensors, and the names tied to them."""
        return frozenset({*self.tensors, *self.ties})

    def home(self, tensor: str) -> str:
        """The tensor itself, or the one that it is tied to."""
        return self.ties.get(tensor, tensor)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The whole logical shape, in canonical axis order."""
        return tuple(self.sizes[axis] for axis in self.tensors[tensor])


def _said(architecture: ArchitectureSpec, known: Mapping[str, Any], name: str) -> str:
    """What the config says about a fact, in the config's own terms."""
    entry = architecture.config.facts.get(name)
    field = entry.field[0] if entry is not None and entry.field else name
    return f"{field} is {known[name]!r}" if known.get(name) is not None else f"the config says nothing about {field}"


def logical_model(architecture: ArchitectureSpec, facts: Mapping[str, Any]) -> LogicalModel:
    """The model that an architecture and facts describe. Raises MappingError listing every axis without a size."""
    known = {**facts, **architecture.facts}
    sizes: dict[str, int] = {}
    problems = []
    for axis, text in architecture.axes.items():
        expression = expressions.parse(text)
        said = ", ".join(_said(architecture, known, name) for name in sorted(expression.names))
        try:
            size = None if any(known.get(name) is None for name in expression.names) else expression(known)
        except SpecError:
            size = None
        if type(size) is not int or not 0 <= size < 1 << 48:
            problems.append(f"axis {axis!r} = {text} is no size: {said}")
        else:
            sizes[axis] = size
    for pattern in architecture.tensors:
        named = [axis for axis, _ in AXIS.findall(pattern) if axis in sizes]
        if math.prod(sizes[axis] for axis in named) > MAX_NAMES:
            used = [name for axis in named for name in expressions.parse(architecture.axes[axis]).names]
            found = ", ".join(_said(architecture, known, name) for name in used)
            problems.append(f"more than {MAX_NAMES} tensors {pattern}: {found}")
            break
    if problems:
        raise MappingError(
            f"the config does not describe a {architecture.name} model", details=problems, hint="check the config file"
        )
    active = [
        (pattern, rule)
        for pattern, rule in architecture.rules()
        if rule.when is None or expressions.parse(rule.when)(known)
    ]
    axes = architecture.logical()
    ties = {tie.tensor: tie.to for tie in architecture.tied if expressions.parse(tie.when)(known)}
    tensors = {t: axes[t] for _, rule in active for t in rule.parsed.tensors if t not in ties}
    return LogicalModel(architecture, known, sizes, tensors, ties)
