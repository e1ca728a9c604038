"""What a config.json leaves to its transformers class, and what of it no fact reads.

A field that a document lacks has the default of the transformers class. Specs say the usual defaults themselves; only
where a fact has none, and its fields are absent, is transformers imported and asked (that takes seconds). The class is
given the document's own fields, because it derives some from others: the types of as many layers as the document says.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from registry import expressions
from registry.config_rules import ConfigMap, FactMap
from registry.errors import MappingError, SpecError
from registry.model import read_facts
from registry.specs import ArchitectureSpec

_ABSENT = object()
#: Fields about running or training a model, not about the model. A class may act on them, with what a document says.
_RUNNING = frozenset({
    "attn_implementation", "auto_map", "dtype", "experts_implementation", "id2label", "label2id", "model_type",
    "num_labels", "output_attentions", "per_layer_config", "problem_type", "quantization_config", "torch_dtype",
})  # fmt: skip
#: A class makes lists as long as these fields say.
_COUNTS = ("layer", "label", "depth")
_MAX_COUNT = 1 << 16


def _lookup(document: Any, dotted: str) -> Any:
    for step in dotted.split("."):
        if not isinstance(document, Mapping) or step not in document:
            return _ABSENT
        document = document[step]
    return document


def _with(document: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    first, _, rest = dotted.partition(".")
    inner = document.get(first)
    return {**document, first: _with(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def _without(document: Mapping[str, Any], dotted: Iterable[str]) -> dict[str, Any]:
    """The document without some fields; what they leave empty goes too."""
    below: dict[str, list[str]] = {}
    for path in dotted:
        first, _, rest = path.partition(".")
        below.setdefault(first, []).append(rest)
    left = {name: value for name, value in document.items() if name not in below}
    for name, rests in below.items():
        if "" not in rests and (inner := _without(document[name], rests)):
            left[name] = inner
    return left


def _expression_paths(node: ast.AST) -> Iterator[str]:
    """The dotted paths that an expression reads, as far as they can be told from its text."""
    steps: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute | ast.Subscript):
        if isinstance(inner, ast.Attribute):
            steps.insert(0, inner.attr)
        elif isinstance(inner.slice, ast.Constant) and isinstance(inner.slice.value, str):
            steps.insert(0, inner.slice.value)
        else:  # an element of a list: the whole list is read
            steps = []
            yield from _expression_paths(inner.slice)
        inner = inner.value
    if isinstance(inner, ast.Name):
        yield ".".join([inner.id, *steps])
    else:
        for child in inner.args if isinstance(inner, ast.Call) else ast.iter_child_nodes(inner):
            yield from _expression_paths(child)


def paths(entry: FactMap) -> tuple[str, ...]:
    """The fields of a document that a fact is read from."""
    if entry.read is None:
        return tuple(entry.field)
    expression = expressions.parse(entry.read)
    read = [path for path in _expression_paths(expression.tree) if path.split(".")[0] in expression.names]
    return tuple(dict.fromkeys([*entry.field, *read]))


def _flat(document: Mapping[str, Any], config: ConfigMap) -> Mapping[str, Any]:
    """A document with the part that holds the facts' fields laid over the rest, as facts are read."""
    inner = document.get(config.within) if config.within is not None else None
    return {**document, **inner} if isinstance(inner, Mapping) else document


def _fills(entry: FactMap, document: Mapping[str, Any]) -> bool:
    """Does a fact's expression put something in the place of nulls, which are not how the spec spells it?"""
    try:
        value = entry.read and expressions.parse(entry.read)(document)
        return value is not None and (value, None) not in entry.values
    except SpecError:  # such as half of a null: said where the facts are read
        return False


def silent_facts(document: Mapping[str, Any], config: ConfigMap) -> list[str]:
    """The facts that a document says nothing about and that have no default; `default: null` is one.

    A null says something, none of it, but where an expression puts a value in its place: that is the class's to choose.
    """
    flat = _flat(document, config)

    def silent(entry: FactMap) -> bool:
        found = [_lookup(flat, path) for path in paths(entry)]
        if all(value is _ABSENT for value in found):
            return bool(found)
        return all(value in (_ABSENT, None) for value in found) and _fills(entry, flat)

    asked = {
        n: entry for n, entry in config.facts.items() if not entry.loose and "default" not in entry.model_fields_set
    }
    return [name for name, entry in asked.items() if silent(entry)]


