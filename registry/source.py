"""Open a checkpoint and understand it: its format, architecture, facts, and where every logical box lies."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from registry import catalog, expressions
from registry.bind import Bound, bind_source
from registry.changes import check_finished, directories, reading, stamps
from registry.collector import no_collection
from registry.decoding import decode
from registry.defaults import hub_facts
from registry.documents import read_json
from registry.dtypes import is_float
from registry.errors import CheckpointError, DetectionError, MappingError, RegistryError
from registry.flat import bind_flat
from registry.model import (
    LogicalModel,
    config_map,
    extension,
    format_rules,
    logical_model,
    loose_facts,
    read_facts,
    rules_spec,
    write_document,
)
from registry.places import PathLike, is_remote, place
from registry.problems import collapse
from registry.quantization.decoding import decode_quantized
from registry.specs import ArchitectureSpec, FormatSpec
from registry.states import check_states, held_states, is_state, with_states
from registry.storage import Opened, slot_bytes

_LONGEST_NAME = 1024
#: Entries of a directory that are tried, where it is no checkpoint itself.
_LOOKED_AT = 64
_ODD_NAME = re.compile(r"\0|\d{10}")
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_CONFIG = "give config= as a HuggingFace directory or a config.json"


@frozen(eq=False)
class Source:
    """A checkpoint on disk, bound to its model. No tensor data has been read."""

    opened: Opened
    spec: FormatSpec
    architecture: ArchitectureSpec
    model: LogicalModel
    bound: Bound
    options: Mapping[str, Any]
    hub_config: dict[str, Any]
    dtypes: dict[str, frozenset[str]]
    dtype: str
    notes: tuple[str, ...]

    def dtype_of(self, tensor: str) -> str:
        """The type of a logical tensor. Raises MappingError where its layers differ."""
        found = self.dtypes.get(tensor, frozenset({self.dtype}))
        if len(found) > 1:
            raise MappingError(
                f"{tensor} is stored in several types", where=self.opened.path, expected="one type",
                found=", ".join(sorted(found)), hint="give dtype= to cast them to one",
            )  # fmt: skip
        return next(iter(found))


def detect_format(path: Path) -> FormatSpec:
    """The format of what is at `path`. Raises DetectionError listing the candidates, or CheckpointError."""
    if not path.exists():
        raise CheckpointError(
            "no such checkpoint", where=path, expected="a directory", found="nothing",
            hint="correct the path; a model of the HuggingFace hub must be downloaded first",
        )  # fmt: skip
    if not path.is_dir():
        raise CheckpointError(
            "a checkpoint is a directory", where=path, expected="a directory", found="a file",
            hint="name the directory that holds the file",
        )  # fmt: skip
    known = catalog.names("format")
    found = [spec for spec in map(catalog.format_spec, known) if catalog.container(spec.container).detect(path)]
    if len(found) != 1:
        below = [] if found else _checkpoints_below(path)
        raise DetectionError(
            "no known format fits" if not found else "several formats fit",
            where=path,
            expected=f"one of {', '.join(known)}",
            found=", ".join(spec.name for spec in found)
            or ", ".join(sorted(p.name for p in path.iterdir())[:8])
            or "nothing",
            hint=f"name one of the checkpoints in it: {', '.join(below)}" if below
            else "name the directory that holds the checkpoint's own files",
        )  # fmt: skip
    return found[0]


def _checkpoints_below(path: Path) -> list[str]:
    """The directories in a directory that a format knows, for whoever named the one above."""
    specs = [catalog.format_spec(name) for name in catalog.names("format")]
    inside = [] if is_remote(path) else [each for each in sorted(path.iterdir())[:_LOOKED_AT] if each.is_dir()]
    fits = {each.name: [s.name for s in specs if catalog.container(s.container).detect(each)] for each in inside}
    return [f"{name} ({' or '.join(formats)})" for name, formats in fits.items() if formats]


def read_config(config: Any) -> dict[str, Any]:
    """A HuggingFace config: a directory that holds config.json, the file, its content, or a config of transformers."""
    if hasattr(config, "to_dict"):  # an object of transformers
        config = config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    path = place(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            "the config cannot be read", where=path, expected="a JSON file", found=found, hint=_CONFIG
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(
            "the config is no JSON object", where=path, expected="an object", found=type(data).__name__, hint=_CONFIG
        )
    return data


@no_collection()
def load(
    path: PathLike,
    *,
    config: PathLike | Mapping[str, Any] | None = None,
    architecture: str | None = None,
    states: bool = False,
) -> Source:
    """Open, detect and bind; with `states`, the optimizer state too, where there is any.

    Raises CheckpointError, DetectionError and MappingError.
    """
    opened, spec = opened_at(place(path))
    return understood(opened, spec, config=config, architecture=architecture, states=states)


def opened_at(where: Path) -> tuple[Opened, FormatSpec]:
    """What is at a path, and its format. Raises CheckpointError and DetectionError."""
    with reading(where):
        check_finished(where)
        spec = detect_format(where)
        before = directories(where) if where.is_dir() and not is_remote(where) else {}
        opened = catalog.container(spec.container).open(where, spec.name)
        opened.stamps = stamps(opened.path)
        check_finished(opened.path)
        _check_names(opened)
        if before and before.get(opened.path) != directories(where).get(opened.path):
            raise CheckpointError(
                "another checkpoint took the place of this one while it was opened", where=opened.path,
                expected="a directory that stays", found="another of its name", hint="open it again",
            )  # fmt: skip
    return opened, spec


def _check_names(opened: Opened) -> None:
    """Names are taken apart by their indices, and shown. Raises CheckpointError for those that no model has."""
    names = [piece.name for piece in opened.pieces]
    joined = "\n".join(names)
    # The digits alone are looked for first: the expression takes ten times as long.
    digits = not joined.isascii() or b"0" * 10 in joined.encode().translate(_DIGITS)
    if max(map(len, names), default=0) > _LONGEST_NAME or "\0" in joined or (digits and _ODD_NAME.search(joined)):
        bad = next((name for name in names if len(name) > _LONGEST_NAME or _ODD_NAME.search(name)), "")
        raise CheckpointError(
            "a tensor of an absurd name", where=opened.path, found=repr(bad),
            expected=f"at most {_LONGEST_NAME} characters, none of them null, and indices of at most 9 digits",
        )  # fmt: skip


def understood(
    opened: Opened, spec: FormatSpec, *, config: PathLike | Mapping[str, Any] | None, architecture: str | None,
    states: bool = False,
) -> Source:  # fmt: skip
    """What has been opened, bound to its model."""
    where = opened.path
    decode_quantized(opened, spec)
    hub = decode(opened, spec, read_config(config) if config is not None else opened.hub_config)
    name = architecture or (None if hub is None else hub.get("model_type")) or opened.architecture
    if config is not None and isinstance(config, str | os.PathLike):
        opened = _with_side_files(opened, place(config))
    if name is None and hub is not None and not opened.document:
        raise DetectionError(
            "the config has no model_type", where=where, expected="a model_type", found="none",
            hint="name the architecture= of the model",
        )  # fmt: skip
    if name is None and hub is None and not opened.document:
        raise DetectionError(
            "the checkpoint carries no config", where=where, expected="a config that says the sizes", found="none",
            hint="give config= (a HuggingFace directory or config.json) for its sizes",
        )  # fmt: skip
    if name is not None:
        if name not in catalog.names("architecture"):
            raise DetectionError(
                f"unknown architecture {name!r}", where=where, found=repr(name),
                expected="one of " + ", ".join(catalog.names("architecture")),
                hint="register a spec for it, or name a known architecture= that has the same tensors",
            )  # fmt: skip
        return _bind(opened, spec, catalog.architecture(name), hub, states=states)
    return _guess(opened, spec, hub, states)


@no_collection()
def load_pair(
    a: PathLike, b: PathLike, *, config: PathLike | Mapping[str, Any] | None = None, architecture: str | None = None
) -> tuple[Source, Source]:
    """Two checkpoints of one model: the config that one side carries, or the one given, serves a side without."""
    sides = [opened_at(place(path)) for path in (a, b)]
    carried = (opened.hub_config for opened, _ in sides if opened.hub_config is not None)
    spare = config if config is not None else next(carried, None)
    left, right = (
        understood(opened, spec, config=spare if opened.hub_config is None else None, architecture=architecture)
        for opened, spec in sides
    )
    return left, right


def _with_side_files(opened: Opened, config: Path) -> Opened:
    """Side files of the HuggingFace directory that the user named, where the checkpoint brings none of its own."""
    directory = config if config.is_dir() else config.parent
    if opened.side_files or not (directory / "config.json").is_file():
        return opened
    opened.side_files = {"config.json": directory / "config.json"}
    for spec in map(catalog.format_spec, catalog.names("format") if config.is_dir() else ()):
        container = catalog.container(spec.container)
        if spec.rules_from == "architecture" and container.detect(directory):
            opened.side_files = container.open(directory, spec.name).side_files
    return opened


def _guess(opened: Opened, spec: FormatSpec, hub: dict[str, Any] | None, states: bool) -> Source:
    """The one architecture that fits the document and the tensors."""
    fitting: list[Source] = []
    failed: list[RegistryError] = []
    reasons = []
    for name in catalog.names("architecture"):
        candidate = catalog.architecture(name)
        added = extension(spec, candidate)
        if not candidate.recognised or (spec.closed if added is None else not added.recognised):
            continue
        fits = False
        try:
            _facts(opened, spec, candidate, hub, strict=True)
            fits = True
            fitting.append(_bind(opened, spec, candidate, hub, strict=True))
        except RegistryError as error:
            reasons.append(f"{name}: {error.problem}" + "".join(f"; {detail}" for detail in error.details[:1]))
            failed += [error] if fits else []
    if not fitting and len(failed) == 1:
        raise failed[0]  # the config is that of one architecture: what is wrong are the tensors
    if len(fitting) != 1:
        names = ", ".join(source.architecture.name for source in fitting)
        unclear = DetectionError(
            f"several architectures fit: {names}" if fitting else "no known architecture fits",
            where=opened.path, expected="one architecture", found=names or "none", details=() if fitting else reasons,
            hint="name one with architecture=, or give config= (a HuggingFace directory or config.json)",
        )  # fmt: skip
        unclear.candidates = tuple(source.architecture.name for source in fitting)
        raise unclear
    found = fitting[0]
    return _bind(opened, spec, found.architecture, hub, strict=True, states=True) if states else found


def _bind(
    opened: Opened,
    spec: FormatSpec,
    architecture: ArchitectureSpec,
    hub: dict[str, Any] | None,
    *,
    strict: bool = False,
    states: bool = False,
) -> Source:
    facts, hub_config, notes = _facts(opened, spec, architecture, hub, strict)
    known = bool(hub or spec.rules_from == "architecture")
    options = {
        name: (expressions.parse(option.read)(opened.document) if option.read else None)
        for name, option in spec.options.items()
    }
    options = {name: spec.options[name].default if value is None else value for name, value in options.items()}
    ignored = [*spec.ignored, *(architecture.ignored if spec.rules_from == "architecture" else [])]
    kinds = held_states(opened, spec) if states else ()
    rules = list(with_states(list(format_rules(spec, architecture)), spec, kinds, rules_spec(spec, architecture)))
    model = logical_model(architecture, facts)
    bound = bind_source(opened, spec, rules, model.with_states(kinds), options, ignored)
    if bound.absent:
        for part in (architecture.optional[name] for name in bound.absent):
            if any(facts.get(name) != value for name, value in part.facts.items()):
                notes.append(f"not all that the config speaks of is here: {part.reason}")
            facts |= part.facts
        model = logical_model(architecture, facts, bound.absent)
        bound = bind_source(opened, spec, rules, model.with_states(kinds), options, ignored)
    if states:
        kinds = tuple(dict.fromkeys((*kinds, *bind_flat(opened, spec, model, options, bound))))
    if kinds:
        held = {model.home(f.tensor) for group in bound.groups for f in group.fragments if is_state(f.tensor)}
        check_states(opened, spec, bound, kinds, held)
        model = model.with_states(kinds, held)
        for name in opened.state.get("carried", ()):
            bound.left_out.pop(name, None)
    if strict and bound.missing:
        raise MappingError(
            "tensors are missing", where=opened.path, details=collapse(bound.missing),
            hint="check that no file is missing and that the config belongs to these tensors",
        )  # fmt: skip
    dtypes, dominant = _dtypes(bound, opened, model)
    carried = opened.state.get("dtypes")
    if isinstance(carried, dict):  # what a format stored in a type of its own
        dtypes |= {t: frozenset({d}) for t, d in carried.items() if t in dtypes and isinstance(d, str) and is_float(d)}
    if not known:
        hub_config = write_document({"dtype": dominant}, architecture.config, model.facts, hub_config)
        if bound.padded:
            notes.append(
                "no config says the true vocabulary: the padded size is taken (give config= to cut the padding)"
            )
    return Source(
        opened, spec, architecture, model, bound, options, hub_config, dtypes, dominant, (*opened.notes, *notes)
    )  # fmt: skip


def _facts(
    opened: Opened, spec: FormatSpec, architecture: ArchitectureSpec, hub: dict[str, Any] | None, strict: bool
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The model's facts, the HuggingFace config that says them, and where the format's own document disagrees."""
    if spec.rules_from == "architecture":
        document = hub or opened.document
        said, notes = _hub_facts(document, architecture, {}, strict)
        return said, document, notes
    own: dict[str, Any] = {}
    if opened.document:
        own = read_facts(opened.document, config_map(spec, architecture))
    wrong = [
        f"{key}: {own[key]!r}, expected {value!r}"
        for key, value in architecture.facts.items()
        if own.get(key) is not None and own[key] != value
    ]
    if added := extension(spec, architecture):
        wrong += [
            f"{key}: {opened.document.get(key)!r}, expected {value!r}"
            for key, value in added.requires.items()
            if opened.document and opened.document.get(key) != value
        ]
    if hub is not None:
        said, notes = _hub_facts(hub, architecture, own, strict)
    else:
        hub = write_document(own, architecture.config, own, {})
        said, notes = read_facts(hub, architecture.config), []
        wrong += [
            f"{key}: {own[key]!r} cannot be said by its config" for key in said if own.get(key) not in (None, said[key])
        ]
    if strict and wrong:
        raise MappingError(f"the config is not that of {architecture.name}", details=wrong)
    facts = {**own, **said}
    loose = loose_facts(config_map(spec, architecture)) | loose_facts(architecture.config)
    differ = [
        f"config: {key} is {facts[key]!r}, but the checkpoint's own document says {value!r}"
        for key, value in own.items()
        if key not in loose and value is not None and facts.get(key) != value
    ]
    return facts, hub, [*notes, *differ, *(f"config: {line}" for line in wrong)]


