"""What a spec file may say: pydantic models of architecture and format specs.

A spec is data. Its strings are layouts (`registry.layout`), expressions over facts (`registry.expressions`) and name
patterns with axes in braces (`model.layers.{layer}.mlp.up_proj.weight`). Everything is checked when the spec is loaded,
and all problems are reported at once, in the spec's own terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from registry import expressions
from registry.config_rules import ConfigMap
from registry.encoding import Encoding
from registry.flat_rules import Flat
from registry.parallel import DIMENSIONS
from registry.quantization.declared import Quantizations
from registry.repeats import Repeat, defined, repeated
from registry.tensor_rules import AXIS, Derived, Expression, Model, Rule, Rules, Scalar, named_axes


class Problems(ValueError):
    """Several problems of one spec; `found` lists them."""

    def __init__(self, found: list[str]) -> None:
        self.found = found
        super().__init__("; ".join(found))


class Ignored(Model):
    """Stored entries that no logical tensor answers to, by glob, and why that is right."""

    name: str = Field(description="a glob over stored names")
    reason: str = Field(description="why no logical tensor answers to them, for the report")
    holds: Literal["optimizer", "rng"] | None = Field(
        default=None, description="the state of a training run that they hold, for inspect"
    )


class Tie(Model):
    """`tensor` is the same tensor as `to` wherever `when` is true."""

    tensor: str = Field(description="the logical tensor that is another one")
    to: str = Field(description="the logical tensor that it is")
    when: Expression = Field(description="true where they are tied")


class Extension(Model):
    """What one architecture adds to one format."""

    config: ConfigMap = Field(default=ConfigMap(), description="laid over the format's own config map")
    requires: dict[str, Any] = Field(
        default={}, description="document fields that must have this value to be this architecture"
    )
    options: dict[str, Any] = Field(default={}, description="the format's defaults, where the family has others")
    limits: dict[str, int] = Field(
        default={}, description="parallel dimension -> the most ranks that readers take for this family"
    )
    recognised: bool = Field(
        default=True, description="false where a checkpoint of this format could as well be a better known family's"
    )


class Optional(Model):
    """A part of a model that checkpoints may lack as a whole: the rules that name it in `optional`."""

    reason: str = Field(description="why it may be absent, for the report")
    facts: dict[str, Any] = Field(default={}, description="facts that differ in a model without it")


def _axes(name: str) -> list[str]:
    """The axes that a name pattern spells."""
    return [named.axis for named in named_axes(name)]


class Variant(Model):
    """A spelling of names."""

    fold: str | None = Field(
        default=None, description="the axis that leaves the names and becomes the leading dimension"
    )
    begin: dict[str, str] = Field(
        default={}, description="how names begin -> what stands there instead; the longest that fits holds"
    )
    written: bool = Field(default=True, description="false for a spelling that is only read")

    def spell(self, name: str) -> str | None:
        """The name under this choice, where it begins in one of these ways."""
        fits = max((begin for begin in self.begin if name.startswith(begin)), key=len, default=None)
        return None if fits is None else self.begin[fits] + name.removeprefix(fits)


class Spec(Model):
    """What every spec has."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]+$", description="what the spec is called; its file is named after it")
    description: str = Field(default="", description="one line for lists")
    tensors: dict[str, Rules] = Field(default={}, description="name pattern -> rule, or several with conditions")
    ignored: list[Ignored] = Field(default=[], description="stored entries that are left out, with the reason")
    variants: dict[str, dict[str, Variant]] = Field(
        default={}, description="variant -> choices, the first is written by default"
    )

    define: dict[str, Expression] = Field(
        default={}, description="name -> a condition or size that `when` and `axes` may use by this name"
    )
    repeats: list[Repeat] = Field(default=[], description="rules that hold again for another stack of layers")
    _given: tuple[str, dict[str, Any]] | None = PrivateAttr(default=None)

    def given(self, data: dict[str, Any]) -> Self:
        """This spec, remembering the data that it was made of, in which definitions and repeats are not spelled out."""
        self._given = (self.name, data)
        return self

    def source(self) -> dict[str, Any] | None:
        """The data that this very spec was made of, for specs that extend it."""
        return self._given[1] if self._given is not None and self._given[0] == self.name else None

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, data: Any) -> Any:
        return repeated(defined(data))

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
            used = [*rule.names, *([rule.choice] if rule.choice else [])]
            yield from (f"{pattern}: no variant has the choice {c!r}" for c in used if c not in choices)
            axes = sorted(_axes(pattern))
            for name in (pattern, *rule.names.values(), *rule.aliases):
                if set("{}") & set(AXIS.sub("", name)):
                    yield f"{name}: a brace that names no axis"
                elif sorted(_axes(name)) != axes:
                    yield f"{pattern}: its other name {name} has other axes"
        yield from self._clashes()
        for pattern, rule in self.sound():
            for tensor, inner in rule.parsed.axes.items():
                yield from (
                    f"{pattern}: axis {a!r} of {tensor} is in the name and in the layout"
                    for a in _axes(pattern)
                    if a in inner
                )
            twice = {named.shard for named in named_axes(pattern) if named.shard} & rule.parsed.sharded_over()
            yield from (f"{pattern}: {dim!r} shards an axis of the name and of the layout" for dim in sorted(twice))

    def _clashes(self) -> Iterator[str]:
        """Repeats that repeat nothing, or the same name twice, and definitions of what has a meaning already."""
        made: dict[str, str] = {}
        for repeat in self.repeats:
            names = [name for name in self.tensors if name.startswith(repeat.of)]
            if not names:
                yield f"repeats: no name begins with {repeat.of!r}"
            for name in (n.replace(repeat.of, repeat.to, 1) for n in names if not repeat.leaves(n)):
                if made.setdefault(name, repeat.of) != repeat.of:
                    yield f"repeats: {name} comes of {made[name]!r} and of {repeat.of!r}"
        taken = {*expressions.FUNCTIONS, *expressions.MODEL_FUNCTIONS}
        yield from (f"define: {name!r} is a function" for name in self.define if name in taken)

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
    optional: dict[str, Optional] = Field(default={}, description="parts that checkpoints may lack as a whole")
    spare: dict[str, str] = Field(
        default={}, description="logical tensor -> why formats may leave it out; it is zeros where they do"
    )
    recognised: bool = Field(
        default=True, description="false where nothing but its name tells it from a family that is better known"
    )

    def problems(self) -> Iterator[str]:
        """As in `Spec`, and what only an architecture can get wrong."""
        yield from super().problems()
        yield from (
            f"{pattern}: {rule.optional!r} is no optional part of this spec"
            for pattern, rule in self.rules()
            if rule.optional is not None and rule.optional not in self.optional
        )
        seen: dict[str, tuple[str, set[str]]] = {}
        for pattern, rule in self.sound():
            for tensor, inner in rule.parsed.axes.items():
                axes = {*_axes(pattern), *inner}
                yield from (
                    f"{pattern}: axis {a!r} of {tensor} is not declared" for a in sorted(axes) if a not in self.axes
                )
                if rule.replica:
                    continue
                first = seen.setdefault(tensor, (pattern, axes))
                if first[1] != axes:
                    yield f"{pattern}: {tensor} has other axes here than in {first[0]}"
        yield from self._copies(seen)
        yield from (f"spare: {name!r} is no tensor of this spec" for name in self.spare if name not in seen)
        for tie in self.tied:
            yield from (
                f"tied: {name!r} is no tensor of this spec" for name in (tie.tensor, tie.to) if name not in seen
            )
        known = {*self.facts, *self.config.facts}
        both = sorted(self.facts.keys() & self.config.facts)
        yield from (f"facts: {name!r} is said for every model; config.facts reads it too" for name in both)
        yield from (f"define: {name!r} is a fact of this spec" for name in self.define if name in known)
        yield from (f"define: {name!r} is an axis of this spec" for name in self.define if name in self.axes)
        yield from (
            f"{pattern}: {named.plus!r} is no fact of this spec"
            for pattern in self.tensors
            for named in named_axes(pattern)
            if named.plus is not None and named.plus not in known
        )
        yield from (
            f"optional {part}: {name!r} is no fact of this spec"
            for part, optional in self.optional.items()
            for name in optional.facts
            if name not in known
        )
        used = [(f"axis {axis}", text, set(self.axes)) for axis, text in self.axes.items()]
        used += [(pattern, rule.when, set(_axes(pattern))) for pattern, rule in self.rules() if rule.when]
        used += [(f"{pattern} offset", rule.offset, set()) for pattern, rule in self.rules()]
        used += [(f"tied {tie.tensor}", tie.when, set()) for tie in self.tied]
        for place, text, axes in used:
            names = expressions.parse(text).names
            yield from (f"{place}: {name!r} is no fact of this spec" for name in sorted(names - known - axes))
            if len(names & axes - known) > 1:
                yield f"{place}: differs along {' and '.join(sorted(names & axes - known))}; one axis is the most"
        yield from self._differing(seen)

    def _copies(self, seen: dict[str, tuple[str, set[str]]]) -> Iterator[str]:
        """What is wrong with further copies of tensors; `seen` has every tensor's first name and axes."""
        for pattern, rule in self.sound():
            for tensor, inner in rule.parsed.axes.items() if rule.replica else ():
                if tensor not in seen:
                    yield f"{pattern}: a copy of {tensor}, which no other rule names"
                elif lacks := seen[tensor][1] - {*_axes(pattern), *inner}:
                    yield f"{pattern}: a copy of {tensor} without its axis {sorted(lacks)[0]!r}"

    def _differing(self, seen: dict[str, tuple[str, set[str]]]) -> Iterator[str]:
        """Tensors of which no rule could say what differs: along an axis that they lack, or along two."""
        sized = {axis: along for axis, text in self.axes.items() if (along := self.along(text))}
        everywhere = {*sized.values(), *(along for _, rule in self.rules() if (along := self.along(rule.when)))}
        for tensor, (pattern, axes) in seen.items():
            for axis in sorted(axes & set(sized)):
                if sized[axis] not in axes:
                    yield f"{pattern}: axis {axis!r} of {tensor} differs along {sized[axis]!r}, which {tensor} lacks"
            if len(both := sorted(axes & everywhere)) > 1:
                yield f"{pattern}: {tensor} differs along {' and '.join(both)}; one axis is the most"

    def along(self, text: str | None) -> str | None:
        """The axis that an expression of this spec differs along, if any: one that it names, and that is no fact."""
        names = expressions.parse(text).names if text else frozenset()
        return next((a for a in self.axes if a in names and a not in self.facts and a not in self.config.facts), None)

    def logical(self) -> dict[str, tuple[str, ...]]:
        """Logical tensor -> its axes in canonical order: those of its first rule's name, then those of the layout."""
        found: dict[str, tuple[str, ...]] = {}
        for pattern, rule in self.rules():
            for tensor, axes in rule.parsed.axes.items() if not rule.replica else ():
                found.setdefault(tensor, (*_axes(pattern), *axes))
        return found


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
    apart: bool = Field(
        default=False, description="every rank has one file, in their order, so that ranks may be written one by one"
    )
    parallel: list[str] = Field(default=[], description="the parallel dimensions that the format shards over")
    closed: bool = Field(default=False, description="its readers know only architectures that extend it")
    extensions_of: str | None = Field(
        default=None, description="the format whose extensions hold here too, where an architecture gives none for this"
    )
    extensions: dict[str, Extension] = Field(
        default={}, description="architecture -> what it adds to this format, where its own spec says nothing of it"
    )
    tied: bool = Field(default=False, description="tensors that are another one are written too")
    boxes: bool = Field(default=False, description="a tensor may be stored in any boxes, such as its ranks hold")
    experts_within: Literal["tp"] | None = Field(
        default=None, description="ep x etp are the ranks of this dimension, ep fastest, and not further ones"
    )
    replicate: dict[str, list[str]] = Field(
        default={}, description="parallel dimension -> axes repeated when shorter than it"
    )
    options: dict[str, Option] = Field(default={}, description="the choices that the format offers")
    states: dict[str, list[str]] = Field(
        default={},
        description="kind of optimizer state -> what its tensors' names begin with, or all of them, with a * for the "
        "weight's name; the first is written, any is read",
    )
    objects: dict[str, Expression] = Field(
        default={}, description="entries without data that readers expect -> when to write them"
    )
    flat: Flat | None = Field(default=None, description="optimizer state in flat buffers, which is read too")
    config: ConfigMap = Field(default=ConfigMap(), description="the format's config document against the facts")
    derived: dict[str, Derived] = Field(
        default={}, description="logical tensors that are computed of others, which rules of this format may name"
    )
    encodings: dict[str, Encoding] = Field(
        default={}, description="ways to store a tensor as several, which are decoded on reading"
    )
    quantizations: Quantizations | None = Field(default=None, description="the quantisation that the format offers")

    def problems(self) -> Iterator[str]:
        """As in `Spec`, and what only a format can get wrong."""
        yield from super().problems()
        if self.quantizations is not None:
            yield from self.quantizations.problems(set(self.options))
        for dim in (*self.parallel, *self.replicate):
            if dim not in DIMENSIONS:
                yield f"parallel: unknown dimension {dim!r}"
        for name, derived in self.derived.items():
            yield from (f"derived.{name}.{problem}" for problem in derived.problems())
        for pattern, rule in self.sound():
            if along := set(_axes(pattern)) & expressions.parse(rule.when or "true").names:
                yield f"{pattern}: {sorted(along)[0]!r} in `when`: only families differ along an axis, ask has()"
            if rule.shape is not None and self.parallel and not self.ranked:
                yield f"{pattern}: chunks of a tensor cannot be shown in another shape"
            used = rule.parsed.sharded_over() | {named.shard for named in named_axes(pattern) if named.shard}
            yield from (
                f"{pattern}: shards over {d!r}, which `parallel` does not list"
                for d in sorted(used - set(self.parallel))
            )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec file: an architecture or a format."""
    from pydantic import TypeAdapter

    spec = Annotated[ArchitectureSpec | FormatSpec, Field(discriminator="kind")]
    return TypeAdapter(spec).json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
