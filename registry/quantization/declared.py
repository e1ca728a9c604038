"""Quantisation that a format offers, as its spec declares it: what each scheme makes of a weight, and out of what.

A scheme takes the place of single weights of the unquantised target with several stored tensors: the values in few
bits, and the scales that they are to be multiplied with. Every one has a shape and a formula. `registry.
formulas` evaluates the formulas, `registry.quantization.layouts` cuts the shapes for every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from registry.dtypes import ITEMSIZE
from registry.errors import RegistryError
from registry.quantization import formulas
from registry.tensor_rules import Expression, Model

#: What a stored tensor's shape may be made of. `in/group` is one for every group of columns, `out/2` two rows in one.
DIMENSIONS = ("1", "expert", "out", "in", "out/2", "in/2", "in/group")
#: Names that formulas may use beside the ranges, the numbers, and what the scheme itself defines: the weight, the
#: columns of a group, the types of the target's weights and of the source's, and whether several weights make this one.
KNOWN = ("plain", "group", "dtype", "source_dtype", "fused")


def _formula(text: Any) -> Any:
    text = str(text) if isinstance(text, int | float) and not isinstance(text, bool) else text
    if isinstance(text, str):
        try:
            formulas.parse(text)
        except RegistryError as error:
            raise ValueError(error.brief) from None
    return text


def _shape(text: str) -> str:
    if unknown := [dim for dim in text.split() if dim not in DIMENSIONS]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(DIMENSIONS)}")
    if len({dim.split("/")[0] for dim in text.split()} - {"1"}) < len([d for d in text.split() if d != "1"]):
        raise ValueError(f"{text!r} names a dimension twice")
    return text


def _stored_type(name: str) -> str:
    if name not in ITEMSIZE and name != "model":
        raise ValueError(f"unknown dtype {name!r}")
    return name


FormulaText = Annotated[str, BeforeValidator(_formula)]


class Range(Model):
    """Something that a calibration measured, by what it is called in the file that holds it."""

    names: list[str] = Field(
        default=[],
        description="entries of a calibration file, any of which is taken: {module} is the HuggingFace module of a"
        " weight, {parent} the one around it",
    )
    shape: Literal["one", "in", "out", "matrix"] = Field(
        default="one",
        description="one number, or one for each column or row; `matrix` are weights that the calibration has changed,"
        " which then take the place of the source's",
    )
    state: str | None = Field(
        default=None,
        pattern=r"^\w+\[\d+\]$",
        description="where a training checkpoint keeps it, if no calibration is given: key[index] of a module's state",
    )
    optional: bool = Field(default=False, description="formulas ask given() whether it is there")
    positive: bool = Field(default=True, description="zero and negative numbers are refused")


class StoredTensor(Model):
    """One of the tensors that are stored of a quantised weight."""

    name: str = Field(
        default="", description="its name, where that is not {module}.<key>; {parent} is the module around it"
    )
    shape: Annotated[str, AfterValidator(_shape)] = Field(
        description="dimensions out of " + ", ".join(DIMENSIONS) + "; `expert` is left out where there are none"
    )
    dtype: Annotated[str, AfterValidator(_stored_type)] = Field(
        description="its type; `model` is that of the model's other weights"
    )
    packed: Literal["int4", "fp4"] | None = Field(
        default=None, description="two values in a byte, the first in its low half"
    )
    blocks: str | None = Field(
        default=None, description="the registered codec (`registry.encoding.Blocks`) that makes the bytes of each group"
    )
    value: FormulaText = Field(description="what it holds")
    when: Expression | None = Field(default=None, description="stored only where this is true, over options and facts")
    modules: list[str] = Field(default=[], description="globs over modules that store it, where not all do")


class Beside(Model):
    """A tensor of the unquantised target that is stored anew with a weight's scheme, such as the norm before it."""

    modules: list[str] = Field(description="globs over modules that it belongs to")
    tensor: str = Field(description="its name; {parent} is the module around the weight's, {layer} that around it")


class Only(Model):
    """What a model must be like."""

    when: Expression = Field(description="true where it is, over facts")
    reason: str = Field(description="what is asked for, for the error")


class Scheme(Model):
    """One kind of quantisation."""

    description: str = Field(default="", description="one line for lists")
    modules: list[str] = Field(default=[], description="globs over modules, where they are not the usual ones")
    together: list[list[str]] = Field(
        default=[], description="globs over modules of one layer whose ranges are taken over all of them"
    )
    parameters: dict[str, Expression] = Field(
        default={}, description="numbers and choices that formulas use, as expressions over options and facts"
    )
    groups: list[int] = Field(default=[], description="the sizes that a group of columns may have, the usual one first")
    let: dict[str, FormulaText] = Field(default={}, description="name -> formula of something that is not stored")
    tensors: dict[str, StoredTensor] = Field(default={}, description="name within the module -> a stored tensor")
    original: FormulaText = Field(default="plain", description="what the stored values stand for")
    decoded: FormulaText | None = Field(default=None, description="what they are read as, in terms of what is stored")
    restored: FormulaText | None = Field(
        default=None, description="what the weights were before they were smoothed, where that is something else"
    )
    beside: dict[str, list[Beside]] = Field(default={}, description="further tensors, by their names in formulas")
    only: list[Only] = Field(default=[], description="the models that can be quantised so")
    needs: list[list[str]] = Field(default=[], description="ranges of which all of one list must be there")
    leaves: Expression | None = Field(
        default=None, description="a list of globs over modules that it leaves as they are, over options and facts"
    )
    experts: Literal["quantized", "plain", "refused"] = Field(
        default="quantized", description="what becomes of weights of experts"
    )
    config: dict[str, Expression] = Field(
        default={}, description="field of the config document -> what it says, over the options and `group`"
    )