def _hub_facts(
    document: Mapping[str, Any], architecture: ArchitectureSpec, own: Mapping[str, Any], strict: bool
) -> tuple[dict[str, Any], list[str]]:
    """The facts of a config.json, and a note on those that it leaves to its class and the format's document to nobody.

    A guess takes no defaults of a class: with those, the config of any model would do.
    """
    if strict:
        return read_facts(document, architecture.config), []
    facts, added = hub_facts(document, architecture, [name for name, value in own.items() if value is not None])
    note = f"config: silent about {', '.join(added)}; taken as its transformers class has it"
    return facts, [note] if added else []


def _dtypes(bound: Bound, opened: Opened, model: LogicalModel) -> tuple[dict[str, frozenset[str]], str]:
    """Each logical tensor's types, and the floating-point type that most bytes have."""
    found: dict[str, set[str]] = {}
    weight: Counter[str] = Counter()
    for group in bound.groups:
        for fragment in group.fragments:
            found.setdefault(model.home(fragment.tensor), set()).add(group.dtype)
        if is_float(group.dtype) and len(group.members):
            weight[group.dtype] += slot_bytes(opened.pieces[int(group.members[0])]) * len(group.members)
    dominant = weight.most_common(1)[0][0] if weight else "float32"
    return {tensor: frozenset(types) for tensor, types in found.items()}, dominant
