"""inspect(): what a directory is, at a glance: what it holds, what is odd about it, and what can be done with it.

Only headers are read. What no architecture can be bound to (yet) is described as far as its format alone tells.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, field, frozen

from registry import catalog, manifest
from registry.decoding import stored
from registry.derived import with_derived
from registry.errors import DetectionError, RegistryError
from registry.parallel import Parallel
from registry.places import PathLike, is_path, is_remote, place
from registry.prepare import bound_target, fitted, merged_options
from registry.source import Source, load, opened_at
from registry.specs import FormatSpec
from registry.states import is_state
from registry.storage import Opened, slot_bytes
from registry.tables import Shown, Table

#: Details of a problem that are shown; `registry plan` tells them all.
_DETAILS = 6
_UNFINISHED = re.compile(r"\.(.+)\.(?:partial|partial\.old|deleted)")


@frozen(repr=False)
class Inspection(Shown):
    """What a checkpoint holds.

    Where nothing could be bound, `problem` says why, `architectures` which fit, and there are no `parameters`.
    `optimizer` names the kinds of state of an optimizer; `padded` are axes that are stored longer than they are.
    `iterations` are the checkpoints of the directory that was named, if it holds several, and `unfinished` what runs
    that have not ended (or died) left there. `commands` are some that work on it.
    """

    path: str
    format: str
    architecture: str | None
    variants: dict[str, str]
    parameters: int | None
    active: int | None
    dtypes: dict[str, int]
    nbytes: int
    tensors: int
    files: int
    parallel: str
    iteration: int | None
    facts: dict[str, Any]
    optimizer: str | None = None
    rng: bool = False
    config: bool = False
    manifest: bool = False
    padded: dict[str, int] = field(factory=dict)
    left_out: dict[str, str] = field(factory=dict)
    missing: tuple[str, ...] = ()
    side_files: tuple[str, ...] = ()
    iterations: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    problem: str | None = None
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """What `str` says, in rows."""
        held = "?" if self.parameters is None else f"{self.parameters:,}"
        caption = f"{self.path}: {self.architecture or 'unknown architecture'} in {self.format}, {held} parameters"
        return Table(caption, (), list(self._rows()))

    def __str__(self) -> str:
        lines = [self.path]
        for label, text in self._rows():
            first, *rest = text.split("\n")
            lines += [f"  {label:<14}{first}", *(f"  {'':<14}{line}" for line in rest)]
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "format", self.format + "".join(f", {k} {v}" for k, v in self.variants.items())
        yield "architecture", self.architecture or " or ".join(self.architectures) or "unknown"
        types = ", ".join(f"{name} {count:,}" for name, count in self.dtypes.items())
        if self.parameters is None:
            yield "elements", types
        else:
            active = "" if self.active is None else f", {self.active:,} of them active for a token"
            yield "parameters", f"{self.parameters:,} ({types}){active}"
        yield "on disk", f"{self.tensors:,} tensors in {self.files} files, {self.nbytes / 1e6:,.1f} MB"
        yield "parallel", self.parallel
        yield "iteration", "-" if self.iteration is None else str(self.iteration)
        if self.iterations:
            yield "also here", ", ".join(self.iterations)
        yield "optimizer", self.optimizer or "-"
        yield "random state", "yes" if self.rng else "-"
        if said := ", ".join(f"{k} {v}" for k, v in self.facts.items() if v not in (None, False, [], {})):
            yield "facts", said
        yield "config", "carried along" if self.config else "none of HuggingFace's is carried along"
        if self.side_files:
            yield "travels along", ", ".join(self.side_files)
        yield "manifest", "yes" if self.manifest else "none: not written by this library, or not whole"
        yield from self._oddities()
        if self.commands:
            yield "try", "\n".join(self.commands)

    def _oddities(self) -> Iterator[tuple[str, str]]:
        for axis, size in self.padded.items():
            yield "padded", f"{axis} is stored as {size:,}" + self._true_size(axis)
        for reason, count in Counter(self.left_out.values()).items():
            yield "beside", f"{count} x {reason}"
        for name in self.missing:
            yield "missing", name
        for name in self.unfinished:
            yield "unfinished", f"{name}: a run is writing it, or died"
        for note in self.notes:
            yield "note", note
        if self.problem:
            yield "problem", self.problem

    def _true_size(self, axis: str) -> str:
        true = self.facts.get(f"{axis}_size")
        return f", and is {true:,}" if isinstance(true, int) and true != self.padded[axis] else ""


def inspect(
    path: PathLike, *, config: PathLike | Mapping[str, Any] | None = None, architecture: str | None = None
) -> Inspection:
    """Sum a checkpoint up. No tensor data is read. Raises CheckpointError and DetectionError."""
    try:
        return _bound(load(path, config=config, architecture=architecture), path, config, architecture)
    except RegistryError as error:
        if config is not None or architecture is not None:
            raise
        opened, spec = opened_at(place(path))  # what is no checkpoint at all raises here as it did before
        said = _said(error)
        if not (candidates := error.candidates if isinstance(error, DetectionError) else ()):
            return _unbound(opened, spec, path, said, asks=isinstance(error, DetectionError))
    found = [_bound(load(path, architecture=name), path, None, name) for name in candidates]
    facts = {k: v for k, v in found[0].facts.items() if all(one.facts.get(k) == v for one in found)}
    return evolve(found[0], architecture=None, architectures=candidates, facts=facts, problem=said)


def _said(error: RegistryError) -> str:
    """What is wrong and what to do, in a few lines."""
    details = list(error.details[:_DETAILS])
    if len(error.details) > _DETAILS:
        details.append(f"and {len(error.details) - _DETAILS} more")
    return "\n".join([error.problem, *(f"- {detail}" for detail in details), *([error.hint] if error.hint else [])])


def _bound(
    source: Source, path: PathLike, config: PathLike | Mapping[str, Any] | None, architecture: str | None
) -> Inspection:
    opened, model = source.opened, source.model
    types: Counter[str] = Counter()
    for tensor in model.tensors:
        types["/".join(sorted(source.dtypes.get(tensor, {source.dtype})))] += model.volume(tensor)
    optimizer = None
    if _holds(opened, source.spec, "optimizer"):
        optimizer = _optimizer(path, config, source.architecture.name)
    return Inspection(
        **_common(opened, source.spec, path),
        architecture=source.architecture.name,
        variants=dict(source.bound.variants),
        parameters=sum(types.values()),
        active=_active(source),
        dtypes=dict(types),
        facts=_facts(source),
        optimizer=optimizer,
        padded=dict(source.bound.padded),
        left_out=dict(source.bound.left_out),
        missing=tuple(source.bound.missing),
        notes=source.notes,
        commands=tuple(_commands(source, path, _flags(config, architecture))),
    )


def _unbound(opened: Opened, spec: FormatSpec, path: PathLike, problem: str, *, asks: bool) -> Inspection:
    """What the format alone tells of a checkpoint that no architecture was bound to; `asks`: a config may help."""
    types: Counter[str] = Counter()
    for piece in stored(opened):
        types[piece.dtype] += math.prod(piece.shape)
    where = shlex.quote(os.fspath(path))
    helps = []
    if asks and opened.hub_config is None:
        helps = [f"registry inspect {where} --config DIRECTORY"]
    elif asks and spec.rules_from == "architecture":  # its config names a model that no spec is known of
        helps = [f"registry new-architecture {where}"]
    return Inspection(
        **_common(opened, spec, path), architecture=None, variants={}, parameters=None, active=None,
        dtypes=dict(types), facts={}, optimizer="yes" if _holds(opened, spec, "optimizer") else None,
        problem=problem, notes=tuple(opened.notes), commands=(*_verify(opened, where), *helps),
    )  # fmt: skip


def _common(opened: Opened, spec: FormatSpec, path: PathLike) -> dict[str, Any]:
    """What is known of any checkpoint that could be opened."""
    on_disk = list(stored(opened))
    root = place(path)
    return {
        "path": str(opened.path),
        "format": spec.name,
        "nbytes": sum(slot_bytes(piece) for piece in on_disk),
        "tensors": len({(piece.rank, piece.name) for piece in on_disk}),
        "files": sum(is_path(file) for file in opened.files),
        "parallel": str(opened.parallel or "one rank"),
        "iteration": opened.iteration,
        "rng": _holds(opened, spec, "rng"),
        "config": opened.hub_config is not None,
        "manifest": manifest.present(opened.path) or manifest.present(root),
        "side_files": tuple(opened.side_files),
        "iterations": tuple(_iterations(opened, spec, root)),
        "unfinished": tuple(_unfinished(opened, root)),
    }


def _holds(opened: Opened, spec: FormatSpec, what: str) -> bool:
    """Are there entries of this state of a training run?"""
    globs = [ignored.name for ignored in spec.ignored if ignored.holds == what]
    names = {*opened.entries, *(piece.name for piece in opened.pieces)} if globs else ()
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def _optimizer(path: PathLike, config: PathLike | Mapping[str, Any] | None, architecture: str) -> str:
    """The kinds of optimizer state, or why they cannot be read."""
    try:
        found = load(path, config=config, architecture=architecture, states=True).model
    except RegistryError as error:
        return f"yes, but it cannot be read: {error.problem}"
    kinds = dict.fromkeys(tensor.split(".")[1] for tensor in found.tensors if is_state(tensor))
    return ", ".join(kinds) or "its settings alone"


def _facts(source: Source) -> dict[str, Any]:
    """The facts that the model's family has: a format's document says more, of every family's."""
    own = source.architecture
    return {k: v for k, v in source.model.facts.items() if k in {*own.facts, *own.config.facts, "dtype"}}


