"""Every error says what to do next."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import registry
from registry import errors
from registry.colours import coloured, wanted
from registry.problems import collapse

ROOT = Path(registry.__file__).parent.parent
CLASSES = {
    name: one for name, one in vars(errors).items() if inspect.isclass(one) and issubclass(one, errors.RegistryError)
}


def raised() -> list[tuple[str, ast.Call]]:
    """Every place where the code makes an error of ours."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node)
        for folder in ("registry", "formats")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES
    ]


def test_every_error_that_is_raised_has_a_next_step() -> None:
    found = raised()
    assert len(found) > 200
    lacking = []
    for where, call in found:
        assert isinstance(call.func, ast.Name)
        hint = next((k.value for k in call.keywords if k.arg == "hint"), None)
        given = hint is not None and not (isinstance(hint, ast.Constant) and not hint.value)
        if not given and not CLASSES[call.func.id].advice:
            lacking.append(where)
    assert lacking == []


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "RegistryError"])
def test_the_message_ends_with_it(name: str) -> None:
    error = CLASSES[name]("something is wrong", where="there", details=["one"])
    assert str(error).splitlines()[-1] == f"  to do: {error.advice}"
    assert error.brief == "something is wrong\n  where: there\n  - one"
    own = CLASSES[name]("something is wrong", hint="do this")
    assert str(own).endswith("\n  to do: do this") and own.brief == str(own)


def test_an_error_within_an_error_gives_no_advice_of_its_own() -> None:
    with pytest.raises(registry.SpecError) as caught:
        registry.register(
            {"kind": "architecture", "name": "bad-one", "extends": "llama", "tensors": {"x.{layer}.w": "a: ((hidden"}}
        )
    assert str(caught.value).count("to do:") == 1


# --- in colours -------------------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, terminal: bool) -> None:
        self.isatty = lambda: terminal


def test_colours_are_for_terminals_that_want_them() -> None:
    assert wanted(Stream(True), {"TERM": "xterm"})  # type: ignore[arg-type]
    assert wanted(Stream(True), {"NO_COLOR": ""})  # type: ignore[arg-type]  # empty is unset: https://no-color.org
    assert not wanted(Stream(False), {"TERM": "xterm"})  # type: ignore[arg-type]
    assert not wanted(Stream(True), {"NO_COLOR": "1"})  # type: ignore[arg-type]
    assert not wanted(Stream(True), {"TERM": "dumb"})  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_on_a_terminal(more: dict[str, str], tmp_path: Path) -> None:
    control, terminal = os.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | more
    line = [sys.executable, "-m", "registry.cli", "inspect", str(tmp_path / "\033[31mred")]
    code = subprocess.run(line, stderr=terminal, stdout=subprocess.PIPE, env=environment, timeout=120).returncode
    os.close(terminal)
    shown = os.read(control, 65536).decode()
    os.close(control)
    assert code == 1 and "no such checkpoint" in shown
    assert ("\033[" in shown) == (not more)
    assert "\033[31m" not in shown and "\\x1b[31mred" in shown  # what a path is called may not talk to the terminal


def test_colours_change_no_word() -> None:
    text = "registry: no\n  where: x\n  to do: this\ndifferent: 1 of 2\n  note: n\n"
    shown = coloured(text)
    assert shown != text
    for code in ("\033[1m", "\033[1;31m", "\033[1;32m", "\033[33m", "\033[0m"):
        shown = shown.replace(code, "")
    assert shown == text


def test_names_are_grouped_by_their_indices_whatever_they_hold() -> None:
    names = ["a.0.w", "a.1.w", "a.3.w", "b", "\0", "c.\0.w", "c.1.w"]
    assert collapse(names) == ["a.{0..1,3}.w", "b", r"\0", r"c.\0.w", "c.1.w"]
    assert collapse(names, 2) == ["a.{0..1,3}.w", "b", "and 3 more"]
