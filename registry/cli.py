"""The command `registry`: the public functions on the command line.

Importing this module, and `registry --help`, load nothing heavy: the library is loaded when a command runs.
registry/arguments.py has the commands and flags; docs/cli.md is the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

import registry
from registry import colours, commands
from registry.arguments import parser
from registry.commands import Outcome, follows
from registry.errors import ArgumentError, RegistryError


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
            _say(sys.stdout, f"{outcome.text}\n")
    except RegistryError as error:
        if not follows(args):
            _complain(error, args.json)
        return commands.USAGE if isinstance(error, ArgumentError) else commands.REFUSED
    except KeyboardInterrupt:
        _write(sys.stderr, "registry: interrupted\n")
        return commands.INTERRUPTED
    return outcome.code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return parser().parse_args(argv)
    except SystemExit:
        _write(sys.stdout, "")  # So that `registry --help | true` ends quietly too.
        raise
    except BrokenPipeError as gone:  # The argparse of Python before 3.11.4 does not see to it.
        _write(sys.stdout, "")
        raise SystemExit(0) from gone


def _complain(error: RegistryError, as_json: bool) -> None:
    if not as_json:
        _say(sys.stderr, f"registry: {error}\n")
        return
    fields = {key: getattr(error, key) for key in ("problem", "where", "expected", "found", "hint", "details")}
    _write(sys.stderr, _dump({"error": {"type": type(error).__name__, **fields}}, None))


def _dump(data: Any, indent: int | None = 2) -> str:
    return json.dumps(_plain(data), indent=indent, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """`value` in JSON's terms, which has no nan and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _say(stream: TextIO, text: str) -> None:
    """Write for people: in colours where they are wanted. What a checkpoint calls things may not talk to a terminal."""
    if stream.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    _write(stream, colours.coloured(text) if colours.wanted(stream) else text)


def _write(stream: TextIO, text: str) -> None:
    """Write and flush. A reader that has gone away (`registry formats | head -1`) is no error."""
    encoding = stream.encoding or "utf-8"  # A path may hold bytes that no encoding has a name for.
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # Or the interpreter complains when it flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
