"""The command line's grammar: its commands and flags, and the values that their texts mean.

To add a flag, add it where its command's arguments are; to add a command, write its function in registry/commands.py
and add an entry to COMMANDS. Its help, shell completion and reference come of what is here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import registry
from registry import commands
from registry.commands import Outcome
from registry.engines import ENGINES

RANKS = ("tp", "pp", "ep", "vpp")
SHELLS = ("bash", "zsh", "fish")


class Command(NamedTuple):
    """What a command does, what it does in a few words, and the function that adds its arguments to its parser."""

    run: Callable[[argparse.Namespace], Outcome]
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. What it parses holds `run`, the command's function."""
    made = argparse.ArgumentParser(
        "registry",
        description="Convert, reshard, inspect and compare checkpoints of large models.",
        epilog="Exit codes: 0 done, 1 refused or different, 2 usage, 130 interrupted.",
        allow_abbrev=False,
    )
    made.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = made.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        each = subparsers.add_parser(name, help=command.summary, description=command.run.__doc__, allow_abbrev=False)
        each.set_defaults(run=command.run, grammar=made, json=False, quiet=False)
        command.arguments(each)
        _common(each, quiet=name in ("convert", "verify", "diff"))
    return made


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


class _Version(argparse.Action):
    """Like argparse's own, which would want to know the version before it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        with suppress(BrokenPipeError):
            sys.stdout.write(f"registry {registry.__version__}\n")
        parser.exit()


# --- the arguments of each command ------------------------------------------------------------------------------------


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint directory; its format is detected")
    parser.add_argument("target", metavar="DST", help="the directory to write")
    _wanted(parser)
    parser.add_argument("--ranks", type=_ranks, metavar="N,N", help="write only these ranks' files, beside others")
    parser.add_argument("--overwrite", action="store_true", help="replace DST where it is not empty")
    _threads(parser)
    parser.add_argument(
        "--engine", choices=ENGINES, default="local",
        help="who does the work: this process, the workers of a Ray cluster, or the ranks that torchrun has started",
    )  # fmt: skip
    parser.add_argument("--no-sync", action="store_true", help="do not wait until everything is on the disk")
    _reading(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint directory; its format is detected")
    parser.add_argument("target", metavar="DST", nargs="?", help="where it will go: the time is measured there")
    _wanted(parser)
    _threads(parser)
    _html(parser)
    _reading(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a checkpoint directory")
    _reading(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a checkpoint directory")
    parser.add_argument("b", metavar="B", nargs="?", help="another, in any format and layout")
    _reading(parser)


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a checkpoint directory")
    parser.add_argument("b", metavar="B", help="another, in any format and layout")
    _reading(parser)


def _explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a checkpoint directory")
    parser.add_argument("tensor", metavar="TENSOR", help="a stored name, here or in that format, or a logical tensor")
    _wanted(parser, required=False)
    _html(parser)
    _reading(parser)


def _view(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a checkpoint directory")
    parser.add_argument("name", metavar="NAME", help="a tensor's name in that format; with * or ?, a pattern to list")
    parser.add_argument(
        "--rank", type=_rank, metavar="RANK", help="whose files, where every rank has its own: tp=1,pp=0"
    )
    _wanted(parser)
    _reading(parser)


def _new(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="PATH", help="a HuggingFace model directory: config.json and safetensors")
    command.add_argument("--out", metavar="FILE", help="write the spec to this file, which must not be there yet")
    command.add_argument("--name", help="what the architecture is called (default: the config's model_type)")


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell; docs/cli.md says where its file goes")


def _nothing(parser: argparse.ArgumentParser) -> None:
    """The command has only the flags that all have."""


# --- what several commands share --------------------------------------------------------------------------------------


def _wanted(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--to", required=required, metavar="FORMAT", help="the format (registry formats lists them)")
    parser.add_argument("--dtype", metavar="NAME", help="cast floating-point tensors: bfloat16, float16, float32, ...")
    parser.add_argument(
        "--option", type=_option, action="append", default=[], metavar="KEY=VALUE",
        help="a choice of the format; repeatable. VALUE is JSON where it parses as JSON, else a string",
    )  # fmt: skip
    layout = parser.add_argument_group("parallel layout", "Sizes of the parallel dimensions.")
    layout.add_argument("--pp", type=_stages, metavar="N", help="pipeline stages, or their layer counts: 3,5")
    for name, word in commands.SIZES.items():
        layout.add_argument(f"--{name}", type=int, metavar="N", help=f"{word} parallel size")


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="how many workers; default: one a core, at most 8")


def _html(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", help="also draw it: one page for any browser, source beside target")


def _reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument("--config", metavar="PATH", help="a HuggingFace directory or config.json, where there is none")
    group.add_argument("--architecture", metavar="NAME", help="the model family, where several fit")


def _common(parser: argparse.ArgumentParser, *, quiet: bool) -> None:
    parser.add_argument(
        "--spec", action="append", default=[], metavar="FILE", help="register a spec file first; repeatable"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON on stdout; errors are JSON on stderr")
    if quiet:
        output.add_argument("--quiet", action="store_true", help="print nothing but errors")


#: Every command, in the order in which help lists them.
COMMANDS = {
    "convert": Command(commands.convert, "convert a checkpoint to another format or layout", _convert),
    "plan": Command(commands.plan, "what convert would do", _plan),
    "inspect": Command(commands.inspect, "what a checkpoint holds", _inspect),
    "verify": Command(commands.verify, "whether a checkpoint is undamaged, or two are the same model", _verify),
    "diff": Command(commands.diff, "how two checkpoints differ", _diff),
    "explain": Command(commands.explain, "what a tensor is made of, and where its parts lie", _explain),
    "view": Command(commands.view, "one tensor in the terms of a format", _view),
    "formats": Command(commands.formats, "the known formats and their options", _nothing),
    "architectures": Command(commands.architectures, "the known model families", _nothing),
    "new-architecture": Command(commands.new_architecture, "draft the spec of an unknown model family", _new),
    "schema": Command(commands.schema, "the JSON Schema of spec files", _nothing),
    "completion": Command(commands.completion, "what makes a shell complete this command", _completion),
}
