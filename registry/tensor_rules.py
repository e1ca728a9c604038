"""One rule of a spec: how a stored tensor, or a family of them, is laid out. `registry.specs` holds the specs."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from registry import expressions
from registry.dtypes import ITEMSIZE
from registry.errors import RegistryError
from registry.layout import Layout, parse
from registry.parallel import DIMENSIONS

#: An axis in a name pattern. `{layer@pp}` counts from the first layer of the stage that stores the tensor;
#: `{mtp+layers}` counts on from the fact `layers`.
AXIS = re.compile(r"\{(\w+)(?:\+(\w+))?(?:@(\w+))?\}")


class Named(NamedTuple):
    """An axis that a name pattern spells: the fact that is added to its index, and what shards it, if anything."""

    axis: str
    plus: str | None
    shard: str | None


def named_axes(pattern: str) -> list[Named]:
    """The axes that a name pattern spells, in order."""
    return [Named(axis, plus or None, shard or None) for axis, plus, shard in AXIS.findall(pattern)]


class Model(BaseModel):
    """Base: unknown keys are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked_expression(text: Any) -> Any:
    if isinstance(text, bool | int | float):
        text = str(text)
    if isinstance(text, str):
        try:
            expressions.parse(text)
        except RegistryError as error:
            raise ValueError(error.brief) from None
    return text


Scalar = bool | int | float | str | None
Expression = Annotated[str, BeforeValidator(_checked_expression)]


class Rule(Model):
    """How one stored tensor (or a family of them, one for each value of the axes in its name) is laid out."""

    layout: str = Field(description="the layout string: products and sums of named axes")
    when: Expression | None = Field(default=None, description="the rule holds only where this is true")
    names: dict[str, str] = Field(default={}, description="variant choice -> the name under that choice")
    aliases: list[str] = Field(default=[], description="other names accepted on reading")
    dtype: str | None = Field(default=None, description="stored in this type whatever the source's")
    scale: float = Field(default=1.0, description="stored = logical * scale + offset")
    offset: Expression = Field(default="0", description="stored = logical * scale + offset, over facts")
    cast_first: Expression = Field(
        default="false", description="values are cast to the type of the weights before anything is done to them"
    )
    codec: str | None = Field(default=None, description="a registered codec that encodes the stored values")
    pad: dict[str, Expression] = Field(
        default={}, description="axis -> the multiple that its stored size is rounded up to"
    )
    stage: Literal["first", "last", "ends"] | None = Field(
        default=None, description="only this pipeline stage stores it, or the first and the last one"
    )
    tied: Expression = Field(default="false", description="written also where its tensor is tied to another")
    optional: str | None = Field(
        default=None, description="may be absent from a checkpoint, together with the rest of this part of the model"
    )
    replica: bool = Field(
        default=False, description="one more copy of its tensor, at every index of axes that the tensor itself lacks"
    )
    choice: str | None = Field(default=None, description="the rule holds only where this choice of a variant does")
    shape: str | None = Field(
        default=None, description="a layout whose shape is stored, where it shows the same bytes in other dimensions"
    )

    def problems(self) -> list[str]:
        """What is wrong with the rule by itself."""
        try:
            parsed = parse(self.layout)
        except RegistryError as error:
            return [error.brief]
        axes = {axis for axes in parsed.axes.values() for axis in axes}
        found = [f"pads axis {axis!r}, which the layout lacks" for axis in self.pad if axis not in axes]
        found += [f"pads axis {axis!r}, which the layout takes apart" for axis in sorted({*self.pad} & parsed.split())]
        found += [
            f"shards over {dim!r}; the parallel dimensions are {', '.join(DIMENSIONS)}"
            for dim in parsed.sharded_over()
            if dim not in DIMENSIONS
        ]
        if self.dtype is not None and self.dtype not in ITEMSIZE:
            found.append(f"unknown dtype {self.dtype!r}")
        if self.scale == 0:
            found.append("scale 0 has no inverse")
        if self.shape is not None:
            try:
                shown = parse(self.shape)
            except RegistryError as error:
                return [*found, error.brief]
            if {t: set(a) for t, a in shown.axes.items()} != {t: set(a) for t, a in parsed.axes.items()}:
                found.append(f"its shape {self.shape!r} has other axes")
        return [f"rule {self.layout!r}: {problem}" for problem in found]

    @property
    def parsed(self) -> Layout:
        """The layout, parsed (and remembered: parsing the same text again costs nothing)."""
        return parse(self.layout)


def as_rules(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"layout": item} if isinstance(item, str) else item for item in items]


Rules = Annotated[list[Rule], BeforeValidator(as_rules)]


class Derived(Model):
    """A logical tensor that no checkpoint has by itself: it is computed of others, for formats that store it too."""

    codec: Literal["absorb"] = Field(description="what computes it, in `registry.derived`")
    of: dict[str, str] = Field(description="what the codec calls a part -> the part's layout, without the index")
    index: list[str] = Field(description="axes that parts and result share: it is computed for each of their indices")
    axes: list[str] = Field(description="the result's further axes, in the order of the codec's dimensions")

    def problems(self) -> list[str]:
        """What is wrong with it by itself."""
        found = []
        for part, text in self.of.items():
            try:
                axes = parse(text).axes.values()
            except RegistryError as error:
                found.append(f"{part}: {error.brief}")
            else:
                if len(axes) != 1 or set(self.index) & {axis for own in axes for axis in own}:
                    found.append(f"{part}: a part is one tensor, without the axes of the index")
        return found
