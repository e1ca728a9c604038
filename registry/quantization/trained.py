"""What a training run keeps beside its modules' weights, by the modules' names in the whole model.

A rank counts its layers and its experts from its first one, and modules that hold several experts' weights have the
numbers of all of them in one state: both are undone here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from registry.bind import local_stages
from registry.boxes import interval
from registry.groups import spellings
from registry.model import format_rules, rules_spec
from registry.parallel import Parallel, Stage
from registry.source import Source
from registry.storage import Rank
from registry.tensor_rules import AXIS, Named, named_axes

#: The numbers of one module, by name.
Numbers = dict[str, list[float]]


def module_pattern(pattern: str) -> str:
    """The module that holds a weight; of a weight that is one of several in it (`weight{expert@ep}`) with its index."""
    module, _, leaf = pattern.rpartition(".")
    return f"{module}.{mark[0]}" if (mark := AXIS.search(leaf)) else module


class _Module(NamedTuple):
    """A pattern of modules: what matches their names as a rank has them, and the axes that these spell, in order.

    `inner` is the axis of several weights in one module.
    """

    regex: re.Pattern[str]
    template: str
    axes: list[Named]
    inner: Named | None


def _modules(source: Source) -> Iterator[_Module]:
    owner = rules_spec(source.spec, source.architecture)
    for pattern, rule in format_rules(source.spec, source.architecture):
        for spelling in spellings(owner, pattern, rule, source.model):
            module, _, leaf = spelling.pattern.rpartition(".")
            regex = re.compile(r"(\d+)".join(map(re.escape, AXIS.split(module)[:: AXIS.groups + 1])))
            inner = next(iter(named_axes(leaf)), None)
            yield _Module(regex, module_pattern(spelling.pattern), named_axes(module), inner)


def kept_states(source: Source) -> dict[str, Numbers]:
    """The numbers of every module. Of several ranks those are taken that are safe for all: a range may differ between
    the shards of one matrix, and the largest one, which is the smallest multiplier, holds for it."""
    opened, found = source.opened, dict[str, Numbers]()
    if opened.module_states is None:
        return found
    modules = list({module.template: module for module in _modules(source)}.values())
    stages = local_stages(opened, [module.template for module in modules]) if source.spec.ranked else []
    for rank, kept in opened.module_states().items():
        for local, numbers in kept.items():
            for name, own in _placed(source, modules, stages, rank, local, numbers):
                known = found.setdefault(name, own)
                for key, values in own.items():
                    safe = max if "inv" in key else min
                    if key in known and len(known[key]) == len(values):
                        known[key] = [safe(a, b) for a, b in zip(known[key], values, strict=True)]
    return found


def _placed(
    source: Source, modules: list[_Module], stages: list[Stage], rank: Rank | None, local: str, numbers: Numbers
) -> Iterator[tuple[str, Numbers]]:
    """(module of the whole model, its numbers) of what a rank's module keeps."""
    parallel = source.opened.parallel or Parallel()

    def span(named: Named) -> tuple[int, int]:
        size = source.model.sizes[named.axis]
        if rank is None or named.shard is None:
            return 0, size
        if named.shard == "pp":
            return next(((s.first, s.count) for s in stages if (s.pp, s.vpp) == (rank.pp, rank.vpp)), (0, 0))
        at = parallel.index(named.shard, rank.tp, rank.ep)
        return interval(size, at, parallel.size(named.shard), f"{named.axis}@{named.shard}")

    for module in modules:
        if match := module.regex.fullmatch(local):
            index = [int(i) + span(named)[0] for i, named in zip(match.groups(), module.axes, strict=True)]
            if module.inner is None:
                yield AXIS.sub("%d", module.template) % tuple(index), numbers
                break
            first, count = span(module.inner)
            for k in range(count):
                own = {key: values[k::count] for key, values in numbers.items() if len(values) % count == 0}
                yield AXIS.sub("%d", module.template) % (*index, first + k), own
            break
