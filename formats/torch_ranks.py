"""Megatron's per-rank checkpoints: mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt, a torch.save archive for every rank.

Source: megatron/training/checkpointing.py (get_checkpoint_name, generate_state_dict).
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import frozen

from registry.crc import combine
from registry.errors import CheckpointError
from registry.parallel import Parallel
from registry.reading import each
from registry.storage import FilePlan, Laid, ObjectSlot, Opened, Piece, Rank, Request, Row, slot_bytes

from . import documents, extra_state, megatron_dirs, param_groups, plain, torchzip
from .pickles import Global, brief

FILE = "model_optim_rng.pt"
FLAT = "distrib_optim.pt"
_AGAIN = "copy the checkpoint again, or use another iteration"
_DIRECTORY = re.compile(r"mp_rank_(\d{2,9})(?:_(\d{3,9}))?(?:_(\d{3,9}))?")
_MODEL = re.compile(r"model(\d{0,9})")


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and any(_DIRECTORY.fullmatch(p.name) and (p / FILE).is_file() for p in path.glob("mp_rank_*"))


class Container:
    """Opens and lays out per-rank directories."""

    def detect(self, path: Path) -> bool:
        """A directory of mp_rank_* directories, or one whose tracker names such a directory."""
        return megatron_dirs.detect(path, _is_checkpoint)

    def open(self, path: Path, spec_name: str) -> Opened:
        """Read the pickle of every rank's file; tensors stay where they are. Raises CheckpointError."""
        path = megatron_dirs.directory(path, _is_checkpoint, "per-rank Megatron checkpoint")
        found = {
            m: p for p in sorted(path.glob("mp_rank_*")) if (m := _DIRECTORY.fullmatch(p.name)) and (p / FILE).is_file()
        }
        states = dict(zip(found.values(), each(_load, [p / FILE for p in found.values()], path), strict=True))
        first = next(iter(states.values()))
        arguments = megatron_dirs.arguments(first)
        parallel = megatron_dirs.parallel(arguments)
        ranks = {p: _rank(m, parallel, path) for m, p in found.items()}
        parallel = _check_ranks(path, parallel, ranks)
        pieces: list[Piece] = []
        entries: list[str] = []
        groups: dict[tuple[Rank, int], list[dict[str, Any]]] = {}
        files = [p / FILE for p in states]
        for i, (directory, state) in enumerate(states.items()):
            _read_model(directory / FILE, state, i, ranks[directory], pieces, entries)
            pieces += _listed(state.get("optimizer"), i, ranks[directory], groups)
        for directory in states:
            if (directory / FLAT).is_file():
                pieces += _flat(directory / FLAT, len(files), ranks[directory], parallel)
                files.append(directory / FLAT)
        training = megatron_dirs.training(first, next(iter(states)) / FILE)
        carried = [name for name in entries if name.startswith("optimizer (")]
        opened = Opened(
            path, spec_name, files, pieces, arguments, parallel=parallel,
            iteration=megatron_dirs.iteration(path, first), entries=sorted(set(entries)),
            state={"training": training, "carried": carried, "groups": groups},
        )  # fmt: skip
        opened.training = partial(_beside, {rank: directory / FILE for directory, rank in ranks.items()})
        opened.module_states = partial(_module_states, {rank: directory / FILE for directory, rank in ranks.items()})
        documents.read_carried(opened)
        return opened

    def lay_out(self, request: Request) -> Laid:
        """One archive a rank, the model under `model`, or under `model0`, `model1`, ... with virtual stages.

        The rows of an optimizer are in an archive beside it.
        """
        root = megatron_dirs.place(request)
        members: dict[Rank, list[int]] = defaultdict(list)
        in_rows = {i for row in request.rows for i, _ in row.members}
        for i, slot in enumerate(request.slots):
            if i not in in_rows:
                members[slot.rank._replace(vpp=0)].append(i)
        rows: dict[Rank, list[Row]] = defaultdict(list)
        for row in request.rows:
            rows[row.rank].append(row)
        objects: dict[Rank, list[ObjectSlot]] = defaultdict(list)
        for entry in request.objects:
            objects[entry.rank._replace(vpp=0)].append(entry)
        files: list[FilePlan] = []
        seals: list[Callable[[Sequence[int]], Iterator[tuple[int, bytes]]]] = []
        places = [(0, 0)] * len(request.slots)

        def add(path: str, archive: _Archive) -> None:
            for i, at in archive.places.items():
                places[i] = (len(files), at)
            files.append(FilePlan(path, archive.skeleton.size, archive.literals))
            seals.append(archive.seal)

        for rank in _ranks(request.parallel):
            folder = f"{root}/{_name(rank, request.parallel)}"
            add(f"{folder}/{FILE}", _archive(request, members[rank], objects[rank]))
            if rows[rank] or (request.rows and request.chained):
                add(f"{folder}/{FLAT}", _flat_archive(request, rows[rank]))
        small, copies = documents.carry(request, f"{root}/")
        small |= megatron_dirs.tracker(request)

        def seal(crcs: Sequence[int]) -> list[tuple[int, int, bytes]]:
            return [(file, at, data) for file, own in enumerate(seals) for at, data in own(crcs)]

        def seal_file(file: int, crcs: Sequence[int]) -> list[tuple[int, bytes]]:
            return list(seals[file](crcs))

        return Laid(files, places, small, copies, seal=seal, home=root, seal_file=seal_file)


