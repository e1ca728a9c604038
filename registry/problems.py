"""Words for what does not fit: names with their indices grouped, and why no rule takes a tensor."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from registry import expressions
from registry.model import LogicalModel, said
from registry.tensor_rules import AXIS, Rule, named_axes

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def collapse(names: Sequence[str], limit: int = 20) -> list[str]:
    """Names with their indices grouped: `layers.{0..31}.q_proj`. At most `limit` lines, then a count."""
    grouped: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in (name.replace("\0", "\\0") for name in names):  # which stands for an index here
        grouped[_INDEX.sub("\0", name)].append(tuple(map(int, _INDEX.findall(name))))
    lines = [line for key, indices in grouped.items() for line in _lines(key, sorted(set(indices)))]
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]


def _lines(key: str, indices: Sequence[tuple[int, ...]]) -> list[str]:
    """One line if the indices are all combinations of their columns, or one for each first index and its rest."""
    columns = [sorted(set(column)) for column in zip(*indices, strict=True)]
    if math.prod(map(len, columns)) == len(indices):
        shown = iter([_span(column) for column in columns])
        return [re.sub("\0", lambda _: next(shown), key)]
    found = []
    for rest, same in itertools.groupby(sorted(indices, key=lambda i: (i[1:], i[0])), key=lambda i: i[1:]):
        shown = iter([_span([i[0] for i in same]), *map(str, rest)])
        found.append(re.sub("\0", lambda _, shown=shown: next(shown), key))  # type: ignore[misc]
    return found


def _span(numbers: Sequence[int]) -> str:
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    text = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{{{text}}}" if len(numbers) > 1 else text


def unclaimed(names: Iterable[tuple[str, str]], rules: Sequence[tuple[str, Rule]], model: LogicalModel) -> list[str]:
    """Why no rule takes each of these (name, what else to say of it): the config excludes it, or nobody knows it."""
    matchers = [
        (re.compile(r"(\d+)".join(map(re.escape, AXIS.split(spelled)[::4]))), spelled, rule)
        for pattern, rule in rules
        for spelled in (pattern, *rule.names.values(), *rule.aliases)
    ]
    known: dict[str, list[str]] = defaultdict(list)
    unknown: dict[str, list[str]] = defaultdict(list)
    for name, more in names:
        fits = ((m, spelled, rule) for at, spelled, rule in matchers if (m := at.fullmatch(name)))
        reasons = (_reason(m.groups(), spelled, rule, model) for m, spelled, rule in fits)
        reason = next(reasons, None)
        (unknown[more] if reason is None else known[reason]).append(name)
    lines = [f"no rule claims {line}{more}" for more, same in unknown.items() for line in collapse(same)]
    return [f"{line}: {reason}" for reason, same in known.items() for line in collapse(same)] + lines


def _reason(indices: Sequence[str], pattern: str, rule: Rule, model: LogicalModel) -> str:
    for named, text in zip(named_axes(pattern), indices, strict=True):
        if named.plus is None and named.shard is None and int(text) >= model.sizes.get(named.axis, 0):
            names = expressions.parse(model.architecture.axes[named.axis]).names if named.axis in model.sizes else ()
            why = ", ".join(said(model.architecture, model.facts, name) for name in sorted(names))
            return f"the config has no {named.axis} {text}: {why}"
    return f"by the config there is none here (rule {rule.layout!r}" + (f", when {rule.when})" if rule.when else ")")
