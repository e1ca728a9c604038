"""The documentation is true: what its pages show runs (tests/running_docs.py says how), and links lead somewhere."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs import generate
from registry.cli import main
from tests.running_docs import FOLLOWED, LANGUAGES, ROOT, Block, Untrue, blocks, commands, compare, run_commands, words

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Blocks that need what a test does not have. Each says what, and there may be no more of them.
NOT_RUN = 6


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in FOLLOWED], ids=name_of)
def test_what_a_page_shows_runs(page, hf_model, tmp_path):
    shutil.copytree(hf_model("llama3"), tmp_path / "llama")
    command = (sys.executable, "-P", ROOT / "tests" / "running_docs.py", page)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_every_block_of_code_is_one_that_runs():
    """Fenced, in a language that is run or read; text is no code, and few blocks are left out, each with a reason."""
    left_out = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = blocks(page)
        assert len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found), f"{page.name}: fences at odds"
        outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        assert re.findall(r"(?<=\n\n) {4}\S.*", outside) == [], f"{page.name}: fence it, so that it runs"
        for block in found:
            where = f"{page.name}, line {block.line}"
            assert block.language in LANGUAGES, where
            left_out += block.why is not None
            if block.language == "text":
                assert not re.search(r"^(\$ |registry |import |pip |make )", block.text, re.MULTILINE), where
    assert left_out <= NOT_RUN


# --- the runner -------------------------------------------------------------------------------------------------------


def block(text: str, language: str = "console") -> Block:
    return Block(0, language, text, None)


def test_commands_are_read_as_a_shell_would():
    text = (
        "$ registry convert a b \\\n  --to trtllm  # a comment\n$ make demo\nmade\n\nall\n$ registry verify 'a b' c\n"
    )
    found = list(commands(block(text)))
    assert [words(command) for command, _ in found] == [
        ["registry", "convert", "a", "b", "--to", "trtllm"], ["make", "demo"], ["registry", "verify", "a b", "c"],
    ]  # fmt: skip
    assert [shown for _, shown in found] == [None, ["made", "", "all"], None]
    assert words("registry formats | head -1 > 'a|b'") == ["registry", "formats", "|", "head", "-1", ">", "a|b"]


@pytest.mark.parametrize(
    "text",
    [
        "$ false\n",
        "$ false\n$ true\n",
        "$ false\n$ echo $?\n2\n",
        "$ true\n$ echo $?\n1\n",
        "$ echo one\ntwo\n",
        "$ echo one\none\ntwo\n",
        "$ printf 'one\\ntwo\\n'\none\n",
        "$ registry convert nothing there --to huggingface\n",
        "$ make no-such-target\n",
        "output\n$ true\n",
    ],
)
def test_an_untrue_block_is_noticed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Untrue):
        run_commands(block(text))


@pytest.mark.parametrize(
    "text", ["$ false\n$ echo $?\n1\n", "$ printf 'a\\nb c d\\ne\\n'\n...\nb ... d\n...\n", "$ make demo\n"]
)
def test_a_true_block_passes(text):
    run_commands(block(text))


def test_times_may_differ_and_counts_may_not():
    compare(["9 files, 0.14 s, 0.01 GB/s, min -1.3e-05"], "9 files, 12.5 s, 3.10 GB/s, min 0.2\n")
    with pytest.raises(Untrue):
        compare(["9 files, 0.14 s"], "8 files, 0.14 s\n")


# --- pages that are made ----------------------------------------------------------------------------------------------


def test_pages_that_are_made_from_the_code_are_not_stale():
    assert list(generate.stale()) == [], "run `make docs`"


def test_a_stale_page_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(generate, "PAGES", {"support.md": lambda: "other\n", "no-such-page.md": lambda: "new\n"})
    assert generate.main(["--check"]) == 1
    assert re.findall(r"docs/([a-z-]+\.md)", capsys.readouterr().out) == ["support.md", "no-such-page.md"]


def test_every_command_and_flag_and_error_is_in_the_references():
    import registry
    from registry.arguments import COMMANDS
    from registry.errors import RegistryError

    text = (ROOT / "docs" / "reference-commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^## ([a-z-]+)$", text, re.MULTILINE) == list(COMMANDS)
    errors = (ROOT / "docs" / "reference-errors.md").read_text(encoding="utf-8")
    public = {name for name in registry.__all__ if name.endswith("Error")}
    headings = set(re.findall(r"^## (\w+)$", errors, re.MULTILINE))
    assert public <= headings and RegistryError.__name__ in headings


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["convert", "llama", "out", "--to", "megatron", "--pp", "3"], "ParallelError"),
        (["convert", "nothing", "out", "--to", "megatron"], "CheckpointError"),
        (["convert", "llama", "llama", "--to", "megatron"], "TargetError"),
        (["plan", "llama", "--to", "megatron", "--option", "layer=stacked"], "ArgumentError"),
        (["explain", "llama", "no.such.tensor"], "MappingError"),
    ],
)
def test_what_a_user_is_told_is_in_the_error_reference(arguments, kind, hf_model, tmp_path, monkeypatch, capsys):
    """The first line of a message is found on the page, under its class."""
    shutil.copytree(hf_model("llama3"), tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--json"]) in (1, 2)
    told = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert told["type"] == kind
    section = (ROOT / "docs" / "reference-errors.md").read_text(encoding="utf-8").split(f"\n## {kind}\n")[1]
    rows = re.findall(r"^\| (.+?) \|", section.split("\n## ")[0], re.MULTILINE)
    patterns = [re.escape(row.replace("\\|", "|").replace("\\*", "*")).replace("…", ".*") for row in rows]
    assert any(re.fullmatch(pattern, told["problem"]) for pattern in patterns), told["problem"]


def test_the_site_builds(tmp_path):
    """mkdocs, strict: a link or an anchor that leads nowhere is an error."""
    pytest.importorskip("mkdocs")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES[1:]:
        path = page.relative_to(ROOT / "docs").with_suffix("")
        assert (tmp_path / "site" / ("" if path.name == "index" else path) / "index.html").exists(), path


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What GitHub and mkdocs call a page's headings: lower case, spaces as hyphens, no punctuation."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    """Where a page's links and pictures point to."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            assert target.suffix == ".md" and anchor in anchors(target), link


