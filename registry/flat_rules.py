"""What a format's spec says of optimizer state that is not stored weight by weight; `registry.flat` reads it."""

from __future__ import annotations

from pydantic import Field

from registry.tensor_rules import Expression, Model, Scalar


class Division(Model):
    """What a field of a parameter group says of its weights, where any group has it."""

    field: str = Field(description="the field of the groups")
    value: Scalar = Field(description="what it is for the weights meant here, and for no others")
    weights: list[str] = Field(default=[], description="globs over their names")
    vectors: bool = Field(default=False, description="weights of one dimension are meant too")


class Listed(Model):
    """Optimizer state that is listed by parameter groups, in the order in which the program makes its weights."""

    name: str = Field(description="a regular expression over names: groups chain, group, place, state")
    states: dict[str, str] = Field(description="state in a name -> kind of state")
    copies: str = Field(default="", description="the state that only weights of less than 32 bits have")
    groups: list[Division] = Field(default=[], description="which weights are in which groups")


class Flat(Model):
    """Optimizer state that lies in flat buffers of model-parallel ranks; `registry.flat` reads and writes it."""

    name: str = Field(description="a regular expression over names: groups chain, group, chunk, dtypes, bucket, state")
    states: dict[str, str] = Field(description="state in a name -> kind of state")
    layout: str = Field(
        description="the format whose files of every rank hold the weights that are in a rank's buffers"
    )
    align: int = Field(description="every weight's state begins at a multiple of so many elements")
    order: list[str] = Field(description="globs over that format's names in the order of making; # is the layer")
    buffers: list[str] = Field(default=[], description="globs over tensors of the model that no optimizer steps")
    experts: str = Field(default="", description="a glob over what the second of several optimizers steps")
    shared: dict[str, Expression] = Field(
        default={}, description="glob over weights that stages share -> when; each has a bucket of its own"
    )
    listed: Listed | None = Field(default=None, description="the form of optimizers without flat buffers")
    written: bool = Field(default=False, description="the format's own optimizer state is written so")
