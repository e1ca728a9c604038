"""The public functions, with their arguments checked. `registry/__init__.py` gives their names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from registry import catalog
from registry.engines import ENGINES
from registry.parallel import Parallel
from registry.rules import known_dtype, known_format
from registry.storage import Rank
from registry.validation import checked, rule

if TYPE_CHECKING:
    import torch

    from registry.checkpoint import Checkpoint
    from registry.comparison import Comparison
    from registry.conversion import PlanReport, Report
    from registry.execute import Progress
    from registry.explanation import Explanation
    from registry.inspection import Inspection
    from registry.specs import ArchitectureSpec, FormatSpec
    from registry.verification import Verification

PathLike = str | os.PathLike[str]
Config = PathLike | Mapping[str, Any]

_some_path = rule("source is not empty", lambda source: os.fspath(source) != "")
_some_threads = rule("threads is at least 1", lambda threads: threads is None or threads >= 1)


@checked(
    known_format,
    known_dtype,
    _some_path,
    _some_threads,
    rule("target is not empty", lambda target: os.fspath(target) != ""),
    rule(f"engine is one of {', '.join(ENGINES)}", lambda engine: engine in ENGINES),
)
def convert(
    source: PathLike,
    target: PathLike,
    *,
    to: str,
    parallel: Parallel | None = None,
    dtype: str | torch.dtype | None = None,
    config: Config | None = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    ranks: Sequence[int] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    durable: bool = True,
    progress: Progress | None = None,
    engine: str = "local",
) -> Report:
    """Convert the checkpoint at `source` into format `to` at `target`, a directory. One pass, constant memory.

    source: a checkpoint directory; its format and architecture are detected.
    parallel: the target's layout (tensor, pipeline, ... parallel sizes).
    dtype: a torch dtype or its name that floating-point tensors are cast to.
    config: a HuggingFace directory, config file or mapping, for a source that carries no config.
    architecture: the model family (a HuggingFace model_type), where several fit.
    options: choices of the target format; `registry formats --json` lists them.
    ranks: write only the files of these ranks, beside those that other machines write; for formats with a file a rank.
    overwrite: replace a target that is not empty.
    durable: sync every file to the disk before the target appears under its name.
    progress: called with (bytes done, bytes in all).
    engine: who does the work: "local", this process; "ray", the workers of a Ray cluster, which see the same file
    system; "torchrun", all ranks that torchrun has started, each of which calls this. See docs/scale.md.

    Raises CheckpointError, DetectionError or MappingError for the source, TargetError for the target, ArgumentError and
    ParallelError for the arguments; all are RegistryError. What was at `target` before stays, or is replaced whole.
    """
    from registry.conversion import convert as run

    return run(
        source, target, to=to, parallel=parallel, dtype=dtype, config=config, architecture=architecture,
        options=options, ranks=ranks, overwrite=overwrite, threads=threads, durable=durable, progress=progress,
        engine=engine,
    )  # fmt: skip


@checked(known_format, known_dtype, _some_path)
def plan(
    source: PathLike,
    *,
    to: str,
    parallel: Parallel | None = None,
    dtype: str | torch.dtype | None = None,
    config: Config | None = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> PlanReport:
    """What `convert` would do with the same arguments: files, bytes and copies. Reads headers only, writes nothing."""
    from registry.conversion import plan as run

    return run(
        source, to=to, parallel=parallel, dtype=dtype, config=config, architecture=architecture, options=options
    )  # fmt: skip


@checked(_some_path)
def open(source: PathLike, *, config: Config | None = None, architecture: str | None = None) -> Checkpoint:
    """Open a checkpoint lazily: format, architecture, config, names and shapes, and a view in any format's terms."""
    from registry.checkpoint import Checkpoint
    from registry.source import load

    return Checkpoint(load(source, config=config, architecture=architecture))