def _active(source: Source) -> int | None:
    """Parameters that one token meets, where of some experts a fixed number is chosen."""
    facts, model = source.model.facts, source.model
    chosen, experts = facts.get("experts_per_token"), facts.get("experts")
    if not (isinstance(chosen, int) and isinstance(experts, int) and 0 < chosen < experts):
        return None
    routed = [t for t, axes in model.tensors.items() if "expert" in axes and "experts" in t.split(".")]
    idle = sum(model.volume(tensor) for tensor in routed) * (experts - chosen) // experts
    return sum(map(model.volume, model.tensors)) - idle


def _iterations(opened: Opened, spec: FormatSpec, root: Path) -> Iterator[str]:
    """The other checkpoints of a run, where the directory that was named holds several."""
    if opened.path == root or is_remote(root):
        return
    detect = catalog.container(spec.container).detect
    for child in sorted(root.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and child != opened.path and detect(child):
            yield child.name


def _unfinished(opened: Opened, root: Path) -> Iterator[str]:
    """What runs that died left beside a checkpoint, or those that live still write."""
    if is_remote(root):
        return
    whole = opened.path != root
    for entry in sorted((root if whole else root.absolute().parent).iterdir()):
        match = _UNFINISHED.fullmatch(entry.name)
        if match and (whole or match[1] == root.name):
            yield entry.name


def _flags(config: PathLike | Mapping[str, Any] | None, architecture: str | None) -> str:
    said = f" --config {shlex.quote(os.fspath(config))}" if isinstance(config, str | os.PathLike) else ""
    return said + (f" --architecture {shlex.quote(architecture)}" if architecture else "")


def _verify(opened: Opened, where: str) -> Iterator[str]:
    if manifest.present(opened.path):
        yield f"registry verify {where}"


def _commands(source: Source, path: PathLike, flags: str) -> Iterator[str]:
    """Commands that work on this checkpoint: each conversion has been tried as far as its names and shapes."""
    where = shlex.quote(os.fspath(path))
    yield from _verify(source.opened, where)
    stem = Path(os.fspath(path)).absolute().name.removesuffix(f"-{source.spec.name}") or "model"
    for to in catalog.names("format"):
        if to != source.spec.name and _takes(source, catalog.format_spec(to)):
            yield f"registry convert {where} {shlex.quote(f'{stem}-{to}')} --to {to}{flags}"
    if source.opened.pieces:
        yield f"registry explain {where} {shlex.quote(source.opened.pieces[0].name)}{flags}"


def _takes(source: Source, spec: FormatSpec) -> bool:
    """Has the format a place for every tensor of this model?"""
    try:
        options = merged_options(spec, source.architecture, None)
        bound_target(with_derived(source, spec, None), spec, fitted(spec, Parallel())[0], options, None)
    except RegistryError:
        return False
    return True
