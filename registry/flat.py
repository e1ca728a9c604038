"""Optimizer state in flat buffers: one row of numbers a rank, in which every weight's state lies behind the next one's.

A rank of data parallelism holds a slice of the row, so that a slice may begin in the middle of a weight. The row is
that of the weights that a model-parallel rank has, last one first, each from a multiple of some elements on, in buckets
that begin anew. Nothing on disk says which weight is where: it follows from the format with files of every rank, and
from the order in which the program makes its weights, which the spec lists. `registry.rows` writes them.
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
from typing import Any, NamedTuple

from attrs import evolve, frozen

from registry import catalog, expressions
from registry.bind import Bound, bind_source
from registry.dtypes import ITEMSIZE
from registry.errors import MappingError
from registry.flat_rules import Division, Flat, Listed
from registry.model import LogicalModel, format_rules
from registry.parallel import Parallel
from registry.specs import FormatSpec
from registry.states import with_states
from registry.storage import Opened, Piece, Rank, Slot
from registry.target import bind_target

_AGAIN = (
    "give the options that it was saved with (transformer_impl), or convert without it: options={'optimizer': 'none'}"
)


class Buffer(NamedTuple):
    """One buffer of one rank: the weights of one type of one of its model chunks, last one first."""

    dtype: str
    weights: tuple[Slot, ...]


@frozen(eq=False)
class Order:
    """In which order, and in which buffers, an optimizer has the weights of each rank.

    `chained`: experts have an optimizer of their own, the second one.
    """

    flat: Flat
    parallel: Parallel
    chained: bool
    shared: tuple[str, ...]

    def made(self, weights: Sequence[Slot], *, everywhere: bool = False) -> dict[tuple[Rank, int], list[Slot]]:
        """(rank, chain) -> its weights in the order of making; those that ranks repeat only once, or `everywhere`."""
        found: dict[tuple[Rank, int], list[Slot]] = defaultdict(list)
        for slot in sorted(weights, key=lambda slot: (slot.rank.vpp, _order(self.flat, slot.name))):
            if any(fnmatchcase(slot.name, glob) for glob in self.flat.buffers):
                continue
            chain = int(self.chained and fnmatchcase(slot.name, self.flat.experts))
            if chain or everywhere or slot.rank.ep == self.parallel.dense_ep(slot.rank.tp):
                found[slot.rank._replace(vpp=0), chain].append(slot)
        return found

    def buffers(self, made: Sequence[Slot], *, split: bool = True) -> list[Buffer]:
        """The buffers of one rank: of every model chunk one, or with `split` one of each type."""
        found: dict[tuple[int, str], list[Slot]] = defaultdict(list)
        for slot in made:
            found[slot.rank.vpp, slot.dtype if split else ""].append(slot)
        return [Buffer(members[0].dtype, tuple(reversed(members))) for members in found.values()]

    def places(self, weights: Sequence[Slot]) -> tuple[list[int], int]:
        """Where each weight begins in the row of a buffer whose buckets lie one behind the other, and its length."""
        starts, bucket, cursor = [], 0, 0
        for slot in weights:
            own = any(fnmatchcase(slot.name, glob) for glob in self.shared)
            starts.append(bucket + self.aligned(cursor - bucket))
            bucket = starts[-1] if own else bucket
            cursor = starts[-1] + math.prod(slot.shape)
            bucket = cursor if own else bucket
        return starts, cursor

    def aligned(self, at: int) -> int:
        """The first element from there on where a weight may begin."""
        return -(-at // self.flat.align) * self.flat.align


def order(flat: Flat, model: LogicalModel, parallel: Parallel, *, chained: bool) -> Order:
    """The order of a model's weights."""
    env = {**model.facts, **parallel.env(), **model.functions}
    shared = tuple(glob for glob, when in flat.shared.items() if expressions.parse(when)(env))
    return Order(flat, parallel, chained, shared)


