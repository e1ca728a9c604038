"""A conversion as work for several processes: each makes the whole plan from the same arguments, and does its share.

Plans hold functions and locks, which do not travel; and what would travel takes as long to pack and unpack as to plan
again. A share is whole files: network file systems let only one host write into a file. All that a process returns is
what it has seen: sums, losses.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from attrs import evolve, field, frozen

from registry import manifest
from registry.collector import no_collection
from registry.commit import failed
from registry.crc import crc32
from registry.errors import TargetError
from registry.execute import Progress, default_threads, execute
from registry.losses import Watch
from registry.manifest import Sums
from registry.parallel import Parallel
from registry.places import PathLike, place
from registry.prepare import Prepared, lay_out, prepare, wants_states
from registry.rankplan import Part, part
from registry.source import load
from registry.storage import Laid
from registry.version import library_version

T = TypeVar("T")


@frozen(eq=False)
class Order:
    """The arguments that say what a conversion is. Paths among `options` are taken from the working directory."""

    source: Path
    to: str
    parallel: Parallel | None
    dtype: str | None
    config: PathLike | Mapping[str, Any] | None
    architecture: str | None
    options: Mapping[str, Any] | None

    def anywhere(self) -> Order:
        """The same for a process that works in another directory."""
        config = place(self.config).absolute() if isinstance(self.config, str | os.PathLike) else self.config
        return evolve(self, source=self.source.absolute(), config=config)


@frozen(eq=False)
class Work:
    """A conversion that only has to be carried out, and the notes on it."""

    prepared: Prepared
    laid: Laid
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data files."""
        return sum(file.size for file in self.laid.files)

    def check(self, threads: int | None, first: int = 0, step: int = 1) -> None:
        """Read every `step`-th weight that is to be quantised once. Raises MappingError for what cannot be."""
        quantized = self.prepared.quantized
        if quantized is not None:
            evolve(quantized, units=quantized.units[first::step]).check(threads or default_threads())

    def digest(self) -> str:
        """The same in every process that writes the same, with the same release of this library."""
        found = sha256(json.dumps([library_version(), [(f.path, f.size) for f in self.laid.files]]).encode())
        found.update(np.array(self.laid.places, dtype=np.int64).tobytes())
        found.update(repr([[(at, crc32(data)) for at, data in f.literals] for f in self.laid.files]).encode())
        return found.hexdigest()

    def whole(self) -> Part:
        """Everything, for one process."""
        return Part(self.prepared.plan, self.prepared.target.slots, self.laid)

    def share(self, owners: Sequence[int], me: int, step: int) -> Part:
        """What process `me` writes, where file i is of process `owners[i]`, with every `step`-th check of replicas."""
        plan = self.prepared.plan
        writer = [owners[file] for file, _ in self.laid.places]
        found = part(plan, self.prepared.target.slots, self.laid, writer, me)
        return evolve(found, plan=evolve(found.plan, replicas=plan.replicas[me::step]))


@no_collection()
def planned(order: Order) -> Prepared:
    """Open the source and plan where everything goes. Raises RegistryError as `registry.convert` does."""
    states = wants_states(order.to, order.options)
    loaded = load(order.source, config=order.config, architecture=order.architecture, states=states)
    return prepare(loaded, order.to, parallel=order.parallel, dtype=order.dtype, options=order.options)


@no_collection()
def made(order: Order) -> Work:
    """What `planned` gives, laid out in files. Raises RegistryError as it does."""
    prepared = planned(order)
    laid, notes = lay_out(prepared, order.options, order.dtype)
    return Work(prepared, laid, tuple(notes))


def deal(laid: Laid, count: int) -> list[int]:
    """A process below `count` for every file, such that all have about as many bytes: the largest files go first.

    Files that hold no tensor are of process 0.
    """
    owners = [0] * len(laid.files)
    load = [(0, process) for process in range(count)]
    for file in sorted({file for file, _ in laid.places}, key=lambda file: (-laid.files[file].size, file)):
        nbytes, owners[file] = load[0]
        heapq.heapreplace(load, (nbytes + laid.files[file].size, owners[file]))
    return owners


