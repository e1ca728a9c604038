"""The command `registry`: the public functions on the command line.

Importing this module, and `registry --help`, load nothing heavy: the library is loaded when a command runs.
docs/cli.md is the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO

import registry
from registry.errors import ArgumentError, RegistryError

if TYPE_CHECKING:
    import torch

    from registry.checkpoint import View
    from registry.progress import ProgressLine

DONE, REFUSED, USAGE, INTERRUPTED = 0, 1, 2, 130
SIZES = {
    "tp": "tensor", "vpp": "virtual pipeline", "ep": "expert", "etp": "expert tensor", "cp": "context", "dp": "data",
}  # fmt: skip
RANKS = ("tp", "pp", "ep", "vpp")
FIRST_VALUES = 8
_CHUNK = 1 << 20


class Outcome(NamedTuple):
    """What a command prints, as text or as data, and its exit code."""

    text: str
    data: Any
    code: int = DONE


# --- the commands -----------------------------------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> Outcome:
    """Convert the checkpoint SRC into another format, written to the directory DST."""
    with _progress(args) as progress:
        report = registry.convert(
            args.source, args.target, **_wanted(args), **_reading(args), ranks=args.ranks, overwrite=args.overwrite,
            threads=args.threads, durable=not args.no_sync, progress=progress,
        )  # fmt: skip
    return Outcome(str(report), report.as_dict())


def _plan(args: argparse.Namespace) -> Outcome:
    """Say what convert would do with the same options: files, bytes and copies. Writes nothing."""
    report = registry.plan(args.source, **_wanted(args), **_reading(args))
    return Outcome(str(report), report.as_dict())


def _inspect(args: argparse.Namespace) -> Outcome:
    """Say what a checkpoint holds. Reads headers only."""
    found = registry.inspect(args.path, **_reading(args))
    return Outcome(str(found), found.as_dict())


def _verify(args: argparse.Namespace) -> Outcome:
    """Compare a checkpoint with its manifest, or two, in any formats and layouts. Exit code 1: they differ."""
    result = registry.verify(args.a, args.b, **_reading(args))
    return Outcome(str(result), result.as_dict(), DONE if result else REFUSED)


def _view(args: argparse.Namespace) -> Outcome:
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


def _formats(args: argparse.Namespace) -> Outcome:
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


def _architectures(args: argparse.Namespace) -> Outcome:
    """List the architectures; with --json, their whole specs."""
    from registry.catalog import architecture

    specs = {name: architecture(name) for name in registry.architectures()}
    text = _columns([[name, spec.description] for name, spec in specs.items()])
    return Outcome(text, {name: spec.model_dump(mode="json") for name, spec in specs.items()})


def _schema(args: argparse.Namespace) -> Outcome:
    """Print the JSON Schema of spec files, for editors and other tools."""
    return Outcome("", registry.schema())


# --- from options to arguments ----------------------------------------------------------------------------------------


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


def _stages(text: str) -> int | list[int]:
    try:
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of stages nor layer counts with commas, such as 3,5"
        ) from None


def _ranks(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ranks with commas, such as 0,1") from None


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    with suppress(ValueError, RecursionError):
        return key, json.loads(value)
    return key, value


def _rank(text: str) -> dict[str, int]:
    rank = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in RANKS or not value.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not a rank, such as tp=1,pp=0 (also {', '.join(RANKS[2:])})")
        rank[key] = int(value)
    return rank


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator[ProgressLine | None]:
    if args.quiet or args.json or not sys.stderr.isatty():
        yield None
        return
    from registry.progress import ProgressLine

    with ProgressLine(sys.stderr) as line:
        yield line


# --- output -----------------------------------------------------------------------------------------------------------


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


def _plain(value: Any) -> Any:
    """`value` in JSON's terms, which has no nan and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _write(stream: TextIO, text: str) -> None:
    """Write and flush. A reader that has gone away (`registry formats | head -1`) is no error."""
    encoding = stream.encoding or "utf-8"  # A path may hold bytes that no encoding has a name for.
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # Or the interpreter complains when it flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _dump(data: Any, indent: int | None = 2) -> str:
    return json.dumps(_plain(data), indent=indent, allow_nan=False) + "\n"


def _complain(error: RegistryError, as_json: bool) -> None:
    if not as_json:
        _write(sys.stderr, f"registry: {error}\n")
        return
    fields = {key: getattr(error, key) for key in ("problem", "where", "expected", "found", "hint", "details")}
    _write(sys.stderr, _dump({"error": {"type": type(error).__name__, **fields}}, None))


