"""What the public functions return shows itself in a line, and in a notebook as a small table, whatever names are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import registry
from registry.tables import MOST, Table, html

HOSTILE = "<script>alert(1)</script>&\"'"


class Cells(HTMLParser):
    """The tags and texts of a page; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def results(hf_model: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    source = tmp_path / "<b>model"
    shutil.copytree(hf_model("llama3"), source)
    opened = registry.open(source)
    return {
        "inspect": registry.inspect(source),
        "plan": registry.plan(source, to="trtllm"),
        "convert": registry.convert(source, tmp_path / "x", to="trtllm", dtype="bfloat16"),
        "verify": registry.verify(source, tmp_path / "x"),
        "diff": registry.diff(source, tmp_path / "x"),
        "explain": registry.explain(source, "mlp.up.weight", to="megatron"),
        "open": opened,
        "view": opened.view("megatron"),
    }


def test_every_result_is_a_line_and_a_table(results: dict[str, Any]) -> None:
    for what, result in results.items():
        line = repr(result)
        assert "\n" not in line and len(line) < 400, what
        page = result._repr_html_()
        cells = Cells(page)
        assert cells.tags[0] == "table" and set(cells.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
        assert cells.tags.count("tr") <= MOST + 2 and len(page) < 60_000, what
        assert "<b>" not in page
    assert "189,376 parameters" in repr(results["inspect"])
    assert "39 of 39 logical tensors" in repr(results["verify"]) and "39 of 39" in repr(results["diff"])
    assert "and 25 more" not in results["verify"]._repr_html_()
    assert "mlp.up.weight" in results["explain"]._repr_html_()


def test_names_are_escaped_and_long_ones_cut() -> None:
    text = html(Table(HOSTILE, (HOSTILE,), [(HOSTILE,), ("x" * 1000,)]))
    assert "<script" not in text and Cells(text).texts.count("<script>alert(1)</script>&\"'") == 3
    assert "x" * 301 not in text


def test_many_rows_are_counted() -> None:
    text = html(Table("c", ("a", "b"), [(i, i) for i in range(MOST + 5)]))
    assert "and 5 more" in text and Cells(text).tags.count("tr") == MOST + 2
    assert "more" not in html(Table("c", (), [("label", 1)]))
