"""Checkpoints of torch.distributed.checkpoint itself: `.metadata` and `__{rank}_{n}.distcp`, of nested state dicts.

A tensor's name is the path to it in the dict that was saved, {"model": ..., "optimizer": ...} as a rule, joined by
dots; what is no tensor is an item of its own. Here names are those of the model, and of its optimizer's state
`optimizer.state.<name>.<kind>`, wherever in the dict they are.
Source: torch/distributed/checkpoint/{_nested_dict,_traverse,state_dict,filesystem}.py; reference megatron.md B6.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from attrs import evolve

from registry.plain import TensorData
from registry.reading import read_all, reading
from registry.storage import Laid, ObjectSlot, Opened, Piece, Rank, Request, slot_bytes

from . import documents, megatron_dirs, param_groups, plain
from .chunks import METADATA, Items, read_pieces
from .pickle_tree import MAX_DEPTH
from .pickles import attr
from .torch_dist import Writer, is_plain, read_metadata, read_object

_Path = tuple[str | int, ...]
_STATE = re.compile(r"(?:(?P<root>.*?)\.)?state\.(?P<name>.+)\.(?P<kind>\w+)")
#: What training scripts call the parts of what they save.
_OPTIMIZERS = ("optimizer", "optim", "optimizers")
_MODELS = ("model", "module", "state_dict", "model_state", "model_state_dict")
#: Modules that wrap others and add themselves to the names.
_WRAPPERS = re.compile(r"(?:^module\.)|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_TWICE = re.compile(r"model\.(?:module\.|_orig_mod\.)?model\.")
#: The groups of torch's flattened form, by weight.
_BY_WEIGHT = re.compile(r"(?<![^.])param_groups\.(?P<name>(?!\d+\.\w+$).+)\.(?P<key>\w+)$")
_STEP = "step"
_NUMBER = re.compile(r"[0-9]{1,9}")
#: Bytes of a tensor beside the model's that is read into memory.
_SMALL = 1 << 26


class Container:
    """Opens and lays out DCP directories."""

    def detect(self, path: Path) -> bool:
        """A directory with `.metadata` and without what Megatron puts beside it, or one whose tracker names such."""
        return megatron_dirs.detect(path, is_plain)

    def open(self, path: Path, spec_name: str) -> Opened:
        """Read the metadata and the head of every item. Raises CheckpointError."""
        path = megatron_dirs.directory(path, is_plain, "DCP checkpoint")
        metadata, items = read_metadata(path)
        found, entries = read_pieces(path, attr(metadata, "state_dict_metadata"), items)
        paths = _paths(attr(metadata, "planner_data", None), [*(piece.name for piece in found), *entries])
        root = _root(found, paths)
        pieces: list[Piece] = []
        steps: list[Piece] = []
        others: dict[str, Piece] = {}
        for piece in found:
            name = _name(piece.name, paths[piece.name], root)
            if name is None:
                entries.append(piece.name)
                others[piece.name] = piece
            elif name.endswith(f".{_STEP}") and not piece.shape:
                steps.append(piece)
            else:
                pieces.append(piece._replace(name=name))
        opened = Opened(
            path, spec_name, [path / name for name in items.files], pieces, {},
            iteration=megatron_dirs.iteration(path, _counts(path, items)), entries=entries,
        )  # fmt: skip
        kept = {name: _beside_path(paths[name], (name, None) in items.where, root) for name in entries}
        opened.training = partial(_beside, path, items, kept, [*steps, *others.values()])
        own = {name: at for name, at in kept.items() if at[0] == _OPTIMIZERS[0]}
        if own or steps:
            beside = _beside(path, items, own, steps, None)
            opened.state["training"] = {key: plain.nodes(beside[key]) for key in beside if key in _OPTIMIZERS[:1]}
            opened.state["carried"] = list(own)
        documents.read_carried(opened)
        return opened

    def lay_out(self, request: Request) -> Laid:
        """One .distcp a rank that owns anything, and the items that training scripts look for."""
        root = str(request.options.get("root") or "")
        paths: dict[str, _Path] = {}
        slots, stepped = [], []
        for slot in request.slots:
            path = _stored(slot.name, root)
            if path[-1] == "exp_avg" and path[:2] == (_OPTIMIZERS[0], "state"):
                stepped.append(str(path[2]))
            slots.append(slot._replace(name=_joined(path)))
            paths[slots[-1].name] = path
        payloads: dict[ObjectSlot, Any] = {}
        for path, value in _flat((), _kept(request, stepped)):
            payloads[ObjectSlot(_joined(path), Rank())] = value
            paths[_joined(path)] = path
        inner = evolve(request, slots=slots, objects=list(payloads), payloads=payloads)
        writer = Writer(inner, "", paths)
        small, copies = documents.carry(request)
        small[METADATA] = writer.metadata
        return Laid(writer.files, writer.places, small, copies, seal=writer.seal, seal_file=writer.seal_file)


# Names.


def _joined(path: _Path) -> str:
    return ".".join(map(str, path))


def _paths(told: object, names: list[str]) -> dict[str, _Path]:
    """Where in the dict each name stands; a name of which nothing is told stands at its top."""
    known = told if isinstance(told, dict) else {}
    paths: dict[str, object] = {name: known.get(name) for name in names}
    return {name: path if _is_path(path) and _joined(path) == name else (name,) for name, path in paths.items()}


def _is_path(path: object) -> TypeGuard[_Path]:
    """What torch's planner says of a leaf: the keys that lead to it. (Others could be of any depth, or endless.)"""
    return isinstance(path, tuple) and 0 < len(path) <= MAX_DEPTH and all(type(key) in (str, int) for key in path)