# --- the parser -------------------------------------------------------------------------------------------------------


class _Version(argparse.Action):
    """Like argparse's own, which would want to know the version before it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        _write(sys.stdout, f"registry {registry.__version__}\n")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "registry",
        description="Convert, reshard, inspect and compare checkpoints of large models.",
        epilog="Exit codes: 0 done, 1 refused or different, 2 usage, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Outcome], summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=run.__doc__, allow_abbrev=False)
        made.set_defaults(run=run, json=False, quiet=False, spec=[])
        return made

    convert = command("convert", _convert, "convert a checkpoint to another format or layout")
    convert.add_argument("source", metavar="SRC", help="a checkpoint directory; its format is detected")
    convert.add_argument("target", metavar="DST", help="the directory to write")
    _add_wanted(convert)
    _add_writing(convert)
    plan = command("plan", _plan, "what convert would do")
    plan.add_argument("source", metavar="SRC", help="a checkpoint directory; its format is detected")
    _add_wanted(plan)
    inspect = command("inspect", _inspect, "what a checkpoint holds")
    inspect.add_argument("path", metavar="PATH", help="a checkpoint directory")
    verify = command("verify", _verify, "whether a checkpoint is undamaged, or two are the same model")
    verify.add_argument("a", metavar="A", help="a checkpoint directory")
    verify.add_argument("b", metavar="B", nargs="?", help="another, in any format and layout")
    view = command("view", _view, "one tensor in the terms of a format")
    view.add_argument("path", metavar="PATH", help="a checkpoint directory")
    view.add_argument("name", metavar="NAME", help="a tensor's name in that format; with * or ?, a pattern to list")
    view.add_argument("--rank", type=_rank, metavar="RANK", help="whose files, where every rank has its own: tp=1,pp=0")
    _add_wanted(view)
    for each in (convert, plan, inspect, verify, view):
        _add_reading(each)
    formats = command("formats", _formats, "the known formats and their options")
    architectures = command("architectures", _architectures, "the known model families")
    for each in (convert, plan, inspect, verify, view, formats, architectures):
        _add_common(each, quiet=each in (convert, verify))
    command("schema", _schema, "the JSON Schema of spec files").set_defaults(json=True)
    return parser


def _add_wanted(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, metavar="FORMAT", help="the format (registry formats lists them)")
    parser.add_argument("--dtype", help="cast floating-point tensors: bfloat16, float16, float32, ...")
    parser.add_argument(
        "--option", type=_option, action="append", default=[], metavar="KEY=VALUE",
        help="a choice of the format; repeatable. VALUE is JSON where it parses as JSON, else a string",
    )  # fmt: skip
    layout = parser.add_argument_group("parallel layout", "Sizes of the parallel dimensions.")
    layout.add_argument("--pp", type=_stages, metavar="N", help="pipeline stages, or their layer counts: 3,5")
    for name, word in SIZES.items():
        layout.add_argument(f"--{name}", type=int, metavar="N", help=f"{word} parallel size")


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=_ranks, metavar="N,N", help="write only these ranks' files, beside others")
    parser.add_argument("--overwrite", action="store_true", help="replace DST where it is not empty")
    parser.add_argument("--threads", type=int, metavar="N", help="how many workers; default: one a core, at most 8")
    parser.add_argument("--no-sync", action="store_true", help="do not wait until everything is on the disk")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument("--config", metavar="PATH", help="a HuggingFace directory or config.json, where there is none")
    group.add_argument("--architecture", metavar="NAME", help="the model family, where several fit")


def _add_common(parser: argparse.ArgumentParser, *, quiet: bool) -> None:
    parser.add_argument(
        "--spec", action="append", default=[], metavar="FILE", help="register a spec file first; repeatable"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON on stdout; errors are JSON on stderr")
    if quiet:
        output.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return _parser().parse_args(argv)
    except SystemExit:
        _write(sys.stdout, "")  # So that `registry --help | true` ends quietly too.
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; a command line that cannot be parsed raises SystemExit(2)."""
    args = _parse(argv)
    try:
        for path in args.spec:
            registry.register(path)
        outcome: Outcome = args.run(args)
        if args.json:
            _write(sys.stdout, _dump(outcome.data))
        elif not args.quiet:
            _write(sys.stdout, f"{outcome.text}\n")
    except RegistryError as error:
        _complain(error, args.json)
        return USAGE if isinstance(error, ArgumentError) else REFUSED
    except KeyboardInterrupt:
        _write(sys.stderr, "registry: interrupted\n")
        return INTERRUPTED
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