@frozen(eq=False)
class _Archive:
    """A torch.save archive to write, and which slots lie in which of its tensors: (slot, its first byte there)."""

    skeleton: torchzip.Skeleton
    held: Mapping[int, Sequence[tuple[int, int, int]]]  # tensor -> (slot, first byte, bytes)

    @property
    def places(self) -> dict[int, int]:
        """Where each slot begins in the archive."""
        tensors = self.skeleton.tensors
        return {i: tensors[k][1] + first for k, slots in self.held.items() for i, first, _ in slots}

    @property
    def literals(self) -> list[tuple[int, bytes]]:
        """All bytes that are known before those of the slots."""
        own = [(at, tensor.data) for tensor, at in self.skeleton.tensors if tensor.data]
        return sorted([*self.skeleton.literals, *own])

    def seal(self, crcs: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """The CRC32 fields, given those of all slots."""
        sums = {k: zlib.crc32(tensor.data) for k, (tensor, _) in enumerate(self.skeleton.tensors) if tensor.data}
        for k, slots in self.held.items():
            sums[k] = combine(_parts(slots, crcs, self.skeleton.tensors[k][0].nbytes))
        yield from self.skeleton.crc_patches(sums)


def _parts(slots: Sequence[tuple[int, int, int]], crcs: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """(CRC32, bytes) of what lies one behind the other in a tensor: slots, and zeros between them."""
    end = 0
    for i, first, nbytes in (*slots, (-1, size, 0)):
        if first > end:
            yield zlib.crc32(bytes(first - end)), first - end
        if nbytes:
            yield crcs[i], nbytes
        end = first + nbytes


def _flat_archive(request: Request, rows: Sequence[Row]) -> _Archive:
    """The distributed optimizer's rows of one rank; in a chain, None for what another rank keeps."""
    reduced = bool(request.document.get("grad_reduce_in_bf16"))
    chain: list[dict[Any, Any] | None] = [None, {"buckets_coalesced": True}] if request.chained else [None]
    held: dict[int, list[tuple[int, int, int]]] = {}
    for row in rows:
        optimizer = chain[row.chain] = chain[row.chain] or {"buckets_coalesced": True}
        types = Global("torch", row.dtype), Global("torch", row.dtype if reduced else "float32")
        states = optimizer.setdefault(row.buffer, {}).setdefault(types, {"numel_unpadded": row.size})
        tensor = states[row.state] = torchzip.NewTensor("float32", (row.size,))
        held[id(tensor)] = [(i, 4 * at, slot_bytes(request.slots[i])) for i, at in row.members]
    skeleton = torchzip.layout(chain if request.chained else chain[0], prefix=FLAT.removesuffix(".pt"))
    return _Archive(skeleton, {k: held[id(tensor)] for k, (tensor, _) in enumerate(skeleton.tensors)})


def _name(rank: Rank, parallel: Parallel) -> str:
    pp = f"_{rank.pp:03d}" if parallel.pp > 1 else ""
    ep = f"_{rank.ep:03d}" if parallel.ep > 1 else ""
    return f"mp_rank_{rank.tp:02d}{pp}{ep}"


def _archive(request: Request, members: Sequence[int], objects: Sequence[ObjectSlot]) -> _Archive:
    """The archive of one rank's model, which are the slots `members`, and of what lies beside it."""
    chunks: dict[int, dict[str, Any]] = {vpp: {} for vpp in range(request.parallel.vpp)}
    new: dict[int, torchzip.NewTensor] = {}
    for i in members:
        slot = request.slots[i]
        new[i] = chunks[slot.rank.vpp][slot.name] = torchzip.NewTensor(slot.dtype, slot.shape)
    engine = request.options.get("transformer_impl") == "transformer_engine"
    state = megatron_dirs.common_state(request)
    for entry in objects:
        if entry in request.payloads:
            state[entry.name] = plain.nodes(request.payloads[entry])
        else:
            bare = entry.name.startswith("output_layer.") or not engine
            chunks[entry.rank.vpp][entry.name] = None if bare else torchzip.NewTensor("uint8", (0,))
    for vpp, chunk in chunks.items():
        state["model" if len(chunks) == 1 else f"model{vpp}"] = chunk
    skeleton = torchzip.layout(state, prefix="model_optim_rng")
    slot_of = {id(tensor): (i, 0, tensor.nbytes) for i, tensor in new.items()}
    return _Archive(skeleton, {k: [slot_of[id(t)]] for k, (t, _) in enumerate(skeleton.tensors) if id(t) in slot_of})


def _beside(files: Mapping[Rank, Path], rank: Rank | None) -> dict[str, Any]:
    """What a rank's file holds beside its model; the first rank's, for what all share."""
    rank = rank if rank in files else None
    path = files[rank or min(files)]
    state = {key: value for key, value in _load(path).items() if not _MODEL.fullmatch(str(key))}
    state["optimizer"] = param_groups.without_tensors(state.get("optimizer"))
    found: dict[str, Any] = plain.plain(state, path)
    if rank is None:
        found.pop("rng_state", None)
    return found


def _load(path: Path) -> dict[str, Any]:
    state = torchzip.read(path, where=str(path)).load()
    if not isinstance(state, dict):
        raise CheckpointError(
            "the file holds no dictionary", where=path, expected="a dictionary with a model", found=brief(state),
            hint=_AGAIN,
        )  # fmt: skip
    return state


def _rank(match: re.Match[str], parallel: Parallel, path: Path) -> Rank:
    """Which rank a directory name means: one suffix is the pipeline's or the experts', as the arguments decide."""
    tp, second, third = int(match[1]), match[2], match[3]
    if third is not None:
        return Rank(tp=tp, pp=int(second), ep=int(third))
    if second is None:
        return Rank(tp=tp)
    if parallel.pp > 1 and parallel.ep > 1:
        raise CheckpointError(
            "a directory name lacks the expert rank", where=path / match[0], expected="mp_rank_TT_PPP_EEE",
            found=f"arguments with pp {parallel.pp} and ep {parallel.ep}",
            hint="restore the names that Megatron gave the directories",
        )  # fmt: skip
    return Rank(tp=tp, ep=int(second)) if parallel.ep > 1 else Rank(tp=tp, pp=int(second))


def _check_ranks(path: Path, parallel: Parallel, ranks: Mapping[Path, Rank]) -> Parallel:
    """The layout that arguments and names give together. Raises CheckpointError unless every rank is there once."""
    held = {rank: directory.name for directory, rank in ranks.items()}
    twice = [f"{directory.name} and {held[rank]}" for directory, rank in ranks.items() if held[rank] != directory.name]
    if twice:
        raise CheckpointError(
            "two directories of one rank", where=path, expected="one directory a rank", found="; ".join(twice[:8]),
            hint="remove those that a save at another layout left",
        )  # fmt: skip
    tp, pp, ep = (max(parallel.size(dim), *(1 + getattr(rank, dim) for rank in held)) for dim in ("tp", "pp", "ep"))
    layout = Parallel(tp=tp, pp=pp, vpp=parallel.vpp, ep=ep, etp=parallel.etp)
    if tp * pp * ep * layout.size("etp") > 1 << 20:
        raise CheckpointError(
            "absurdly many ranks", where=path, expected=f"the {len(held)} that are here", found=layout, hint=_AGAIN
        )
    every = _ranks(layout)
    if held.keys() != set(every):
        missing = itertools.islice((rank for rank in every if rank not in held), 8)
        raise CheckpointError(
            "files of some ranks are missing", where=path, expected=f"{len(every)} ranks ({layout})",
            found=f"{len(held)}, without " + ", ".join(_name(rank, layout) for rank in missing),
            hint="copy the files of every rank",
        )  # fmt: skip
    return layout


def _ranks(parallel: Parallel) -> list[Rank]:
    """Every rank that has a file of its own, by tp, pp and ep."""
    found = [Rank(at["tp"], pp, at["ep"]) for at in parallel.expert_ranks() for pp in range(parallel.pp)]
    return sorted(found)


def _flat(path: Path, file: int, rank: Rank, parallel: Parallel) -> list[Piece]:
    """The distributed optimizer's flat buffers of one rank, by the names that they have in torch_dist checkpoints.

    {gradient buffer: {(types): {"param", "exp_avg", "exp_avg_sq": a row, ...}}}; where experts have an optimizer of
    their own, a list of two such, in which None stands for what the file of another rank has.
    """
    loaded = torchzip.read(path, where=str(path)).load()
    etp = parallel.size("etp")
    experts = (rank.pp * parallel.ep + rank.ep) * etp + parallel.index("etp", rank.tp, rank.ep)
    pieces: list[Piece] = []
    for chain, state in enumerate(loaded) if isinstance(loaded, list) else [(-1, loaded)]:
        begin = f"chained_{chain}." if chain >= 0 else ""
        group = experts if chain > 0 else rank.pp * parallel.tp + rank.tp
        for buffer, by_types in state.items() if isinstance(state, dict) else ():
            for types, rows in by_types.items() if type(buffer) is int and isinstance(by_types, dict) else ():
                shown = (
                    ", ".join(f"torch.{getattr(t, 'name', t)}" for t in types) if isinstance(types, tuple) else types
                )
                head = f"{begin}optimizer.distributed.dp_group_idx_{group}.gbuf_idx_{buffer}"
                pieces += _rows(f"{head}.dtype_({shown}).bucket_idx_0.", rows, file, rank)
    return pieces


def _listed(entry: Any, file: int, rank: Rank, groups: dict[tuple[Rank, int], list[dict[str, Any]]]) -> Iterator[Piece]:
    """The state of optimizers without flat buffers: of each parameter group, tensors in the order of its parameters."""
    found = param_groups.parts(entry)
    for chain, part in enumerate(found):
        own = param_groups.inner(part)
        begin = f"chained_{chain}." if len(found) > 1 else ""
        groups[rank, chain] = param_groups.groups(own)
        masters = next((part[key] for key in ("fp32_from_fp16_params", "fp32_from_fp16") if key in part), None)
        state = own.get("state")
        for g, group in enumerate(groups[rank, chain]):
            lists = {"fp32": _list(_list(masters)[g]) if g < len(_list(masters)) else []}
            entries = [
                state.get(index) if isinstance(state, dict) and type(index) in (int, str) else None
                for index in _list(group.get("params"))
            ]
            for kind in ("exp_avg", "exp_avg_sq"):
                lists[kind] = [one.get(kind) if isinstance(one, dict) else None for one in entries]
            for kind, tensors in lists.items():
                for place, value in enumerate(tensors):
                    if isinstance(value, torchzip.TensorRef):
                        strides = None if value.is_contiguous else value.stride
                        name = f"{begin}optimizer.group_{g}.param_{place}.{kind}"
                        yield Piece(name, value.dtype, value.shape, file, value.offset, rank, strides=strides)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _rows(head: str, rows: object, file: int, rank: Rank) -> list[Piece]:
    return [
        Piece(f"{head}{name}", row.dtype, row.shape, file, row.offset, rank)
        for name, row in (rows.items() if isinstance(rows, dict) else ())
        if isinstance(row, torchzip.TensorRef) and len(row.shape) == 1 and row.is_contiguous
    ]


def _module_states(paths: Mapping[Rank, Path]) -> dict[Rank | None, dict[str, dict[str, list[float]]]]:
    """The numbers that modules keep beside their weights."""
    found: dict[Rank | None, dict[str, dict[str, list[float]]]] = defaultdict(dict)
    for rank, path in paths.items():
        for key, model in _load(path).items():
            match = _MODEL.fullmatch(str(key))
            if match is None or not isinstance(model, dict):
                continue
            own = found[rank._replace(vpp=int(match[1] or 0))]
            for name, value in model.items():
                module = extra_state.module_of(str(name))
                if module is not None and value is not None:
                    own[module] = extra_state.scales(extra_state.content(value, path), path)
    return dict(found)


def _read_model(
    path: Path, state: Mapping[str, Any], file: int, rank: Rank, pieces: list[Piece], entries: list[str]
) -> None:
    chunks = {int(match[1] or 0): model for key, model in state.items() if (match := _MODEL.fullmatch(str(key)))}
    if not chunks:
        raise CheckpointError(
            "the file holds no model", where=path, expected="a key `model` or `model0`",
            found=", ".join(map(brief, itertools.islice(state, 16))) or "no keys", hint=_AGAIN,
        )  # fmt: skip
    for vpp, model in chunks.items():
        if not isinstance(model, dict) or isinstance(model.get("language_model"), dict):
            raise CheckpointError(
                "a model from before megatron-core", where=path, expected="a flat dictionary of names to tensors",
                found=brief(model) if not isinstance(model, dict) else "tensors nested in language_model",
                hint="load and save it once with megatron-core 0.17 or earlier",
            )  # fmt: skip
        for name, value in model.items():
            if isinstance(value, torchzip.TensorRef):
                strides = None if value.is_contiguous else value.stride
                pieces.append(
                    Piece(
                        str(name), value.dtype, value.shape, file, value.offset, rank._replace(vpp=vpp), strides=strides
                    )
                )
            else:
                entries.append(str(name))
    entries += [f"optimizer ({key})" for key in ("optimizer", "opt_param_scheduler") if state.get(key) is not None]
    entries += ["rng_state"] if state.get("rng_state") is not None else []
    entries += ["optimizer (distrib_optim.pt)"] if path.with_name(FLAT).exists() else []
