"""What a spec file may say: pydantic models of architecture and format specs.

A spec is data. Its strings are layouts (`registry.layout`), expressions over facts (`registry.expressions`) and name
patterns with axes in braces (`model.layers.{layer}.mlp.up_proj.weight`). Everything is checked when the spec is loaded,
and all problems are reported at once, in the spec's own terms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from registry import expressions
from registry.dtypes import ITEMSIZE
from registry.errors import RegistryError
from registry.layout import Layout, parse
from registry.parallel import DIMENSIONS

#: An axis in a name pattern; `{layer@pp}` counts from the first layer of the stage that stores the tensor.
AXIS = re.compile(r"\{(\w+)(?:@(\w+))?\}")

Scalar = bool | int | float | str | None


class Problems(ValueError):
    """Several problems of one spec; `found` lists them."""

    def __init__(self, found: list[str]) -> None:
        self.found = found
        super().__init__("; ".join(found))


class Model(BaseModel):
    """Base: unknown keys are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked_expression(text: Any) -> Any:
    if isinstance(text, bool | int):
        text = str(text)
    if isinstance(text, str):
        try:
            expressions.parse(text)
        except RegistryError as error:
            raise ValueError(str(error)) from None
    return text


Expression = Annotated[str, BeforeValidator(_checked_expression)]


class Rule(Model):
    """How one stored tensor (or a family of them, one for each value of the axes in its name) is laid out."""

    layout: str = Field(description="the layout string: products and sums of named axes")
    when: Expression | None = Field(default=None, description="the rule holds only where this is true")
    names: dict[str, str] = Field(default={}, description="variant choice -> the name under that choice")
    aliases: list[str] = Field(default=[], description="other names accepted on reading")
    dtype: str | None = Field(default=None, description="stored in this type whatever the source's")
    scale: float = Field(default=1.0, description="stored = logical * scale + offset")
    offset: float = Field(default=0.0, description="stored = logical * scale + offset")
    codec: str | None = Field(default=None, description="a registered codec that encodes the stored values")
    pad: dict[str, Expression] = Field(
        default={}, description="axis -> the multiple that its stored size is rounded up to"
    )
    stage: Literal["first", "last"] | None = Field(default=None, description="only this pipeline stage stores it")
    tied: Expression = Field(default="false", description="written also where its tensor is tied to another")
    optional: str | None = Field(default=None, description="may be absent from a checkpoint; the reason")

    def problems(self) -> list[str]:
        """What is wrong with the rule by itself."""
        try:
            parsed = parse(self.layout)
        except RegistryError as error:
            return [str(error)]
        axes = {axis for axes in parsed.axes.values() for axis in axes}
        found = [f"pads axis {axis!r}, which the layout lacks" for axis in self.pad if axis not in axes]
        found += [
            f"shards over {dim!r}; the parallel dimensions are {', '.join(DIMENSIONS)}"
            for dim in parsed.sharded_over()
            if dim not in DIMENSIONS
        ]
        if self.dtype is not None and self.dtype not in ITEMSIZE:
            found.append(f"unknown dtype {self.dtype!r}")
        if self.scale == 0:
            found.append("scale 0 has no inverse")
        return [f"rule {self.layout!r}: {problem}" for problem in found]

    @property
    def parsed(self) -> Layout:
        """The layout, parsed (and remembered: parsing the same text again costs nothing)."""
        return parse(self.layout)


def _as_rules(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"layout": item} if isinstance(item, str) else item for item in items]


Rules = Annotated[list[Rule], BeforeValidator(_as_rules)]


class Ignored(Model):
    """Stored entries that no logical tensor answers to, by glob, and why that is right."""

    name: str = Field(description="a glob over stored names")
    reason: str = Field(description="why no logical tensor answers to them, for the report")


class Tie(Model):
    """`tensor` is the same tensor as `to` wherever `when` is true."""

    tensor: str = Field(description="the logical tensor that is another one")
    to: str = Field(description="the logical tensor that it is")
    when: Expression = Field(description="true where they are tied")


