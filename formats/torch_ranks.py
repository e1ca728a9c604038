"""Megatron's per-rank checkpoints: mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt, a torch.save archive for every rank.

Source: megatron/training/checkpointing.py (get_checkpoint_name, generate_state_dict).
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from registry.errors import CheckpointError
from registry.parallel import Parallel
from registry.storage import FilePlan, Laid, Opened, Piece, Rank, Request

from . import documents, extra_state, megatron_dirs, plain, torchzip
from .pickles import brief

FILE = "model_optim_rng.pt"
FLAT = "distrib_optim.pt"
_AGAIN = "copy the checkpoint again, or use another iteration"
_DIRECTORY = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


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
        states = {p: _load(p / FILE) for p in found.values()}
        first = next(iter(states.values()))
        arguments = megatron_dirs.arguments(first)
        parallel = megatron_dirs.parallel(arguments)
        ranks = {p: _rank(m, parallel, path) for m, p in found.items()}
        parallel = _check_ranks(path, parallel, ranks)
        pieces: list[Piece] = []
        entries: list[str] = []
        files = [p / FILE for p in states]
        for i, (directory, state) in enumerate(states.items()):
            _read_model(directory / FILE, state, i, ranks[directory], pieces, entries)
        for directory in states:
            if (directory / FLAT).is_file():
                pieces += _flat(directory / FLAT, len(files), ranks[directory], parallel)
                files.append(directory / FLAT)
        training = megatron_dirs.training(first, next(iter(states)) / FILE)
        if isinstance(training.get("optimizer"), dict) and "state" not in training["optimizer"]:
            training["optimizer"] |= {"param_state_sharding_type": "fully_reshardable"}
        opened = Opened(
            path, spec_name, files, pieces, arguments, parallel=parallel,
            iteration=megatron_dirs.iteration(path, first), entries=sorted(set(entries)),
            state={"training": training, "carried": [name for name in entries if name.startswith("optimizer (")]},
        )  # fmt: skip
        opened.training = partial(_beside, {rank: directory / FILE for directory, rank in ranks.items()})
        opened.module_states = partial(_module_states, {rank: directory / FILE for directory, rank in ranks.items()})
        documents.read_carried(opened)
        return opened

    def lay_out(self, request: Request) -> Laid:
        """One archive a rank, the model under `model`, or under `model0`, `model1`, ... with virtual stages."""
        root = megatron_dirs.place(request)
        members: dict[Rank, list[int]] = defaultdict(list)
        objects: dict[Rank, list[str]] = defaultdict(list)
        for i, slot in enumerate(request.slots):
            members[slot.rank._replace(vpp=0)].append(i)
        for entry in request.objects:
            objects[entry.rank._replace(vpp=0)].append(entry.name)
        files: list[FilePlan] = []
        sealed: list[tuple[torchzip.Skeleton, dict[int, int], dict[int, int]]] = []
        places = [(0, 0)] * len(request.slots)
        p = request.parallel
        for rank in _ranks(p):
            skeleton, slot_of = _archive(request, rank, members[rank])
            literals, crcs = list(skeleton.literals), {}
            for k, (tensor, offset) in enumerate(skeleton.tensors):
                if k in slot_of:
                    places[slot_of[k]] = (len(files), offset)
                elif tensor.data:
                    literals.append((offset, tensor.data))
                    crcs[k] = zlib.crc32(tensor.data)
            path = f"{root}/{_name(rank, request.parallel)}/{FILE}"
            files.append(FilePlan(path, skeleton.size, sorted(literals)))
            sealed.append((skeleton, slot_of, crcs))
        small, copies = documents.carry(request, f"{root}/")
        small |= megatron_dirs.tracker(request)

        def seal(crcs: Sequence[int]) -> list[tuple[int, int, bytes]]:
            return [
                (file, at, data)
                for file, (skeleton, slot_of, own) in enumerate(sealed)
                for at, data in skeleton.crc_patches({k: crcs[i] for k, i in slot_of.items()} | own)
            ]

        return Laid(files, places, small, copies, seal=seal)


def _name(rank: Rank, parallel: Parallel) -> str:
    pp = f"_{rank.pp:03d}" if parallel.pp > 1 else ""
    ep = f"_{rank.ep:03d}" if parallel.ep > 1 else ""
    return f"mp_rank_{rank.tp:02d}{pp}{ep}"


def _archive(request: Request, rank: Rank, members: Sequence[int]) -> tuple[torchzip.Skeleton, dict[int, int]]:
    """The archive of one rank, and which of its tensors is which slot."""
    chunks: dict[int, dict[str, Any]] = {vpp: {} for vpp in range(request.parallel.vpp)}
    new: dict[int, torchzip.NewTensor] = {}
    for i in members:
        slot = request.slots[i]
        new[i] = chunks[slot.rank.vpp][slot.name] = torchzip.NewTensor(slot.dtype, slot.shape)
    engine = request.options.get("transformer_impl") == "transformer_engine"
    state = megatron_dirs.common_state(request)
    for entry in request.objects:
        if entry.rank._replace(vpp=0) == rank and entry in request.payloads:
            state[entry.name] = plain.nodes(request.payloads[entry])
        elif entry.rank._replace(vpp=0) == rank:
            bare = entry.name.startswith("output_layer.") or not engine
            chunks[entry.rank.vpp][entry.name] = None if bare else torchzip.NewTensor("uint8", (0,))
    for vpp, chunk in chunks.items():
        state["model" if len(chunks) == 1 else f"model{vpp}"] = chunk
    skeleton = torchzip.layout(state, prefix="model_optim_rng")
    slot_of = {id(tensor): i for i, tensor in new.items()}
    return skeleton, {k: slot_of[id(t)] for k, (t, _) in enumerate(skeleton.tensors) if id(t) in slot_of}


def _beside(files: Mapping[Rank, Path], rank: Rank | None) -> dict[str, Any]:
    """What a rank's file holds beside its model; the first rank's, for what all share."""
    path = files[rank or min(files)]
    state = {key: value for key, value in _load(path).items() if not re.fullmatch(r"model\d*", str(key))}
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

    {gradient buffer: {(types): {"param", "exp_avg", "exp_avg_sq": a row, ...}}}; with experts, a list of such, which
    depends on more than this file: it stays behind.
    """
    state: dict[Any, Any] = _load(path) if parallel.ep == 1 else {}
    group = rank.pp * parallel.tp + rank.tp
    pieces: list[Piece] = []
    for buffer, by_types in state.items():
        if type(buffer) is int and isinstance(by_types, dict):
            for types, rows in by_types.items():
                shown = (
                    ", ".join(f"torch.{getattr(t, 'name', t)}" for t in types) if isinstance(types, tuple) else types
                )
                head = f"optimizer.distributed.dp_group_idx_{group}.gbuf_idx_{buffer}.dtype_({shown}).bucket_idx_0."
                pieces += _rows(head, rows, file, rank)
    return pieces


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
            match = re.fullmatch(r"model(\d*)", str(key))
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
    chunks = {
        int(match[1] or 0): model for key, model in state.items() if (match := re.fullmatch(r"model(\d*)", str(key)))
    }
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
