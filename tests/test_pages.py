"""Pages and pictures: what they draw is what the plan says and what the bytes are, in a real headless browser.

Chromium and its driver come from the system (Debian: chromium, chromium-driver); without them, or without selenium, the
tests that need them are skipped, and the rest still run.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import registry
from docs import pictures as drawn
from registry import Parallel, boxes, layout
from registry.boxes import Fragment
from registry.model import format_rules, logical_model
from registry.pictures import geometry, scene
from registry.pictures.geometry import CORNER, MOST, picture, spans
from registry.pictures.page import COLOURS, page
from registry.specs import ArchitectureSpec, FormatSpec
from registry.target import Target, bind_target
from registry.testing.layouts import show
from tests.test_boxes import Reference, references
from tests.test_explain import READ, hub, key

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


# --- geometry: against the reference of tests/test_boxes.py -----------------------------------------------------------


def painted(found: geometry.Picture) -> dict[tuple[int, int], str]:
    """Every cell of a picture, and the tensor that it is of."""
    cells: dict[tuple[int, int], str] = {}
    for part in found.parts:
        (down, high), (across, broad) = part.down(10**6), part.across(10**6)
        for row, column, i, j in itertools.product(down, across, range(high), range(broad)):
            assert (row + i, column + j) not in cells, "blocks lie over one another"
            cells[row + i, column + j] = part.tensor
    return cells


@given(references())
@settings(max_examples=300)
def test_every_cell_is_of_the_tensor_that_the_reference_has_there(case: Reference) -> None:
    parsed = layout.parse(show(case.tree))
    shape = case.shape()
    found = picture(shape, boxes.fragments(parsed, case.box))
    cells = painted(found)
    expected = {np.ravel_multi_index(at, shape) if at else 0: e for at, e in case.elements().items() if e is not None}
    assert found.rows * found.columns == math.prod(shape)
    assert {row * found.columns + column: tensor for (row, column), tensor in cells.items()} == {
        int(at): tensor for at, (tensor, _) in expected.items()
    }


@given(references(ranked=False), st.data())
@settings(max_examples=100)
def test_a_piece_that_is_stored_in_another_order_is_drawn_as_what_it_is(case: Reference, data: st.DataObject) -> None:
    parsed, shape = layout.parse(show(case.tree)), case.shape()
    strides, step = [0] * len(shape), 1
    for d in data.draw(st.permutations(range(len(shape)))):
        strides[d] = step
        step *= max(shape[d], 1)
    found = picture(shape, boxes.fragments(parsed, case.box, strides=strides), strides=strides)
    plain = picture(shape, boxes.fragments(parsed, case.box))
    assert painted(found) == painted(plain)


def test_a_stretch_of_a_row_is_drawn_from_where_it_begins() -> None:
    fragment = Fragment("x", ("a", "b"), (0, 0), (4, 6), (6, 1), 0)
    parts = boxes.stretch(fragment, 9, 8)
    found = picture((4, 6), parts, stretch=(9, 8))
    assert (found.begin, found.rows * found.columns) == (9, 8)
    assert len(painted(found)) == 8


def test_a_tensor_of_countless_blocks_is_drawn_in_a_corner() -> None:
    fused = layout.parse("expert hidden (ffn [gate: | up:])")
    sizes = {"expert": 32, "hidden": 2880, "ffn": 2880}
    found = picture(boxes.shape(fused, boxes.Box(sizes)), boxes.fragments(fused, boxes.Box(sizes)))
    rows, columns = found.shown
    shown = sum(
        sum(at < rows for at in p.down(MOST)[0]) * sum(at < columns for at in p.across(MOST)[0]) for p in found.parts
    )
    assert rows == found.rows and columns < found.columns
    assert CORNER / 4 <= shown <= CORNER


def test_bytes_in_another_order_than_the_shape_says_have_whole_rows() -> None:
    """Stored as [hidden, expert x ffn], the bytes are expert by expert: no axis may run on from row to row."""
    own = layout.parse("x: expert hidden ffn")
    found = picture((4, 6), boxes.fragments(own, boxes.Box({"expert": 2, "hidden": 4, "ffn": 3})))
    assert (found.rows, found.columns) == (8, 3)
    assert len(painted(found)) == 24


# --- the browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium, driven through selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install .[test]")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`visit(html, width=1200, dark=False)`: the browser at the page. At the end the console must be empty."""
    browser.get_log("browser")

    def go(html: str, width: int = 1200, height: int = 900, dark: bool = False) -> Any:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        browser.get(file.as_uri())
        return browser

    yield go
    assert browser.get_log("browser") == []