def bind_flat(
    opened: Opened, spec: FormatSpec, model: LogicalModel, options: Mapping[str, Any], bound: Bound
) -> tuple[str, ...]:
    """Add the groups of the flat buffers of a checkpoint to those that are bound; the kinds of state that they hold.

    Raises MappingError where buffers and weights do not fit together.
    """
    flat = spec.flat
    buffers = _buffers(opened, flat) if flat is not None else {}
    groups = _listed(opened, flat.listed) if flat is not None and flat.listed is not None else {}
    if flat is None or not (buffers or groups):
        return ()
    ranked = catalog.format_spec(flat.layout)
    parallel = opened.parallel or Parallel()
    slots = _weights(ranked, model, parallel, options, bound)
    chained = parallel.ep > 1 or any(chain for _, chain in groups) or any(key.chain for key in buffers)
    way = order(flat, model, parallel, chained=chained)
    begins = {name: spec.states[kind][0] for name, kind in flat.states.items()}
    pieces = list(_pieces(opened, way, slots, buffers, begins))
    kinds = {flat.states[state] for found in buffers.values() for state in found}
    if flat.listed is not None and not pieces:
        begins = {name: spec.states[kind][0] for name, kind in flat.listed.states.items()}
        pieces = list(_by_group(opened, way, flat.listed, slots, groups, begins))
        names = {piece.name for piece in pieces}
        kinds = {flat.listed.states[n] for n, begin in begins.items() if any(name.startswith(begin) for name in names)}
    held = tuple(state for state in spec.states if state in kinds)
    rules = list(with_states(list(format_rules(ranked, model.architecture)), spec, held))
    states = [(pattern, rule) for pattern, rule in rules if any(pattern.startswith(w[0]) for w in spec.states.values())]
    inner = evolve(opened, pieces=pieces, entries=[])
    found = bind_source(inner, ranked, states, model.with_states(held), options, [])
    first = len(opened.pieces)
    opened.pieces += pieces
    bound.groups += [evolve(group, members=group.members + first) for group in found.groups]
    known = [flat.name, *([flat.listed.name] if flat.listed is not None else [])]
    for name in [name for name in bound.left_out if any(re.fullmatch(form, name) for form in known)]:
        del bound.left_out[name]
    return held


def _weights(
    ranked: FormatSpec, model: LogicalModel, parallel: Parallel, options: Mapping[str, Any], bound: Bound
) -> list[Slot]:
    """The weights of every rank, of the types that they have in the checkpoint."""
    # What is padded has the sizes of the weights on disk, whatever the options would make of it.
    rules = [
        (pattern, rule.model_copy(update={"pad": {a: str(bound.padded.get(a, text)) for a, text in rule.pad.items()}}))
        for pattern, rule in format_rules(ranked, model.architecture)
    ]
    own = {**{name: option.default for name, option in ranked.options.items()}, **options}
    choices = {variant: next(iter(named)) for variant, named in ranked.variants.items()}
    choices |= {variant: str(own[variant]) for variant in choices if variant in own}
    types = {model.home(f.tensor): group.dtype for group in bound.groups for f in group.fragments}
    return bind_target(
        ranked, rules, model, parallel, own, choices, lambda name: types.get(name, "float32"), None
    ).slots  # fmt: skip


# Flat buffers.


class _Key(NamedTuple):
    """The bucket of a buffer, where all buffers of `group` are those of one rank's optimizer `chain`."""

    chain: int
    group: int
    chunk: int
    dtypes: str
    bucket: int


