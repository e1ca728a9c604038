"""Writes the pages that are made from the code, so that they cannot say anything else. `python -m docs.generate`

With `--check`, nothing is written: it names the pages that are stale, and exits with 1. tests/test_docs.py does so too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from docs import architecture, errors, pictures
from registry.arguments import parser as command_line

FOLDER = Path(__file__).resolve().parent
MADE = "Written by `make docs` from {source}; a test fails where it is stale.\n"

COMMANDS = f"""\
# Commands and flags

{MADE.format(source="registry/arguments.py")}
[cli.md](cli.md) shows what they are used for, with examples.
"""


def cell(text: str) -> str:
    """Text as it may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _flag(action: argparse.Action) -> str:
    """How an argument is given, such as `--tp N`."""
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    given = f" {action.metavar or (action.choices and '|'.join(action.choices)) or ''}" if action.nargs != 0 else ""
    return ", ".join(f"`{name}{given}`" for name in action.option_strings).replace("|", "\\|")


def _meaning(action: argparse.Action) -> str:
    text = action.help or ""
    if action.required and action.option_strings:
        text += "; required"
    elif not action.option_strings and action.nargs == "?":
        text += "; may be left out"
    if action.choices and action.metavar is None and action.option_strings:
        text += f"; default: {action.default}"
    return cell(text)


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    yield f"\n## {name}\n"
    yield " ".join((parser.description or "").split()) + "\n"
    yield "| argument | |\n| --- | --- |"
    for action in actions:
        yield f"| {_flag(action)} | {_meaning(action)} |"


def commands() -> str:
    """The command reference."""
    parser = command_line()
    lines = [COMMANDS, f"{parser.epilog}"]
    for name, each in _subcommands(parser).items():
        lines += _command(name, each)
    return "\n".join(lines) + "\n"


def support() -> str:
    """The support matrix, which is made from the tests too."""
    from tests.support import page

    return page()


#: File in docs/ -> what it should hold.
PAGES: dict[str, Callable[[], str]] = {
    "support.md": support,
    "reference-commands.md": commands,
    "reference-errors.md": errors.page,
    "architecture.svg": architecture.drawing,
}


def made() -> dict[str, str]:
    """File in docs/ -> what it should hold, of all that are made; the pictures of the notation too."""
    drawn = {f"pictures/{name}": text for name, text in pictures.drawings().items()}
    return {name: make() for name, make in PAGES.items()} | drawn


def stale() -> dict[str, str]:
    """The pages that are not what they should be: file in docs/ -> what it should hold."""
    return {
        name: text
        for name, text in made().items()
        if not (path := FOLDER / name).exists() or path.read_text(encoding="utf-8") != text
    }


def main(argv: list[str]) -> int:
    found = stale()
    if "--check" in argv:
        print("\n".join(f"stale: docs/{name}; run `make docs`" for name in found), end="\n" if found else "")
        return bool(found)
    for name, text in found.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