OPEN_ALL = "for (const each of document.querySelectorAll('details')) each.open = true"
RESULTS = "return [...document.querySelectorAll('.results .card > .name')].map((one) => one.textContent)"
NAMES = "return [...document.querySelectorAll('.card > .name')].map((one) => one.textContent)"


def wait(browser: Any, script: str) -> Any:
    """What a script returns, once that is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda _: browser.execute_script(script))


def type_in(browser: Any, text: str) -> None:
    """Type into the search field, and let the page's own timer run out."""
    field = browser.find_element("css selector", "input")
    field.clear()
    field.send_keys(text)
    browser.execute_async_script("setTimeout(arguments[0], 200)")


@pytest.fixture(scope="module")
def plans(hf_model: Callable[..., Path]) -> Callable[..., Any]:
    return lambda model="llama3", to="megatron-legacy", **sizes: registry.plan(
        hf_model(model), to=to, parallel=Parallel(**(sizes or {"tp": 2, "pp": 2}))
    )


# --- what a page says -------------------------------------------------------------------------------------------------

COUNTS = "return D.sides.map((side) => side.groups.reduce((n, g) => n + g.n, 0))"
CLAIMS = """
const found = [];
D.sides[1].groups.forEach((g) => { for (let k = 0; k < g.n; k++) g.homes.forEach((home, p) => {
  const e = {s: 1, g, k};
  for (const [other, q, part] of placesOf(0, home, boxOf(e, p), 1e6)[0]) {
    const from = corner(blocks(other, q, part, 1)), to = corner(blocks(e, p, part, 1));
    found.push([D.tensors[home][0], nameOf(other), rankOf(other), element(other, from.row, from.column),
      nameOf(e), rankOf(e), element(e, to.row, to.column), [...part.values()].reduce((n, [a, b]) => n * (b - a), 1)]);
  }
}); });
return found;
"""


def rank(text: str) -> dict[str, int] | None:
    words = text.split()
    return {dim: int(at) for dim, at in zip(words[::2], words[1::2], strict=True)} or None


