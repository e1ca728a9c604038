"""A HuggingFace model directory: config.json, one safetensors file or several with an index, and side files.

Directories from before safetensors, with pickled weights (pytorch_model.bin), are read too, and never written.

Source: transformers/modeling_utils.py (save_pretrained) and huggingface_hub's split of a state dict into shards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

from registry.errors import ArgumentError, CheckpointError
from registry.reading import each
from registry.storage import FilePlan, Laid, Opened, Piece, Request, Slot, Small, slot_bytes

from . import documents, torchzip
from .pickles import brief
from .safetensors_file import layout, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_MAX_INDEX = 256 << 20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLED = re.compile(r"pytorch_model.*\.bin(\.index\.json)?")
_OTHER_WEIGHTS = re.compile(
    r".*\.(bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|safetensors)$|.*\.(bin|safetensors)\.index\.json$"
)


class Container:
    """Opens and lays out HuggingFace directories."""

    def detect(self, path: Path) -> bool:
        """A directory with an index or a model.safetensors; or with weights that only `open` can say is wrong with."""
        if (path / INDEX).is_file() or (path / SINGLE).is_file():
            return True
        return path.is_dir() and any(_SHARD.fullmatch(p.name) or _PICKLED.fullmatch(p.name) for p in path.iterdir())

    def open(self, path: Path, spec_name: str) -> Opened:
        """Read every header. Raises CheckpointError for whatever does not fit together."""
        pickled = not any((path / name).is_file() for name in (INDEX, SINGLE))
        indexed, single = (path / PICKLED_INDEX, PICKLED_SINGLE) if pickled else (path / INDEX, SINGLE)
        index = documents.read_json(indexed, _MAX_INDEX) if indexed.is_file() else None
        if index is None and not (path / single).is_file():
            _refuse_shards(path)
        names = [single] if index is None else _indexed_files(indexed, index)
        pieces: list[Piece] = []
        metadata: dict[str, dict[str, str]] = {}
        nbytes = 0
        for name in names:
            if not (path / name).is_file():
                raise CheckpointError(
                    "a file that the index names is missing", where=path / name, expected=f"{len(names)} files",
                    found="no such file", hint="download it again; every shard is needed",
                )  # fmt: skip
        files = [path / name for name in names]
        if pickled:
            pieces = [piece._replace(file=i) for i, held in enumerate(each(_pickled, files, path)) for piece in held]
        else:
            for i, (entries, told) in enumerate(each(read_header, files, path)):
                metadata[names[i]] = told
                nbytes += sum([e.end - e.begin for e in entries.values()])
                pieces += [Piece(key, e.dtype, e.shape, i, e.begin) for key, e in entries.items()]
        if index is not None:
            _check_index(indexed, index, names, pieces, None if pickled else nbytes)
        config = documents.read_json(path / CONFIG) if (path / CONFIG).is_file() else None
        side = {n: p for n, p in documents.side_files(path, ()).items() if not _OTHER_WEIGHTS.match(n) or n == INDEX}
        notes = [
            f"left behind: {p.name}" for p in sorted(path.iterdir())
            if p.name not in side and p.name not in names and not p.name.startswith(".")
        ]  # fmt: skip
        model_type = (config or {}).get("model_type")
        return Opened(
            path, spec_name, files, pieces, config or {},
            architecture=model_type if isinstance(model_type, str) else None, hub_config=config, side_files=side,
            state={"metadata": metadata}, notes=notes,
        )  # fmt: skip

    def lay_out(self, request: Request) -> Laid:
        """One file, or shards of at most `shard_size` bytes, or the source's own split where it is known."""
        shards = _split(request)
        carried = request.source.state.get("metadata") or {}
        files, where = [], {}
        for i, (name, slots) in enumerate(shards.items()):
            metadata = carried.get(name) or next(iter(carried.values()), None) or {"format": "pt"}
            head, entries, size = layout(((s.name, s.dtype, s.shape) for s in slots), metadata)
            files.append(FilePlan(name, size, [(0, head)]))
            where.update({key: (i, entry.begin) for key, entry in entries.items()})
        small: dict[str, Small] = {}
        copies = {name: p for name, p in request.side_files.items() if name not in (CONFIG, INDEX)}
        documents.place_config(request, CONFIG, small, copies)
        if len(shards) > 1 or SINGLE not in shards:
            _place_index(request, shards, small, copies)
        return Laid(files, [where[slot.name] for slot in request.slots], small, copies)


def _refuse_shards(path: Path) -> Never:
    """Say what is wrong with a directory that has shards of weights, but no index."""
    names = sorted(p.name for p in path.iterdir())
    shards = list(filter(_SHARD.fullmatch, names))
    raise CheckpointError(
        "the index of the shards is missing", where=path / (INDEX if shards else PICKLED_INDEX),
        expected=INDEX if shards else PICKLED_INDEX, found=", ".join(shards or filter(_PICKLED.fullmatch, names)),
        hint="download the index too",
    )  # fmt: skip


