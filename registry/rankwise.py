"""The names that a training process has for its tensors, as a format: weights by a ranked format's rules, and beside
each weight what the optimizer holds of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import evolve

from registry import catalog, expressions
from registry.bind import bind_source
from registry.errors import ArgumentError
from registry.groups import template_of
from registry.local import Key, stored_name
from registry.model import LogicalModel, format_rules
from registry.parallel import Parallel
from registry.source import Source
from registry.specs import ArchitectureSpec, FormatSpec
from registry.states import with_states


def ranks_spec(names: str, states: Iterable[str] = ()) -> FormatSpec:
    """The format whose names the ranks have, with optimizer state. Raises ArgumentError for one without ranks."""
    spec = catalog.format_spec(names)
    if not spec.ranked:
        ranked = [name for name in catalog.names("format") if catalog.format_spec(name).ranked]
        raise ArgumentError("names= is a format with tensors of every rank", expected=" or ".join(ranked), found=names)
    prefixes = {state: [stored_name(state, "")] for state in states}
    return spec.model_copy(update={"states": prefixes, "ignored": []})


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
    rules = list(with_states(list(format_rules(source.spec, source.architecture)), source.spec, model.states))
    ignored = [*source.spec.ignored]
    return evolve(
        source, model=model, bound=bind_source(source.opened, source.spec, rules, model, source.options, ignored)
    )


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
