"""open(): a checkpoint, lazily; any of its tensors in any format's terms; and a stream of all of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from registry import catalog
from registry.changes import check_unchanged
from registry.dtypes import ITEMSIZE, dtype_name, torch_dtype
from registry.errors import MappingError
from registry.execute import assembler, check_replicas, default_threads
from registry.files import SourceFiles
from registry.parallel import Parallel
from registry.prepare import fitted, merged_options, prepare_target
from registry.rules import known_dtype, known_format
from registry.source import Source
from registry.storage import Rank, slot_bytes
from registry.tables import MOST, Table, html
from registry.validation import checked

if TYPE_CHECKING:
    import torch

    from registry.boxes import Fragment


#: Bytes of tensors that a stream holds before they are asked for; at least one tensor.
_AHEAD = 256 << 20
#: Bytes of one request to a URL.
_STRETCH = 4 << 20


class View(Mapping[str, "torch.Tensor"]):
    """A checkpoint's tensors under the names and shapes of one format, read one by one when asked for.

    Keys are stored names. In a format with files of every rank they are those of the rank `rank` (default: the first).
    """

    def __init__(
        self, source: Source, to: str, parallel: Parallel | None = None, rank: Rank | None = None,
        dtype: str | None = None, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        spec = catalog.format_spec(to)
        layout, _ = fitted(spec, parallel or Parallel())
        chosen = merged_options(spec, source.architecture, options)
        source, target, plan, _ = prepare_target(source, spec, layout, chosen, dtype)
        self.format, self.parallel = to, layout
        self._source, self._slots, self._plan = source, target.slots, plan
        self._by_name: dict[str, list[int]] = {}
        self._sources = SourceFiles(source.opened.files, source.opened.stamps)
        self._assembler = assembler(plan, source.opened, self._sources, target.slots)
        wanted = rank or Rank()
        for i, slot in enumerate(target.slots):
            if not spec.ranked or slot.rank == wanted:
                self._by_name.setdefault(slot.name, []).append(i)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor. Nothing is read. Raises KeyError."""
        slot = self._slots[self._by_name[name][0]]
        return slot.shape if slot.whole is None else slot.whole

    def dtype(self, name: str) -> str:
        """The type of one tensor, by name. Nothing is read. Raises KeyError."""
        return self._slots[self._by_name[name][0]].dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        shape, dtype = self.shape(name), self.dtype(name)
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        whole = torch.zeros(nbytes, dtype=torch.uint8)
        buffer = memoryview(whole.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffer
        for i in self._by_name[name]:
            slot = self._slots[i]
            size = slot_bytes(slot)
            if not size:
                continue
            if slot.shape == shape:
                self._fill(buffer, i)
                continue
            part = torch.zeros(size, dtype=torch.uint8)
            self._fill(memoryview(part.numpy()), i)  # type: ignore[arg-type]
            box = tuple(slice(o, o + n) for o, n in zip(slot.origin or (), slot.shape, strict=True))
            whole.view(torch_dtype(dtype)).view(shape)[box] = part.view(torch_dtype(dtype)).view(slot.shape)
        return whole.view(torch_dtype(dtype)).view(shape)

    @property
    def threads(self) -> int:
        """How many threads are worth it where the checkpoint lies."""
        return default_threads(self._sources.remote)

    def _fill(self, buffer: memoryview, slot: int) -> None:
        """The bytes of one slot; from a URL a stretch a request, many of them under way."""
        if not self._sources.remote or len(buffer) <= _STRETCH:
            self._assembler.fill(buffer, slot, 0, 0, len(buffer))
            return

        def stretch(at: int) -> None:
            end = min(at + _STRETCH, len(buffer))
            self._assembler.fill(buffer[at:end], slot, 0, at, end)

        with ThreadPoolExecutor(min(self.threads, -(-len(buffer) // _STRETCH))) as pool:
            list(pool.map(stretch, range(0, len(buffer), _STRETCH)))

    def check_replicas(self) -> None:
        """Compare what the source holds several times. Raises MappingError where copies differ."""
        check_replicas(self._plan, self._source.opened, self._sources)

    def __repr__(self) -> str:
        return f"View({self.format!r}, {len(self)} tensors, {self.parallel})"

    def _repr_html_(self) -> str:
        rows = [(name, self.dtype(name), list(self.shape(name))) for name in islice(self, MOST)]
        return html(Table(repr(self), ("name", "type", "shape"), rows), len(self))


class Checkpoint:
    """A checkpoint on disk. Opening reads headers and metadata; tensors are read when asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def path(self) -> str:
        """The directory that holds the checkpoint itself."""
        return str(self._source.opened.path)

    @property
    def format(self) -> str:
        """The name of its format."""
        return self._source.spec.name

    @property
    def architecture(self) -> str:
        """The model family, by its HuggingFace model_type."""
        return self._source.architecture.name

    @property
    def config(self) -> dict[str, Any]:
        """The model's HuggingFace config."""
        return dict(self._source.hub_config)

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the model, in no format's terms: layers, kv_heads, rope_theta, ..."""
        return dict(self._source.model.facts)

    @property
    def parallel(self) -> Parallel:
        """The layout that it was written at."""
        return self._source.opened.parallel or Parallel()

    @property
    def iteration(self) -> int | None:
        """The training step, where it is known."""
        return self._source.opened.iteration

    @property
    def names(self) -> list[str]:
        """The names of its stored tensors, each once, in the order of the files."""
        return list(dict.fromkeys(piece.name for piece in self._source.opened.pieces))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored tensor -> its shape (of the first rank that holds it)."""
        found: dict[str, tuple[int, ...]] = {}
        for piece in self._source.opened.pieces:
            found.setdefault(piece.name, piece.shape if piece.whole is None else piece.whole)
        return found

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Logical tensor -> its shape over its axes."""
        return {name: self._source.model.shape(name) for name in self._source.model.tensors}

    @checked(known_format, known_dtype)
    def view(
        self, to: str, *, parallel: Parallel | None = None, rank: Rank | None = None,
        dtype: str | torch.dtype | None = None, options: Mapping[str, Any] | None = None,
    ) -> View:  # fmt: skip
        """The tensors in the terms of format `to`: a mapping from name to torch tensor. Raises MappingError."""
        return View(self._source, to, parallel, rank, None if dtype is None else dtype_name(dtype), options)

    def __repr__(self) -> str:
        count = sum(math.prod(shape) for shape in self.tensors.values())
        return f"Checkpoint({self.path!r}, {self.architecture}, {self.format}, {count:,} parameters)"

    def _repr_html_(self) -> str:
        rows = [(name, list(shape)) for name, shape in self.tensors.items()]
        return html(Table(repr(self), ("logical tensor", "shape"), rows))


def stream(source: Source, to: str, parallel: Parallel | None, rank: Rank | None, dtype: str | None,
           options: Mapping[str, Any] | None) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """(name, tensor) of every tensor in the terms of format `to`, in order; the next ones are read meanwhile."""
    view = View(source, to, parallel, rank, dtype, options)
    view.check_replicas()
    pool = ThreadPoolExecutor(view.threads)
    ahead: deque[tuple[str, Future[torch.Tensor], int]] = deque()
    held = 0
    try:
        for name in view:
            size = math.prod(view.shape(name)) * ITEMSIZE[view.dtype(name)]
            while ahead and held + size > _AHEAD:
                first, reading, freed = ahead.popleft()
                held -= freed
                yield first, reading.result()
            ahead.append((name, pool.submit(view.__getitem__, name), size))
            held += size
        while ahead:
            first, reading, _ = ahead.popleft()
            yield first, reading.result()
        check_unchanged(source.opened)
    finally:  # also where nobody wants the rest
        pool.shutdown(cancel_futures=True)


def stored_names(source: Source, tensor: str, index: Mapping[str, int]) -> list[str]:
    """Where a logical tensor (at one index of its named axes) is stored, for messages."""

    def holds(fragment: Fragment) -> bool:
        return source.model.home(fragment.tensor) == tensor

    names: list[str] = []
    for group in source.bound.groups:
        if any(holds(f) for f in group.fragments):
            wanted = np.ones(len(group.members), dtype=bool)
            for axis, column in group.index.items():
                if axis in index:
                    wanted &= column == index[axis]
            names += [source.opened.pieces[int(member)].name for member in group.members[wanted]]
    if not names:
        raise MappingError(f"{tensor} is stored nowhere", where=source.opened.path)
    return list(dict.fromkeys(names))
