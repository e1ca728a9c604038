"""Write some ranks' files of a checkpoint into a directory that other machines write theirs into.

Each file appears under its name whole and synced; the small files that all ranks share come last. Every machine writes
those, for their bytes are the same wherever the same export runs: a machine that finds other ones there has another
export's directory before it, and refuses it before it writes anything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import evolve

from registry.commit import check_space, failed, locked, make_directory, remove, sync_names, write_small
from registry.errors import ArgumentError, TargetError
from registry.manifest import own_name
from registry.planning import Plan
from registry.rankplan import Part, part
from registry.specs import FormatSpec
from registry.storage import Laid, Slot, small_bytes


def check_ranks(spec: FormatSpec, ranks: Sequence[int]) -> None:
    """Refuse what is no list of ranks, and formats whose files do not belong to ranks. Raises ArgumentError."""
    if not spec.apart:
        raise ArgumentError(f"{spec.name} has no files of single ranks", found=f"ranks {list(ranks)}",
                            hint="leave ranks out")  # fmt: skip
    if not ranks or len(set(ranks)) != len(ranks) or any(type(rank) is not int or rank < 0 for rank in ranks):
        raise ArgumentError("ranks are different whole numbers from 0", found=list(ranks))


def own_part(plan: Plan, slots: Sequence[Slot], laid: Laid, ranks: Sequence[int]) -> Part:
    """What fills the files of some ranks. Raises ArgumentError for ranks that the layout does not have."""
    if max(ranks) >= len(laid.files):
        raise ArgumentError("no such rank", expected=f"ranks 0 to {len(laid.files) - 1}", found=list(ranks))
    found = part(plan, slots, laid, [int(file not in ranks) for file, _ in laid.places], 0)
    laid = evolve(found.laid, small=laid.small, copies=laid.copies)
    return evolve(found, laid=laid)


@contextmanager
def beside(target: Path, laid: Laid, everyone: Laid, *, durable: bool, overwrite: bool) -> Iterator[Path]:
    """A directory to write `laid`'s files into, which join those at `target` if the block ends well.

    `everyone` says what files there are of all ranks. Raises TargetError for a directory that holds anything else, or
    these very ranks already (unless `overwrite`).
    """
    target = Path(os.path.realpath(target))
    own = [file.path for file in laid.files]
    stage = target / f".{own[0]}.partial"
    small = {name: small_bytes(content) for name, content in laid.small.items()}
    known = {*(file.path for file in everyone.files), *small, *laid.copies}
    try:
        make_directory(target, durable)
        with locked(target / f".{own[0]}.lock", target):
            remove(stage)
            _check(target, own, known, small, overwrite)
            check_space(target, sum(file.size for file in laid.files))
            stage.mkdir()
            try:
                write_small(stage, small, laid.copies, durable=durable)
                yield stage
                _check(target, own, known, small, overwrite)  # another machine may have been faster
                sums = [own_name(name) for name in own]
                for name in sums:  # while a file is exchanged, none says what it was
                    (target / name).unlink(missing_ok=True)
                for names in ([*own, *sums, *laid.copies], list(small)):  # the shared ones only when the others stay
                    _appear(stage, target, names, durable)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise failed(target, error, stage) from error


def _appear(stage: Path, target: Path, names: Sequence[str], durable: bool) -> None:
    for name in names:
        make_directory((target / name).parent, durable)
        (stage / name).replace(target / name)
    for place in {(target / name).parent for name in names} if durable else ():
        sync_names(place)


def _check(target: Path, own: Sequence[str], known: set[str], small: Mapping[str, bytes], overwrite: bool) -> None:
    found = [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()]
    strange = sorted(name for name in found if name not in known and not name.startswith("."))
    there = sorted(name for name in found if name in own)
    other = sorted(name for name, data in small.items() if name in found and (target / name).read_bytes() != data)
    if strange or other or (there and not overwrite):
        raise TargetError(
            "the target holds other files than those of this export" if strange or other
            else "these ranks have been written already",
            where=target, expected="nothing yet, or other ranks of the same export",
            found=", ".join((strange or other or there)[:8]),
            hint="choose another directory, or empty this one" if strange or other
            else "give overwrite=True (--overwrite) to write them again",
        )  # fmt: skip
