"""Optimizer state in flat buffers: one row of numbers a rank, in which every weight's state lies behind the next one's.

A rank of data parallelism holds a slice of the row, so that a slice may begin in the middle of a weight. The row is
that of the weights that a model-parallel rank has, last one first, each from a multiple of some elements on, in buckets
that begin anew. Nothing on disk says which weight is where: it follows from the format with files of every rank, and
from the order in which the program makes its weights, which the spec lists.
Source: megatron/core/distributed/param_and_grad_buffer.py; reference megatron.md B1.5 and B5.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from attrs import evolve

from registry import catalog
from registry.bind import Bound, bind_source
from registry.dtypes import ITEMSIZE
from registry.errors import MappingError
from registry.model import LogicalModel, format_rules
from registry.parallel import Parallel
from registry.specs import Flat, FormatSpec
from registry.states import with_states
from registry.storage import Opened, Piece, Rank, Slot
from registry.target import bind_target
from registry.tensor_rules import Rule

_AGAIN = (
    "give the options that it was saved with (transformer_impl), or convert without it: options={'optimizer': 'none'}"
)


def bind_flat(
    opened: Opened, spec: FormatSpec, model: LogicalModel, options: Mapping[str, Any], bound: Bound
) -> tuple[str, ...]:
    """Add the groups of the flat buffers of a checkpoint to those that are bound; the kinds of state that they hold.

    Raises MappingError where buffers and weights do not fit together.
    """
    flat = spec.flat
    buffers = _buffers(opened, flat) if flat is not None else {}
    if flat is None or not buffers:
        return ()
    ranked = catalog.format_spec(flat.layout)
    parallel = opened.parallel or Parallel()
    # What is padded has the sizes of the weights on disk, whatever the options would make of it.
    weights = [
        (pattern, rule.model_copy(update={"pad": {a: str(bound.padded.get(a, text)) for a, text in rule.pad.items()}}))
        for pattern, rule in format_rules(ranked, model.architecture)
    ]
    pieces = list(_pieces(opened, flat, ranked, weights, spec, buffers, model, parallel, options))
    kinds = tuple(state for state in spec.states if state in flat.states.values())
    rules = list(with_states(list(format_rules(ranked, model.architecture)), spec, kinds))
    states = [(pattern, rule) for pattern, rule in rules if any(pattern.startswith(w[0]) for w in spec.states.values())]
    inner = evolve(opened, pieces=pieces, entries=[])
    found = bind_source(inner, ranked, states, model.with_states(kinds), options, [])
    first = len(opened.pieces)
    opened.pieces += pieces
    bound.groups += [evolve(group, members=group.members + first) for group in found.groups]
    for name in [name for name in bound.left_out if _match(flat, name) is not None]:
        del bound.left_out[name]
    return kinds


#: (chain, model-parallel rank, model chunk, dtypes, bucket)
_Key = tuple[str, int, int, str, int]


def _match(flat: Flat, name: str) -> tuple[_Key, str] | None:
    match = re.fullmatch(flat.name, name)
    if match is None:
        return None
    part = match.groupdict()
    key = (part.get("chain") or "", int(part["group"]), int(part["chunk"]), part["dtypes"], int(part["bucket"]))
    return key, part["state"]


def _buffers(opened: Opened, flat: Flat) -> dict[_Key, dict[str, list[Piece]]]:
    """Bucket -> kind of state -> its chunks in order."""
    found: dict[_Key, dict[str, list[Piece]]] = defaultdict(lambda: defaultdict(list))
    for piece in opened.pieces:
        if (match := _match(flat, piece.name)) is not None and len(piece.shape) == 1 and piece.shape[0]:
            found[match[0]][match[1]].append(piece)
    for states in found.values():
        for chunks in states.values():
            chunks.sort(key=_begin)
    return found


def _pieces(
    opened: Opened, flat: Flat, ranked: FormatSpec, rules: Sequence[tuple[str, Rule]], spec: FormatSpec,
    buffers: Mapping[_Key, Mapping[str, list[Piece]]], model: LogicalModel, parallel: Parallel,
    options: Mapping[str, Any],
) -> Iterator[Piece]:  # fmt: skip
    """Every stretch of every weight's state, under the name that it has in the format with files of every rank."""
    own = {**{name: option.default for name, option in ranked.options.items()}, **options}
    choices = {variant: next(iter(named)) for variant, named in ranked.variants.items()}
    choices |= {variant: str(own[variant]) for variant in choices if variant in own}
    slots = bind_target(ranked, rules, model, parallel, own, choices, lambda _: "float32", None).slots
    members: dict[Rank, list[Slot]] = defaultdict(list)
    for slot in slots:
        if not any(fnmatchcase(slot.name, glob) for glob in flat.buffers):
            members[slot.rank].append(slot)
    rows: dict[tuple[str, int, int, str], list[_Key]] = defaultdict(list)
    for key in sorted(buffers):
        rows[key[:4]].append(key)
    for (chain, group, chunk, _), keys in rows.items():
        rank = _rank(parallel, chain, group, chunk)
        held = [slot for slot in members[rank] if _in_chain(flat, chain, slot.name)]
        places = _places(opened, flat, held, [_length(buffers[key]) for key in keys])
        for slot, bucket, offset in places:
            for state, chunks in buffers[keys[bucket]].items():
                begin = spec.states[flat.states[state]][0]
                yield from _stretches(chunks, slot._replace(name=begin + slot.name), offset, rank)


