"""The error reference, read from the syntax trees of registry/ and formats/: every error that is raised, and its hint.

A call of an error class is found wherever it stands. A function that makes an error of its own parameter (`corrupt()`)
is followed to its callers, whose arguments say what the problem is. What is only known when it happens is shown as `…`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from registry import errors

ROOT = Path(__file__).resolve().parent.parent
TREES = ("registry", "formats")
#: Tests for others, which raise what they are given.
LEFT_OUT = "testing"

HEAD = """\
# Errors

Written by `make docs` from the source; a test fails where it is stale.

Everything that the library raises on purpose is a `RegistryError` of one of the classes below. It says what the problem
is, `where`, what was `expected` and `found`, and what to do next (`hint`); `details` lists further problems of one
report. On the command line the same is printed, as one line of JSON with `--json`, and the exit code is 2 for an
`ArgumentError` and 1 for the others. Search this page for the first line of a message; `…` stands for what differs from
case to case.
"""


@dataclass(frozen=True)
class Raised:
    """One error as the source has it: its class, and texts with `…` for what is only known when it happens."""

    kind: str
    problem: str
    expected: str | None
    hint: str | None


@dataclass(frozen=True)
class Maker:
    """A function that makes an error of its own parameters: what the error takes each of its texts from."""

    kind: str
    parameters: tuple[str, ...]
    given: dict[str, ast.expr]


def classes() -> dict[str, type[errors.RegistryError]]:
    """Every class of the hierarchy, by name, those above before those below."""
    found = {errors.RegistryError.__name__: errors.RegistryError}
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.RegistryError):
            found[name] = value
    return found


def text_of(node: ast.expr | None) -> str | None:
    """A text as it stands in the source: literals joined, `…` for the rest. None for one that is not given."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return None
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=values):
            return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in values)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return f"{text_of(left)}{text_of(right)}"
        case ast.IfExp(body=body, orelse=other):
            either = [text for text in (text_of(body), text_of(other)) if text is not None]
            return " / ".join(either) or None
        case ast.BoolOp(op=ast.Or(), values=values):
            return text_of(values[-1])
    return "…"


def _arguments(call: ast.Call, parameters: tuple[str, ...]) -> dict[str, ast.expr]:
    given = dict(zip(parameters, call.args, strict=False))
    return given | {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def _called(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    names = tuple(each.arg for each in (*function.args.args, *function.args.kwonlyargs))
    return names[1:] if names[:1] in (("self",), ("cls",)) else names


def _trees() -> list[ast.Module]:
    paths = (path for top in TREES for path in sorted((ROOT / top).rglob("*.py")))
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths if LEFT_OUT not in path.parts]


def _makers(trees: list[ast.Module], kinds: set[str]) -> dict[str, Maker]:
    """The functions whose error's problem is a parameter of theirs, by name."""
    found = {}
    for tree in trees:
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            own = _parameters(function)
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and _called(call) in kinds:
                    given = _arguments(call, ("problem",))
                    problem = given.get("problem")
                    if isinstance(problem, ast.Name) and problem.id in own:
                        found[function.name] = Maker(_called(call), own, given)
    return found


def _through(maker: Maker, call: ast.Call) -> Raised:
    """The error that a call of a maker makes."""
    arguments = _arguments(call, maker.parameters)

    def said(field: str) -> str | None:
        node = maker.given.get(field)
        if isinstance(node, ast.Name) and node.id in maker.parameters:
            node = arguments.get(node.id)
        return text_of(node)

    return Raised(maker.kind, said("problem") or "…", said("expected"), said("hint"))


def raised() -> set[Raised]:
    """Every error in the source."""
    kinds = set(classes())
    trees = _trees()
    makers = _makers(trees, kinds)
    found = set()
    for tree in trees:
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            name = _called(call)
            if name in kinds:
                given = {field: text_of(node) for field, node in _arguments(call, ("problem",)).items()}
                found.add(Raised(name, given.get("problem") or "…", given.get("expected"), given.get("hint")))
            elif name in makers:
                found.add(_through(makers[name], call))
    return {error for error in found if error.problem.strip("… :,") != ""}


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("*", "\\*")


def _section(name: str, kind: type[errors.RegistryError], found: set[Raised]) -> Iterator[str]:
    above = kind.__mro__[1].__name__
    yield f"\n## {name}\n"
    yield " ".join((inspect.getdoc(kind) or "").split()) + ("" if name == "RegistryError" else f" A kind of `{above}`.")
    if kind.advice:
        yield f"\nTo do, where nothing else is said: {kind.advice}."
    own = sorted((each for each in found if each.kind == name), key=lambda each: (each.problem, str(each)))
    if own:
        yield "\n| problem | expected | to do |\n| --- | --- | --- |"
    for each in own:
        yield f"| {_cell(each.problem)} | {_cell(each.expected)} | {_cell(each.hint)} |"


def page() -> str:
    """The whole page."""
    found = raised()
    lines = [HEAD]
    for name, kind in classes().items():
        lines += _section(name, kind, found)
    return "\n".join(lines) + "\n"
