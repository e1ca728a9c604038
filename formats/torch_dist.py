"""Megatron-Core's torch_dist checkpoints: `.metadata`, `__{rank}_{n}.distcp`, and common state in either generation.

A .distcp file is a row of items, each a whole torch.save archive; `.metadata` says where which chunk is.
Source: torch/distributed/checkpoint/{metadata,filesystem}.py, megatron/core/dist_checkpointing/strategies/torch.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from registry.errors import CheckpointError
from registry.reading import read_all, reading
from registry.storage import FilePlan, Laid, ObjectSlot, Opened, Rank, Request, Slot

from . import dcp_metadata, documents, extra_state, megatron_dirs, plain, torchzip
from .chunks import AGAIN as _AGAIN
from .chunks import METADATA, Items, read_pieces, unflatten, whole_numbers
from .pickles import attr, brief, check_start, loads

COMMON = "common.pt"
_COMMON_ITEM = "common_state/shard_0_1"
_MAX_METADATA = 1 << 30


def _is_checkpoint(path: Path) -> bool:
    if not (path / METADATA).is_file():
        return path.is_dir() and any(path.glob("__*.distcp"))
    return not is_plain(path)


def is_plain(path: Path) -> bool:
    """Is this what torch's own save writes, without what Megatron has beside it?"""
    return (path / METADATA).is_file() and not (path / "metadata.json").exists() and not (path / COMMON).exists()


class Container:
    """Opens and lays out torch_dist directories."""

    def detect(self, path: Path) -> bool:
        """A directory with `.metadata`, or one whose tracker names such a directory."""
        return megatron_dirs.detect(path, _is_checkpoint)

    def open(self, path: Path, spec_name: str) -> Opened:
        """Read the metadata and the head of every item. Raises CheckpointError."""
        path = megatron_dirs.directory(path, _is_checkpoint, "torch_dist checkpoint")
        metadata, items = read_metadata(path)
        pieces, entries = read_pieces(path, attr(metadata, "state_dict_metadata"), items)
        unflatten(path / METADATA, pieces, attr(metadata, "mcore_data", None))
        common = _state(path, items)
        carried = [name for name in entries if _KEPT.fullmatch(name)]
        arguments = megatron_dirs.arguments(common)
        opened = Opened(
            path, spec_name, [path / name for name in items.files], pieces, arguments,
            parallel=megatron_dirs.parallel(arguments), iteration=megatron_dirs.iteration(path, common),
            entries=entries, state={"training": _training(path, items, common), "carried": carried},
        )  # fmt: skip
        opened.training = partial(_beside, path, items, common)
        opened.module_states = partial(_module_states, path, items)
        documents.read_carried(opened)
        return opened

    def lay_out(self, request: Request) -> Laid:
        """One .distcp a rank that owns anything, in the form that megatron-core 0.16 and current releases both read."""
        root = megatron_dirs.place(request)
        writer = Writer(request, f"{root}/")
        small, copies = documents.carry(request, f"{root}/")
        small |= megatron_dirs.tracker(request)
        small[f"{root}/{METADATA}"] = writer.metadata
        state = megatron_dirs.common_state(request) | {"content_metadata": {"singleton_local_shards": False}}
        small[f"{root}/{COMMON}"] = torchzip.whole(torchzip.layout(state, prefix="common"))
        small[f"{root}/metadata.json"] = (
            b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1,'
            b' "common_backend": "torch", "common_backend_version": 1}'
        )
        return Laid(writer.files, writer.places, small, copies, seal=writer.seal, home=root, seal_file=writer.seal_file)


def read_metadata(path: Path) -> tuple[Any, Items]:
    """`.metadata` as inert nodes, and where each item lies. Raises CheckpointError."""
    where = path / METADATA
    if not where.is_file():
        raise CheckpointError(
            "the metadata is missing", where=where, expected=METADATA, found="only .distcp files",
            hint="it is written last: the save did not end, or a copy left hidden files out",
        )  # fmt: skip
    with reading(where) as file:
        if file.size > _MAX_METADATA:
            raise CheckpointError(
                "metadata too large", where=where, expected=f"at most {_MAX_METADATA} bytes",
                found=f"{file.size} bytes", hint=_AGAIN,
            )  # fmt: skip
        check_start(read_all(file, 0, 2), str(where))  # a file of holes need not be read
        data = read_all(file)
    metadata = loads(data, where=str(where))
    stored = attr(metadata, "storage_data")
    tensors = attr(metadata, "state_dict_metadata")
    if not isinstance(stored, dict) or not isinstance(tensors, dict) or not set(map(type, tensors)) <= {str}:
        raise CheckpointError(
            "not the metadata of a checkpoint", where=where, expected="dictionaries of tensors and places",
            found=f"{brief(tensors)} and {brief(stored)}", hint=_AGAIN,
        )  # fmt: skip
    return metadata, _items(path, stored)


