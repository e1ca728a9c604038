"""The documentation is true: its Python blocks and its `registry` commands run, in order, page by page.

A page runs in a process and a directory of its own, beside a tiny HuggingFace model called `llama`. Its ```python
blocks share one namespace; of its ```console and ```bash blocks the lines that start with `registry`, or `$ registry`,
must exit with 0, and others, such as `make`, are left alone.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|console|bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """The page's blocks: the line before the first one of their text, the language, the text."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(2)), match[1], match[2]) for match in BLOCK.finditer(text)]


def commands(text: str) -> list[list[str]]:
    """The arguments of each `registry` command of a console block."""
    lines = [shlex.split(line.removeprefix("$ "), comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [line[1:] for line in lines if line[:1] == ["registry"]]


def run_page(page: Path) -> None:
    """Run everything on a page, in the working directory."""
    from registry.cli import main

    names = {"__name__": "page"}
    for line, language, text in blocks(page):
        if language == "python":
            exec(compile("\n" * line + text, str(page), "exec"), names)
            continue
        for arguments in commands(text):
            print("$ registry", shlex.join(arguments), flush=True)
            try:
                status = main(arguments)
            except SystemExit as stopped:
                status = stopped.code
            if status:
                sys.exit(f"{page.name}, block at line {line}: registry {shlex.join(arguments)} exited with {status}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page, hf_model, tmp_path):
    shutil.copytree(hf_model("llama3"), tmp_path / "llama")
    command = (sys.executable, "-P", __file__, str(page))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_the_readme_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^    (make \w+)", text, re.MULTILINE)[:2] == ["make demo", "make test"]
    assert text.index("make demo") < text.index("make test") < 250


def test_the_readme_names_every_make_target_and_format_and_the_number_of_families():
    import registry

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in registry.formats():
        assert f"`{name}`" in readme, name
    assert f"{len(registry.architectures())} families" in readme
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = set(re.findall(r"^    make ((?:[a-z]+ ?)+?)(?: {2,}|$)", readme, re.MULTILINE))
    assert {target for line in shown for target in line.split()} <= targets


def test_links_in_the_documentation_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_console_blocks_are_read_as_a_shell_would():
    text = "$ registry convert a b \\\n    --to trtllm  # a comment\nmake demo\nregistry verify 'a b' c\nequal: 3\n"
    assert commands(text) == [["convert", "a", "b", "--to", "trtllm"], ["verify", "a b", "c"]]


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))


def test_what_holds_a_promise_of_security_is_there():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    quoted = {name for part in re.findall(r"`([^`\n]+)`", text) for name in part.split("::")}
    named = {name for name in quoted if re.fullmatch(r"_?[a-z]+(_[a-z]+){2,}", name)}
    folders = (ROOT / "tests", ROOT / "registry" / "testing")
    code = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    assert {"test_a_flipped_bit_anywhere_is_found", "test_no_fault_tears_a_checkpoint"} <= named
    assert {name for name in named if f"def {name}(" not in code} == set()
    for name in quoted:
        if name.startswith("tests/"):
            assert (ROOT / name).exists(), name
    made = {name.removeprefix("make ") for name in quoted if name.startswith("make ")}
    assert {f"{name}:" for name in made} <= set(re.findall(r"^[a-z]+:", (ROOT / "Makefile").read_text(), re.MULTILINE))