def hub_facts(
    document: Mapping[str, Any], architecture: ArchitectureSpec, known: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The facts that a config.json holds, and the names of those that its transformers class adds.

    `known` are facts that the checkpoint itself says. Raises MappingError for a document that says what no expression
    can work with.
    """
    config = architecture.config
    added = []
    elsewhere = set(known)
    silent = [name for name in silent_facts(document, config) if name not in elsewhere]
    if silent and (whole := _whole(document, architecture)):
        document = _flat(document, config)
        for name in silent:
            for path in paths(config.facts[name]):
                if (value := _lookup(whole, path)) is not _ABSENT:
                    document = _with(document, path, value)
                    added.append(name)
        document = {name: value for name, value in document.items() if name != config.within}
    facts = read_facts(document, config)
    return facts, [name for name in dict.fromkeys(added) if facts.get(name) is not None]


def _whole(document: Mapping[str, Any], architecture: ArchitectureSpec) -> Mapping[str, Any]:
    """What the class of a document makes of it, flat; empty where no class can be asked."""
    config = architecture.config
    inner = document.get(config.within) if config.within is not None else None
    if isinstance(inner, Mapping) and (whole := class_config(inner, inner.get("model_type"))) is not None:
        return whole
    whole = class_config(document, document.get("model_type"))
    if whole is None:
        whole = class_config(document, architecture.name) or {}
        if config.within in whole and config.within not in document:
            return {}  # the class of a larger model, of which the document is a part: it was told nothing
    return _flat(whole, config)


def class_config(document: Mapping[str, Any], model_type: object) -> dict[str, Any] | None:
    """The whole config that the transformers class of `model_type` makes of a document, in its own spelling.

    None where transformers has no such class, or the class refuses the document. No file is read, nothing is fetched,
    and no code that the document names is run: the class is one that comes with transformers.
    """
    if not isinstance(model_type, str) or _too_many(document):
        return None
    try:
        from transformers import CONFIG_MAPPING
    except Exception:  # a broken installation fails in many ways, and specs say most defaults themselves
        return None
    if model_type not in CONFIG_MAPPING:
        return None
    with _quietly():
        try:
            made = CONFIG_MAPPING[model_type]
            given = {name: copy.deepcopy(value) for name, value in document.items() if _takes(made, name)}
            return dict(made(**given).to_dict())
        except Exception:  # what a class does with a strange document is up to it
            return None


def _takes(made: type, name: object) -> bool:
    """May a document set this attribute of a config? Methods and what the class itself is built of are not fields."""
    if not isinstance(name, str) or name in _RUNNING:
        return False
    if dataclasses.is_dataclass(made) and name in {field.name for field in dataclasses.fields(made)}:
        return True
    return not name.startswith("_") and isinstance(getattr(made, name, None), property | None)


def _too_many(value: Any, name: str = "") -> bool:
    """Would a class make absurdly long lists of this document?"""
    if isinstance(value, Mapping):
        return any(_too_many(inner, str(key)) for key, inner in value.items())
    return isinstance(value, int) and value > _MAX_COUNT and any(word in name for word in _COUNTS)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of a config class: no model is made, and what is odd about the document is said by us."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)


def _leaves(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}")
    else:
        yield path


def unread_fields(document: Mapping[str, Any], config: ConfigMap, neutral: Iterable[str]) -> list[str]:
    """The fields of a document that no fact is read from, by dotted path, but for `neutral` ones (globs).

    A field inside a table that a fact reads as a whole is read if the facts differ without it. A table of which nothing
    is read is one field.
    """
    globs = tuple(neutral)
    read = {path for entry in config.facts.values() for path in paths(entry)} | {*config.constants, *config.write}
    facts = read_facts(document, config)

    def counts(own: str) -> bool:
        return own not in read and not any(fnmatchcase(own, glob) for glob in globs)

    def found(path: str, value: Any) -> Iterator[str]:
        own = _own(path, config)
        if own in read:
            inner = (leaf for leaf in _leaves(value, path) if leaf != path and counts(_own(leaf, config)))
            yield from (leaf for leaf in inner if _facts_without(document, leaf, config) == facts)
        elif not counts(own):
            return
        elif path == config.within or any(other.startswith(f"{own}.") for other in read):
            for name, field in value.items() if isinstance(value, Mapping) else ():
                yield from found(f"{path}.{name}", field)
        else:
            yield path

    return [path for name, value in document.items() for path in found(name, value)]


def _own(path: str, config: ConfigMap) -> str:
    """A field's path in the part of the document that holds the facts' fields."""
    return path.removeprefix(f"{config.within}.")


def _facts_without(document: Mapping[str, Any], path: str, config: ConfigMap) -> dict[str, Any] | None:
    """The facts of a document without one field; None where they cannot be read without it."""
    try:
        return read_facts(_without(document, [path]), config)
    except MappingError:
        return None


def lost_fields(
    document: Mapping[str, Any], architecture: ArchitectureSpec, neutral: Iterable[str], usual: Mapping[str, Any]
) -> list[str]:
    """The fields of a config.json that no fact is read from, and that do not have the value they have when absent.

    `usual` are such values, by dotted path; about others the transformers class is asked.
    """
    config = architecture.config
    unread = {path: _own(path, config) for path in unread_fields(document, config, neutral)}
    found = {p: own for p, own in unread.items() if own not in usual or _lookup(document, p) != usual[own]}
    if not found:
        return []
    whole = _whole(_without(document, found), architecture)

    def implied(path: str, own: str) -> bool:
        value, absent = _lookup(document, path), _lookup(whole, own)
        return not value if absent is _ABSENT else bool(value == absent)

    return [path for path, own in found.items() if not implied(path, own)]
