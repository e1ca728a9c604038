"""convert() and plan(): from one checkpoint to another, in one pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict, evolve, field, frozen

from registry import catalog, engines, manifest
from registry.beside import beside, check_ranks, own_part
from registry.changes import check_unchanged
from registry.commit import check_target, staged, write_small
from registry.dtypes import dtype_name
from registry.engines.work import Order, Work, made, planned, together, writing
from registry.errors import ArgumentError
from registry.estimate import Estimate, estimated
from registry.execute import Progress
from registry.losses import Loss, Watch
from registry.parallel import Parallel
from registry.pictures.page import page
from registry.pictures.scene import Side, everything, scene
from registry.places import PathLike, is_remote, place
from registry.planning import Copies, Plan
from registry.prepare import Prepared, lay_out
from registry.remote import RemotePath
from registry.storage import Laid, small_bytes
from registry.tables import Shown, Table

if TYPE_CHECKING:
    import torch

#: Files that a plan lists as text; `files` has them all.
_FILES = 40


@frozen(repr=False)
class Report(Shown):
    """What a conversion did, or would do."""

    source: str
    target: str | None
    source_format: str
    target_format: str
    architecture: str
    parallel: str
    tensors: int
    files: int
    nbytes: int
    copies: int
    seconds: float
    variants: dict[str, str] = field(factory=dict)
    left_out: dict[str, str] = field(factory=dict)
    notes: tuple[str, ...] = ()
    losses: dict[str, Loss] = field(factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """The report without its notes."""
        rows = [
            ("source", self.source), ("target", self.target or "-"), ("layout", self.parallel),
            ("writes", f"{self.tensors:,} tensors in {self.files:,} files, {self.nbytes / 1e6:,.1f} MB"),
            *([("took", f"{self.seconds:.2f} s")] if self.target else []),
            *(("note", note) for note in self.notes), *(("lossy", line.strip()) for line in _loss_lines(self.losses)),
        ]  # fmt: skip
        return Table(self._headline(), (), rows)

    def _headline(self) -> str:
        return f"{self.architecture}: {self.source_format} -> {self.target_format} ({self.parallel})"

    def __str__(self) -> str:
        speed = f", {self.nbytes / self.seconds / 1e9:.2f} GB/s" if self.seconds > 0 else ""
        took = f", {self.seconds:.2f} s{speed}" if self.target else ""
        lines = [
            self._headline(),
            f"  {self.tensors} tensors in {self.files} files, {self.nbytes / 1e6:.1f} MB{took}",
        ]
        lines += [f"  found {variant}: {choice}" for variant, choice in self.variants.items()]
        reasons: dict[str, int] = {}
        for reason in self.left_out.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines += [f"  left out {count} entries: {reason}" for reason, count in reasons.items()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += _loss_lines(self.losses)
        return "\n".join(lines)


def _loss_lines(losses: Mapping[str, Loss]) -> Iterator[str]:
    """The worst tensor of every lossy step; all are in `Report.losses`."""
    steps: dict[str, list[str]] = {}
    for name, loss in losses.items():
        steps.setdefault(loss.step, []).append(name)
    for step, names in steps.items():
        worst = max(names, key=lambda name: losses[name].relative)
        loss = losses[worst]
        yield (
            f"  lossy: {len(names)} tensors, {step}; the most is lost in {worst}: {loss.max:.3g} of a value, "
            f"{loss.relative:.2%} of the largest"
        )


def _report(
    prepared: Prepared, notes: Sequence[str], target: Path | None, files: int, nbytes: int, seconds: float
) -> Report:
    source = prepared.source
    names = {(slot.rank if prepared.spec.ranked else None, slot.name) for slot in prepared.target.slots}
    return Report(
        str(source.opened.path), None if target is None else str(target), source.spec.name, prepared.spec.name,
        source.architecture.name, str(prepared.parallel), len(names), files, nbytes,
        sum(len(c.source) for c in prepared.plan.copies), seconds, dict(source.bound.variants),
        dict(source.bound.left_out), (*prepared.notes, *notes),
        prepared.quantized.losses() if prepared.quantized is not None else {},
    )  # fmt: skip


def convert(
    source: PathLike,
    target: PathLike,
    *,
    to: str,
    parallel: Parallel | None = None,
    dtype: str | torch.dtype | None = None,
    config: PathLike | Mapping[str, Any] | None = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    ranks: Sequence[int] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    durable: bool = True,
    progress: Progress | None = None,
    engine: str = "local",
) -> Report:
    """Convert the checkpoint at `source` into format `to` at `target`, a directory.

    `parallel` is the target's layout; `dtype` casts floating-point tensors; `config` is a HuggingFace directory, config
    file or mapping for a source that carries none; `architecture` names the model family where several fit; `options`
    are the target format's own. A target that is not empty is refused unless `overwrite`. `durable=False` leaves out
    the syncing of files to the disk. `progress(done, total)` is called with bytes. With `ranks`, only the files of
    these ranks are written, beside those that other runs of the same export write (see `registry.beside`).
    `engine` says whose processes do the work (see `registry.engines`).

    Raises RegistryError: CheckpointError and MappingError for the source, TargetError for the target, ArgumentError and
    ParallelError for the arguments. Whatever happens, what was at `target` before stays or is replaced as a whole.
    """
    start = time.perf_counter()
    goal = place(target)
    if ranks is not None:
        check_ranks(catalog.format_spec(to), ranks)
        if engine != "local":
            raise ArgumentError(
                "ranks= is for machines that do not know of each other", found=f"engine {engine}",
                hint="leave ranks out: the engine deals out all files",
            )  # fmt: skip
    cast = None if dtype is None else dtype_name(dtype)
    order = Order(place(source), to, parallel, cast, config, architecture, options)
    if is_remote(goal):
        work, watch = _uploaded(order, goal, ranks, engine, overwrite=overwrite, threads=threads, progress=progress)
    else:
        work, watch = _written(order, goal, ranks, engine, overwrite, threads, durable, progress)
    files = len(work.laid.files) + len(work.laid.small) + len(work.laid.copies)
    report = _report(work.prepared, work.notes, goal, files, work.nbytes, time.perf_counter() - start)
    return evolve(report, losses={**watch.losses(), **report.losses})


def _uploaded(
    order: Order, goal: RemotePath, ranks: Sequence[int] | None, engine: str, *,
    overwrite: bool, threads: int | None, progress: Progress | None,
) -> tuple[Work, Watch]:  # fmt: skip
    """Carry out a conversion to a URL."""
    from registry import upload

    if engine != "local" or ranks is not None:
        raise ArgumentError(
            "to a URL one process writes everything", where=goal, expected="engine local, and no ranks",
            found=f"engine {engine}" if ranks is None else f"ranks {list(ranks)}",
            hint="leave engine and ranks out, or write to a file system that all machines share",
        )  # fmt: skip
    upload.check_target(order.source, goal, overwrite)
    work = made(order)
    work.check(threads)
    return work, upload.upload(work, goal, overwrite=overwrite, threads=threads, progress=progress)


def _written(
    order: Order, goal: Path, ranks: Sequence[int] | None, engine: str,
    overwrite: bool, threads: int | None, durable: bool, progress: Progress | None,
) -> tuple[Work, Watch]:  # fmt: skip
    """Carry out a conversion to a directory."""
    with engines.crew(engine, order, threads) as crew:

        def ready() -> tuple[Work, Laid]:
            check_target(order.source, goal, overwrite or ranks is not None)
            work = made(order)
            whole = work.laid
            work = work if ranks is None else _of_ranks(work, ranks)
            crew.check(work)
            return work, whole

        work, everyone = crew.every(ready)
        with ExitStack() as stack:

            def begin() -> str:
                how = {"durable": durable, "overwrite": overwrite}
                if ranks is not None:
                    return str(stack.enter_context(beside(goal, work.laid, everyone, **how)))
                stage = stack.enter_context(staged(goal, needed=work.nbytes, **how))
                with writing(stage):
                    write_small(stage, work.laid.small, work.laid.copies, durable=durable)
                return str(stage)

            stage = Path(crew.lead(begin))
            sums, watch = together(work, crew.carry_out(work, stage, durable, progress))

            def end() -> str:
                check_unchanged(work.prepared.source.opened)
                with writing(stage):
                    manifest.write(stage, work.laid, sums, durable=durable, apart=ranks is not None)
                stack.close()
                return ""

            crew.lead(end)
    return work, watch


def _of_ranks(work: Work, ranks: Sequence[int]) -> Work:
    """What fills the files of some ranks."""
    own = own_part(work.prepared.plan, work.prepared.target.slots, work.laid, ranks)
    target = evolve(work.prepared.target, slots=own.slots)
    return evolve(work, prepared=evolve(work.prepared, plan=own.plan, target=target), laid=own.laid)


@frozen(eq=False, slots=False, repr=False)
class PlanReport(Shown):
    """What a conversion would do. `report` sums it up; `files` and `copies()` say it file by file and box by box."""

    plan: Plan
    prepared: Prepared
    options: Mapping[str, Any] | None
    dtype: str | None
    seconds: float

    @cached_property
    def _laid(self) -> tuple[Laid, list[str]]:
        return lay_out(self.prepared, self.options, self.dtype)

    @property
    def laid(self) -> Laid:
        """Where everything will go in the target's files."""
        return self._laid[0]

    @cached_property
    def report(self) -> Report:
        """The report that the conversion would give, but for its time."""
        files = len(self.laid.files) + len(self.laid.small) + len(self.laid.copies)
        nbytes = sum(file.size for file in self.laid.files)
        return _report(self.prepared, self._laid[1], None, files, nbytes, self.seconds)

    @cached_property
    def files(self) -> dict[str, int]:
        """Every file of the target and its size in bytes."""
        files = {file.path: file.size for file in self.laid.files}
        files |= {name: len(small_bytes(small)) for name, small in self.laid.small.items()}
        return files | {name: path.stat().st_size for name, path in self.laid.copies.items()}

    def estimate(self, target: PathLike | None = None, *, threads: int | None = None) -> Estimate:
        """What the conversion will read, write and take; with a `target`, measured there for about a second."""
        return estimated(self.prepared, self.laid, sum(self.files.values()), target, threads, self.seconds)

    def copies(self) -> list[dict[str, Any]]:
        """Each group of equal copies: the tensor, its box, and how many times it is repeated."""
        return [_describe(copies) for copies in self.plan.copies]

    def html(self) -> str:
        """A page that draws every stored tensor, source beside target: open it in any browser."""
        source, target, to = self.prepared.source, self.prepared.target, self.prepared.spec
        facts = [
            ("source", str(source.opened.path)), ("architecture", source.architecture.name),
            ("layout", str(self.prepared.parallel)), ("copies", f"{self.plan.nbytes / 1e6:,.1f} MB"),
        ]  # fmt: skip
        sides = (
            Side("source", source.spec.name, source.spec.ranked, source.opened.pieces, everything(source.bound.groups)),
            Side("target", to.name, to.ranked, target.slots, everything(target.groups)),
        )
        title = f"{source.architecture.name}: {source.spec.name} \N{RIGHTWARDS ARROW} {to.name}"
        return page(scene(title, facts, sides, source.model))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**self.report.as_dict(), "file_sizes": self.files, "copy_groups": self.copies()}

    def table(self) -> Table:
        """The report, and every file."""
        rows = [*self.report.table().rows, *((name, f"{size:,} bytes") for name, size in self.files.items())]
        return Table(self.report.table().caption, (), rows)

    def __str__(self) -> str:
        shown = list(self.files.items())[:_FILES]
        lines = [str(self.report), *(f"  {size:>14} bytes  {name}" for name, size in shown)]
        if len(self.files) > _FILES:
            lines.append(f"  {'':>14}        and {len(self.files) - _FILES:,} more files")
        return "\n".join(lines)


def _describe(copies: Copies) -> dict[str, Any]:
    values = copies.values
    return {
        "tensor": copies.tensor,
        "box": list(copies.size),
        "source_stride": list(copies.source_stride),
        "target_stride": list(copies.target_stride),
        "times": len(copies.source),
        "source_dtype": values.source_dtype,
        "target_dtype": values.target_dtype,
        "plain": values.plain,
    }


def plan(
    source: PathLike,
    *,
    to: str,
    parallel: Parallel | None = None,
    dtype: str | torch.dtype | None = None,
    config: PathLike | Mapping[str, Any] | None = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PlanReport:
    """Plan a conversion without writing anything. Arguments and errors are those of `convert`."""
    start = time.perf_counter()
    cast = None if dtype is None else dtype_name(dtype)
    prepared = planned(Order(place(source), to, parallel, cast, config, architecture, options))
    return PlanReport(prepared.plan, prepared, options, cast, time.perf_counter() - start)
