"""Quantise on the way: the unquantised target on one rank is made up as it is read, encoded, and cut for the ranks.

Weights that a scheme takes are planned twice. First as the format stores them unquantised on a single rank, where each
is a whole matrix; nothing of that is ever written. What is stored of such a matrix becomes pieces in files on no disk,
and a second plan cuts those for the wanted layout by the rules of `registry.quantization.layouts`. Everything else goes
the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from registry import expressions
from registry.assemble import Table, table
from registry.bind import Bound
from registry.errors import MappingError
from registry.files import SourceFiles
from registry.losses import Loss
from registry.model import LogicalModel, rules_spec
from registry.parallel import Parallel
from registry.planning import Plan, make_plan
from registry.quantization.choice import Choice, group_sizes, said
from registry.quantization.declared import Quantizations, Scheme
from registry.quantization.formulas import parse
from registry.quantization.layouts import Derived, beside, check_groups, derive, stored_name
from registry.quantization.matrices import Matrix, Stage
from registry.quantization.ranges import Calibration, Finder, Modules, parts_of, with_weights
from registry.quantization.units import Stored, Unit
from registry.source import Source
from registry.specs import FormatSpec
from registry.storage import Piece, Slot, slot_bytes
from registry.target import Target, bind_target
from registry.tensor_rules import Rule

#: Binds a target: (rules, model, layout) -> what it will hold.
Bind = Callable[[Sequence[tuple[str, Rule]], LogicalModel, Parallel], Target]


@frozen(eq=False)
class Quantized:
    """A target with quantised weights, and the plan that fills it.

    `source` has the pieces that are made up; `fields` are what the config document says of it, and `small` further
    files.
    """

    source: Source
    target: Target
    plan: Plan
    units: list[Unit]
    fields: dict[str, Any]
    small: dict[str, Any] = field(factory=dict)
    notes: tuple[str, ...] = ()

    def check(self, threads: int) -> None:
        """Read every weight that is to be quantised once. Raises MappingError for what cannot be."""
        opened = self.source.opened
        with SourceFiles(opened.files, opened.stamps) as files, ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(lambda unit: unit.check(files), self.units):
                pass

    def losses(self) -> dict[str, Loss]:
        """What was lost, by weight, once everything is written."""
        return {
            unit.matrix.name: Loss(unit.name, unit.error, unit.error / unit.largest if unit.largest else 0.0)
            for unit in self.units
            if unit.error is not None
        }


def quantize(
    source: Source, spec: FormatSpec, choice: Choice, rules: Sequence[tuple[str, Rule]], parallel: Parallel,
    options: Mapping[str, Any], choices: Mapping[str, str], dtype: str | None,
) -> Quantized:  # fmt: skip
    """Plan a quantised target. Raises ArgumentError, CheckpointError, MappingError and ParallelError."""
    quantizations = choice.quantizations
    groups = group_sizes(choice, options)
    model_type = dtype or source.dtype
    env = {**options, **choices, **source.model.facts, **parallel.env(), **source.model.functions}
    _check_model(choice, source, env)
    choice = choice.settled(env)
    derived = derive(quantizations, rules, source.model, choice.of, groups, model_type, env, choices)
    check_groups(derived, quantizations, groups, parallel)
    calibration = _calibration(quantizations, options)
    first = source if calibration is None else _given_weights(source, choice, calibration)

    def bind(
        those: Sequence[tuple[str, Rule]], model: LogicalModel, layout: Parallel, cast: str | None = None
    ) -> Target:
        return bind_target(spec, those, model, layout, options, choices, first.dtype_of, cast)

    read = [(module.pattern, module.rule) for module in derived.modules] + derived.further
    whole = bind(list({id(rule): (name, rule) for name, rule in read}.values()), source.model, Parallel())
    stage_plan = make_plan(first.bound, first.opened, whole.groups, whole.slots, first.model)
    made = table_of(stage_plan, first, whole.slots)
    finder = Finder(calibration, quantizations.ranges, source)
    owner = rules_spec(source.spec, source.architecture)
    modules, own = Modules(source.model, source.architecture), Modules(source.model, owner)
    finder.strangers(modules)
    units = list(
        _units(choice, derived, whole, Stage(made), finder, (modules, own), groups, env, model_type, first.opened.path)
    )
    finder.fail()
    _share(quantizations, units)
    rest = bind(rules, derived.rest, parallel, dtype)
    plan = make_plan(source.bound, source.opened, rest.groups, rest.slots, source.model)
    target, plan, last = _cut(first, derived, bind, parallel, quantizations, units, (rest, plan))
    fields, small = said(choice, options, groups, units, derived, parallel)
    return Quantized(last, target, plan, units, fields, small)


def _check_model(choice: Choice, source: Source, env: Mapping[str, Any]) -> None:
    """Refuse a model that a scheme is not for. Raises MappingError."""
    quantizations = choice.quantizations
    for name in choice.all():
        scheme = quantizations.schemes.get(name)
        for only in (*quantizations.only, *(scheme.only if scheme else ())):
            if not expressions.parse(only.when)(env):
                raise MappingError(
                    f"{name} cannot be had of this model, or not with these options", where=source.opened.path,
                    expected=only.reason, found=f"a model of the family {source.architecture.name}",
                    hint="choose another quantization",
                )  # fmt: skip


def table_of(plan: Plan, source: Source, slots: Sequence[Slot]) -> Callable[[], Table]:
    """The operations of a plan, worked out when they are first needed."""

    @cache
    def made() -> Table:
        return table(plan, source.opened, slots, np.fromiter(map(slot_bytes, slots), np.int64, len(slots)))

    return made


def _calibration(quantizations: Quantizations, options: Mapping[str, Any]) -> Calibration | None:
    path = options.get(quantizations.calibration or "")
    return None if not path else Calibration(Path(str(path)))


def _used(scheme: Scheme, quantizations: Quantizations) -> list[str]:
    """The ranges that a scheme's formulas name, and what is only compared."""
    texts = [*scheme.let.values(), *(stored.value for stored in scheme.tensors.values()), scheme.original]
    names = set().union(*(_names(text) for text in texts))
    compared = {"weight"} if quantizations.weight in scheme.tensors else set()
    return [name for name in quantizations.ranges if name in names | compared]