def _state(name: str) -> re.Match[str] | None:
    """The parts of the name of an optimizer's state; torch's own flattened form has no more than `state.` before it."""
    match = _STATE.fullmatch(name)
    return match if match and (match["root"] or _OPTIMIZERS[0]).split(".")[-1] in _OPTIMIZERS else None


def _root(pieces: list[Piece], paths: Mapping[str, _Path]) -> str:
    """What holds the weights: the part that is called so; of several, or none, the one with most of the bytes."""
    sizes: Counter[str] = Counter()
    for piece in pieces:
        if _state(piece.name) is None:
            path = paths[piece.name]
            # Where nothing is told of the dict, a part that the names of all models have twice is one too many.
            told = len(path) > 1 or not _TWICE.match(piece.name)
            sizes[_joined(path[:-1]) if told else "model"] += slot_bytes(piece)
    if sizes.keys() == {"", "model"} and not any(len(paths[piece.name]) > 1 for piece in pieces):
        return "model"
    return max(sizes, key=lambda root: (root.split(".")[-1] in _MODELS, sizes[root]), default="")


def _name(stored: str, path: _Path, root: str) -> str | None:
    """The name here of a tensor on disk; None for one that is neither the model's nor its optimizer's."""
    if (match := _state(stored)) is not None:
        return f"optimizer.state.{_WRAPPERS.sub('', match['name'])}.{match['kind']}"
    own = _joined(path[:-1]) if len(path) > 1 else root if stored.startswith(f"{root}.") else ""
    if own != root:
        return None
    return _WRAPPERS.sub("", stored.removeprefix(f"{root}.") if root else stored)


def _stored(name: str, root: str) -> _Path:
    """Where a tensor goes in the dict that is written."""
    if (match := _state(name)) is not None:
        return (_OPTIMIZERS[0], "state", match["name"], match["kind"])
    return (*root.split("."), name) if root else (name,)


# What is no tensor.


def _counts(path: Path, items: Items) -> dict[str, Any]:
    """The training step, where it is one of these items."""
    names = [name for name in ("iteration", "step", "train_state.step") if (name, None) in items.where]
    return {"iteration": plain.plain(*read_object(path, items, names[0]))} if names else {}


def _beside(path: Path, items: Items, kept: Mapping[str, _Path], small: list[Piece], _: Rank | None) -> dict[str, Any]:
    """The dict without the tensors of model and optimizer; of the optimizer's steps one, the last."""
    found: dict[str, Any] = {}
    tensors = {piece.name: piece for piece in small if slot_bytes(piece) <= _SMALL and piece.shape == piece.whole}
    for name, at in kept.items():
        if (name, None) in items.where:
            _set(found, at, plain.plain(*read_object(path, items, name)))
        elif name in tensors:
            _set(found, at, _data(path, items, tensors[name]))
    if steps := [_data(path, items, piece) for piece in small if piece.name not in kept]:
        own = found.setdefault(_OPTIMIZERS[0], {})
        if isinstance(own, dict) and isinstance(state := own.setdefault("state", {}), dict):
            state["common_step"] = max(steps, key=param_groups.number)
    own = found.get(_OPTIMIZERS[0])
    if isinstance(own, dict) and "param_groups" not in own and (groups := _by_weight(own)):
        found[_OPTIMIZERS[0]] = {"param_groups": groups, "state": own.get("state", {})}
    return {key: _lists(value) for key, value in found.items()}


