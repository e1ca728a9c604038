"""Draft the spec of an unknown architecture from a HuggingFace directory: config.json and the headers of its tensors.

Each tensor gets the rule of the known architecture whose name ends most alike and whose layout gives the shape that is
stored; among equals, that of the known architecture that explains most of the model. What fits no habit is laid out as
it is stored. All that is not certain is said beside it, `# ?: why`; a draft is checked as any spec is, and binds every
tensor that it was made of.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attrs import frozen

from registry.config_rules import FactMap
from registry.drafting.habits import (
    Habit,
    Habits,
    Known,
    Shape,
    Template,
    evaluated_size,
    fits,
    known,
    mentions,
    templates,
)
from registry.drafting.sizes import Guesses, guess, number_fields
from registry.drafting.text import Draft, Line
from registry.errors import ArgumentError, CheckpointError
from registry.layout import Layout, parse
from registry.source import opened_at
from registry.tensor_rules import AXIS

_HOLES = ("layer", "expert", "part", "inner")
_NAME = re.compile(r"[^A-Za-z0-9_]+")


def draft(path: Path, *, name: str | None = None, leave: Collection[str] = ()) -> Draft:
    """Draft a spec called `name` (by default the config's model_type); `leave` are known architectures not to look at.

    Raises CheckpointError for what cannot be read, and ArgumentError for a directory without tensors or a name.
    """
    opened, spec = opened_at(path)
    if spec.rules_from != "architecture" or not opened.document:
        raise ArgumentError(
            "a spec is drafted of a model as HuggingFace has it", where=path, expected="config.json and safetensors",
            found=spec.name, hint="get the model's own directory",
        )  # fmt: skip
    if not opened.pieces:
        raise CheckpointError(
            "a directory without tensors", where=path, expected="at least one", found="none",
            hint="get the model again, with all of its files",
        )  # fmt: skip
    if braced := [piece.name for piece in opened.pieces if "{" in piece.name or "}" in piece.name]:
        raise CheckpointError(
            "a tensor with braces in its name", where=path, expected="names that a spec can say",
            found=repr(braced[0])[:200], hint="rename it: braces stand for indices in a spec",
        )  # fmt: skip
    document = opened.document
    called = name or document.get("model_type")
    if not isinstance(called, str) or not re.fullmatch(r"[A-Za-z0-9_.\-]+", called):
        raise ArgumentError(
            "the config names no model_type", where=path, expected="letters, digits and _ . -", found=repr(called),
            hint="name the architecture with --name",
        )  # fmt: skip
    return _Drafter(called, document, {p.name: p.shape for p in opened.pieces}, leave).draft()


@frozen
class _Chosen:
    """A template and the habits that it may follow, the likeliest first."""

    template: Template
    habits: Sequence[Habit]
    doubt: str | None


class _Drafter:
    def __init__(
        self, name: str, document: Mapping[str, Any], tensors: Mapping[str, Shape], leave: Collection[str]
    ) -> None:
        self.document = document
        self.found = templates(tensors)
        self.guesses, self.known = _facts(document, self.found, leave)
        layers = Counter(one.facts.get("layers") for one in self.known)
        count = layers.most_common(1)[0][0] if layers else None
        if type(count) is int:
            self.found = templates(tensors, count)
        self.habits = Habits(self.known)
        fitting = {t.name: [h for h in self.habits.like(t) if fits(h, t)] for t in self.found}
        self.base = _base(self.known, fitting)
        self.fitting = fitting
        architectures = document.get("architectures")
        nearest = f", in which most is as in {self.base.spec.name}" if self.base else ""
        self.out = Draft(name, f"{name}{nearest}")
        self.out.constants = {"model_type": Line(name)}
        if isinstance(architectures, list):
            self.out.constants["architectures"] = Line(architectures)

    def draft(self) -> Draft:
        """The whole draft."""
        self._within()
        chosen = [self._choose(template) for template in self.found]
        ignored = self._ignored()
        for one in sorted((one for one in chosen if one.template.name not in ignored), key=self._order):
            self._rule(one)
        patterns = {_template(pattern): pattern for pattern in self.out.tensors}
        order = [patterns[one.template.name] for one in chosen if one.template.name in patterns]
        self.out.tensors = {pattern: self.out.tensors[pattern] for pattern in order}  # as the files have them
        self._ties()
        self._needed()
        return self.out

    def _order(self, one: _Chosen) -> int:
        """What is the surest has its names and axes first."""
        if not one.habits:
            return 3
        return 0 if one.habits[0].known is self.base and one.habits[0].whole else 1 if one.habits[0].whole else 2

    # Which habit.

    def _choose(self, template: Template) -> _Chosen:
        habits = self.fitting[template.name]
        if not habits:
            return _Chosen(template, (), "no known tensor of such a name has this shape")
        votes = Counter(habit.rule.layout for habit in habits)

        def rank(habit: Habit) -> tuple[Any, ...]:
            own = self.base is not None and habit.known is self.base
            return habit.whole, habit.alike, self._agrees(habit, template), own, votes[habit.rule.layout]

        habits = sorted(habits, key=rank, reverse=True)
        best = habits[0]
        rivals = {h.rule.layout for h in habits if h.alike == best.alike and h.rule.layout != best.rule.layout}
        doubt = None
        if not best.whole:
            doubt = f"named like {best.pattern} of {best.known.spec.name}"
        elif len({habit.known.spec.name for habit in habits if habit.rule.layout == best.rule.layout}) == 1:
            doubt = f"of the known families only {best.known.spec.name} calls one so"
        if rivals:
            doubt = f"{doubt or f'as in {best.known.spec.name}'}; elsewhere it is {' or '.join(sorted(rivals)[:2])}"
        return _Chosen(template, habits, doubt)

    def _agrees(self, habit: Habit, template: Template) -> bool:
        """Is the condition of a rule true of the layers that have such tensors, and of no other?"""
        if not template.holes:
            return habit.known.holds(habit.rule, 0) is True
        there = set(template.counts(0))
        count = habit.known.size(habit.axes[0], 0) or 0
        return all(habit.known.holds(habit.rule, i) is (i in there) for i in range(count))

    def _where(self, template: Template, axes: Sequence[str]) -> str | None:
        """A condition that lists the layers, where not all have such tensors."""
        if not axes or len(template.counts(0)) == self._own_size(axes[0]):
            return None
        return f"{axes[0]} in {template.counts(0)}"

    # Rules.

    def _rule(self, one: _Chosen) -> None:
        """The rule of the first habit whose tensors and axes the draft can have."""
        for habit in one.habits:
            axes = {axis for axes in habit.rule.parsed.axes.values() for axis in axes} | set(habit.axes)
            if not self._clashes(habit, one.template) and all(self._axis(axis, habit.known) for axis in sorted(axes)):
                break
        else:
            clash = "what it is called like has another tensor of that kind, or axes of other sizes"
            return self._plain(one.template, clash if one.habits else str(one.doubt))
        value = {"layout": habit.rule.layout} | ({"shape": habit.rule.shape} if habit.rule.shape else {})
        doubt = one.doubt
        if habit is not one.habits[0]:
            first = one.habits[0]
            doubt = f"not {first.rule.layout} as in {first.known.spec.name}, whose tensors or axes are taken already"
        when = habit.rule.when
        if when is not None and self._agrees(habit, one.template) and self._sayable(when, habit.known):
            value["when"] = when
        elif where := self._where(one.template, habit.axes):
            value["when"] = where
            doubt = f"{doubt + '; ' if doubt else ''}these layers were counted"
        self._place(_filled(one.template, habit.axes), value if set(value) > {"layout"} else value["layout"], doubt)
        return None

    def _sayable(self, condition: str, those: Known) -> bool:
        """Can the draft read the facts of a condition? Adds them where it can."""
        return all(self._fact(name, those) for name in those.names(condition))

    def _clashes(self, habit: Habit, template: Template) -> bool:
        """Is one of the rule's tensors laid out already, under another name that is there at the same layers?"""
        for pattern, lines in self.out.tensors.items():
            for line in lines:
                said = _layout(line)
                if set(said.tensors) & set(habit.rule.parsed.tensors):
                    there = next(t for t in self.found if t.name == _template(pattern))
                    both = set(there.counts(0) if there.holes else [0]) & set(
                        template.counts(0) if template.holes else [0])  # fmt: skip
                    if both or set(said.axes) != set(habit.rule.parsed.axes):
                        return True
        return False

    def _plain(self, template: Template, doubt: str) -> None:
        """Lay a tensor out as it is stored, in axes that have its sizes."""
        label = ".".join(filter(None, (_NAME.sub("_", s) for s in template.segments if s != "{}")))
        label = re.sub(r"(^|\.)(\d)", r"\1n\2", label)  # a label begins with a letter
        taken = {t for lines in self.out.tensors.values() for line in lines for t in _layout(line).tensors}
        while label in taken:
            label += "_again"
        names = [self._own_axis(hole, template.counts(hole)[-1] + 1) for hole in range(template.holes)]
        by_shape: dict[Shape, list[int]] = defaultdict(list)
        for index, size in template.shapes.items():
            by_shape[size].append(index[0] if index else 0)
        pattern = _filled(template, names)
        for i, (size, layers) in enumerate(by_shape.items()):
            dims: list[str] = []
            for n in size:
                dims.append(self._sized(n, {*dims, *names}))
            tensor = label if i == 0 else f"{label}.shape{i + 1}"
            layout = f"{tensor}: {' '.join(dims)}".rstrip()
            where = f"layer in {sorted(set(layers))}" if len(by_shape) > 1 else self._where(template, names)
            value = {"layout": layout, "when": where} if where else layout
            self._place(pattern, value, f"{doubt}; axes are guessed by size")

    def _place(self, pattern: str, value: Any, doubt: str | None) -> None:
        self.out.tensors.setdefault(pattern, []).append(Line(value, doubt))

    def _sized(self, size: int, taken: Collection[str]) -> str:
        """An axis of a size, which the tensor does not have yet; never that of the layers, which differ."""
        taken = {*taken, _HOLES[0]}
        for axis in self.out.axes:
            if axis not in taken and self._own_size(axis) == size:
                return axis
        for one in ([self.base] if self.base else []) + self.known:
            for axis in one.spec.axes:
                fact = one.spec.axes[axis]
                if fact not in one.spec.config.facts or axis in {*taken, *self.out.axes}:
                    continue
                if one.size(axis, 0) == size and mentions(self.document, one.spec, fact) and self._axis(axis, one):
                    return axis
        axis = f"size_{size}"
        while axis in taken or axis in self.out.axes:
            axis += "_again"
        self.out.axes[axis] = Line(str(size), "which field of the config says so is not known")
        return axis

    # Axes and facts.

    def _own_size(self, axis: str, layer: int = 0) -> int | None:
        return evaluated_size(self.out.axes[axis].value, self.out.axes, self.out.values, layer)

    def _own_axis(self, hole: int, size: int) -> str:
        """An axis of indices: that of the layers is long enough for all of them, others are as long as they are."""
        axis = _HOLES[hole] if hole < len(_HOLES) else f"index_{hole}"
        found = self._own_size(axis) if axis in self.out.axes else None
        if found == size or (hole == 0 and found is not None and found > size):
            return axis
        for one in ([self.base] if self.base else []) + self.known:
            if found is None and one.size(axis, 0) == size and self._axis(axis, one):
                return axis
        name = axis if found is None else f"{axis}_{size}"
        self.out.axes[name] = Line(str(size), "counted; which field of the config says so is not known")
        return name

    def _axis(self, axis: str, those: Known) -> bool:
        """Have an axis as a known architecture has it. False where the draft has it with another size."""
        layers = range(max([1, *(t.counts(0)[-1] + 1 for t in self.found if t.holes)]))
        wanted = [those.size(axis, layer) for layer in layers]
        if axis in self.out.axes:
            return [self._own_size(axis, layer) for layer in layers] == wanted
        text = those.spec.axes[axis]
        if not all(self._fact(name, those) for name in those.names(text)):
            return False
        self.out.axes[axis] = Line(text)
        if [self._own_size(axis, layer) for layer in layers] != wanted:
            del self.out.axes[axis]
            return False
        return True

    def _fact(self, name: str, those: Known) -> bool:
        """Have a fact as a known architecture reads it. False where the draft has another value for it."""
        if name in self.out.values:
            return bool(self.out.values[name] == those.facts.get(name))
        if name in those.spec.facts:
            doubt = f"so it is of {those.spec.name}; a config does not say it"
            self.out.facts[name] = Line(those.spec.facts[name], doubt)
            self.out.values[name] = those.spec.facts[name]
            return True
        if name in self.guesses.facts:
            path, value = self.guesses.facts[name]
            self.out.config[name] = Line(path, self.guesses.doubts.get(name) or f"by its number alone: {value}")
            self.out.values[name] = value
            return True
        entry = those.entries.get(name)
        if entry is None:
            return False
        self.out.config[name] = Line(_entry(entry))
        self.out.values[name] = those.facts.get(name)
        return True

    def _within(self) -> None:
        within = self.base.spec.config.within if self.base else None
        self.out.within = within if within in self.document else None

    def _ignored(self) -> set[str]:
        gone = set()
        for template in self.found:
            for ignored in self.base.spec.ignored if self.base else ():
                if fnmatchcase(template.name, ignored.name) and not self.fitting[template.name]:
                    self.out.ignored.append(Line(ignored.model_dump(exclude_defaults=True)))
                    gone.add(template.name)
        return gone

    def _ties(self) -> None:
        """Tensors that the files lack because they are others, as the config says and the nearest spec has it."""
        base = self.base
        for tie in base.spec.tied if base else ():
            here = {t for lines in self.out.tensors.values() for line in lines for t in _layout(line).tensors}
            if base is None or tie.to not in here or not self._sayable(tie.when, base):
                continue
            if tie.tensor not in here:
                named = [(p, r) for p, r in base.spec.rules() if r.parsed.tensors == (tie.tensor,)]
                if not named or "{" in named[0][0]:
                    continue
                doubt = f"not in the files, where the two are tied: so it is called in {base.spec.name}"
                self._place(named[0][0], named[0][1].layout, doubt)
            self.out.tied.append(Line(tie.model_dump()))

    def _needed(self) -> None:
        """All else that the nearest spec knows of the config, where the config says it, or of the family."""
        base = self.base
        if base is None:
            return
        for name, entry in base.entries.items():
            if name not in self.out.values and mentions(self.document, base.spec, name):
                self.out.config[name] = Line(_entry(entry))
                self.out.values[name] = base.facts.get(name)
        for name, value in base.spec.facts.items():
            if name not in self.out.values:
                self.out.facts[name] = Line(value, f"so it is of {base.spec.name}; a config does not say it")
                self.out.values[name] = value


def _layout(line: Line) -> Layout:
    return parse(line.value if isinstance(line.value, str) else line.value["layout"])


def _filled(template: Template, axes: Sequence[str]) -> str:
    """The template with its axes in the holes."""
    rest = iter(axes)
    return ".".join(f"{{{next(rest)}}}" if s == "{}" else s for s in template.segments)


def _template(pattern: str) -> str:
    return AXIS.sub("{}", pattern)


def _entry(entry: FactMap) -> Any:
    """A fact's place in the config, as short as a spec may say it."""
    value = entry.model_dump(exclude_defaults=True)
    if isinstance(value.get("field"), list) and len(value["field"]) == 1:
        value["field"] = value["field"][0]
    if "values" in value:
        value["values"] = [list(pair) for pair in value["values"]]
    return value["field"] if list(value) == ["field"] and isinstance(value["field"], str) else value


def _facts(
    document: Mapping[str, Any], found: Sequence[Template], leave: Collection[str]
) -> tuple[Guesses, list[Known]]:
    """What can be told of sizes whose fields are unknown, and the known architectures with it."""
    those = known(document, leave, {})
    guesses = guess(number_fields(document, [one.spec for one in those]), found, those)
    return guesses, known(document, leave, guesses.values) if guesses.facts else those


def _tail(template: str) -> str:
    """What stands behind the layer's number, or the whole name where there is none."""
    return template.partition("{}.")[2] or template


def _base(those: Sequence[Known], fitting: Mapping[str, Sequence[Habit]]) -> Known | None:
    """The known architecture that explains most: names in full before names that end alike.

    What it would have besides, and the model lacks, counts against it.
    """
    score: Counter[int] = Counter()
    for habits in fitting.values():
        best: Counter[int] = Counter()
        for habit in habits:
            best[id(habit.known)] = max(best[id(habit.known)], 2 if habit.whole else 1)
        score.update(best)
    here = {_tail(name) for name in fitting}
    for one in those:
        if score[id(one)]:
            score[id(one)] -= len({_tail(name) for name in one.expected()} - here)
    ranked = sorted(those, key=lambda one: score[id(one)], reverse=True)
    return ranked[0] if ranked and score[id(ranked[0])] > 0 else None