class FactMap(Model):
    """One fact of the model and the field of a config document that holds it."""

    field: list[str] = Field(default=[], description="dotted paths; the first is written, any is read")
    read: Expression | None = Field(
        default=None, description="an expression over the document, where a plain field will not do"
    )
    values: list[tuple[Scalar, Scalar]] = Field(default=[], description="pairs (fact, field value)")
    default: Any = Field(default=None, description="the fact where the document is silent")
    loose: bool = Field(default=False, description="a document that says otherwise, or nothing, does no harm")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"field": [data]}
        if isinstance(data, dict):
            data = dict(data)
            if isinstance(data.get("field"), str):
                data["field"] = [data["field"]]
            if isinstance(data.get("values"), dict):
                data["values"] = list(data["values"].items())
        return data


class ConfigMap(Model):
    """A config document against the facts of the model, in both directions."""

    facts: dict[str, FactMap] = Field(default={}, description="fact -> where the document holds it")
    write: dict[str, Expression] = Field(default={}, description="field -> expression over facts, only written")
    constants: dict[str, Any] = Field(default={}, description="field -> literal, only written")


class Extension(Model):
    """What one architecture adds to one format."""

    config: ConfigMap = Field(default=ConfigMap(), description="laid over the format's own config map")
    requires: dict[str, Any] = Field(
        default={}, description="document fields that must have this value to be this architecture"
    )


def _axes(name: str) -> list[str]:
    """The axes that a name pattern spells."""
    return [axis for axis, _ in AXIS.findall(name)]


class Variant(Model):
    """A spelling of names."""

    fold: str | None = Field(
        default=None, description="the axis that leaves the names and becomes the leading dimension"
    )


class Spec(Model):
    """What every spec has."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]+$", description="what the spec is called; its file is named after it")
    description: str = Field(default="", description="one line for lists")
    tensors: dict[str, Rules] = Field(default={}, description="name pattern -> rule, or several with conditions")
    ignored: list[Ignored] = Field(default=[], description="stored entries that are left out, with the reason")
    variants: dict[str, dict[str, Variant]] = Field(
        default={}, description="variant -> choices, the first is written by default"
    )

    @model_validator(mode="after")
    def _check(self) -> Spec:
        if problems := list(self.problems()):
            raise Problems(problems)
        return self

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with the spec, in its own terms."""
        choices = {choice for variant in self.variants.values() for choice in variant}
        for pattern, rules in self.tensors.items():
            for i, rule in enumerate(rules):
                yield from (f"tensors.{pattern}.{i}: {problem}" for problem in rule.problems())
        for pattern, rule in self.rules():
            yield from (f"{pattern}: no variant has the choice {c!r}" for c in rule.names if c not in choices)
            axes = sorted(_axes(pattern))
            for name in (pattern, *rule.names.values(), *rule.aliases):
                if set("{}") & set(AXIS.sub("", name)):
                    yield f"{name}: a brace that names no axis"
                elif sorted(_axes(name)) != axes:
                    yield f"{pattern}: its other name {name} has other axes"
        for pattern, rule in self.sound():
            for tensor, inner in rule.parsed.axes.items():
                yield from (
                    f"{pattern}: axis {a!r} of {tensor} is in the name and in the layout"
                    for a in _axes(pattern)
                    if a in inner
                )
            twice = {dim for _, dim in AXIS.findall(pattern) if dim} & rule.parsed.sharded_over()
            yield from (f"{pattern}: {dim!r} shards an axis of the name and of the layout" for dim in sorted(twice))

    def sound(self) -> Iterator[tuple[str, Rule]]:
        """The rules whose layouts can be parsed."""
        return ((pattern, rule) for pattern, rule in self.rules() if not rule.problems())

    def rules(self) -> Iterator[tuple[str, Rule]]:
        """Every (name pattern, rule)."""
        for pattern, rules in self.tensors.items():
            for rule in rules:
                yield pattern, rule