@pytest.mark.parametrize("model", ["llama3", "gpt2", "qwen2_tied"])
@pytest.mark.parametrize("to", ["trtllm", "megatron-legacy"])
def test_elements_that_a_page_sets_beside_each_other_are_equal(
    model: str, to: str, hf_model: Callable[..., Path], plans: Callable[..., Any], visit: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Each box of each target tensor is read at both of the elements that the page names, by each format's reader."""
    plan = plans(model, to, tp=2)
    claims = visit(plan.html()).execute_script(CLAIMS)
    registry.convert(hf_model(model), tmp_path / "out", to=to, parallel=Parallel(tp=2))
    ours, theirs = hub(hf_model(model)), READ[to](tmp_path / "out")
    held: dict[Any, int] = dict.fromkeys(theirs, 0)
    for _, source, _, first, target, where, there, volume in claims:
        at = key(target, rank(where))
        assert theirs[at][tuple(there)] == ours[None, source][tuple(first)], (source, target, where)
        held[at] += volume
    for at, stored in theirs.items():
        assert held[at] == stored.numel() or not stored.flatten()[held[at] :].any(), at  # but for padding


def test_a_page_pairs_what_the_plan_copies(plans: Callable[..., Any], visit: Callable[..., Any]) -> None:
    plan = plans("llama3", "megatron", tp=2, pp=2)
    source, target = plan.prepared.source.opened.pieces, plan.prepared.target.slots
    copied = {
        (copies.tensor, source[a].name, target[b].name, tuple(target[b].origin or ()))
        for copies in plan.plan.copies
        for a, b in zip(copies.source.tolist(), copies.target.tolist(), strict=True)
    }
    at = visit(plan.html())
    claims = at.execute_script(CLAIMS)
    paired = {
        (tensor, name, other, tuple(origin))
        for tensor, name, other, origin in at.execute_script(
            "const found = [];"
            "D.sides[1].groups.forEach((g) => { for (let k = 0; k < g.n; k++) g.homes.forEach((home, p) => {"
            "  const e = {s: 1, g, k};"
            "  for (const [other] of placesOf(0, home, boxOf(e, p), 1e6)[0])"
            "    found.push([D.tensors[home][0], nameOf(other), nameOf(e), originOf(e) || []]);"
            "}); }); return found;"
        )
    }
    assert paired == copied and len(copied) > 20
    assert sum(volume for *_, volume in claims) == sum(c.volume * len(c.source) for c in plan.plan.copies)


def test_the_script_and_the_library_cut_boxes_alike(plans: Callable[..., Any], visit: Callable[..., Any]) -> None:
    made = random.Random(0)
    cases = []
    for _ in range(200):
        axes, step = [], 1
        for _ in range(made.randint(0, 4)):
            n = made.randint(1, 4)
            axes.append((n, step if n > 1 else 0))
            step = step * n + made.choice([0, 0, 1, 5])
        made.shuffle(axes)
        cases.append((made.randint(0, 9), axes))
    theirs = visit(plans().html()).execute_script(
        "return arguments[0].map(([base, axes]) => {"
        "  const {starts, run} = spans(base, axes.map(([n, step], i) => [i, n, step]), 50);"
        "  return [starts, run]; })",
        cases,
    )
    assert theirs == [list(spans(base, axes, 50)) for base, axes in cases]


def test_all_stored_tensors_are_drawn_in_their_colours(plans: Callable[..., Any], visit: Callable[..., Any]) -> None:
    plan = plans()
    at = visit(plan.html())
    at.execute_script(OPEN_ALL)
    pieces, slots = plan.prepared.source.opened.pieces, plan.prepared.target.slots
    wait(at, "return document.querySelectorAll('details.section:not([open])').length === 0")
    names = at.execute_script(NAMES)
    assert set(names) == {p.name for p in pieces} | {s.name for s in slots}
    assert len(at.find_elements("css selector", "figure")) == len(pieces) + len(slots)
    ranks = {text.rpartition(" [")[0] for text in at.execute_script(
        "return [...document.querySelectorAll('figcaption')].map((one) => one.textContent)")}  # fmt: skip
    assert {f"tp {tp} pp {pp}" for tp in (0, 1) for pp in (0, 1)} <= ranks


@pytest.mark.parametrize("dark", [False, True])
def test_the_screen_shows_the_colours(dark: bool, plans: Callable[..., Any], visit: Callable[..., Any]) -> None:
    """The pixels of a screenshot, read in the browser's own canvas: the blocks of [q | k | v], group by group."""
    at = visit(plans("llama3", "trtllm", tp=2).html(), dark=dark)
    type_in(at, "layers.0.attention.qkv.weight")
    figure, tensors = at.execute_script("""
        const d = drawn.find(({svg, cells}) => svg.closest(".results") && cells[0].e.s === 1);
        d.svg.scrollIntoView({block: "center"});
        const e = d.cells[0].e, now = d.svg.getBoundingClientRect();
        return [[now.left, now.top, now.width, now.height], e.g.homes.map((home, p) => {
          const {down} = blocks(e, p);
          return [order.get(home), (down.starts[0] + down.run / 5) / D.pictures[e.g.picture].rows];
        })]""")
    shot = at.get_screenshot_as_base64()
    left, top, width, height = figure
    points = [[left + width * 0.13, top + 1 + (height - 2) * y] for _, y in tensors] + [[2, top + 2]]
    at.get("about:blank")
    pixels = at.execute_async_script(
        """const [data, points, done] = arguments, image = new Image();
        image.onload = () => {
          const canvas = document.createElement("canvas");
          canvas.width = image.width; canvas.height = image.height;
          const context = canvas.getContext("2d", {willReadFrequently: true});
          context.drawImage(image, 0, 0);
          done(points.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3)));
        };
        image.src = "data:image/png;base64," + data;""",
        shot, points,
    )  # fmt: skip
    *blocks, ground = ["#" + "".join(f"{c:02x}" for c in pixel) for pixel in pixels]
    assert len(blocks) == 3
    assert blocks == [COLOURS[number % len(COLOURS)] for number, _ in tensors]
    assert ground == ("#17181a" if dark else "#ffffff")


# --- what a page does -------------------------------------------------------------------------------------------------


def test_a_block_under_the_pointer_is_explained(plans: Callable[..., Any], visit: Callable[..., Any]) -> None:
    """The second query group of the second rank: which box it is, and where the source has it."""
    from selenium.webdriver.common.action_chains import ActionChains

    at = visit(plans().html())
    type_in(at, "decoder.layers.0.self_attention.linear_qkv")
    figure = at.execute_script(
        """return drawn.find(({svg, cells: [{e}]}) => svg.closest(".results") && rankOf(e) === "tp 1 pp 0").svg"""
    )
    at.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    height = figure.size["height"]
    ActionChains(at).move_to_element_with_offset(figure, 0, round(height * (4.5 / 8 - 0.5))).perform()
    text = wait(at, "return document.querySelector('.panel:not([hidden])')?.innerText")
    assert "attention.q.weight" in text
    assert "layer 0, group 3, rep 0..1, head_dim 0..7, hidden 0..63" in text
    assert "decoder.layers.0.self_attention.linear_qkv.weight (tp 1 pp 0) from element [32, 0], float32" in text
    assert "model.layers.0.self_attn.q_proj.weight from element [48, 0]" in text
    marked = at.execute_script(
        "return drawn.filter(({svg, mark}) => svg.closest('.results') && mark.children.length)"
        ".map(({cells}) => nameOf(cells[0].e))"
    )
    assert set(marked) == {
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "model.layers.0.self_attn.q_proj.weight",
    }
    assert len(marked) == 2, "of two ranks only the one that has these rows"
    ActionChains(at).move_to_element(at.find_element("css selector", "h1")).perform()
    wait(at, "return document.querySelector('.panel').hidden")


def test_a_pointed_block_says_what_explain_says(
    hf_model: Callable[..., Path], plans: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    said = registry.explain(hf_model("llama3"), name, to="megatron-legacy", parallel=Parallel(tp=2, pp=2))
    at = visit(plans().html())
    shown = at.execute_script(
        """const found = [];
        D.sides[1].groups.forEach((g) => { for (let k = 0; k < g.n; k++) {
          const e = {s: 1, g, k};
          if (nameOf(e) === arguments[0]) g.homes.forEach((home, p) => {
            const block = whole(e, p);
            found.push([rankOf(e), D.tensors[home][0], spoken(block.box, home), element(e, block.row, block.column),
              placesOf(0, home, block.box, 99)[0].map(([other, q, part]) => [nameOf(other), spoken(part, home)])]);
          });
        } }); return found""",
        name,
    )
    there = [one for one in said.stored if one.format == "megatron-legacy"]
    assert len(there) == 4
    assert sorted(shown) == sorted(
        [
            " ".join(f"{dim} {i}" for dim, i in (one.rank or {}).items()),
            part.tensor,
            words(part.box),
            list(part.first),
            [[place.name, words(place.box)] for place in part.places],
        ]
        for one in there
        for part in one.parts
    )


def words(box: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{axis} {lo}" + (f"..{hi - 1}" if hi > lo + 1 else "") for axis, (lo, hi) in box.items())


def test_search_finds_stored_and_logical_names_and_ranks(plans: Callable[..., Any], visit: Callable[..., Any]) -> None:
    at = visit(plans().html())
    for text, *found in [
        ("layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight", "decoder.layers.1.mlp.linear_fc1.weight"),
        ("MLP.down.weight layers.3", "model.layers.3.mlp.down_proj.weight", "decoder.layers.1.mlp.linear_fc2.weight"),
        ('"lm_head.weight"', "lm_head.weight", "output_layer.weight"),
    ]:
        type_in(at, text)
        assert at.execute_script(RESULTS) == found, text
        assert at.execute_script("return document.querySelector('.browse').hidden")
    type_in(at, "output_layer tp")
    assert at.find_element("css selector", ".count").text == "0 \N{RIGHTWARDS ARROW} 2"
    type_in(at, "no such thing")
    assert at.find_element("css selector", ".results").text.startswith("No tensor")
    type_in(at, " ")
    assert at.find_element("css selector", ".browse").is_displayed()


def test_the_keyboard_reaches_a_tensor_and_comes_back(plans: Callable[..., Any], visit: Callable[..., Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    at = visit(plans().html())
    type_in(at, "linear_proj layers.0")
    for _ in range(12):
        ActionChains(at).send_keys(Keys.TAB).perform()
        if at.execute_script("return document.activeElement.matches('.card .chip')"):
            break
    assert "attention.output.weight" in wait(at, "return document.querySelector('.panel:not([hidden])')?.innerText")
    before = at.execute_script("return document.activeElement")
    ActionChains(at).send_keys(Keys.ENTER).perform()
    wait(at, "return document.querySelector('.panel').contains(document.activeElement)")
    ActionChains(at).send_keys(Keys.TAB).send_keys(Keys.ENTER).perform()
    wait(at, "return document.activeElement.matches('figure')")
    at.execute_script("arguments[0].focus()", before)
    ActionChains(at).send_keys(Keys.ENTER).pause(0.1).send_keys(Keys.ESCAPE).perform()
    assert at.execute_script("return document.activeElement === arguments[0]", before)
    assert at.execute_script("return document.querySelector('.panel').hidden")


@pytest.mark.parametrize("to", ["megatron-legacy", "megatron", "trtllm"])
def test_a_phone_shows_it_without_scrolling_sideways(
    to: str, plans: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    at = visit(plans("gpt2", to, tp=2).html(), width=360, height=740)
    at.execute_script(OPEN_ALL)
    wait(at, "return document.querySelectorAll('.card').length > 40")
    assert at.execute_script("return document.documentElement.scrollWidth") == 360
    wide = (
        "return [...document.querySelectorAll('.card, figure, .chip, .name')]"
        ".filter((one) => one.getBoundingClientRect().right > 360).length"
    )
    assert at.execute_script(wide) == 0
    figure = at.find_elements("css selector", "figure svg")[6]
    at.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    x, y, width, height = at.execute_script(
        "const {x, y, width, height} = arguments[0].getBoundingClientRect(); return [x, y, width, height]", figure
    )
    touch = {"type": "touchStart", "touchPoints": [{"x": x + width / 2, "y": y + height / 2}]}
    at.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    at.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    at.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    wait(at, "return !document.querySelector('.panel').hidden")
    at.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert at.execute_script("return document.documentElement.scrollWidth") == 360
    assert at.execute_script(wide) == 0


def test_explain_draws_a_tensor_and_what_it_lies_beside(
    hf_model: Callable[..., Path], visit: Callable[..., Any]
) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    found = registry.explain(hf_model("llama3"), name, to="trtllm", parallel=Parallel(tp=2))
    at = visit(found.html())
    assert wait(at, NAMES) == [name, "transformer.layers.2.attention.qkv.weight"]
    assert len(at.find_elements("css selector", "figure")) == 3  # one stored tensor, and those of two ranks
    alone = visit(registry.explain(hf_model("llama3"), "mlp.up.weight").html())
    assert len(wait(alone, NAMES)) == 2 and len(alone.find_elements("css selector", "details.section")) == 4


# --- hostile and large ------------------------------------------------------------------------------------------------

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>"


def test_a_hostile_name_is_text(visit: Callable[..., Any], tmp_path: Path) -> None:
    """In the checkpoint, in its spec and in its path; through the command line, as a user would come by it."""
    folder = tmp_path / "a<img src=x onerror=alert(1)>"
    folder.mkdir()
    save_file({f"{EVIL}.{i}": torch.zeros(2, 3) for i in range(2)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "n": 2}))
    spec = {
        "kind": "architecture", "name": "evil", "axes": {"layer": "layers", "a": "2", "b": "3"},
        "config": {"facts": {"layers": "n"}}, "tensors": {f"{EVIL}.{{layer}}": "x: a b"},
    }  # fmt: skip
    (tmp_path / "evil.yaml").write_text(json.dumps(spec))
    out = tmp_path / "evil.html"
    command = [sys.executable, "-m", "registry", "plan", folder, "--to", "huggingface", "--html", out]
    command += ["--spec", tmp_path / "evil.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    html = out.read_text()
    assert "<img" not in html and html.count("<script") == 2 and html.count("</script") == 2
    at = visit(html)
    assert set(wait(at, NAMES)) == {f"{EVIL}.{i}" for i in range(2)}
    type_in(at, "onerror")
    at.execute_script("document.querySelector('.card .chip').click()")
    assert EVIL in wait(at, "return document.querySelector('.panel:not([hidden])')?.textContent")
    assert at.find_elements("css selector", "img, iframe, object, link") == []
    assert at.title.startswith("evil") and str(folder) in at.find_element("css selector", "header").text


def test_the_page_runs_nothing_but_its_own_script(plans: Callable[..., Any], visit: Callable[..., Any]) -> None:
    html = plans().html()
    assert not re.search(r"https?://(?!www\.w3\.org/)|<link|@import|url\((?!#)", html.replace("url(#c${", "url(#"))
    at = visit(html)
    assert at.execute_script("return performance.getEntriesByType('resource').length") == 0
    blocked = at.execute_script(
        """try {
          document.body.insertAdjacentHTML("beforeend", "<b>no</b>");
          return "markup";
        } catch { }
        try {
          const script = document.createElement("script");
          script.text = "window.owned = 1";
          document.body.append(script);
        } catch { }
        return window.owned ? "script" : "";"""
    )
    assert blocked == ""
    at.get_log("browser")  # which tells of what the policy has blocked


def stored(spec: dict[str, Any], model: Any, parallel: Parallel) -> tuple[FormatSpec, Target]:
    made = FormatSpec.model_validate({"name": "made", "container": "none", **spec})
    rules = list(format_rules(made, model.architecture))
    return made, bind_target(made, rules, model, parallel, {}, {}, lambda _: "bfloat16", None)


def many(layers: int, experts: int) -> str:
    """The page of a mixture of experts under the names of its architecture, and in the files of 16 ranks."""
    family = ArchitectureSpec.model_validate(
        {
            "name": "many",
            "axes": {"layer": str(layers), "expert": str(experts), "ffn": "1536", "hidden": "4096"},
            "tensors": {
                "model.layers.{layer}.norm.weight": "norm.weight: hidden",
                "model.layers.{layer}.experts.{expert}.gate_proj": "gate.weight: ffn hidden",
                "model.layers.{layer}.experts.{expert}.up_proj": "up.weight: ffn hidden",
                "model.layers.{layer}.experts.{expert}.down_proj": "down.weight: hidden ffn",
            },
        }
    )
    model = logical_model(family, {})
    ranked = {
        "ranked": True, "parallel": ["tp", "pp", "ep"],
        "tensors": {
            "layers.{layer@pp}.norm": "norm.weight: hidden",
            "layers.{layer@pp}.experts.{expert@ep}.fc1": "[gate.weight: ffn@tp | up.weight: ffn@tp] hidden",
            "layers.{layer@pp}.experts.{expert@ep}.fc2": "down.weight: hidden ffn@tp",
        },
    }  # fmt: skip
    own = stored({"rules_from": "architecture"}, model, Parallel())
    made = [own, stored(ranked, model, Parallel(tp=2, pp=2, ep=4))]
    sides = [
        scene.Side(title, spec.name, spec.ranked, target.slots, scene.everything(target.groups))
        for title, (spec, target) in zip(("source", "target"), made, strict=True)
    ]
    return page(scene.scene("many", [], sides, model))


def test_a_hundred_thousand_tensors_open(visit: Callable[..., Any]) -> None:
    html = many(100, 340)
    assert len(html) < 3_000_000
    at = visit(html)
    assert at.execute_script(COUNTS) == [102_100, 136_800]
    assert at.execute_script("return document.querySelectorAll('*').length") < 20_000
    assert not at.find_elements("css selector", ".warning")
    at.execute_script("document.querySelectorAll('details.section')[99].open = true")
    last = "document.querySelector('details.section:last-of-type .card > .name')"
    assert wait(at, f"return {last} && {last}.textContent") == "model.layers.99.norm.weight"
    type_in(at, "layers.57.experts.339.gate_proj")
    assert set(at.execute_script(RESULTS)) == {"model.layers.57.experts.339.gate_proj", "layers.7.experts.84.fc1"}


def test_what_does_not_fit_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch, visit: Callable[..., Any]) -> None:
    monkeypatch.setattr(scene, "MOST_TENSORS", 200)
    at = visit(many(10, 16))
    [mine, theirs] = [each.text for each in at.find_elements("css selector", ".warning")]
    assert re.match(r"source: 98 of 490 stored tensors are drawn", mine)
    counts = at.execute_script(COUNTS)
    assert counts[0] == 98 and counts[1] <= 200 and f"target: {counts[1]} of" in theirs
    assert at.execute_script(CLAIMS), "both sides keep the same layers"


# --- the command line, and the documentation's drawings ---------------------------------------------------------------


def test_the_command_line_writes_pages(hf_model: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    from registry.cli import main

    source = str(hf_model("llama3"))
    assert main(["plan", source, "--to", "trtllm", "--tp", "2", "--html", str(tmp_path / "p.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target_format"] == "trtllm"
    assert "attention.qkv.weight" in (tmp_path / "p.html").read_text()
    assert main(["explain", source, "mlp.up.weight.1", "--html", str(tmp_path / "e.html")]) == 0
    assert "holds   mlp.up.weight" in capsys.readouterr().out
    assert (tmp_path / "e.html").read_text().startswith("<!doctype html>")
    assert main(["explain", source, "mlp.up.weight.1", "--html", str(tmp_path / "no" / "e.html")]) == 1
    assert "the page cannot be written" in capsys.readouterr().err


def test_the_drawings_in_the_documentation_are_what_is_drawn_now() -> None:
    now = drawn.drawings()
    there = {file.name: file.read_text(encoding="utf-8") for file in drawn.FOLDER.glob("*.svg")}
    assert there == now, "run `python -m docs.pictures`"
    notation = (drawn.FOLDER.parent / "notation.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[\w.+\]\(pictures/([\w-]+\.svg)\)", notation)
    assert sorted(shown) == sorted(now), "each is shown once, with a text for those who cannot see it"
    for text in now.values():
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
        assert tags <= {"svg", "g", "rect", "path", "text"}
