"""What a conversion will take: bytes, memory and time, before anything is written.

Time is measured by doing a part of this very work for about a second, where the target will be; without a target it is
that of an assumed rate. Memory is what this process has now, with everything planned, and the buffers that its threads
will have.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from registry.assemble import SCRATCH
from registry.commit import check_target
from registry.dtypes import ITEMSIZE
from registry.errors import RegistryError, TargetError
from registry.execute import TILE, default_threads, sample
from registry.places import PathLike, is_remote, place
from registry.prepare import Prepared
from registry.progress import clock_face
from registry.storage import Laid

#: Bytes a second that are assumed where nothing is measured: what a plain SSD takes and keeps.
ASSUMED = 500e6
#: How long a measurement works, and how much it writes at most.
_SECONDS = 1.0
_MOST = 256 << 20
#: Bytes of each copy in the tables of a run: five columns of 64 bits, twice while they are sorted.
_ROW = 80


@frozen
class Estimate:
    """What a conversion will take. Bytes, seconds, and bytes written a second.

    `memory` is anonymous memory, that of the whole process: mapped files, which the system drops when it needs room,
    do not count. It is None where this system does not tell what a process has. `free` is the room on the target's
    disk. `refused` is why `convert` would not begin with this target.
    """

    read: int
    written: int
    memory: int | None
    seconds: float
    rate: float
    basis: str
    free: int | None = None
    refused: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        free = "" if self.free is None else f"; {_size(self.free)} are free there"
        memory = "unknown" if self.memory is None else f"{_size(self.memory)}, with what this process has now"
        lines = [
            f"  reads   {_size(self.read)}, writes {_size(self.written)}{free}",
            f"  memory  about {memory}",
            f"  time    about {clock_face(self.seconds)}, at {self.rate / 1e9:.2f} GB/s: {self.basis}",
        ]
        return "\n".join([*lines, *([f"  refused {self.refused}"] if self.refused else [])])


def estimated(
    prepared: Prepared, laid: Laid, written: int, target: PathLike | None, threads: int | None, planning: float
) -> Estimate:
    """The estimate for a conversion that took `planning` seconds to plan."""
    plan, opened = prepared.plan, prepared.source.opened
    read, again = (
        sum(each.volume * len(each.source) * ITEMSIZE[each.values.source_dtype] for each in copies) * times
        for copies, times in ((plan.copies, 1), (plan.replicas, 2))
    )
    if not all(copies.values.plain for copies in plan.copies):
        start = time.perf_counter()
        import_module("torch")  # which does the casts: its memory counts, and the seconds that it takes to come
        planning += time.perf_counter() - start
    workers = threads or default_threads(is_remote(opened.path))
    memory = _anonymous()
    if memory is not None:
        memory += workers * (TILE + SCRATCH) + _ROW * sum(len(copies.source) for copies in plan.copies)
    rate, basis, free, refused = ASSUMED, "assumed; name DST to have it measured there", None, None
    if target is not None:
        goal = place(target)
        try:
            if not is_remote(goal):
                check_target(opened.path, goal, overwrite=False)
        except TargetError as error:
            refused = f"{error.problem}; {error.hint}"
        if is_remote(goal) or is_remote(opened.path):
            basis = "assumed: what a network will take is not measured"
        else:
            parent = next(each for each in goal.absolute().parents if each.is_dir())
            free = shutil.disk_usage(parent).free
            rate, basis = _measured(prepared, laid, parent, workers)
    return Estimate(read + again, written, memory, planning + (written + again) / rate, rate, basis, free, refused)


def _measured(prepared: Prepared, laid: Laid, parent: Path, threads: int) -> tuple[float, str]:
    """Bytes a second, and how they were found."""
    try:
        root = Path(tempfile.mkdtemp(prefix=".registry-measure-", dir=parent))
        try:
            done, seconds = sample(
                prepared.plan, prepared.source.opened, laid, prepared.target.slots, root,
                threads=threads, seconds=_SECONDS, most=_MOST,
            )  # fmt: skip
        finally:
            shutil.rmtree(root, ignore_errors=True)
    except (OSError, RegistryError) as error:
        return ASSUMED, f"assumed, for it could not be measured: {getattr(error, 'strerror', None) or error}"
    if not done:
        return ASSUMED, "assumed: there is nothing to measure"
    return done / seconds, f"measured with {_size(done)} of it in {seconds:.1f} s"


def _anonymous() -> int | None:
    """Bytes of this process's anonymous memory, where the system (Linux) tells."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = next((line for line in text.splitlines() if line.startswith("RssAnon:")), None)
    return None if found is None else int(found.split()[1]) << 10


def _size(nbytes: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.1f} {name}"
    return f"{nbytes / 1e3:,.1f} kB"