def _rank(parallel: Parallel, chain: str, group: int, chunk: int) -> Rank:
    """The rank whose buffers have this number: counted tp first, and for experts etp, ep, then stages."""
    if chain in ("", "0"):
        return Rank(tp=group % parallel.tp, pp=group // parallel.tp, vpp=chunk)
    etp = parallel.size("etp")
    at, ep = group % etp, group // etp % parallel.ep
    tp = next(r["tp"] for r in parallel.expert_ranks() if (r["ep"], r["etp"]) == (ep, at))
    return Rank(tp=tp, pp=group // (etp * parallel.ep), ep=ep, vpp=chunk)


def _in_chain(flat: Flat, chain: str, name: str) -> bool:
    return not chain or fnmatchcase(name, flat.experts) == (chain != "0")


def _length(states: Mapping[str, Sequence[Piece]]) -> int:
    chunks = next(iter(states.values()))
    return sum(piece.shape[0] for piece in chunks) if chunks[0].whole is None else chunks[0].whole[0]


def _places(
    opened: Opened, flat: Flat, held: Sequence[Slot], lengths: Sequence[int]
) -> Iterator[tuple[Slot, int, int]]:
    """(weight, bucket, offset) of every weight of one rank. Raises MappingError unless the buckets are used up."""
    bucket, cursor = 0, 0
    for slot in sorted(held, key=lambda slot: _order(flat, slot.name), reverse=True):
        size = math.prod(slot.shape)
        start = -(-cursor // flat.align) * flat.align
        # A bucket that is closed early, before an embedding that two stages share, keeps the padding at its end.
        if lengths[bucket] in (cursor, start) and bucket + 1 < len(lengths):
            bucket, start = bucket + 1, 0
        cursor = start + size
        if cursor > lengths[bucket]:
            break
        yield slot, bucket, start
    if (bucket, cursor) != (len(lengths) - 1, lengths[-1]):
        raise MappingError(
            "the optimizer's flat buffers do not fit the weights", where=opened.path,
            expected=f"buckets of {list(lengths)} elements to be used up", found=f"bucket {bucket} at {cursor}",
            hint=_AGAIN,
        )  # fmt: skip


def _order(flat: Flat, name: str) -> tuple[int, int, int, list[int], bool]:
    """Where a weight stands in the order in which the program makes its weights; a module's bias comes last."""
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    if (found := _glob(tuple(flat.order), re.sub(r"(?<=\.)\d+(?=\.)|\d+$", "0", name))) is not None:
        first, at = found
        layer = numbers[0] if "#" in flat.order[at] and numbers else 0
        return first, layer, at, numbers[1:], "bias" in name.rpartition(".")[2]
    raise MappingError(
        "the order of a weight in the optimizer's buffers is not known", where=name,
        expected="a name that the format's `flat.order` lists", found=name,
        hint="convert without it: options={'optimizer': 'none'}",
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _glob(order: tuple[str, ...], name: str) -> tuple[int, int] | None:
    """The first glob that fits a name, and the first one of the same row of layers."""
    for at, glob in enumerate(order):
        if fnmatchcase(name, glob.replace("#", "*")):
            head = glob.split("#")[0]
            return next(i for i, other in enumerate(order) if other.split("#")[0] == head), at
    return None


def _begin(chunk: Piece) -> int:
    return chunk.origin[0] if chunk.origin is not None else 0


def _stretches(chunks: Sequence[Piece], slot: Slot, offset: int, rank: Rank) -> Iterator[Piece]:
    """The parts of one weight's state in the chunks of its row."""
    end = offset + math.prod(slot.shape)
    first = bisect_right(chunks, offset, key=_begin) - 1
    for chunk in chunks[max(first, 0) :]:
        begin = _begin(chunk)
        if begin >= end:
            break
        low, high = max(begin, offset), min(begin + chunk.shape[0], end)
        if low < high:
            place = chunk.begin + (low - begin) * ITEMSIZE[chunk.dtype]
            yield Piece(slot.name, chunk.dtype, slot.shape, chunk.file, place, rank, stretch=(low - offset, high - low))