def _items(path: Path, stored: dict[Any, Any]) -> Items:
    items = Items()
    index: dict[str, int] = {}
    sizes: list[int] = []
    for key, info in stored.items():
        name, at = attr(key, "fqn"), attr(key, "offset", None)
        file = attr(info, "relative_path")
        span = whole_numbers((attr(info, "offset"), attr(info, "length")))
        origin = None if at is None else whole_numbers(at)
        if not isinstance(name, str) or span is None or (at is not None and origin is None):
            raise CheckpointError(
                "bad entry in the metadata", where=path / METADATA, expected="a name, an offset and a length",
                found=brief(name), hint=_AGAIN,
            )  # fmt: skip
        if attr(info, "transform_descriptors", None):
            raise CheckpointError(
                "items are stored compressed", where=path / METADATA, expected="items as torch.save writes them",
                found=name, hint="save without transform descriptors",
            )  # fmt: skip
        if not isinstance(file, str) or file not in index:
            if not documents.plain_name(file):
                raise CheckpointError(
                    "the metadata names a file outside its directory", where=path / METADATA,
                    expected="plain file names", found=brief(file),
                    hint="do not use this checkpoint unless you trust where it comes from",
                )  # fmt: skip
            if not (path / file).is_file():
                raise CheckpointError(
                    "a file that the metadata names is missing", where=path / file, expected=f"a file with {name}",
                    found="no such file", hint="copy it again; the files of every rank are needed",
                )  # fmt: skip
            index[file] = len(items.files)
            items.files.append(file)
            sizes.append((path / file).stat().st_size)
        if span[0] + span[1] > sizes[index[file]]:
            raise CheckpointError(
                "a file is shorter than its metadata says", where=path / file,
                expected=f"at least {span[0] + span[1]} bytes for {name}", found=f"{sizes[index[file]]} bytes",
                hint="the file is truncated; copy it again",
            )  # fmt: skip
        items.where[name, origin] = (index[file], span[0], span[1])
    return items


def read_object(path: Path, items: Items, name: str) -> tuple[Any, Path]:
    """What an item without a tensor holds, as inert nodes, and the file that it is in."""
    file, offset, length = items.where[name, None]
    where = path / items.files[file]
    return torchzip.read(where, base=offset, length=length, where=str(where)).load(), where


def _unwrapped(loaded: Any) -> Any:
    """Megatron stores an object as a list of one."""
    return loaded[0] if isinstance(loaded, list) and len(loaded) == 1 else loaded


def _state(path: Path, items: Items) -> dict[str, Any]:
    """The common state, of the generation with common.pt or the one with an object among the items."""
    common: object = {}
    if (path / COMMON).is_file():
        common = torchzip.read(path / COMMON, where=str(path / COMMON)).load()
    elif (_COMMON_ITEM, None) in items.where:
        common = _unwrapped(read_object(path, items, _COMMON_ITEM)[0])
    if not isinstance(common, dict):
        raise CheckpointError(
            "the common state is no dictionary", where=path / COMMON, expected="a dictionary", found=brief(common),
            hint=_AGAIN,
        )  # fmt: skip
    return common


#: What a distributed optimizer keeps beside its flat buffers, of the first model-parallel rank of each chain.
_KEPT = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.[a-z_]+/shard_[\d._]+")
_GROUPS = re.compile(
    r"(?:chained_(\d{1,9})\.)?optimizer\.distributed\.dp_group_idx_0\.(optimizer|grad_scaler)/shard_0_1"
)


def _training(path: Path, items: Items, common: dict[str, Any]) -> dict[str, Any]:
    """What the common state says of optimizer and schedule, and what the flat form keeps of it as objects."""
    return {**megatron_dirs.training(common, path / COMMON), **_flat_optimizer(path, items)}


def _flat_optimizer(path: Path, items: Items) -> dict[str, Any]:
    """The `optimizer` entry that the flat form has as objects; nothing for other forms."""
    chains: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, origin in items.where:
        if origin is None and (match := _GROUPS.fullmatch(name)):
            loaded, where = read_object(path, items, name)
            chains[int(match[1] or 0)][match[2]] = megatron_dirs.plain(_unwrapped(loaded), where)
    own = {n: {**state, "param_state_sharding_type": "fully_reshardable"} for n, state in sorted(chains.items())}
    return {"optimizer": own[0] if len(own) == 1 else own} if own else {}


