"""The catalog of formats, architectures, containers and codecs: what is installed, and what was registered at run time.

Specs come from directories that the entry points `registry.mappings` name (each a package whose `architectures/` and
`formats/` hold YAML files named after their specs) and from `register()`. Containers, the modules that know how bytes
lie on disk, come from the entry points `registry.formats`. A spec is parsed when it is first asked for; the package
that holds it is located, never imported.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from registry.documents import read_bytes
from registry.errors import SpecError

if TYPE_CHECKING:
    import torch
    from pydantic import ValidationError

    from registry.specs import ArchitectureSpec, FormatSpec
    from registry.storage import Container

KINDS = ("architecture", "format")
MAX_SPEC_BYTES = 1 << 20
_MAX_DEPTH = 32


@frozen
class Codec:
    """Element-wise storage coding: `decode(encode(x))` is x, or close to it where `lossy`."""

    name: str
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    lossy: bool = False


_registered: dict[tuple[str, str], ArchitectureSpec | FormatSpec] = {}
_containers: dict[str, Container] = {}
_codecs: dict[str, Codec] = {
    "minus_exp": Codec("minus_exp", lambda x: -x.float().exp(), lambda x: (-x.float()).log(), lossy=True)
}
_BUILT_IN = frozenset(_codecs)


def _read_yaml(path: Path) -> dict[str, Any]:
    """Parse one YAML file with plain types only; duplicate keys and aliases are errors."""
    import yaml

    # libyaml's parser where PyYAML was built with it: ten times faster, and as safe.
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for inner, _ in node.value:
                key = str(self.construct_object(inner, deep=True))
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", inner.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        text = read_bytes(path, MAX_SPEC_BYTES).decode("utf-8")
        _check_events(yaml.parse(text, Loader=base))
        data = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise SpecError("not a readable YAML file", where=path, found=error) from None
    if not isinstance(data, dict):
        raise SpecError("a spec file holds one mapping", where=path, found=type(data).__name__)
    return data


def _check_events(events: Iterable[Any]) -> None:
    """Refuse aliases, a few lines of which can stand for gigabytes, and nesting that would exhaust the stack."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        if kind == "AliasEvent":
            raise ValueError("aliases are not allowed")
        depth += kind in ("MappingStartEvent", "SequenceStartEvent")
        depth -= kind in ("MappingEndEvent", "SequenceEndEvent")
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DEPTH}: recursion has to end")


@cache
def _points(group: str) -> EntryPoints:
    """What the installed packages offer under a name. To look takes 10 ms."""
    return entry_points(group=group)


@cache
def _directories() -> tuple[Path, ...]:
    found = []
    for point in _points("registry.mappings"):
        located = importlib.util.find_spec(point.value.split(":")[0])
        if located is None or not located.submodule_search_locations:
            raise SpecError("an installed entry point names no package", where=f"registry.mappings: {point.value}")
        found += [Path(p) for p in located.submodule_search_locations]
    return tuple(dict.fromkeys(found))  # the path of a namespace package may say one directory twice


@cache
def _files(kind: str) -> dict[str, Path]:
    """Name -> file of every installed spec of one kind. Two packages with the same name are an error."""
    found: dict[str, Path] = {}
    for directory in _directories():
        for path in sorted((directory / f"{kind}s").glob("*.yaml")):
            if path.stem in found:
                raise SpecError(f"two {kind} specs are called {path.stem!r}", where=f"{found[path.stem]} and {path}")
            found[path.stem] = path
    return found


#: What a plain string stands for, where a mapping may stand too: below this key, it is that field of the mapping.
_SHORTHAND = {"tensors": "layout", "facts": "field"}