def _names(text: str) -> set[str]:
    import ast

    formula = parse(text)
    given = {node.args[0].id for node in ast.walk(formula.tree)
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "given"
             and isinstance(node.args[0], ast.Name)}  # fmt: skip
    return set(formula.names) | given


def _given_weights(source: Source, choice: Choice, calibration: Calibration) -> Source:
    """The source with the weights that the calibration has changed, for schemes that look for them."""
    quantizations = choice.quantizations
    used = {name for scheme in choice.all() for name in _used(quantizations.schemes[scheme], quantizations)}
    endings = [
        n.split("}", 1)[1] for name in used if (r := quantizations.ranges[name]).shape == "matrix" for n in r.names
    ]
    return with_weights(source, calibration, endings) if endings else source


def _units(
    choice: Choice, derived: Derived, whole: Target, stage: Stage, finder: Finder, modules: tuple[Modules, Modules],
    groups: Mapping[str, int], env: Mapping[str, Any], dtype: str, path: Path,
) -> Iterator[Unit]:  # fmt: skip
    """Every weight under every scheme that takes it."""
    quantizations = choice.quantizations
    slots = {slot.name: i for i, slot in enumerate(whole.slots)}
    able = {m.rule.layout: set[str]() for m in derived.modules}  # names may be spelled otherwise
    for module in derived.modules:
        able[module.rule.layout] |= set(module.schemes)
    for group in whole.groups:
        for position, slot_index in enumerate(group.members.tolist()):
            slot = whole.slots[slot_index]
            name = slot.name.removesuffix(f".{quantizations.weight}")
            schemes = [n for n in choice.named(name) if n in able.get(group.layout, ())]
            if not schemes:
                continue
            parts = parts_of(group, position, slot.shape, *modules)
            *experts, rows, width = slot.shape
            matrix = Matrix(
                stage, slot_index, name, slot.dtype, (int(np.prod(experts, dtype=np.int64)), rows, width),
                np.array([part.row for part in parts], dtype=np.int64), path,
            )  # fmt: skip
            for scheme_name in schemes:
                scheme = quantizations.schemes[scheme_name]
                ranges = finder.find(_used(scheme, quantizations), parts, width)
                finder.need(scheme.needs, ranges, parts)
                constants = {
                    "group": groups[scheme_name], "dtype": dtype, "source_dtype": slot.dtype,
                    **{key: expressions.parse(text)(env) for key, text in scheme.parameters.items()},
                    "fused": len(parts) > matrix.shape[0],
                }  # fmt: skip
                near = beside(scheme, name).items()
                rows = {key: _row(whole.slots[slots[n]], slots[n], matrix) for key, n in near if n in slots}
                yield Unit(matrix, scheme_name, scheme, quantizations.ranges, ranges, constants, rows)


