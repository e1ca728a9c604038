"""TensorRT-LLM's unified checkpoint: config.json and one rank{N}.safetensors a rank, N = pp * tp_size + tp.

Source: tensorrt_llm/models/modeling_utils.py (PretrainedModel.from_checkpoint) and mapping.py; context-parallel ranks
share files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from registry.errors import CheckpointError, ParallelError
from registry.parallel import Parallel
from registry.reading import each
from registry.storage import FilePlan, Laid, Opened, Piece, Rank, Request

from . import documents
from .safetensors_file import layout, read_header

CONFIG = "config.json"
_RANK = re.compile(r"rank\d+\.safetensors")


class Container:
    """Opens and lays out TensorRT-LLM checkpoint directories."""

    def detect(self, path: Path) -> bool:
        """A directory with the file of some rank; `open` says which are missing."""
        return path.is_dir() and any(_RANK.fullmatch(p.name) for p in path.iterdir())

    def open(self, path: Path, spec_name: str) -> Opened:
        """Read the config and every rank's header. Raises CheckpointError."""
        config = documents.read_json(path / CONFIG)
        tp, pp, cp, ep = (_size(path, config, key) for key in ("tp_size", "pp_size", "cp_size", "moe_ep_size"))
        expected = {f"rank{i}.safetensors" for i in range(tp * pp)}
        found = {p.name for p in path.iterdir() if _RANK.fullmatch(p.name)}
        if expected != found:
            raise CheckpointError(
                "the rank files do not fit the config's mapping", where=path,
                expected=f"{tp * pp} files for tp_size {tp} x pp_size {pp}",
                found="; ".join(
                    f"{what} {', '.join(sorted(names)[:8])}{' ...' if len(names) > 8 else ''}"
                    for what, names in (("missing", expected - found), ("extra", found - expected)) if names
                ),
                hint="copy the checkpoint again, whole",
            )  # fmt: skip
        try:
            parallel = Parallel(tp, pp, ep=ep, cp=cp, nested=True)
        except ParallelError as error:
            raise CheckpointError(
                "bad mapping", where=path / CONFIG, expected=f"{error.problem}: {error.expected}", found=error.found,
                hint="correct the config, or get it again",
            ) from None  # fmt: skip
        files = [path / f"rank{i}.safetensors" for i in range(tp * pp)]
        pieces = []
        for i, (entries, _) in enumerate(each(read_header, files, path)):
            rank = Rank(tp=i % tp, pp=i // tp)
            pieces += [Piece(name, e.dtype, e.shape, i, e.begin, rank) for name, e in entries.items()]
        opened = Opened(path, spec_name, files, pieces, config, parallel=parallel)
        documents.read_carried(opened)
        return opened

    def lay_out(self, request: Request) -> Laid:
        """One file a rank."""
        by_rank: dict[int, list[int]] = defaultdict(list)
        for i, slot in enumerate(request.slots):
            by_rank[slot.rank.pp * request.parallel.tp + slot.rank.tp].append(i)
        files, places = [], [(0, 0)] * len(request.slots)
        for number in range(request.parallel.tp * request.parallel.pp):
            members = by_rank[number]
            tensors = [(request.slots[i].name, request.slots[i].dtype, request.slots[i].shape) for i in members]
            head, entries, size = layout(tensors, None)
            for i in members:
                places[i] = (number, entries[request.slots[i].name].begin)
            files.append(FilePlan(f"rank{number}.safetensors", size, [(0, head)]))
        small, copies = documents.carry(request)
        small[CONFIG] = documents.to_json(_with_stages(request))
        return Laid(files, places, small, copies)


def _with_stages(request: Request) -> dict[str, Any]:
    """The config, with the number of layers of every stage where readers would not guess it.

    TensorRT-LLM gives the first stages one layer more where layers do not divide (0.17 drops the last layers), unless
    `pp_partition` says otherwise, which only its latest versions know.
    """
    layers = request.parallel.layers
    if layers is None or layers == tuple(sum(layers) // len(layers) + (i < sum(layers) % len(layers))
                                         for i in range(len(layers))):  # fmt: skip
        return request.document
    return {**request.document, "mapping": {**request.document["mapping"], "pp_partition": list(layers)}}


def _size(path: Path, config: dict[str, Any], key: str) -> int:
    mapping = config.get("mapping")
    value = mapping.get(key, 1) if isinstance(mapping, dict) else 1
    if value == -1:  # what TensorRT-LLM's Mapping takes for "not given"
        value = 1
    if type(value) is not int or not 1 <= value <= 1 << 16:
        raise CheckpointError(
            "bad mapping", where=path / CONFIG, expected=f"{key} as a positive number", found=repr(value)[:200],
            hint="correct the config, or get it again",
        )  # fmt: skip
    return value
