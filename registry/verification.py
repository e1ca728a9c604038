"""verify(): is a checkpoint what was written, and are two, in any two formats and layouts, the same model?

The first is asked of the manifest that lies beside it. For the second a digest of every logical tensor is taken over
its bytes in canonical axis order, so that it does not depend on how either side stores it. Tolerance is zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, frozen

from registry import manifest
from registry.boxes import Fragment, contiguous
from registry.changes import check_unchanged, reading
from registry.checkpoint import stored_names
from registry.errors import CheckpointError
from registry.execute import TILE, Assembler, Progress, assembler, check_replicas, default_threads
from registry.files import SourceFiles
from registry.groups import Coding, Group
from registry.places import PathLike, is_remote, place
from registry.planning import make_plan
from registry.problems import collapse
from registry.progress import Tally
from registry.source import Source, detect_format, load_pair, opened_at
from registry.storage import Rank, Slot, slot_bytes
from registry.tables import Shown, Table
from registry.tensor_rules import named_axes


@frozen
class Difference:
    """One logical tensor (at one index of the axes that names spell) in which two checkpoints differ.

    Or, where one is not what its manifest says, a tensor or a file of it that is damaged.
    """

    tensor: str
    problem: str
    stored: tuple[str, ...] = ()


@frozen(repr=False)
class Verification(Shown):
    """The outcome of `verify`. True where the two are the same model, or the one is what was written."""

    equal: bool
    tensors: int
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    files: int = 0

    def __bool__(self) -> bool:
        return self.equal

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """The outcome, and every difference."""
        rows = [(one.tensor, one.problem, ", ".join(one.stored)) for one in self.differences]
        return Table(self._headline(), ("tensor", "problem", "stored as"), rows)

    def _headline(self) -> str:
        if self.equal and self.files:
            return f"whole: {self.files} files with {self.tensors} tensors are as the manifest says"
        if self.equal:
            return f"equal: {self.tensors} logical tensors, bit for bit"
        what = "damaged" if self.files else "different"
        of = f"{self.files} files" if self.files else f"{self.tensors} logical tensors"
        return f"{what}: {len(self.differences)} {'places in' if self.files else 'of'} {of}"

    def __str__(self) -> str:
        lines = [self._headline()]
        if not self.equal:
            shown = collapse([f"{d.tensor}: {d.problem}" for d in self.differences])
            lines += [f"  {line}" for line in shown]
            stored = collapse([n for d in self.differences for n in d.stored], 6)
            lines += ["  stored as", *(f"    {name}" for name in stored)] if stored else []
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _canonical(source: Source) -> tuple[list[Group], list[Slot]]:
    """A target that holds every logical tensor by itself, one slot for each index of the axes that names spell."""
    model = source.model
    spelled = {
        tensor: [named.axis for named in named_axes(pattern)]
        for pattern, rule in reversed(list(source.architecture.rules()))
        if not rule.replica
        for tensor in rule.parsed.tensors
    }
    groups: list[Group] = []
    slots: list[Slot] = []
    for tensor, axes in model.tensors.items():
        named = spelled[tensor]
        inner = [axis for axis in axes if axis not in named]
        dtype = source.dtype_of(tensor)
        for kind, _ in model.parts(tensor):
            size = tuple(kind.sizes[axis] for axis in inner)
            fragment = Fragment(tensor, tuple(inner), (0,) * len(inner), size, contiguous(size), 0)
            spans = [kind.indices if axis == kind.axis else range(kind.sizes[axis]) for axis in named]
            columns = list(product(*spans))
            index = np.array(columns, dtype=np.int64).reshape(len(columns), len(named))
            first = len(slots)
            slots += [Slot(".".join([tensor, *map(str, column)]), dtype, size, Rank()) for column in columns]
            members = np.arange(first, len(slots), dtype=np.int64)
            columns_of = {a: index[:, k] for k, a in enumerate(named)}
            groups.append(Group(tensor, tensor, Coding(), dtype, size, (fragment,), members, columns_of))
    return groups, slots


@frozen(eq=False)
class Logical:
    """The logical tensors of an open checkpoint, each by itself: `slots` names them, `fill` reads them."""

    slots: Sequence[Slot]
    fill: Assembler
    remote: bool

    def read(self, buffer: memoryview, slot: int, begin: int) -> None:
        """Fill `buffer` with bytes of a slot from `begin`."""
        self.fill.fill(buffer, slot, 0, begin, begin + len(buffer))


@contextmanager
def logical(source: Source) -> Iterator[Logical]:
    """A checkpoint's logical tensors, for any number of threads, while the block lasts.

    Raises MappingError where tensors are missing or replicas differ, CheckpointError where it changed meanwhile.
    """
    groups, slots = _canonical(source)
    plan = make_plan(source.bound, source.opened, groups, slots, source.model)
    files = SourceFiles(source.opened.files, source.opened.stamps)
    with files as sources:
        check_replicas(plan, source.opened, sources)
        yield Logical(slots, assembler(plan, source.opened, sources, slots), files.remote)
        check_unchanged(source.opened)


def digests(source: Source, tally: Tally) -> dict[str, tuple[str, str]]:
    """Logical tensor with its index (`mlp.up.weight.3`) -> (its type and shape, the digest of its bytes)."""
    with logical(source) as tensors, ThreadPoolExecutor(default_threads(tensors.remote)) as pool:
        hashes = list(pool.map(lambda i: _digest(tensors, i, tally), range(len(tensors.slots))))
        return {slot.name: (kind(slot), digest) for slot, digest in zip(tensors.slots, hashes, strict=True)}


def kind(slot: Slot) -> str:
    """The type and shape of a tensor, for messages."""
    return f"{slot.dtype} {list(slot.shape)}"


def _digest(tensors: Logical, slot: int, tally: Tally) -> str:
    digest = hashlib.blake2b(digest_size=16)
    nbytes = slot_bytes(tensors.slots[slot])
    buffer = memoryview(bytearray(min(nbytes, TILE)))
    for begin in range(0, nbytes, TILE):
        tile = buffer[: min(TILE, nbytes - begin)]
        tensors.read(tile, slot, begin)
        digest.update(tile)
        tally.add(len(tile))
    return digest.hexdigest()


def check(path: Path, tally: Tally, *, all_there: bool = True) -> Verification | None:
    """Compare a checkpoint with its manifest. None where it has none; raises CheckpointError for a damaged one."""
    with reading(path):
        home = _home(path)
        if home is None:
            return None
        found = manifest.check(home, default_threads(is_remote(home)), tally)
    differences = []
    for damage in found.damage if all_there else [one for one in found.damage if not one.missing]:
        where = f"{damage.problem}, in {damage.path}"
        if damage.tensors:
            differences += [
                Difference(", ".join(holds) or stored, where, (stored,)) for stored, holds in damage.tensors.items()
            ]
        else:
            differences.append(Difference(damage.path.name, where))
    notes = [f"not in the manifest: {name}" for name in collapse(found.strange)]
    if differences:
        notes.append(f"where a file was changed on purpose, remove {manifest.NAME} from {home}")
    return Verification(
        not differences, found.tensors, tuple(differences), tuple(notes), (str(path),), found.files
    )  # fmt: skip


def _home(path: Path) -> Path | None:
    """The directory whose manifest is that of the checkpoint at `path`: itself, or that of the iteration it means."""
    if manifest.present(path):
        return path
    inside = [child for child in path.iterdir() if manifest.present(child)] if path.is_dir() else []
    if len(inside) > 1:
        meant = opened_at(path)[0].path
        return meant if manifest.present(meant) else None
    return inside[0] if inside else None


def _size(path: Path) -> int:
    """About as many bytes as there are to read: those of all files."""
    if is_remote(path) or not path.is_dir():
        return 0
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def alone(path: Path, progress: Progress | None = None) -> Verification:
    """As `check`. Raises CheckpointError where there is no manifest."""
    with reading(path):
        detect_format(path)
        tally = Tally(progress, _size(path) if progress else 0)
    found = check(path, tally)
    if found:
        opened_at(path)  # what lies outside, such as a tracker file, is read too
    if found is None:
        raise CheckpointError(
            "there is no manifest to check this against", where=path, expected=manifest.NAME,
            found="a checkpoint of another writer", hint="name a second checkpoint to compare it with",
        )  # fmt: skip
    return found


def verify(
    a: PathLike, b: PathLike, *, config: PathLike | Mapping[str, Any] | None = None, architecture: str | None = None,
    progress: Progress | None = None,
) -> Verification:  # fmt: skip
    """Compare two checkpoints, of which each must be what its manifest says, if it has one.

    A file that somebody took away is no damage to what is there: where it is needed, reading without it fails.
    """
    sides = [place(path) for path in (a, b)]
    tally = Tally(None, 0)
    if progress:  # each is read once for its manifest, and once for its tensors
        reads = [1 + (_home(path) is not None) for path in sides if path.is_dir()]
        tally = Tally(progress, sum(_size(path) * times for path, times in zip(sides, reads, strict=False)))
    for path in sides:
        found = check(path, tally, all_there=False)
        if found is not None and not found:
            return found
    return compare(*load_pair(a, b, config=config, architecture=architecture), tally)


def compare(a: Source, b: Source, tally: Tally) -> Verification:
    """Compare two bound checkpoints by the digests of their logical tensors."""
    left, right = digests(a, tally), digests(b, tally)
    found = list(_differences(a, b, left, right))
    notes = [f"config: {key} is {mine!r} against {other!r}" for key, (mine, other) in fact_differences(a, b).items()]
    if a.architecture.name != b.architecture.name:
        notes.append(f"architecture: {a.architecture.name} against {b.architecture.name}")
    paths = (str(a.opened.path), str(b.opened.path))
    return Verification(not found, len(left.keys() | right.keys()), tuple(found), tuple(notes), paths)


def _differences(
    a: Source, b: Source, left: Mapping[str, tuple[str, str]], right: Mapping[str, tuple[str, str]]
) -> Iterator[Difference]:
    for name in [*left, *(name for name in right if name not in left)]:
        side = a if name in left else b
        if name not in left or name not in right:
            yield Difference(name, f"only in the {'first' if name in left else 'second'}", stored_as(side, name))
        elif left[name][0] != right[name][0]:
            yield Difference(name, f"{left[name][0]} against {right[name][0]}", stored_as(a, name))
        elif left[name][1] != right[name][1]:
            yield Difference(name, "the values differ", (*stored_as(a, name), *stored_as(b, name)))


def stored_as(source: Source, name: str) -> tuple[str, ...]:
    """The stored tensors that hold a logical one with its index."""
    tensor = next(
        t for t in sorted(source.model.tensors, key=len, reverse=True) if name == t or name.startswith(f"{t}.")
    )
    values = [int(step) for step in name[len(tensor) :].split(".") if step]
    axes = source.model.tensors[tensor]
    return tuple(stored_names(source, tensor, dict(zip(axes, values, strict=False))))


def fact_differences(a: Source, b: Source) -> dict[str, tuple[Any, Any]]:
    """The facts that both know and that differ: the first's and the second's value. A type is the tensors' affair."""
    left, right = a.model.facts, b.model.facts
    return {
        key: (left[key], right[key])
        for key in sorted(left.keys() & right.keys() - {"dtype"})
        if left[key] != right[key]
    }
