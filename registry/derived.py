"""Logical tensors that a format stores and no checkpoint has by itself: each is computed of others when it is read.

A format spec declares them under `derived`. They are put into a source as pieces in files that are on no disk, one for
each index that parts and result share, so that sharding and writing know nothing of them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import evolve, field, frozen

from registry.assemble import Assembler, array, assembler
from registry.boxes import Box, fragments, shape
from registry.dtypes import ITEMSIZE, is_float, torch_dtype
from registry.files import SourceFiles
from registry.groups import Coding, Group
from registry.layout import parse
from registry.model import LogicalModel
from registry.planning import Plan, make_plan
from registry.source import Source
from registry.specs import FormatSpec
from registry.storage import Opened, Piece, Rank, Slot, slot_bytes
from registry.tensor_rules import Derived

if TYPE_CHECKING:
    import torch


def _absorb(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """One head's up-projection of keys (nope x kv_lora) multiplied into that of queries ((nope + rope) x q_lora)."""
    import torch

    nope = key.shape[0]
    # The same call as TensorRT-LLM's, for the same rounding: a head at a time gives what all heads together do.
    product = torch.einsum("hdq,hdk->hkq", query[None, :nope], key[None])[0]
    return torch.cat([product, query[nope:]])


#: What a spec may name as a codec: parts by name -> the result.
CODECS: dict[str, Callable[..., torch.Tensor]] = {"absorb": _absorb}


def with_derived(source: Source, spec: FormatSpec, dtype: str | None) -> Source:
    """The source with the derived tensors of a format whose parts it has, computed in their type, or in `dtype`."""
    for name, derived in spec.derived.items():
        parts = {part: parse(layout) for part, layout in derived.of.items()}
        if all(layout.tensors[0] in source.model.tensors for layout in parts.values()):
            source = _added(source, name, derived, dtype)
    return source


def _added(source: Source, name: str, derived: Derived, dtype: str | None) -> Source:
    model, opened = source.model, source.opened
    own = {parse(layout).tensors[0] for layout in derived.of.values()}
    types = {dtype if dtype is not None and is_float(found) else found for found in map(source.dtype_of, sorted(own))}
    kept = max(types, key=lambda found: ITEMSIZE[found])
    every = list(itertools.product(*(range(model.sizes[axis]) for axis in derived.index)))
    index = np.array(every, dtype=np.int64).reshape(len(every), len(derived.index))  # a model may have no layers
    columns = {axis: index[:, k] for k, axis in enumerate(derived.index)}
    made = _Made(source, derived, kept, len(index), *_parts(source, derived, kept, columns))
    layout = parse(f"{name}: {' '.join(derived.axes)}")
    size = shape(layout, Box(model.sizes))
    files = [*opened.files, *(_File(made, i, size) for i in range(len(index)))]
    first, before = len(opened.pieces), len(opened.files)
    pieces = [*opened.pieces, *(Piece(name, kept, size, before + i, 0) for i in range(len(index)))]
    group = Group(
        name, str(layout), Coding(), kept, size, tuple(fragments(layout, Box(model.sizes))),
        np.arange(first, len(pieces), dtype=np.int64), columns,
    )  # fmt: skip
    return evolve(
        source,
        opened=evolve(opened, files=files, pieces=pieces),
        model=_grown(model, name, (*derived.index, *derived.axes)),
        bound=evolve(source.bound, groups=[*source.bound.groups, group]),
        dtypes={**source.dtypes, name: frozenset({kept})},
    )


def _parts(source: Source, derived: Derived, dtype: str, columns: Mapping[str, np.ndarray]) -> tuple[list[Slot], Plan]:
    """The slots of all parts, one part after the other, and the plan that fills them. Raises MappingError."""
    slots: list[Slot] = []
    groups: list[Group] = []
    box, count = Box(source.model.sizes), len(next(iter(columns.values())))
    for text in derived.of.values():
        layout = parse(text)
        size, first = shape(layout, box), len(slots)
        slots += [Slot(layout.tensors[0], dtype, size, Rank()) for _ in range(count)]
        members = np.arange(first, len(slots), dtype=np.int64)
        groups.append(
            Group(text, text, Coding(), dtype, size, tuple(fragments(layout, box)), members, dict(columns))
        )  # fmt: skip
    return slots, make_plan(source.bound, source.opened, groups, slots, source.model)


def _grown(model: LogicalModel, name: str, axes: tuple[str, ...]) -> LogicalModel:
    """The model with one more tensor."""
    return evolve(
        model,
        tensors={**model.tensors, name: axes},
        whole=evolve(model.whole, present=model.whole.present | {name}),
        varying={a: tuple(evolve(k, present=k.present | {name}) for k in ks) for a, ks in model.varying.items()},
    )


@frozen(eq=False)
class _Made:
    """All of one derived tensor: how its parts are read, `count` times each, and what each thread computed last."""

    source: Source
    derived: Derived
    dtype: str
    count: int
    slots: Sequence[Slot]
    plan: Plan
    _local: threading.local = field(factory=threading.local)

    def filler(self, files: SourceFiles) -> Assembler:
        """What reads the parts."""
        if getattr(self._local, "files", None) is not files:
            self._local.filler = assembler(self.plan, self.source.opened, files, self.slots)
            self._local.files = files
            self._local.last = None
        filler: Assembler = self._local.filler
        return filler

    def compute(self, files: SourceFiles, index: int) -> memoryview:
        """The bytes of the tensor at one index."""
        import torch

        filler = self.filler(files)
        if self._local.last is None or self._local.last[0] != index:
            given = {}
            for k, part in enumerate(self.derived.of):
                slot = self.slots[k * self.count + index]
                raw = bytearray(slot_bytes(slot))
                filler.fill(memoryview(raw), k * self.count + index, 0, 0, len(raw))
                given[part] = torch.frombuffer(raw, dtype=torch_dtype(self.dtype)).view(slot.shape)
            made = CODECS[self.derived.codec](**given).contiguous().view(torch.uint8).flatten()
            self._local.last = index, memoryview(made.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffer
        data: memoryview = self._local.last[1]
        return data


@frozen(eq=False)
class _File:
    """The file that a derived tensor's values at one index would be in. See `registry.files.Virtual`."""

    made: _Made
    index: int
    size: Sequence[int]

    @property
    def path(self) -> Path:
        """As in `Virtual`."""
        opened: Opened = self.made.source.opened
        return opened.path

    def read_into(self, files: SourceFiles, offset: int, buffer: memoryview) -> None:
        """As in `Virtual`."""
        buffer[:] = self.made.compute(files, self.index)[offset : offset + len(buffer)]

    def boxes(
        self, files: SourceFiles, offset: int, size: Sequence[int], stride: Sequence[int]
    ) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
        """As in `Virtual`."""
        data = self.made.compute(files, self.index)
        yield (...,), array(data, ITEMSIZE[self.made.dtype], size, stride, offset)