def _row(slot: Slot, index: int, like: Matrix) -> Matrix:
    """A vector of the unquantised target, as a matrix of one row."""
    return evolve(like, slot=index, name=slot.name, dtype=slot.dtype, shape=(1, 1, slot.shape[0]))


def _share(quantizations: Quantizations, units: Sequence[Unit]) -> None:
    """Tell units that go together of each other."""
    by_name = {(unit.matrix.name, unit.name): unit for unit in units}
    for unit in units:
        for globs in unit.scheme.together:
            ending = next((g.lstrip("*") for g in globs if fnmatchcase(unit.matrix.name, g)), None)
            if ending is None or unit.together:
                continue
            base = unit.matrix.name.removesuffix(ending)
            names = [base + glob.lstrip("*") for glob in globs]
            together = [by_name[name, unit.name] for name in names if (name, unit.name) in by_name]
            for other in together:
                other.together, other.cache, other.lock = together, unit.cache, unit.lock


def _cut(
    source: Source, derived: Derived, bind: Bind, parallel: Parallel, quantizations: Quantizations,
    units: Sequence[Unit], rest: tuple[Target, Plan],
) -> tuple[Target, Plan, Source]:  # fmt: skip
    """The target and its plan with what is stored of the units besides, and the source with the pieces made of them."""
    stored = {
        stored_name(unit.matrix.name, key, tensor): (unit, key)
        for unit in units
        for key, tensor in unit.scheme.tensors.items()
        if quantizations.stores(tensor, unit.matrix.name)
    }
    made, cut = (bind(derived.rules, derived.model, layout) for layout in (Parallel(), parallel))
    first, before = len(source.opened.pieces), len(source.opened.files)
    pieces = [Piece(slot.name, slot.dtype, slot.shape, before + i, 0) for i, slot in enumerate(made.slots)]
    files = [Stored(*stored[slot.name], slot.shape, slot.dtype) for slot in made.slots]
    opened = evolve(source.opened, files=[*source.opened.files, *files], pieces=[*source.opened.pieces, *pieces])
    bound = Bound([evolve(group, members=group.members + first) for group in made.groups])
    encoded = make_plan(bound, opened, cut.groups, cut.slots, derived.model)
    target, plan = rest
    count = len(target.slots)
    groups = [*target.groups, *(evolve(group, members=group.members + count) for group in cut.groups)]
    copies = [*plan.copies, *(evolve(c, target=c.target + count) for c in encoded.copies)]
    slots = [*target.slots, *cut.slots]
    return Target(groups, slots, target.objects), Plan(copies, plan.replicas), evolve(source, opened=opened)
