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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

import registry
from registry import commands
from registry.commands import Outcome, follows
from registry.engines import ENGINES
from registry.errors import ArgumentError, RegistryError

RANKS = ("tp", "pp", "ep", "vpp")


# --- from text to values ----------------------------------------------------------------------------------------------


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


# --- output -----------------------------------------------------------------------------------------------------------


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
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], Outcome], summary: str
    ) -> argparse.ArgumentParser:
        made = subparsers.add_parser(name, help=summary, description=run.__doc__, allow_abbrev=False)
        made.set_defaults(run=run, json=False, quiet=False, spec=[])
        return made

    convert = command("convert", commands.convert, "convert a checkpoint to another format or layout")
    convert.add_argument("source", metavar="SRC", help="a checkpoint directory; its format is detected")
    convert.add_argument("target", metavar="DST", help="the directory to write")
    _add_wanted(convert)
    _add_writing(convert)
    plan = command("plan", commands.plan, "what convert would do")
    plan.add_argument("source", metavar="SRC", help="a checkpoint directory; its format is detected")
    _add_wanted(plan)
    inspect = command("inspect", commands.inspect, "what a checkpoint holds")
    inspect.add_argument("path", metavar="PATH", help="a checkpoint directory")
    verify = command("verify", commands.verify, "whether a checkpoint is undamaged, or two are the same model")
    verify.add_argument("a", metavar="A", help="a checkpoint directory")
    verify.add_argument("b", metavar="B", nargs="?", help="another, in any format and layout")
    explain = command("explain", commands.explain, "what a tensor is made of, and where its parts lie")
    explain.add_argument("path", metavar="PATH", help="a checkpoint directory")
    explain.add_argument("tensor", metavar="TENSOR", help="a stored name, here or in that format, or a logical tensor")
    _add_wanted(explain, required=False)
    view = command("view", commands.view, "one tensor in the terms of a format")
    view.add_argument("path", metavar="PATH", help="a checkpoint directory")
    view.add_argument("name", metavar="NAME", help="a tensor's name in that format; with * or ?, a pattern to list")
    view.add_argument("--rank", type=_rank, metavar="RANK", help="whose files, where every rank has its own: tp=1,pp=0")
    _add_wanted(view)
    for each in (convert, plan, inspect, verify, explain, view):
        _add_reading(each)
    formats = command("formats", commands.formats, "the known formats and their options")
    architectures = command("architectures", commands.architectures, "the known model families")
    for each in (convert, plan, inspect, verify, explain, view, formats, architectures):
        _add_common(each, quiet=each in (convert, verify))
    command("schema", commands.schema, "the JSON Schema of spec files").set_defaults(json=True)
    return parser


def _add_wanted(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--to", required=required, metavar="FORMAT", help="the format (registry formats lists them)")
    parser.add_argument("--dtype", help="cast floating-point tensors: bfloat16, float16, float32, ...")
    parser.add_argument(
        "--option", type=_option, action="append", default=[], metavar="KEY=VALUE",
        help="a choice of the format; repeatable. VALUE is JSON where it parses as JSON, else a string",
    )  # fmt: skip
    layout = parser.add_argument_group("parallel layout", "Sizes of the parallel dimensions.")
    layout.add_argument("--pp", type=_stages, metavar="N", help="pipeline stages, or their layer counts: 3,5")
    for name, word in commands.SIZES.items():
        layout.add_argument(f"--{name}", type=int, metavar="N", help=f"{word} parallel size")


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=_ranks, metavar="N,N", help="write only these ranks' files, beside others")
    parser.add_argument("--overwrite", action="store_true", help="replace DST where it is not empty")
    parser.add_argument("--threads", type=int, metavar="N", help="how many workers; default: one a core, at most 8")
    parser.add_argument(
        "--engine", choices=ENGINES, default="local",
        help="who does the work: this process, the workers of a Ray cluster, or the ranks that torchrun has started",
    )  # fmt: skip
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
        if follows(args):
            return outcome.code
        if args.json:
            _write(sys.stdout, _dump(outcome.data))
        elif not args.quiet:
            _write(sys.stdout, f"{outcome.text}\n")
    except RegistryError as error:
        if not follows(args):
            _complain(error, args.json)
        return commands.USAGE if isinstance(error, ArgumentError) else commands.REFUSED
    except KeyboardInterrupt:
        _write(sys.stderr, "registry: interrupted\n")
        return commands.INTERRUPTED
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