def _match(flat: Flat, name: str) -> tuple[_Key, str] | None:
    match = re.fullmatch(flat.name, name)
    if match is None:
        return None
    part = match.groupdict()
    numbers = (int(part.get("chain") or 0), int(part["group"]), int(part["chunk"]))
    return _Key(*numbers, part["dtypes"], int(part["bucket"])), part["state"]


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
    opened: Opened, way: Order, slots: Sequence[Slot], buffers: Mapping[_Key, Mapping[str, list[Piece]]],
    begins: Mapping[str, str],
) -> Iterator[Piece]:  # fmt: skip
    """Every stretch of every weight's state, under the name that it has in the format with files of every rank."""
    made = way.made(slots)
    optimizers: dict[tuple[Rank, int], dict[int, list[_Key]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(buffers):
        optimizers[_rank(way.parallel, key.chain, key.group), key.chain][key.chunk].append(key)
    for (rank, chain), rows in optimizers.items():
        found = way.buffers(made.get((rank, chain), []), split=False)
        if len(found) < len(rows):
            found = way.buffers(made.get((rank, chain), []))
        for chunk, keys in rows.items():
            lengths = [_length(buffers[key]) for key in keys]
            if chunk >= len(found):
                raise _misfit(opened, lengths, f"a buffer number {chunk}, where the weights make {len(found)}")
            for slot, bucket, offset in _places(opened, way, found[chunk].weights, lengths):
                for state, chunks in buffers[keys[bucket]].items():
                    yield from _stretches(chunks, slot._replace(name=begins[state] + slot.name), offset, slot.rank)


def _rank(parallel: Parallel, chain: int, group: int) -> Rank:
    """The rank whose buffers have this number: counted tp first, and for experts etp, ep, then stages."""
    if not chain:
        tp = group % parallel.tp
        return Rank(tp=tp, pp=group // parallel.tp, ep=parallel.dense_ep(tp))
    etp = parallel.size("etp")
    at, ep = group % etp, group // etp % parallel.ep
    tp = next(r["tp"] for r in parallel.expert_ranks() if (r["ep"], r["etp"]) == (ep, at))
    return Rank(tp=tp, pp=group // (etp * parallel.ep), ep=ep)


def _length(states: Mapping[str, Sequence[Piece]]) -> int:
    chunks = next(iter(states.values()))
    return sum(piece.shape[0] for piece in chunks) if chunks[0].whole is None else chunks[0].whole[0]


def _places(
    opened: Opened, way: Order, held: Sequence[Slot], lengths: Sequence[int]
) -> Iterator[tuple[Slot, int, int]]:
    """(weight, bucket, offset) of every weight of one buffer. Raises MappingError unless the buckets are used up."""
    if len(lengths) == 1:
        starts, end = way.places(held)
        if end != lengths[0]:
            raise _misfit(opened, lengths, f"weights of {end}")
        yield from ((slot, 0, start) for slot, start in zip(held, starts, strict=True))
        return
    bucket, cursor = 0, 0
    for slot in held:
        size = math.prod(slot.shape)
        start = way.aligned(cursor)
        # A bucket that is closed early, before an embedding that two stages share, keeps the padding at its end.
        if lengths[bucket] in (cursor, start) and bucket + 1 < len(lengths):
            bucket, start = bucket + 1, 0
        cursor = start + size
        if cursor > lengths[bucket]:
            break
        yield slot, bucket, start
    if (bucket, cursor) != (len(lengths) - 1, lengths[-1]):
        raise _misfit(opened, lengths, f"bucket {bucket} at {cursor}")


def _misfit(opened: Opened, lengths: Sequence[int], found: str) -> MappingError:
    return MappingError(
        "the optimizer's flat buffers do not fit the weights", where=opened.path,
        expected=f"buckets of {list(lengths)} elements to be used up", found=found, hint=_AGAIN,
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


# State by parameter groups.


#: (rank, chain) -> parameter group -> state -> its tensors by their place in the group.
_Groups = dict[tuple[Rank, int], dict[int, dict[str, dict[int, Piece]]]]


def _listed(opened: Opened, listed: Listed) -> _Groups:
    found: _Groups = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for piece in opened.pieces:
        if (match := re.fullmatch(listed.name, piece.name)) is not None:
            rank, chain = (piece.rank or Rank())._replace(vpp=0), int(match["chain"] or 0)
            found[rank, chain][int(match["group"])][match["state"]][int(match["place"])] = piece
    return found


def _by_group(
    opened: Opened, way: Order, listed: Listed, slots: Sequence[Slot], groups: _Groups, begins: Mapping[str, str]
) -> Iterator[Piece]:
    """Every tensor of state, under the name that it has in the format with files of every rank."""
    made = way.made(slots, everywhere=True)
    fields: Mapping[tuple[Rank, int], Sequence[Mapping[str, Any]]] = opened.state.get("groups", {})
    for key, held in groups.items():
        own = fields.get(key, ())
        rules = [rule for rule in listed.groups if any(group.get(rule.field) == rule.value for group in own)]
        for number, group in enumerate(own):
            wanted = [(group.get(rule.field) == rule.value, rule) for rule in rules]
            weights = [slot for slot in made.get(key, []) if all(_meant(rule, slot) == yes for yes, rule in wanted)]
            for state, tensors in held.get(number, {}).items():
                of = [slot for slot in weights if state != listed.copies or ITEMSIZE[slot.dtype] < 4]
                if sorted(tensors) != list(range(len(of))) or any(p.shape != of[i].shape for i, p in tensors.items()):
                    raise MappingError(
                        "the optimizer's parameter groups do not fit the weights", where=opened.path,
                        expected=f"{len(of)} tensors of {state} in group {number}, as the weights are",
                        found=f"{len(tensors)}, or of other shapes", hint=_AGAIN,
                    )  # fmt: skip
                for i, piece in tensors.items():
                    yield piece._replace(name=begins[state] + of[i].name, rank=of[i].rank)


def _meant(rule: Division, slot: Slot) -> bool:
    return (rule.vectors and len(slot.shape) == 1) or any(fnmatchcase(slot.name, glob) for glob in rule.weights)
