"""What a container module does: the protocol between the engine and the modules that know how bytes lie on disk.

A container opens a checkpoint into `Opened` (names, shapes and where every byte lies; no tensor data is read) and lays
a new one out into `Laid` (which files to write, and where in them every tensor goes). The engine moves the bytes
between.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from attrs import define, field, frozen

from registry.dtypes import ITEMSIZE
from registry.parallel import Parallel

if TYPE_CHECKING:
    from registry.files import Virtual


class Rank(NamedTuple):
    """Whose file an entry is in, in formats with files of every rank."""

    tp: int = 0
    pp: int = 0
    ep: int = 0
    vpp: int = 0


class Piece(NamedTuple):
    """A stretch of bytes that holds a box of one stored tensor.

    `shape` is the piece's own; `origin` where it begins in the whole stored tensor of shape `whole` (None: it is the
    whole). `strides` are in elements (None: row-major). `file` indexes `Opened.files`, `begin` is in bytes. With
    `stretch` only the elements from its first number on, as many as its second, of the box laid out in a row are here.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    begin: int
    rank: Rank | None = None
    origin: tuple[int, ...] | None = None
    whole: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    stretch: tuple[int, int] | None = None


@define
class Opened:
    """A checkpoint on disk, without its tensors' data.

    `document` is the format's config document (config.json, Megatron's args); `iteration` the training step where one
    is known; `parallel` the layout that the checkpoint says it was written at; `entries` names of what is not a tensor;
    `side_files` what travels along (relative name -> path); `hub_config` a HuggingFace config that was carried with
    the checkpoint; `state` whatever else the format keeps, for a target of the same container: under `training` what
    belongs to the optimizer, and under `carried` the entries that it was read from. `stamps` are its files as they
    were when it was opened (see `registry.changes`). `training(rank)` reads what a training run keeps beside its
    tensors, as plain data: what all ranks share, or with a rank also what is its own. `module_states()` reads what
    modules keep beside their weights: rank -> module, as names have it -> numbers by name.
    """

    path: Path
    format: str
    files: Sequence[Path | Virtual]
    pieces: list[Piece]
    document: dict[str, Any]
    parallel: Parallel | None = None
    iteration: int | None = None
    architecture: str | None = None
    hub_config: dict[str, Any] | None = None
    entries: list[str] = field(factory=list)
    side_files: dict[str, Path] = field(factory=dict)
    state: dict[str, Any] = field(factory=dict)
    notes: list[str] = field(factory=list)
    stamps: dict[Path, tuple[int, int, int]] = field(factory=dict)
    training: Callable[[Rank | None], dict[str, Any]] | None = None
    module_states: Callable[[], dict[Rank | None, dict[str, dict[str, list[float]]]]] | None = None


class Slot(NamedTuple):
    """A tensor, or one chunk of a tensor, that a target is to hold; fields as in `Piece`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rank: Rank
    origin: tuple[int, ...] | None = None
    whole: tuple[int, ...] | None = None


def slot_bytes(slot: Slot | Piece) -> int:
    """Bytes of the elements of one slot or piece."""
    size = ITEMSIZE[slot.dtype]
    stretch = getattr(slot, "stretch", None)
    for n in slot.shape if stretch is None else stretch[1:]:
        size *= n
    return size


class ObjectSlot(NamedTuple):
    """An entry without data that readers of a target expect; `origin` and `whole` over the folded axes."""

    name: str
    rank: Rank
    origin: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()


class Row(NamedTuple):
    """A row of numbers in which slots lie one behind the other: the state `state` of one of a rank's flat buffers.

    `buffer` counts the buffers of the optimizer `chain` of a rank; `dtype` is the type of the weights; `size` counts
    elements; `members` are (slot, its first element).
    """

    rank: Rank
    chain: int
    buffer: int
    dtype: str
    state: str
    size: int
    members: tuple[tuple[int, int], ...]


@frozen
class Request:
    """All that a container needs to lay a checkpoint out; `states` are the kinds of optimizer state in the slots.

    `rows` hold the slots that have no place of their own, and `chained` says whether experts have an optimizer of
    their own (None: as in the source). `common` is what a training run keeps beside its tensors, plain data with
    `registry.plain.TensorData` in it, and `payloads` what some of the objects hold.
    """

    format: str
    slots: Sequence[Slot]
    objects: Sequence[ObjectSlot]
    document: dict[str, Any]
    parallel: Parallel
    options: Mapping[str, Any]
    source: Opened
    iteration: int | None
    manifest: bytes
    hub_config: dict[str, Any]
    side_files: Mapping[str, Path]
    states: tuple[str, ...] = ()
    common: Mapping[str, Any] = field(factory=dict)
    payloads: Mapping[ObjectSlot, Any] = field(factory=dict)
    rows: Sequence[Row] = ()
    chained: bool | None = None


@frozen
class FilePlan:
    """One data file: its path inside the target, its size, and the bytes around the tensors, by offset."""

    path: str
    size: int
    literals: list[tuple[int, bytes]]


def cut(literals: Sequence[tuple[int, bytes]], begin: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """The parts of (offset, bytes), which are in order, that lie within [begin, end), as (begin, end, bytes)."""
    for i in range(max(bisect.bisect_right(literals, begin, key=itemgetter(0)) - 1, 0), len(literals)):
        offset, data = literals[i]
        if offset >= end:
            return
        low, high = max(offset, begin), min(offset + len(data), end)
        if low < high:
            yield low, high, data[low - offset : high - offset]


Small = bytes | Callable[[], bytes]


def small_bytes(small: Small) -> bytes:
    """The bytes of a small file."""
    return small if isinstance(small, bytes) else small()


@frozen
class Laid:
    """Where everything goes.

    `places[i]` is (file index, byte offset) of slot i. `small` are whole files (path -> bytes, or what makes the bytes
    where that takes long and a plan can do without) and `copies` files to be copied (path -> source). `home` is the
    directory of the checkpoint itself, where the target has others beside it. With `seal`, `seal(crcs)` gives the last
    literals, (file index, offset, bytes), from the CRC32 of every slot's bytes. `seal_file(file, crcs)` gives those of
    one file alone, (offset, bytes): each lies behind the bytes that it sums, for a writer who cannot go back.
    """

    files: list[FilePlan]
    places: list[tuple[int, int]]
    small: dict[str, Small] = field(factory=dict)
    copies: dict[str, Path] = field(factory=dict)
    seal: Callable[[Sequence[int]], list[tuple[int, int, bytes]]] | None = None
    home: str = ""
    seal_file: Callable[[int, Sequence[int]], list[tuple[int, bytes]]] | None = None


class Container(Protocol):
    """How one kind of checkpoint lies on disk. It knows no model."""

    def detect(self, path: Path) -> bool:
        """Is the directory (or file) at `path` a checkpoint of this kind? Cheap, raises nothing for other kinds."""

    def open(self, path: Path, spec_name: str) -> Opened:
        """Read headers and metadata. Raises CheckpointError."""

    def lay_out(self, request: Request) -> Laid:
        """Decide files and offsets. Raises TargetError or ArgumentError."""