class Further(Model):
    """Schemes that are used besides that of the weights."""

    option: str = Field(description="the option that names one")
    prefix: str = Field(description="what the names of these schemes begin with, before what the option says")


class Mixed(Model):
    """A scheme of other schemes: each module has its own."""

    scheme: str = Field(description="the choice of the option that means it")
    option: str = Field(description="the option that names a JSON file: module or glob -> {algorithm, ...}")
    file: str = Field(description="the file beside the config that lists what each module has")
    layers: str = Field(description="the field of that file that holds the modules")
    algorithm: str = Field(description="the field of a module that names its scheme")
    group: str = Field(description="the field of a module that says how large its groups of columns are")
    config: dict[str, Expression] = Field(
        default={}, description="field of the config document, and of the file, -> what it says"
    )


def _extended(schemes: dict[str, Any], name: str, above: tuple[str, ...]) -> Any:
    """One scheme with what it extends filled in."""
    own = schemes[name]
    base = own.get("extends") if isinstance(own, dict) else None
    if base is None:
        return own
    if base not in schemes or base in (*above, name):
        raise ValueError(f"{name} extends {base!r}, which is no other scheme")
    return _laid_over(_extended(schemes, base, (*above, name)), {k: v for k, v in own.items() if k != "extends"})


def _laid_over(base: Any, own: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    kept = {key: value for key, value in base.items() if key not in own}
    return kept | {key: _laid_over(base.get(key), value) for key, value in own.items() if value is not None}


class Quantizations(Model):
    """The quantisation that a format offers."""

    modules: list[str] = Field(description="globs over modules whose weights are quantised")
    weight: str = Field(default="weight", description="what a module's weight is called")
    ranges: dict[str, Range] = Field(default={}, description="what a calibration may give, by its name in formulas")
    option: str = Field(description="the option that names the scheme")
    further: Further | None = Field(default=None, description="schemes to be used besides")
    group: str | None = Field(default=None, description="the option that says how large groups of columns are")
    exclude: str | None = Field(default=None, description="the option that lists globs over modules to be left as is")
    calibration: str | None = Field(default=None, description="the option that names the file of ranges")
    mixed: Mixed | None = Field(default=None, description="schemes that differ between modules")
    config: dict[str, Expression] = Field(
        default={}, description="field of the config document -> what it says whatever the scheme, over the options"
    )
    only: list[Only] = Field(default=[], description="the models that can be quantised")
    schemes: dict[str, Scheme] = Field(description="the schemes")

    @model_validator(mode="before")
    @classmethod
    def _extend(cls, data: Any) -> Any:
        """Fill in what schemes take over from the scheme that they extend; null takes something away."""
        if not isinstance(data, dict) or not isinstance(data.get("schemes"), dict):
            return data
        given, made = data["schemes"], {}
        for name in given:
            made[name] = _extended(given, name, ())
        return {**data, "schemes": made}

    def stores(self, stored: StoredTensor, module: str) -> bool:
        """Is a tensor of a scheme stored of this module?"""
        return not stored.modules or any(fnmatchcase(module, glob) for glob in stored.modules)

    def applies(self, scheme: Scheme, module: str) -> bool:
        """Does a scheme quantise this module?"""
        return any(fnmatchcase(module, glob) for glob in scheme.modules or self.modules)

    def problems(self, options: set[str]) -> Iterator[str]:
        """What is wrong with it, in the spec's own terms."""
        own = [self.option, self.group, self.exclude, self.calibration]
        own += [self.further.option] if self.further else []
        own += [self.mixed.option] if self.mixed else []
        yield from (f"quantizations: no option {name!r}" for name in own if name and name not in options)
        for name, scheme in self.schemes.items():
            texts = {**scheme.let, **{key: stored.value for key, stored in scheme.tensors.items()}}
            texts |= {"original": scheme.original}
            texts |= {k: v for k, v in (("decoded", scheme.decoded), ("restored", scheme.restored)) if v is not None}
            known = {*KNOWN, *self.ranges, *scheme.beside, *scheme.parameters, *scheme.let, *scheme.tensors}
            for key, text in texts.items():
                for used in sorted(formulas.parse(text).names - known):
                    yield f"quantizations.{name}.{key}: {used!r} is no range and nothing that the scheme defines"
            for key, stored in scheme.tensors.items():
                if "in/group" in stored.shape and not scheme.groups:
                    yield f"quantizations.{name}.{key}: in/group of a scheme without groups"
                if stored.blocks is not None and (stored.shape.split()[-1:] != ["in/group"] or stored.dtype != "uint8"):
                    yield f"quantizations.{name}.{key}: blocks are uint8, and what is last in their shape is in/group"
                if (stored.packed is not None) != ("/2" in stored.shape):
                    yield f"quantizations.{name}.{key}: two values in a byte need a halved dimension"