class ArchitectureSpec(Spec):
    """One model family, named by its HuggingFace `model_type`, as HuggingFace stores it."""

    kind: Literal["architecture"] = Field(default="architecture", description="what the spec describes")
    axes: dict[str, Expression] = Field(description="axis -> its size, an expression over facts")
    facts: dict[str, Any] = Field(default={}, description="facts that hold for every model of the family")
    config: ConfigMap = Field(default=ConfigMap(), description="config.json against the facts")
    tied: list[Tie] = Field(default=[], description="tensors that are another one")
    formats: dict[str, Extension] = Field(default={}, description="what the family adds to a format's config")

    def problems(self) -> Iterator[str]:
        """As in `Spec`, and what only an architecture can get wrong."""
        yield from super().problems()
        seen: dict[str, tuple[str, set[str]]] = {}
        for pattern, rule in self.sound():
            for tensor, inner in rule.parsed.axes.items():
                axes = {*_axes(pattern), *inner}
                yield from (
                    f"{pattern}: axis {a!r} of {tensor} is not declared" for a in sorted(axes) if a not in self.axes
                )
                first = seen.setdefault(tensor, (pattern, axes))
                if first[1] != axes:
                    yield f"{pattern}: {tensor} has other axes here than in {first[0]}"
        for tie in self.tied:
            yield from (
                f"tied: {name!r} is no tensor of this spec" for name in (tie.tensor, tie.to) if name not in seen
            )
        known = {*self.facts, *self.config.facts}
        used = [(f"axis {axis}", text) for axis, text in self.axes.items()]
        used += [(pattern, rule.when) for pattern, rule in self.rules() if rule.when]
        used += [(f"tied {tie.tensor}", tie.when) for tie in self.tied]
        for place, text in used:
            for name in sorted(expressions.parse(text).names - known):
                yield f"{place}: {name!r} is no fact of this spec"

    def logical(self) -> dict[str, tuple[str, ...]]:
        """Logical tensor -> its axes in canonical order: those of the name, then those of the layout."""
        return {
            tensor: (*(axis for axis, _ in AXIS.findall(pattern)), *axes)
            for pattern, rule in self.rules()
            for tensor, axes in rule.parsed.axes.items()
        }


class Option(Model):
    """A choice that a format offers."""

    default: Any = Field(default=None, description="what is written where the user chooses nothing")
    choices: list[Scalar] = Field(
        default=[], description="the values that are allowed (none listed: any of the default's type)"
    )
    description: str = Field(default="", description="what the option decides")
    read: Expression | None = Field(
        default=None, description="what a checkpoint on disk chose, over its config document"
    )


class FormatSpec(Spec):
    """One checkpoint format: how it lays out the logical tensors, once for all architectures."""

    kind: Literal["format"] = Field(default="format", description="what the spec describes")
    container: str = Field(description="the module that knows how the bytes lie on disk")
    rules_from: Literal["format", "architecture"] = Field(
        default="format", description="whose rules and config map hold: the format's own, or each architecture's"
    )
    ranked: bool = Field(default=False, description="every rank has files of its own, with names local to its stage")
    parallel: list[str] = Field(default=[], description="the parallel dimensions that the format shards over")
    closed: bool = Field(default=False, description="its readers know only architectures that extend it")
    replicate: dict[str, list[str]] = Field(
        default={}, description="parallel dimension -> axes repeated when shorter than it"
    )
    options: dict[str, Option] = Field(default={}, description="the choices that the format offers")
    objects: dict[str, Expression] = Field(
        default={}, description="entries without data that readers expect -> when to write them"
    )
    config: ConfigMap = Field(default=ConfigMap(), description="the format's config document against the facts")

    def problems(self) -> Iterator[str]:
        """As in `Spec`, and what only a format can get wrong."""
        yield from super().problems()
        for dim in (*self.parallel, *self.replicate):
            if dim not in DIMENSIONS:
                yield f"parallel: unknown dimension {dim!r}"
        for pattern, rule in self.sound():
            used = rule.parsed.sharded_over() | {dim for _, dim in AXIS.findall(pattern) if dim}
            yield from (
                f"{pattern}: shards over {d!r}, which `parallel` does not list"
                for d in sorted(used - set(self.parallel))
            )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec file: an architecture or a format."""
    from pydantic import TypeAdapter

    spec = Annotated[ArchitectureSpec | FormatSpec, Field(discriminator="kind")]
    return TypeAdapter(spec).json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