@checked(known_format, known_dtype, _some_path)
def stream(
    source: PathLike,
    *,
    to: str = "huggingface",
    parallel: Parallel | None = None,
    rank: Rank | None = None,
    dtype: str | torch.dtype | None = None,
    config: Config | None = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in format `to`, for a live model or an inference engine.

    In a format with files of every rank, `parallel` and `rank` say whose tensors are wanted.
    """
    from registry.checkpoint import stream as run
    from registry.dtypes import dtype_name
    from registry.source import load

    loaded = load(source, config=config, architecture=architecture)
    return run(loaded, to, parallel, rank, None if dtype is None else dtype_name(dtype), options)


@checked(rule("a and b are not empty", lambda a, b: os.fspath(a) != "" and (b is None or os.fspath(b) != "")))
def verify(
    a: PathLike, b: PathLike | None = None, *, config: Config | None = None, architecture: str | None = None,
    progress: Progress | None = None,
) -> Verification:  # fmt: skip
    """Is a checkpoint what was written, and with `b`, are two the same model? Tolerance is zero.

    Every file and tensor is compared with the manifest that this library writes beside what it writes. With `b`, the
    two are compared, in any formats and layouts, by a digest of every logical tensor; a side that carries no config is
    read with the other's, or with `config` and `architecture`. `progress` is called with (bytes done, bytes in all).

    The result is true where all is well, and lists every difference where it is not. Raises CheckpointError for one
    checkpoint alone that has no manifest.
    """
    from registry.places import place
    from registry.verification import alone
    from registry.verification import verify as run

    if b is None:
        return alone(place(a), progress)
    return run(a, b, config=config, architecture=architecture, progress=progress)


@checked(rule("a and b are not empty", lambda a, b: os.fspath(a) != "" and os.fspath(b) != ""))
def diff(
    a: PathLike, b: PathLike, *, config: Config | None = None, architecture: str | None = None,
    progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """How two checkpoints differ, of any formats, layouts, types and shapes: facts, tensors, and by how much values do.

    Arguments and errors are those of `verify`. `equal` of the result says whether there is any difference but of format
    and layout. Both are read side by side, in memory that does not grow with them.
    """
    from registry.comparison import diff as run

    return run(a, b, config=config, architecture=architecture, progress=progress)


@checked(_some_path)
def inspect(source: PathLike, *, config: Config | None = None, architecture: str | None = None) -> Inspection:
    """What a checkpoint holds: format, architecture, parameters, types, parallel layout, and what is odd about it.

    Where no architecture can be told, or none fits, `problem` of the result says why, and the rest what is known all
    the same; with `config` or `architecture` that is an error.
    """
    from registry.inspection import inspect as run

    return run(source, config=config, architecture=architecture)


@checked(
    known_dtype,
    _some_path,
    rule("to is None, or names a known format", lambda to: to is None or to in catalog.names("format")),
)
def explain(
    source: PathLike,
    tensor: str,
    *,
    to: str | None = None,
    parallel: Parallel | None = None,
    dtype: str | torch.dtype | None = None,
    config: Config | None = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Explanation:
    """Which logical tensors a stored one holds, by which rule, and with `to`, where each part lies in that format.

    tensor: a stored name, a logical tensor (`mlp.up.weight`, or of one layer `mlp.up.weight.3`), or with `to` a name
    in the target, of which it is then said where in the source its parts come from. Reads headers only.

    Raises MappingError for a tensor that is not there; else as `plan`.
    """
    from registry.dtypes import dtype_name
    from registry.explanation import explain as run
    from registry.source import load

    loaded = load(source, config=config, architecture=architecture)
    return run(loaded, tensor, to, parallel, None if dtype is None else dtype_name(dtype), options)


@checked()
def register(spec: str | os.PathLike[str] | Mapping[str, Any] | ArchitectureSpec | FormatSpec) -> str:
    """Add an architecture or format spec for this process: a YAML file, plain data, or a model. Returns its name."""
    return catalog.register(spec)


def formats() -> list[str]:
    """The names of the known formats."""
    return catalog.names("format")


def architectures() -> list[str]:
    """The names of the known architectures, HuggingFace's model_types."""
    return catalog.names("architecture")


def schema() -> dict[str, Any]:
    """The JSON Schema of spec files, for editors and other tools."""
    from registry.specs import json_schema

    return json_schema()
