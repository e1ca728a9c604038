"""The names that a training process has for its tensors, as a format: weights by a ranked format's rules, and beside
each weight what the optimizer holds of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import evolve

from registry import catalog, expressions
from registry.bind import bind_source
from registry.dtypes import ITEMSIZE
from registry.errors import ArgumentError
from registry.flat import bind_flat
from registry.groups import template_of
from registry.model import LogicalModel, format_rules, rules_spec
from registry.parallel import Parallel
from registry.source import Source
from registry.specs import ArchitectureSpec, FormatSpec
from registry.states import MASTER, is_state, state_tensor, with_states
from registry.training.local import Key, stored_name


def ranks_spec(names: str, states: Iterable[str] = (), parallel: Parallel | None = None) -> FormatSpec:
    """The format whose names the ranks have, with optimizer state.

    It has tensors of every rank, or it is that of the models themselves: those are whole, or sharded by DTensor, which
    no layout speaks of. Raises ArgumentError for others.
    """
    spec = catalog.format_spec(names)
    known = [catalog.format_spec(name) for name in catalog.names("format")]
    if not spec.ranked and spec.rules_from != "architecture":
        fitting = [one.name for one in known if one.ranked or one.rules_from == "architecture"]
        raise ArgumentError("names= is a format with tensors of every rank", expected=" or ".join(fitting), found=names)
    if not spec.ranked and parallel is not None and (parallel.tp, parallel.pp, parallel.ep) != (1, 1, 1):
        raise ArgumentError(
            f"in the names of {names} a model is whole, or sharded by DTensor", found=f"parallel= {parallel}",
            expected="one rank of tp, pp and ep", hint="leave parallel= out",
        )  # fmt: skip
    prefixes = {state: [stored_name(state, "")] for state in states}
    return spec.model_copy(update={"states": prefixes, "ignored": [], "flat": None, "tied": False})


def padded_sizes(
    spec: FormatSpec, architecture: ArchitectureSpec, held: Mapping[Key, Sequence[int]], parallel: Parallel
) -> dict[str, int]:
    """Axis -> its size with the padding that a process has, by the shapes that it holds."""
    found: dict[str, int] = {}
    shapes = {key.name: shape for key, shape in held.items()}
    for pattern, rule in format_rules(spec, architecture):
        for dim, n in zip(rule.parsed.dims, shapes.get(template_of(pattern), ()), strict=False):
            axis, _, shard = str(dim).partition("@")
            if axis in rule.pad:
                found[axis] = n * (parallel.size(shard) if shard else 1)
    return found


def pad_options(
    spec: FormatSpec, architecture: ArchitectureSpec, sizes: Mapping[str, int], parallel: Parallel
) -> dict[str, int]:
    """The options that pad axes to just these sizes; none where the defaults do."""
    found: dict[str, int] = {}
    for axis, option, names in _paddings(spec, architecture):
        if axis in sizes:
            step = math.prod(parallel.size(name) for name in names & parallel.env().keys())
            if sizes[axis] % (step * spec.options[option].default):
                found[option] = sizes[axis] // step
    return found


def padded_axes(spec: FormatSpec, architecture: ArchitectureSpec) -> set[str]:
    """The axes that a format pads as far as an option says."""
    return {axis for axis, _, _ in _paddings(spec, architecture)}


def _paddings(spec: FormatSpec, architecture: ArchitectureSpec) -> Iterator[tuple[str, str, frozenset[str]]]:
    """(axis, option, all names that its padding depends on)."""
    for _, rule in format_rules(spec, architecture):
        for axis, text in rule.pad.items():
            names = frozenset(expressions.parse(text).names)
            option = next((name for name in sorted(names) if name in spec.options), None)
            if option is not None:
                yield axis, option, names


def widened(source: Source, sizes: Mapping[str, int]) -> Source:
    """The source with the padding of some axes as part of the model: a run goes on with the very rows that it had."""
    grown = {axis: n for axis, n in sizes.items() if n > source.model.sizes.get(axis, n)}
    if not grown:
        return source
    model = _resized(source.model, grown)
    owner = rules_spec(source.spec, source.architecture)
    rules = list(with_states(list(format_rules(source.spec, source.architecture)), source.spec, model.states, owner))
    # What was found in flat buffers is of ranks; those of a format without ranks are cut out of its buffers anew.
    ranked = source.spec.ranked
    opened = evolve(source.opened, pieces=[piece for piece in source.opened.pieces if ranked or piece.rank is None])
    bound = bind_source(opened, source.spec, rules, model, source.options, [*source.spec.ignored])
    if not ranked:
        bind_flat(opened, source.spec, model, source.options, bound)
    return evolve(source, opened=opened, model=model, bound=bound)


#: What is said where weights of less than 32 bits have copies that the optimizer of a run has no place for.
NO_MASTER = "the fp32 copies of the weights that the checkpoint has are not loaded: this optimizer has none"


def without_master(source: Source) -> Source:
    """The source for an optimizer that steps the weights themselves and has no copies of them."""
    if MASTER not in source.model.states:
        return source
    begin = state_tensor(MASTER, "")
    model = evolve(
        source.model,
        tensors={name: axes for name, axes in source.model.tensors.items() if not name.startswith(begin)},
        states=tuple(state for state in source.model.states if state != MASTER),
    )
    rounded = any(ITEMSIZE[dtype] < 4 for name, types in source.dtypes.items() for dtype in types if not is_state(name))
    groups = [g for g in source.bound.groups if not any(f.tensor.startswith(begin) for f in g.fragments)]
    notes = (*source.notes, *([NO_MASTER] if rounded else []))
    return evolve(source, model=model, bound=evolve(source.bound, groups=groups), notes=notes)


def _resized(model: LogicalModel, grown: Mapping[str, int]) -> LogicalModel:
    return evolve(
        model,
        sizes={**model.sizes, **grown},
        whole=evolve(model.whole, sizes={**model.whole.sizes, **grown}),
        varying={
            axis: tuple(evolve(kind, sizes={**kind.sizes, **grown}) for kind in kinds)
            for axis, kinds in model.varying.items()
        },
    )
