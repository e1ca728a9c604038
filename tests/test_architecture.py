"""docs/architecture.md is true: its table of modules, its picture, and the order of the steps of a conversion."""

import ast
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from docs import architecture

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
#: The rows that a container may import.
CONTAINERS = ("places", "ground")


def modules(top: str) -> dict[str, Path]:
    """The modules of a package, by their names without the package's."""
    found = {}
    for path in sorted((ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT / top).with_suffix("").parts
        name = ".".join(parts if len(parts) == 1 else parts[: -1 if parts[-1] == "__init__" else None])
        found[name] = path
    return found


REGISTRY = modules("registry")


def imports(path: Path) -> set[str]:
    """The modules of registry/ that a file imports when it is loaded or runs, but not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name for each in node.names if (name := within(each.name)) is not None}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                found |= {within(f"{node.module}.{each.name}") or within(node.module)} - {None}
    return found


def within(name: str) -> str | None:
    """What a module of registry/ is called here; None for any other name."""
    short = "__init__" if name == "registry" else name.removeprefix("registry.") if name.startswith("registry.") else ""
    return short if short in REGISTRY else None


def rows() -> dict[str, list[str]]:
    """The table: row -> patterns of modules, from the top to the bottom."""
    text = PAGE.read_text(encoding="utf-8").partition("## What each module may know")[2]
    table = re.findall(r"^\| ([a-z ]+) \| (`.+`) \|", text, re.MULTILINE)
    return {row: re.findall(r"`([\w.*]+)`", cells) for row, cells in table if "modules" not in cells}


def names(pattern: str, module: str) -> bool:
    """`engines.*` names the package itself and all that is in it."""
    return fnmatchcase(module, pattern) or module == pattern.removesuffix(".*")


def row_of(module: str) -> str:
    """The one row that a module is in; where a module is named in full, that counts and not a pattern."""
    exact = [row for row, patterns in rows().items() if module in patterns]
    found = exact or [row for row, patterns in rows().items() if any(names(each, module) for each in patterns)]
    assert len(found) == 1, f"docs/architecture.md has registry.{module} in {found or 'no row'}"
    return found[0]


def test_every_module_is_in_one_row():
    for module in REGISTRY:
        row_of(module)
    for row, patterns in rows().items():
        for pattern in patterns:
            assert any(names(pattern, module) for module in REGISTRY), (row, pattern)


def test_nothing_is_imported_upward():
    order = list(rows())
    upward = [
        f"{name} ({row_of(name)}) imports {other} ({row_of(other)})"
        for name, path in REGISTRY.items()
        for other in sorted(imports(path))
        if order.index(row_of(other)) < order.index(row_of(name))
    ]
    assert upward == []


def test_nobody_imports_in_a_circle():
    waiting = {name: imports(path) - {name, "__init__"} for name, path in REGISTRY.items()}
    while free := {name for name, needs in waiting.items() if not needs & set(waiting)}:
        waiting = {name: needs for name, needs in waiting.items() if name not in free}
    assert waiting == {}


def test_the_engine_and_the_containers_know_each_other_by_protocol_only():
    for name, path in modules("formats").items():
        assert {row_of(other) for other in imports(path)} <= set(CONTAINERS), f"formats.{name}"
    for name, path in REGISTRY.items():
        code = path.read_text(encoding="utf-8")
        assert not re.search(r"^ *(from|import) (registry_)?(formats|mappings)\b", code, re.MULTILINE), name


def test_the_picture_shows_modules_that_exist_and_imports_that_are_made():
    for box in architecture.BOXES.values():
        assert set(box.modules) <= set(REGISTRY), box
    for start, end in architecture.ARROWS:
        made = set().union(*(imports(REGISTRY[name]) for name in architecture.BOXES[start].modules))
        wanted = set(architecture.BOXES[end].modules)
        if "__init__" in made:  # `import registry`, whose names are those of `api`
            made |= {"api"}
        assert made & wanted, f"{start} -> {end}"


def test_a_conversion_goes_the_way_that_is_drawn(hf_model, tmp_path):
    import registry

    steps = {(module, function): box for box, module, function in architecture.ORDER}
    seen: list[str] = []

    def look(frame, event, _):
        box = steps.get((frame.f_globals.get("__name__"), frame.f_code.co_name)) if event == "call" else None
        if box is not None and box not in seen:
            seen.append(box)

    sys.setprofile(look)
    try:
        registry.convert(hf_model("llama3"), tmp_path / "out", to="megatron", parallel=registry.Parallel(tp=2))
    finally:
        sys.setprofile(None)
    assert seen == [box for box, _, _ in architecture.ORDER]


@pytest.mark.parametrize("name", architecture.BOXES)
def test_what_is_written_fits_into_its_box(name):
    box = architecture.BOXES[name]
    width = architecture._place(box)[2]
    assert len(box.title) * 7.5 <= width and len(" · ".join(box.modules)) * 6.7 <= width
    assert len(architecture._wrapped(box.says, width)) <= 2