def test_every_page_is_reached_from_the_readme():
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        found = [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link]
        waiting += [target for target in found if target.suffix == ".md" and target.is_relative_to(ROOT)]
    assert {name_of(page) for page in PAGES} - {name_of(page) for page in seen} == set()


# --- what pages say of the tree ---------------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_readme_begins_with_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^(make \w+)", text, re.MULTILINE)[:2] == ["make demo", "make test"]
    assert text.index("make demo") < text.index("make test") < 250


def test_the_readme_names_every_format_and_the_number_of_families():
    import registry

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in registry.formats():
        assert f"`{name}`" in readme, name
    assert f"{len(registry.architectures())} families" in readme


def code_of(*folders: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))


@pytest.mark.parametrize("page", ["security.md", "guarantees.md"])
def test_what_holds_a_promise_is_there(page):
    """Every test, file and make target that a page names beside a promise exists."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    quoted = {name for part in re.findall(r"`([^`\n]+)`", text) for name in part.split("::")}
    named = {name for name in quoted if re.fullmatch(r"_?[a-z]+(_[a-z]+){2,}", name)}
    code = code_of(ROOT / "tests", ROOT / "registry" / "testing")
    assert len([name for name in named if name.startswith("test_")]) > 10
    assert {name for name in named if f"def {name}(" not in code} == set()
    for name in quoted:
        if name.startswith("tests/"):
            assert (ROOT / name).exists(), name
    assert {name.removeprefix("make ") for name in quoted if name.startswith("make ")} <= targets()
    for name, member in re.findall(r"`(tests/\S+\.py|test_\w+\.py)::(\w+)`", text):
        (path,) = (ROOT / "tests").rglob(Path(name).name)
        defined = {node.name for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name")}
        assert member in defined or f'"{member}"' in path.read_text(), (name, member)