def _data(path: Path, items: Items, piece: Piece) -> TensorData:
    with reading(path / items.files[piece.file]) as file:
        return TensorData(piece.dtype, piece.shape, read_all(file, piece.begin, piece.begin + slot_bytes(piece)))


def _beside_path(path: _Path, is_object: bool, root: str) -> _Path:
    """Where something stands in what lies beside the tensors: the optimizer's at `optimizer`, and the rest as it is
    beside the model."""
    by_weight = _BY_WEIGHT.search(_joined(path))
    if by_weight is not None:
        return (_OPTIMIZERS[0], by_weight[0])
    if len(path) == 1 and is_object:
        parts = str(path[0]).split(".", MAX_DEPTH - 1)
        path = tuple(int(part) if _NUMBER.fullmatch(part) else part for part in parts)
    parent = tuple(root.split(".")[:-1])
    path = path[len(parent) :] if path[: len(parent)] == parent and len(path) > len(parent) else path
    at = next((i for i, part in enumerate(path) if part in _OPTIMIZERS), None)
    return path if at is None else (_OPTIMIZERS[0], *path[at + 1 :])


def _by_weight(own: dict[Any, Any]) -> list[dict[str, Any]]:
    """The groups of torch's flattened form: weights of the same hyperparameters are one."""
    of: dict[str, dict[str, Any]] = {}
    for name, value in own.items():
        if (match := _BY_WEIGHT.fullmatch(str(name))) is not None:
            of.setdefault(match["name"], {})[match["key"]] = value
    groups: list[dict[str, Any]] = []
    for name, fields in of.items():
        same = next((group for group in groups if {k: v for k, v in group.items() if k != "params"} == fields), None)
        if same is None:
            groups.append(same := {**fields, "params": []})
        same["params"].append(name)
    return groups


def _set(found: dict[Any, Any], path: _Path, value: Any) -> None:
    for key in path[:-1]:
        inner = found.setdefault(key, {})
        if not isinstance(inner, dict):
            return
        found = inner
    found[path[-1]] = value


def _lists(value: Any) -> Any:
    """Lists, which are known by the numbers in paths."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(one) for key, one in value.items()}
    if inner and sorted(map(str, inner)) == sorted(map(str, range(len(inner)))) and all(type(k) is int for k in inner):
        return [inner[i] for i in range(len(inner))]
    return inner


def _kept(request: Request, stepped: list[str]) -> dict[str, Any]:
    """What lies beside the tensors, as a training script would save it."""
    kept: dict[str, Any] = {} if request.iteration is None else {"iteration": request.iteration}
    carried = plain.plain(request.source.state.get("training") or {}, request.source.path) if request.states else {}
    kept |= {key: value for key, value in {**carried, **request.common}.items() if value is not None}
    kept |= {entry.name: value for entry, value in request.payloads.items()}
    parts = param_groups.parts(kept.pop("optimizer", None))
    if request.states and parts:
        groups = [group for part in parts for group in param_groups.groups(param_groups.inner(part))]
        count = next((found for part in parts if (found := param_groups.step(part)) is not None), None)
        step = {} if count is None else {_STEP: TensorData("float32", (), struct.pack("<f", count))}
        kept[_OPTIMIZERS[0]] = {"state": {name: step for name in stepped if step}, "param_groups": groups}
    return kept


def _flat(path: _Path, value: Any) -> Iterator[tuple[_Path, Any]]:
    """Every leaf, where torch's planner finds it: lists are opened only where there is more in them than numbers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat((*path, str(key)), inner)
    elif isinstance(value, list) and not _terminal(value):
        for i, inner in enumerate(value):
            yield from _flat((*path, i), inner)
    else:
        yield path, value


def _terminal(value: list[Any]) -> bool:
    return not any(
        isinstance(inner, dict | TensorData) or (isinstance(inner, list) and not _terminal(inner)) for inner in value
    )
