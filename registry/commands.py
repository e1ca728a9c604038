"""What each command of the command line does: its arguments, as the public functions take them, and what is printed.

Importing this module loads nothing heavy: the library is loaded when a command runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import registry
from registry.errors import ArgumentError, TargetError

if TYPE_CHECKING:
    import torch

    from registry.checkpoint import View
    from registry.conversion import PlanReport
    from registry.explanation import Explanation
    from registry.progress import ProgressLine

DONE, REFUSED, USAGE, INTERRUPTED = 0, 1, 2, 130
SIZES = {
    "tp": "tensor", "vpp": "virtual pipeline", "ep": "expert", "etp": "expert tensor", "cp": "context", "dp": "data",
}  # fmt: skip
FIRST_VALUES = 8
_CHUNK = 1 << 20


class Outcome(NamedTuple):
    """What a command prints, as text or as data, and its exit code."""

    text: str
    data: Any
    code: int = DONE


def convert(args: argparse.Namespace) -> Outcome:
    """Convert the checkpoint SRC into another format, written to the directory DST."""
    with _progress(args) as progress:
        report = registry.convert(
            args.source, args.target, **_wanted(args), **_reading(args), ranks=args.ranks, overwrite=args.overwrite,
            threads=args.threads, durable=not args.no_sync, progress=progress, engine=args.engine,
        )  # fmt: skip
    return Outcome(str(report), report.as_dict())


def plan(args: argparse.Namespace) -> Outcome:
    """Say what convert would do with the same options: files, bytes, memory and time. Writes nothing.

    With DST, time is measured: a part of the work is done there for about a second, and leaves nothing behind.
    """
    report = registry.plan(args.source, **_wanted(args), **_reading(args))
    _draw(args, report)
    estimate = report.estimate(args.target, threads=args.threads)
    return Outcome(f"{report}\n{estimate}", {**report.as_dict(), "estimate": estimate.as_dict()})


def inspect(args: argparse.Namespace) -> Outcome:
    """Say what a checkpoint holds and what can be done with it. Reads headers only. Exit code 1: nothing, as it is."""
    found = registry.inspect(args.path, **_reading(args))
    return Outcome(str(found), found.as_dict(), REFUSED if found.problem else DONE)


def verify(args: argparse.Namespace) -> Outcome:
    """Compare a checkpoint with its manifest, or two, in any formats and layouts. Exit code 1: they differ."""
    with _progress(args) as progress:
        result = registry.verify(args.a, args.b, **_reading(args), progress=progress)
    return Outcome(str(result), result.as_dict(), DONE if result else REFUSED)


def diff(args: argparse.Namespace) -> Outcome:
    """Say how two checkpoints differ, in any formats, layouts, types and shapes. Exit code 1: they do."""
    with _progress(args) as progress:
        result = registry.diff(args.a, args.b, **_reading(args), progress=progress)
    return Outcome(str(result), result.as_dict(), DONE if result.equal else REFUSED)


def explain(args: argparse.Namespace) -> Outcome:
    """Show which logical tensors TENSOR holds, by which rule, and with --to where each part lies in that format."""
    wanted = _wanted(args) if args.to else {"dtype": args.dtype}
    found = registry.explain(args.path, args.tensor, **wanted, **_reading(args))
    _draw(args, found)
    return Outcome(str(found), found.as_dict())


def view(args: argparse.Namespace) -> Outcome:
    """Show one tensor of a checkpoint in the terms of a format: its name, shape and values there."""
    from registry.catalog import format_spec
    from registry.dtypes import dtype_name, is_float

    wanted = _wanted(args)
    to, dtype = wanted.pop("to"), None if args.dtype is None else dtype_name(args.dtype)
    if dtype is not None and not is_float(dtype):
        raise ArgumentError("dtype casts to a floating-point type of at least 16 bits", found=dtype)
    if args.rank is not None and not format_spec(to).ranked:
        raise ArgumentError(f"{to} has no files of single ranks", found="--rank", hint="leave --rank out")
    rank = None if args.rank is None else registry.Rank(**args.rank)
    view = registry.open(args.path, **_reading(args)).view(to, rank=rank, **{**wanted, "dtype": dtype})
    if any(mark in args.name for mark in "*?"):
        return _listing(view, [name for name in view if fnmatchcase(name, args.name)] or _absent(args, to, view))
    if args.name not in view:
        _absent(args, to, view)
    facts = {"name": args.name, "format": to, "shape": list(view.shape(args.name)), "dtype": view.dtype(args.name)}
    found = _statistics(view[args.name])
    more = " ..." if math.prod(facts["shape"]) > len(found["values"]) else ""
    said = {**facts, **found, "values": " ".join(map(_shown, found["values"])) + more}
    return Outcome("\n".join(f"{key:<8}{_shown(value)}" for key, value in said.items()), {**facts, **found})


def _listing(view: View, names: Sequence[str]) -> Outcome:
    known = {name: {"shape": list(view.shape(name)), "dtype": view.dtype(name)} for name in names}
    rows = [[name, str(facts["dtype"]), str(facts["shape"])] for name, facts in known.items()]
    return Outcome(_columns(rows), {"tensors": known})


def _absent(args: argparse.Namespace, to: str, view: View) -> NoReturn:
    from difflib import get_close_matches

    near = get_close_matches(args.name, view, 3)
    raise ArgumentError(
        f"no tensor {args.name!r} in terms of {to}",
        where=args.path,
        expected=f"such as {', '.join(near)}" if near else f"one of {len(view)} names",
        hint="'*' as the name lists all" if len(view) else "choose another --rank",
    )


def formats(args: argparse.Namespace) -> Outcome:
    """List the formats with their options and defaults; with --json, their whole specs."""
    from registry.catalog import format_spec

    specs = {name: format_spec(name) for name in registry.formats()}
    width = max(map(len, specs))
    lines = []
    for name, spec in specs.items():
        lines.append(f"{name:<{width}}  {spec.description}".rstrip())
        for key, option in spec.options.items():
            lines.append(f"{'':<{width}}  --option {key}={_value(option.default)}: {option.description}")
            if option.choices:
                lines.append(f"{'':<{width}}    one of {', '.join(map(_value, option.choices))}")
    return Outcome("\n".join(lines), {name: spec.model_dump(mode="json") for name, spec in specs.items()})


def architectures(args: argparse.Namespace) -> Outcome:
    """List the architectures; with --json, their whole specs."""
    from registry.catalog import architecture

    specs = {name: architecture(name) for name in registry.architectures()}
    text = _columns([[name, spec.description] for name, spec in specs.items()])
    return Outcome(text, {name: spec.model_dump(mode="json") for name, spec in specs.items()})


def schema(args: argparse.Namespace) -> Outcome:
    """Print the JSON Schema of spec files, for editors and other tools."""
    found = registry.schema()
    return Outcome(json.dumps(found, indent=2), found)


def _draw(args: argparse.Namespace, found: PlanReport | Explanation) -> None:
    """Write the page that --html asks for. Raises TargetError."""
    if args.html is None:
        return
    try:
        Path(args.html).write_text(found.html(), encoding="utf-8")
    except OSError as error:
        raise TargetError(
            "the page cannot be written", where=args.html, expected="a file in a directory that is there",
            found=error.strerror, hint="name another FILE",
        ) from None  # fmt: skip


def new_architecture(args: argparse.Namespace) -> Outcome:
    """Draft the spec of a model that no known architecture fits, of its config and headers. Marks its doubts `?:`."""
    from registry.drafting import draft

    made = draft(Path(args.path), name=args.name)
    text = made.text()
    if args.out is None:
        return Outcome(text.rstrip("\n"), made.data())
    out = Path(args.out)
    if out.exists():
        raise TargetError(
            "the file is there already", where=out, expected="a name that is free", found="a file",
            hint="give another one, or remove it",
        )  # fmt: skip
    out.write_text(text, encoding="utf-8")
    tensors = sum(map(len, made.tensors.values()))
    said = f"{out}: {tensors} rules, {len(made.doubts)} doubts, each marked `?:`"
    return Outcome(said, {"file": str(out), "rules": tensors, "doubts": made.doubts})


def completion(args: argparse.Namespace) -> Outcome:
    """Print what a shell has to read so that it completes this command: its flags, formats, families and paths."""
    from registry.completion import script

    text = script(args.grammar, args.shell)
    return Outcome(text.rstrip("\n"), {"shell": args.shell, "script": text})


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    return {"config": args.config, "architecture": args.architecture}


def _wanted(args: argparse.Namespace) -> dict[str, Any]:
    known = registry.formats()
    if args.to not in known:
        raise ArgumentError(
            f"unknown format {args.to!r}", expected=f"one of {', '.join(known)}", hint="see registry formats"
        )
    sizes = {name: getattr(args, name) for name in (*SIZES, "pp") if getattr(args, name) is not None}
    parallel = registry.Parallel(**sizes) if sizes else None
    return {"to": args.to, "parallel": parallel, "dtype": args.dtype, "options": dict(args.option) or None}


def follows(args: argparse.Namespace) -> bool:
    """Is this one of several processes that do the same, and not the first, which speaks for all?"""
    return getattr(args, "engine", "local") == "torchrun" and os.environ.get("RANK", "0") != "0"


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator[ProgressLine | None]:
    if args.quiet or args.json or follows(args) or not sys.stderr.isatty():
        yield None
        return
    from registry.progress import ProgressLine

    with ProgressLine(sys.stderr) as line:
        yield line


# --- what is said ----------------------------------------------------------------------------------------------------


def _statistics(tensor: torch.Tensor) -> dict[str, Any]:
    """Extremes, mean and first values; in chunks, for a copy of a large tensor in float64 could fill the memory."""
    flat = tensor.flatten()
    values = flat[:FIRST_VALUES].tolist()
    if not flat.numel() or flat.is_complex():
        return {"min": None, "max": None, "mean": None, "values": values}
    low, high, total = math.inf, -math.inf, 0.0
    for begin in range(0, flat.numel(), _CHUNK):
        wide = flat[begin : begin + _CHUNK].double()
        total += wide.sum().item()
        a, b = wide.min().item(), wide.max().item()
        # Python's min() would drop a nan, and torch's keeps it.
        low, high = (a if a < low or math.isnan(a) else low), (b if b > high or math.isnan(b) else high)
    return {"min": low, "max": high, "mean": total / flat.numel(), "values": values}


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(value: object) -> str:
    """A value as --option takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
