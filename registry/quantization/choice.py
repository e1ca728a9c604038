"""What the options ask for: the schemes, those of single modules where they differ, and what a config says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from registry import expressions
from registry.errors import ArgumentError, MappingError
from registry.parallel import Parallel
from registry.quantization.declared import Quantizations
from registry.quantization.decoding import read_layers
from registry.quantization.layouts import Derived
from registry.quantization.units import Unit
from registry.tensor_rules import AXIS


@frozen
class Choice:
    """What the options ask for: the schemes by name, and those of single modules where they differ."""

    quantizations: Quantizations
    schemes: tuple[str, ...]
    layers: Mapping[str, Mapping[str, Any]]
    mixed: bool
    exclude: tuple[str, ...]
    #: scheme -> globs over modules that it leaves as they are
    leaves: Mapping[str, Sequence[str]] = field(factory=dict)

    def of(self, pattern: str, index: int) -> tuple[str, ...]:
        """The schemes of the module that a pattern means at an index of its pipeline axis."""
        return self.named(AXIS.sub(str(index), pattern.removesuffix(f".{self.quantizations.weight}")))

    def named(self, module: str) -> tuple[str, ...]:
        """The schemes of a module."""
        further = self.schemes[1:] if self.mixed else self.schemes
        own = next((dict(e) for glob, e in self.layers.items() if module == glob or fnmatchcase(module, glob)), None)
        if self.mixed and own is not None and self.quantizations.mixed is not None:
            further = (str(own.get(self.quantizations.mixed.algorithm)), *further)
        return tuple(name for name in further if not self._left(name, module))

    def _left(self, name: str, module: str) -> bool:
        """Does a scheme leave the weights of a module as they are?"""
        exclude = self.exclude if self.quantizations.weight in self.quantizations.schemes[name].tensors else ()
        return any(fnmatchcase(module, glob) for glob in (*exclude, *self.leaves.get(name, ())))

    def settled(self, env: Mapping[str, Any]) -> Choice:
        """The choice for one model, with what its schemes leave as it is."""
        schemes = {name: self.quantizations.schemes.get(name) for name in self.all()}
        leaves = {name: scheme.leaves for name, scheme in schemes.items() if scheme is not None}
        return evolve(self, leaves={name: expressions.parse(text)(env) for name, text in leaves.items() if text})

    def all(self) -> tuple[str, ...]:
        """Every scheme that any module may have."""
        if not self.mixed or self.quantizations.mixed is None:
            return self.schemes
        own = (str(entry.get(self.quantizations.mixed.algorithm)) for entry in self.layers.values())
        return tuple(dict.fromkeys((*own, *self.schemes[1:])))


def chosen(quantizations: Quantizations | None, options: Mapping[str, Any]) -> Choice | None:
    """What the options ask for, if anything. Raises ArgumentError."""
    if quantizations is None:
        return None
    names = [options.get(quantizations.option)]
    if quantizations.further is not None and (besides := options.get(quantizations.further.option)):
        names.append(f"{quantizations.further.prefix}{besides}")
    if not any(names):
        return None
    mixed, layers = quantizations.mixed, {}
    is_mixed = mixed is not None and names[0] == mixed.scheme
    if mixed is not None and is_mixed:
        if not options.get(mixed.option):
            raise ArgumentError(
                f"{mixed.scheme} needs the option {mixed.option}", expected="a JSON file that says what each has",
                found="none",
            )  # fmt: skip
        layers = read_layers(Path(str(options[mixed.option])), mixed.layers)
    exclude = options.get(quantizations.exclude or "") or ()
    exclude = exclude.split(",") if isinstance(exclude, str) else exclude
    wanted = tuple(str(name) for name in names if name)
    choice = Choice(quantizations, wanted, layers, is_mixed, tuple(map(str, exclude)))
    if unknown := [name for name in choice.all() if name not in quantizations.schemes]:
        raise ArgumentError(
            f"unknown quantization {unknown[0]!r}", expected="one of " + ", ".join(quantizations.schemes),
            found=unknown[0],
        )  # fmt: skip
    return choice


def group_sizes(choice: Choice, options: Mapping[str, Any]) -> dict[str, int]:
    """The size of a group of columns, by scheme. Raises ArgumentError for one that a scheme does not have."""
    quantizations, found = choice.quantizations, {}
    for name in choice.all():
        scheme = quantizations.schemes.get(name)
        if scheme is None or not scheme.groups:
            found[name] = 1
            continue
        wanted = {options.get(quantizations.group or "")}
        if choice.mixed and quantizations.mixed is not None:
            key = quantizations.mixed.group
            wanted = {e.get(key) for e in choice.layers.values() if e.get(quantizations.mixed.algorithm) == name}
        wanted = {scheme.groups[0] if size is None else size for size in wanted}
        if len(wanted) > 1 or not wanted <= set(scheme.groups):
            raise ArgumentError(
                f"{name} has no groups of that size", found=", ".join(map(str, wanted)),
                expected=" or ".join(map(str, scheme.groups)), hint=f"choose another {quantizations.group}",
            )  # fmt: skip
        found[name] = next(int(size) for size in wanted if size is not None)
    return found


def said(
    choice: Choice, options: Mapping[str, Any], groups: Mapping[str, int], units: Sequence[Unit], derived: Derived,
    parallel: Parallel,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """What the config document says, and what lies in files beside it."""
    quantizations = choice.quantizations
    fields: dict[str, str] = dict(quantizations.config)
    for name in choice.schemes:
        if choice.mixed and quantizations.mixed is not None and name == quantizations.mixed.scheme:
            fields |= quantizations.mixed.config
        else:
            fields |= quantizations.schemes[name].config
    if quantizations.exclude is not None:
        options = {**options, quantizations.exclude: list(choice.exclude) or None}
    env = {**options, "group": next((groups[n] for n in choice.schemes if n in groups), 1)}
    document = {path: expressions.parse(text)(env) for path, text in fields.items()}
    if not choice.mixed or quantizations.mixed is None:
        return document, {}
    listed = {}
    for unit in units:
        if quantizations.weight in unit.scheme.tensors:
            env = {**options, "group": groups[unit.name]}
            own = {path.rpartition(".")[2]: expressions.parse(text)(env) for path, text in unit.scheme.config.items()}
            listed[unit.matrix.name] = own
    unused = [glob for glob in choice.layers if not any(m == glob or fnmatchcase(m, glob) for m in listed)]
    if unused:
        raise MappingError(
            "some of the listed layers are not in the model", expected="modules whose weights are quantised",
            found=", ".join(unused[:8]), hint="the names are those of the unquantised target's modules",
        )  # fmt: skip
    head = {path.rpartition(".")[2]: document[path] for path in quantizations.mixed.config}
    return document, {
        quantizations.mixed.file: {**head, quantizations.mixed.layers: _in_stages(listed, derived, parallel)}
    }


def _in_stages(listed: Mapping[str, Any], derived: Derived, parallel: Parallel) -> dict[str, Any]:
    """What is listed, under the names that layers have in their stages. Raises ArgumentError where stages differ."""
    if parallel.pp == 1:
        return dict(listed)
    heads = {re.split(r"\{\w+@pp\}", m.pattern)[0]: axis for m in derived.modules
             for axis in re.findall(r"\{(\w+)@pp\}", m.pattern)}  # fmt: skip
    found: dict[str, Any] = {}
    for head, axis in heads.items():
        stages = parallel.stages(derived.model.sizes[axis])
        mine = {name: name.removeprefix(head).partition(".") for name in listed if name.startswith(head)}
        for index, _, rest in mine.values():
            stage = next(s for s in stages if s.first <= int(index) < s.first + s.count)
            local = int(index) - stage.first
            same = [listed.get(f"{head}{s.first + local}.{rest}") for s in stages if local < s.count]
            if any(entry != same[0] for entry in same):
                raise ArgumentError(
                    "stages of the pipeline have layers that are quantised otherwise", where=f"{head}{index}.{rest}",
                    expected=f"the same for layer {local} of every stage", found=", ".join(map(str, same)),
                    hint="the list counts layers from every stage's first: choose other stages, or pp 1",
                )  # fmt: skip
            found[f"{head}{local}.{rest}"] = same[0]
    return found
