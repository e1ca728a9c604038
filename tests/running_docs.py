"""Runs what a page of documentation shows, block by block, and says where it is not true. Needs the library alone.

A page runs in a process and a directory of its own, beside a tiny HuggingFace model called `llama`:

    python -P tests/running_docs.py PAGE.md

What is done with a block is said by its language:

* `python` runs; all of a page share one namespace.
* `console`: each line that begins with `$ ` runs, and must end with 0 unless `$ echo $?` follows and shows another
  number. What follows a command is what it prints: `...` stands for any text, alone on a line for any lines, and
  decimal fractions (times, rates, random weights) may differ.
* `sh`: each line runs, and must end with 0.
* `json`, `yaml` and `toml` are read as such.
* `text` is no code, but a drawing or a grammar.

`registry ...` runs in this process; `make TARGET` is looked at (`make -n`) and not made; all else runs in bash. `pip`
runs where PAGES_PIP names a clone, in that directory, and is left out where it does not.

`<!-- not run: WHY -->` on the line above a block leaves it out. tests/test_docs.py holds how many there may be.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: What a stranger follows word for word; tests/test_packaging.py runs these, in a fresh environment.
FOLLOWED = [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
LANGUAGES = ("python", "console", "sh", "json", "yaml", "toml", "text")
_BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>.+) -->\n)?```(?P<language>.*)\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
#: What differs from run to run and from machine to machine: times, rates, and the values of random weights.
_VARIES = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
_OPERATORS = set("();<>|&")


class Untrue(Exception):
    """What a page shows is not so."""


@dataclass(frozen=True)
class Block:
    """One fenced block: the number of the line before its text, its language, its text, and why it does not run."""

    line: int
    language: str
    text: str
    why: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start("text")), match["language"], match["text"], match["why"])
        for match in _BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[tuple[str, list[str] | None]]:
    """Each command of a block, and the lines that are shown of what it prints; None where nothing is."""
    command: str | None = None
    shown: list[str] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "sh":
            if line.strip() and not line.startswith("#"):
                yield line, None
        elif line.startswith("$ "):
            if command:
                yield command, shown or None
            command, shown = line[2:], []
        elif command is None:
            raise Untrue(f"{line!r} comes before any command, which begins with '$ '")
        else:
            shown.append(line)
    if command:
        yield command, shown or None


def words(command: str) -> list[str]:
    """The words of a command as a shell takes them, operators such as `|` as words; its comment is dropped."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def in_process(arguments: list[str]) -> tuple[int, str]:
    """The exit code of `registry`, run here (which saves importing torch for each), and all that it prints."""
    from registry.cli import main

    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            status = main(arguments)
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
    return status, printed.getvalue()


def in_bash(command: str, folder: Path | None = None) -> tuple[int, str]:
    """The same of anything else, with this Python's commands found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=os.environ | {"PATH": path}, timeout=200,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


def run(command: str) -> tuple[int, str]:
    """The exit code of one command line, and what it prints."""
    parts = words(command)
    if parts[0] == "registry" and "$" not in command and not any(_OPERATORS.issuperset(part) for part in parts[1:]):
        return in_process(parts[1:])
    if parts[0] == "make":
        return in_bash(f"make -n -C {shlex.quote(str(ROOT))} {shlex.join(parts[1:])} >/dev/null")
    if parts[0] == "pip":
        clone = os.environ.get("PAGES_PIP")
        return in_bash(command, Path(clone)) if clone else (0, "")
    if parts[0] == "cd":
        os.chdir(parts[1])
        return 0, ""
    return in_bash(command)


def _pattern(lines: list[str]) -> re.Pattern[str]:
    """What matches an output that is shown as these lines."""
    parts = []
    for line in lines:
        if line.strip() == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            text = re.escape(_VARIES.sub("N", line.rstrip())).replace(r"\.\.\.", ".*")
            parts.append(text + r"[ ]*\n")
    return re.compile("".join(parts))


def compare(shown: list[str], printed: str) -> None:
    """Raises Untrue where a command prints something else than is shown."""
    found = _VARIES.sub("N", "".join(f"{line}\n" for line in printed.splitlines()))
    if not _pattern(shown).fullmatch(found):
        raise Untrue(f"it shows\n{chr(10).join(shown)}\nand what is printed is\n{printed}")


def run_commands(block: Block) -> None:
    """Run a block's commands, and compare what they print."""
    pending: tuple[str, int, str] | None = None

    def ended_well() -> None:
        if pending and pending[1]:
            raise Untrue(f"`{pending[0]}` ended with {pending[1]}:\n{pending[2]}")

    for command, shown in commands(block):
        if command.strip() == "echo $?":
            if pending is None or shown != [str(pending[1])]:
                raise Untrue(f"the exit code is shown as {shown}, and is {pending and pending[1]}")
            pending = None
            continue
        ended_well()
        print("$", command, flush=True)
        status, printed = run(command)
        pending = (command, status, printed)
        if shown is not None:
            compare(shown, printed)
    ended_well()


def run_block(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run one block, or read it."""
    if block.language == "python":
        exec(compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True), names)
    elif block.language in ("console", "sh"):
        run_commands(block)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        import yaml

        list(yaml.safe_load_all(block.text))
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language != "text":
        raise Untrue(f"nobody knows how to run {block.language!r}: make it one of {', '.join(LANGUAGES)}")


def run_page(page: Path) -> None:
    """Run everything on a page, in the working directory."""
    names: dict[str, Any] = {"__name__": "page"}
    sys.path.insert(0, str(Path.cwd()))  # where a user's Python finds what the page has had them write
    for block in blocks(page):
        if block.why is not None:
            continue
        try:
            run_block(block, page, names)
        except Untrue as error:
            sys.exit(f"{page.name}, block at line {block.line}: {error}")


if __name__ == "__main__":
    run_page(Path(sys.argv[1]).resolve())