def _pickled(path: Path) -> list[Piece]:
    """The tensors of a pickled state dict. Ties are stored once and named twice."""
    state = torchzip.read(path, where=str(path)).load()
    held = state.items() if isinstance(state, dict) else [("what it holds", state)]
    for name, value in held:
        if type(name) is not str or not isinstance(value, torchzip.TensorRef):
            raise CheckpointError(
                "the file is no state dict", where=path, expected="a dictionary of names to tensors",
                found=f"{brief(name)}: {brief(value)}",
                hint="save the model's own state_dict(), or use save_pretrained()",
            )  # fmt: skip
    return [
        Piece(name, ref.dtype, ref.shape, 0, ref.offset, strides=None if ref.is_contiguous else ref.stride)
        for name, ref in held
    ]


def _indexed_files(path: Path, index: dict[str, Any]) -> list[str]:
    """The files that an index names, which lies at `path`."""
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(
            "the index has no weight_map", where=path, expected="a weight_map of tensor name -> file name",
            found=", ".join(index) or "nothing", hint="download the index again",
        )  # fmt: skip
    files = list(weights.values())
    bad = [name for name in (set(files) if set(map(type, files)) == {str} else files) if not documents.plain_name(name)]
    if bad:
        raise CheckpointError(
            "the index names a file outside its directory", where=path,
            expected="plain file names", found=repr(bad[0])[:200],
            hint="do not use this checkpoint unless you trust where it comes from",
        )  # fmt: skip
    return sorted(set(weights.values()))


def _check_index(
    path: Path, index: dict[str, Any], names: Sequence[str], pieces: Sequence[Piece], found: int | None
) -> None:
    """The index must say of every tensor where it is, and `found`, the bytes of all, where that is known."""
    weights = index["weight_map"]
    held = {piece.name: names[piece.file] for piece in pieces}
    if len(held) != len(pieces):
        twice = next(name for name, count in Counter(piece.name for piece in pieces).items() if count > 1)
        files = " and ".join(names[piece.file] for piece in pieces if piece.name == twice)
        raise CheckpointError(
            "two files hold the same tensor", where=path.parent, expected="every tensor once",
            found=f"{twice} in {files}", hint="download the directory again; its files are of two versions",
        )  # fmt: skip
    if held != weights:
        details = [f"{t}: the index says {f}, which does not hold it" for t, f in weights.items() if held.get(t) != f]
        details += [f"{t}: in {f}, but not in the index" for t, f in held.items() if t not in weights]
        raise CheckpointError(
            "the index and the files disagree", where=path, details=[*details[:10], *_more(details, 10)],
            hint="download the directory again; index and shards must be of one version",
        )  # fmt: skip
    header = index.get("metadata")
    total = header.get("total_size") if isinstance(header, dict) else None
    if None not in (total, found) and total != found:
        raise CheckpointError(
            "the index's total_size is wrong", where=path, expected=f"{total} bytes", found=f"{found} bytes",
            hint="a shard is of another version; download the directory again",
        )  # fmt: skip


def _more(items: Sequence[str], shown: int) -> list[str]:
    return [f"and {len(items) - shown} more"] if len(items) > shown else []


def _shard_limit(text: object) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]?I?B?)\s*", str(text).upper())
    if not match or match[2] not in _UNITS or not int(match[1]):
        raise ArgumentError("bad shard size", expected="a size such as 5GB or 500MiB", found=repr(text))
    return int(match[1]) * _UNITS[match[2]]


def _natural(slot: Slot) -> list[tuple[int, int, str]]:
    """Sorts `layers.10` after `layers.9`."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in slot.name.split(".")]


def _split(request: Request) -> dict[str, list[Slot]]:
    """File name -> its tensors."""
    slots = sorted(request.slots, key=_natural)
    chosen = request.options.get("shard_size")
    index = request.side_files.get(INDEX)
    if chosen is None and index is not None:
        weights = documents.read_json(index, _MAX_INDEX).get("weight_map")
        if isinstance(weights, dict) and weights.keys() == {slot.name for slot in slots}:
            shards: dict[str, list[Slot]] = {
                name: [] for name in sorted(set(_indexed_files(index, {"weight_map": weights})))
            }
            for slot in slots:
                shards[weights[slot.name]].append(slot)
            return shards
    limit = _shard_limit(chosen or "5GB")
    groups: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        size = slot_bytes(slot)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(slot)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


def _place_index(
    request: Request, shards: dict[str, list[Slot]], small: dict[str, Small], copies: dict[str, Path]
) -> None:
    weights = {slot.name: name for name, slots in shards.items() for slot in slots}
    total = sum(slot_bytes(slot) for slots in shards.values() for slot in slots)
    old = request.side_files.get(INDEX)
    if old is not None:
        before = documents.read_json(old, _MAX_INDEX)
        header = before.get("metadata")
        if (
            before.get("weight_map") == weights
            and isinstance(header, dict)
            and header.get("total_size") in (None, total)
        ):
            copies[INDEX] = old
            return
    small[INDEX] = documents.to_json({"metadata": {"total_size": total}, "weight_map": weights})
