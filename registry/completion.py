"""Shell completion, made of the command line's own grammar by shtab: formats, model families and paths complete too."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import shtab

import registry
from registry.dtypes import ITEMSIZE, is_float

#: What an argument's METAVAR says of its values; the others complete by nothing.
_DIRECTORIES = ("SRC", "DST", "PATH", "A", "B")
_FILES = ("FILE",)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What `shell` is to read so that it completes the command of `parser`, which is changed by this."""
    types = sorted(name for name in ITEMSIZE if is_float(name))
    choices = {"--architecture": registry.architectures(), "--dtype": types}
    for action in _actions(parser):
        if isinstance(action, argparse._SubParsersAction):
            for command in action._choices_actions:  # a line is all that there is room for
                action.choices[command.dest].description = command.help
        flag = action.option_strings[0] if action.option_strings else None
        if flag in choices:
            _set(action, choices=choices[flag])
        elif action.metavar == "FORMAT":
            _set(action, choices=registry.formats())
        elif action.metavar in _FILES or flag == "--config":
            _set(action, complete=shtab.FILE)
        elif action.metavar in _DIRECTORIES:
            _set(action, complete=shtab.DIRECTORY)
    return str(shtab.complete(parser, shell))


def _set(action: argparse.Action, **fields: Any) -> None:
    vars(action).update(fields)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, Mapping):
            for inner in action.choices.values():
                yield from _actions(inner)