def _merge(base: Any, change: Any, key: str = "", inside: str = "") -> Any:
    """`change` laid over `base`: mappings merge, null removes, everything else replaces.

    `key` is what both are called, `inside` what the mapping around them is called.
    """
    if isinstance(base, list) and len(base) == 1 and isinstance(base[0], dict) and isinstance(change, dict):
        return _merge(base[0], change)  # the one rule of a tensor, as a checked spec writes it
    if isinstance(base, str) and isinstance(change, dict) and inside in _SHORTHAND:
        return {_SHORTHAND[inside]: base, **change}
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    merged = dict(base)
    for name, value in change.items():
        if value is None and name in merged:
            del merged[name]
        else:
            merged[name] = _merge(merged[name], value, name, key) if name in merged else value
    return merged


def _resolve(data: Mapping[str, Any], where: object, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """`data` with what its `extends` names laid below it."""
    parent = data.get("extends")
    if parent is None:
        return dict(data)
    kind = str(data.get("kind"))
    if not isinstance(parent, str):
        raise SpecError("extends names one spec", where=where, found=repr(parent))
    if parent in seen:
        raise SpecError("specs extend each other in a circle", where=where, found=" -> ".join((*seen, parent)))
    if (kind, parent) in _registered:
        base = _registered[kind, parent].source() or _registered[kind, parent].model_dump()
    elif kind in KINDS and parent in _files(kind):
        base = _resolve(_read_yaml(_files(kind)[parent]), _files(kind)[parent], (*seen, parent))
    else:
        raise SpecError(f"extends an unknown {kind} {parent!r}", where=where)
    return dict(_merge(base, {key: value for key, value in data.items() if key != "extends"}))


def build(data: Mapping[str, Any], where: object) -> ArchitectureSpec | FormatSpec:
    """Check a spec given as plain data. Raises SpecError listing every problem in the spec's own terms."""
    from pydantic import ValidationError

    from registry.specs import ArchitectureSpec, FormatSpec

    models: dict[str, type[ArchitectureSpec] | type[FormatSpec]] = {
        "architecture": ArchitectureSpec,
        "format": FormatSpec,
    }
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in models:
        raise SpecError(
            "a spec says what it is", where=where, expected="kind: architecture or format", found=repr(kind)
        )
    whole = _resolve(data, where)
    try:
        return models[kind].model_validate(whole).given(whole)
    except ValidationError as error:
        problems = _listed(error)
        try:  # What is wrong by itself hides what does not fit together: leave it out, and look again.
            models[kind].model_validate(_without(whole, error))
        except ValidationError as further:
            problems += [problem for problem in _listed(further) if problem not in problems]
        raise SpecError(f"the {kind} spec {data.get('name')!r} is wrong", where=where, details=problems) from None


def _listed(error: ValidationError) -> list[str]:
    found: list[str] = []
    for problem in error.errors():
        several = problem.get("ctx", {}).get("error")
        place = ".".join(str(step) for step in problem["loc"])
        found += getattr(several, "found", [f"{place}: {problem['msg'].removeprefix('Value error, ')}"])
    return found


def _without(data: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """The data of a spec with every wrong value taken out, or replaced where an expression has to be."""
    whole = copy.deepcopy(data)
    for problem in error.errors():
        *steps, last = problem["loc"] or ("",)
        if problem["type"] == "missing" and steps:  # what lacks it goes as a whole
            last = next(step for step in reversed(steps) if isinstance(step, str))
            steps = steps[: steps.index(last)]
        inner: Any = whole
        for step in steps:
            if isinstance(inner, dict):
                inner = inner.get(step, inner)
            elif isinstance(inner, list) and isinstance(step, int) and step < len(inner):
                inner = inner[step]
        if isinstance(inner, dict) and last in inner:
            if problem["type"] == "value_error":
                inner[last] = "0"
            else:
                del inner[last]
    return whole


@cache
def _load(kind: str, name: str) -> ArchitectureSpec | FormatSpec:
    path = _files(kind)[name]
    spec = build(_read_yaml(path), path)
    if (spec.kind, spec.name) != (kind, name):
        raise SpecError("a spec file is named after its spec", where=path, found=f"{spec.kind} {spec.name!r}")
    return spec


def _find(kind: str, name: str) -> ArchitectureSpec | FormatSpec:
    if (kind, name) in _registered:
        return _registered[kind, name]
    if name in _files(kind):
        return _load(kind, name)
    raise SpecError(f"unknown {kind} {name!r}", expected="one of " + ", ".join(names(kind)))


def names(kind: str) -> list[str]:
    """Every known name of one kind ("architecture" or "format"), sorted."""
    return sorted({*_files(kind), *(name for k, name in _registered if k == kind)})


def architecture(name: str) -> ArchitectureSpec:
    """The architecture spec called `name` (a HuggingFace model_type). Raises SpecError."""
    from registry.specs import ArchitectureSpec

    spec = _find("architecture", name)
    assert isinstance(spec, ArchitectureSpec)
    return spec


def format_spec(name: str) -> FormatSpec:
    """The format spec called `name`. Raises SpecError."""
    from registry.specs import FormatSpec

    spec = _find("format", name)
    assert isinstance(spec, FormatSpec)
    return spec


def register(spec: str | os.PathLike[str] | Mapping[str, Any] | ArchitectureSpec | FormatSpec) -> str:
    """Add a spec for this process: a YAML file, plain data, or a model. Returns its name; a known name is replaced.

    Raises SpecError listing everything that is wrong with it.
    """
    if isinstance(spec, str | os.PathLike):
        path = Path(spec)
        if not path.is_file():
            raise SpecError("no such spec file", where=path)
        built = build(_read_yaml(path), path)
    elif isinstance(spec, Mapping):
        built = build(spec, f"spec {spec.get('name')!r}")
    elif hasattr(spec, "model_dump"):
        built = spec
    else:
        raise SpecError("a spec is a YAML file, a mapping or a spec model", found=repr(spec)[:200])
    codecs = {rule.codec for _, rule in built.rules() if rule.codec} - set(_codecs)
    if codecs:
        raise SpecError(
            f"the spec {built.name!r} names unknown codecs", found=sorted(codecs), hint="register_codec() first"
        )
    if built.kind == "format":
        container(built.container)
    _registered[built.kind, built.name] = built
    return built.name


def container(name: str) -> Container:
    """The container module called `name`. Raises SpecError."""
    if name not in _containers:
        offered = _points("registry.formats")
        points = [point for point in offered if point.name == name]
        if not points:
            known = sorted({*_containers, *(point.name for point in offered)})
            raise SpecError(f"unknown container {name!r}", expected="one of " + ", ".join(known))
        if len(points) > 1:
            raise SpecError(f"two installed packages bring a container {name!r}", found=[p.value for p in points])
        _containers[name] = points[0].load()()
    return _containers[name]


def register_container(name: str, made: Container) -> None:
    """Add a container for this process."""
    _containers[name] = made


def register_codec(codec: Codec) -> None:
    """Add an element-wise codec that rules may name, for this process."""
    _codecs[codec.name] = codec


def codec(name: str) -> Codec:
    """The codec called `name`. Raises SpecError."""
    if name not in _codecs:
        raise SpecError(
            f"unknown codec {name!r}", expected="one of " + (", ".join(sorted(_codecs)) or "none registered")
        )
    return _codecs[name]


@frozen
class Added:
    """What was registered in a process, for `add` in another one."""

    specs: Mapping[tuple[str, str], ArchitectureSpec | FormatSpec]
    containers: Mapping[str, Container]
    codecs: Mapping[str, Codec]


def added() -> Added:
    """What this process knows beyond what is installed."""
    return Added(dict(_registered), dict(_containers), {n: c for n, c in _codecs.items() if n not in _BUILT_IN})


def add(them: Added) -> None:
    """Know the same as the process that `them` are from."""
    _registered.update(them.specs)
    _containers.update(them.containers)
    _codecs.update(them.codecs)