def _module_states(path: Path, items: Items) -> dict[Rank | None, dict[str, dict[str, list[float]]]]:
    """The numbers that modules keep beside their weights."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, origin in items.where:
        module = extra_state.module_of(name) if origin is None else None
        if module is not None:
            held, where = read_object(path, items, name)
            found[module] = extra_state.scales(extra_state.content(held, where), where)
    return {None: found}


_RANDOM = re.compile(r"rng_state/shard_(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?_\d+\.\d+(?:\.\d+)?")


def _beside(path: Path, items: Items, common: dict[str, Any], rank: Rank | None) -> dict[str, Any]:
    """The common state, and of a rank its random states: a list of one for each data-parallel rank, or of one for all.

    The axes of `rng_state` are pipeline and tensor rank; with experts, 0.16 has the data-parallel rank as a third.
    """
    found: dict[str, Any] = {**plain.plain(common, path / COMMON), **_flat_optimizer(path, items)}
    states: dict[int, Any] = {}
    for name, origin in items.where:
        match = _RANDOM.fullmatch(name) if origin is None and rank is not None else None
        if match and rank is not None and (int(match[1]), int(match[2])) == (rank.pp, rank.tp):
            loaded, where = read_object(path, items, name)
            states[int(match[3] or 0)] = _unwrapped(plain.plain(loaded, where))
    if states:
        rows = [state if isinstance(state, list) else [state] for _, state in sorted(states.items())]
        found["rng_state"] = [one for row in rows for one in row]
    return found


class Writer:
    """Lays the items out, rank by rank: objects first, then tensors, as torch's own writer does.

    `paths` gives, for checkpoints of nested state dicts, where in them each name stands.
    """

    def __init__(self, request: Request, root: str, paths: Mapping[str, tuple[str | int, ...]] | None = None) -> None:
        self.request, self.paths = request, paths
        self.files: list[FilePlan] = []
        self.places = [(0, 0)] * len(request.slots)
        self.skeletons: list[torchzip.Skeleton] = [torchzip.tensor_item(s.dtype, s.shape) for s in request.slots]
        # (slot or object, file name, offset, length) of every item, and where each slot's item begins
        self.items: list[tuple[Slot | ObjectSlot, str, int, int]] = []
        self.bases = [0] * len(request.slots)
        self.held: list[Sequence[int]] = []  # the slots of each file
        engine = request.options.get("transformer_impl") == "transformer_engine"
        self.empty = torchzip.whole(torchzip.layout([torchzip.NewTensor("uint8", (0,)) if engine else None]))
        by_rank: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        things: tuple[Sequence[ObjectSlot | Slot], ...] = (request.objects, request.slots)
        p = request.parallel
        for kind, i, thing in ((k, i, t) for k, row in enumerate(things) for i, t in enumerate(row)):
            number = (thing.rank.pp * p.ep + thing.rank.ep) * p.tp + thing.rank.tp
            by_rank[number][kind].append(i)
        for number in sorted(by_rank):
            self.rank_file(f"{root}__{number}_0.distcp", *by_rank[number])

    def rank_file(self, path: str, objects: Sequence[int], slots: Sequence[int]) -> None:
        """Lay out one rank's file."""
        cursor = 0
        literals: list[tuple[int, bytes]] = []
        name = Path(path).name
        for i in objects:
            entry = self.request.objects[i]
            blob = self.empty
            if entry in self.request.payloads:
                value = plain.nodes(self.request.payloads[entry])
                blob = torchzip.whole(torchzip.layout([value] if self.paths is None else value))
            literals.append((cursor, blob))
            self.items.append((entry, name, cursor, len(blob)))
            cursor += len(blob)
        for i in slots:
            skeleton = self.skeletons[i]
            at = next((offset for _, offset in skeleton.tensors), 0)
            literals += [(cursor + offset, data) for offset, data in skeleton.literals]
            self.places[i], self.bases[i] = (len(self.files), cursor + at), cursor
            self.items.append((self.request.slots[i], name, cursor, skeleton.size))
            cursor += skeleton.size
        self.held.append(slots)
        self.files.append(FilePlan(path, cursor, literals))

    def metadata(self) -> bytes:
        """The `.metadata` file: what torch's FileSystemReader unpickles."""
        return dcp_metadata.render(self.items, self.request.payloads, self.paths)

    def seal(self, crcs: Sequence[int]) -> list[tuple[int, int, bytes]]:
        """The CRC32 fields of every item's archive."""
        return [(file, at, data) for file in range(len(self.files)) for at, data in self.seal_file(file, crcs)]

    def seal_file(self, file: int, crcs: Sequence[int]) -> list[tuple[int, bytes]]:
        """Those of one file."""
        return [
            (self.bases[i] + at, data)
            for i in self.held[file] for at, data in self.skeletons[i].crc_patches({0: crcs[i]})
        ]  # fmt: skip