@frozen(eq=False)
class Done:
    """What one process has seen of its share: sums of its files, what rounding lost, and of quantised weights, by
    number, the largest error and the largest value.
    """

    sums: Sums
    rounded: dict[tuple[str, str], tuple[float, float]] = field(factory=dict)
    units: dict[int, tuple[float | None, float]] = field(factory=dict)


def carry_out(
    work: Work, own: Part, stage: Path, *, threads: int | None, durable: bool, progress: Progress | None = None
) -> Done:
    """Write the files of a share below `stage`. What a process before, that died, left of them is written anew."""
    for file in own.laid.files:
        (stage / file.path).unlink(missing_ok=True)
    watch = Watch()
    opened, quantized = work.prepared.source.opened, work.prepared.quantized
    crcs = execute(
        own.plan, opened, own.laid, own.slots, stage,
        threads=threads, progress=progress, durable=durable, watch=watch,
    )  # fmt: skip
    with writing(stage):
        sums = manifest.data_sums(stage, own.laid, own.slots, own.plan, crcs)
    units = enumerate(quantized.units if quantized is not None else ())
    return Done(sums, watch.found(), {i: (unit.error, unit.largest) for i, unit in units})


@contextmanager
def writing(stage: Path) -> Iterator[None]:
    """What the system says becomes an error of ours here: to another process it would travel as a text."""
    try:
        yield
    except OSError as error:
        raise failed(stage, error, stage) from error


def together(work: Work, everyone: Sequence[Done]) -> tuple[Sums, Watch]:
    """The sums of all files, and what all processes lost. The work's own units are told what became of them."""
    watch = Watch()
    units = work.prepared.quantized.units if work.prepared.quantized is not None else []
    for done in everyone:
        watch.add(done.rounded)
        for i, (error, largest) in done.units.items():
            units[i].largest = max(units[i].largest, largest)
            if error is not None:
                units[i].error = max(units[i].error or 0.0, error)
    return {name: found for done in everyone for name, found in done.sums.items()}, watch


def check_there(work: Work, stage: Path) -> None:
    """Refuse a stage without the files that others say they have written. Raises TargetError."""
    for file in work.laid.files:
        path = stage / file.path
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            raise TargetError(
                "a worker has written elsewhere", where=path, expected=f"a file of {file.size} bytes",
                found="nothing" if size is None else f"{size} bytes", hint=SHARED,
            )  # fmt: skip


SHARED = "source and target must lie on a file system that all machines have at the same path"


class Crew(Protocol):
    """The processes that carry out a conversion. An error of one of them is raised by all that take part in the call.

    `leads`: does this one make the target, and commit it?
    """

    @property
    def leads(self) -> bool:
        """As above."""

    def every(self, call: Callable[[], T]) -> T:
        """Call it in every process that runs `convert`; the own result."""

    def lead(self, call: Callable[[], str]) -> str:
        """Call it in the one that leads; its result, everywhere."""

    def check(self, work: Work) -> None:
        """Check what can be checked before anything is written: this process's share of it."""

    def carry_out(self, work: Work, stage: Path, durable: bool, progress: Progress | None) -> list[Done]:
        """Write every data file below `stage`."""


@frozen
class Here:
    """This process alone."""

    threads: int | None
    leads: bool = True

    def every(self, call: Callable[[], T]) -> T:
        """As in `Crew`."""
        return call()

    def lead(self, call: Callable[[], str]) -> str:
        """As in `Crew`."""
        return call()

    def check(self, work: Work) -> None:
        """As in `Crew`."""
        work.check(self.threads)

    def carry_out(self, work: Work, stage: Path, durable: bool, progress: Progress | None) -> list[Done]:
        """As in `Crew`."""
        return [carry_out(work, work.whole(), stage, threads=self.threads, durable=durable, progress=progress)]


@contextmanager
def here(threads: int | None) -> Iterator[Crew]:
    """This process alone."""
    yield Here(threads)
