"""A drawing of a few small stored tensors as one SVG, for documentation.

Everything is drawn: there are no scripts, no styles of the page around it, and its own white ground, so that it looks
the same wherever it is shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from registry.pictures.geometry import MOST, Part, Picture
from registry.pictures.page import COLOURS

#: Pixels: the widest drawing, one row or column of a tensor, the least of a panel, and the gaps between things.
WIDE, ROW, COLUMN, LEAST = 830, 15, 26, 64
GAP, EDGE, LINE = 22, 14, 17
SANS = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
FAINT = 'stroke-opacity=".55"'
ARROW = 'fill="none" stroke="#333" stroke-width="1.6"'
MONO = 'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"'


class Panel(NamedTuple):
    """One tensor: its name, and what it is a picture of."""

    name: str
    picture: Picture


class _Box(NamedTuple):
    """A part of the drawing that has been laid out: its extent and its elements, from (0, 0) on."""

    width: float
    height: float
    body: list[str]


def svg(heads: Sequence[tuple[str, Sequence[Panel]]], colours: Mapping[str, int], by: Sequence[str] = ()) -> str:
    """Panels under headings, an arrow from each heading's to the next one's; beside each other where they fit.

    `colours` numbers the logical tensors. A block says its indices along the axes `by`.
    """
    boxes = [_under(head, [_panel(panel, colours, by) for panel in panels]) for head, panels in heads]
    beside = sum(box.width + 2 * GAP for box in boxes) <= WIDE
    x, y, wide, high, body = float(EDGE), float(EDGE), 0.0, 0.0, []
    for n, box in enumerate(boxes):
        if n:
            turn = f"translate({x} {y + 6})" if beside else f"translate({x + 6} {y}) rotate(90)"
            body.append(f'<path d="M0 0h16m-6 -5l6 5l-6 5" transform="{turn}" {ARROW}/>')
            x, y = (x + 2 * GAP - 10, y) if beside else (x, y + 26)
        body.append(_moved(x, y, box.body))
        wide, high = max(wide, x + box.width), max(high, y + box.height)
        x, y = (x + box.width + 12, y) if beside else (x, y + box.height + 6)
    width, height = wide + EDGE, high + EDGE
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img">',
        f'<rect x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="8" fill="#fff" stroke="#d0d7de"/>',
        *body, "</svg>", "",
    ])  # fmt: skip


def _under(head: str, panels: Sequence[_Box]) -> _Box:
    """Panels under their heading, as many beside each other as fit."""
    y, wide, body = LINE + 5.0, len(head) * 7.0, [_text(0, 11, head, SANS, 12, "#57606a", bold=True)]
    for line in _lines(panels):
        x = 0.0
        for box in line:
            body.append(_moved(x, y, box.body))
            x += box.width + GAP
        wide = max(wide, x - GAP)
        y += max(box.height for box in line) + 8
    return _Box(wide, y - 8, body)


def _moved(x: float, y: float, body: Sequence[str]) -> str:
    return "\n".join([f'<g transform="translate({x:g} {y:g})">', *body, "</g>"])


def _lines(boxes: Sequence[_Box]) -> Iterator[list[_Box]]:
    """The boxes side by side, as many as fit."""
    line: list[_Box] = []
    for box in boxes:
        if line and sum(b.width + GAP for b in line) + box.width > WIDE - 2 * EDGE:
            yield line
            line = []
        line.append(box)
    yield line


def _panel(panel: Panel, colours: Mapping[str, int], by: Sequence[str]) -> _Box:
    drawn = panel.picture
    longest = max((len(_label(part, by)) / _across(part) for part in drawn.parts), default=0)
    x = max(COLUMN, min(longest * 6.6 + 3, 44), LEAST / max(drawn.columns, 1))
    width, height, top = drawn.columns * x, drawn.rows * ROW, LINE + 2 if panel.name else 0
    inner = [f'<rect width="{width:g}" height="{height:g}" fill="#e4e4df"/>']
    for part in drawn.parts:
        inner += _blocks(part, x, COLOURS[colours[part.tensor] % len(COLOURS)], [_label(part, by), part.tensor])
    inner.append(f'<path d="{_grid(drawn, x)}" stroke="#000" stroke-opacity=".13" fill="none"/>')
    inner.append(f'<rect width="{width:g}" height="{height:g}" fill="none" stroke="#333" stroke-width="1.4"/>')
    said = "[" + ", ".join(map(str, drawn.shape)) + "]"
    if sum(math.prod(a.size for a in part.axes) for part in drawn.parts) < math.prod(drawn.shape):
        said += ", grey is padding"
    body = [_text(0, 11, panel.name, MONO, 12, "#1f2328")] if panel.name else []
    body += [_moved(0, top, inner), _text(0, top + height + 14, said, SANS, 11, "#57606a")]
    return _Box(max(width, len(panel.name) * 7.3, len(said) * 6.0), top + height + LINE, body)


def _blocks(part: Part, x: float, colour: str, labels: Sequence[str]) -> Iterator[str]:
    """The blocks of a part, each with the first label that it has room for."""
    (rows, high), (columns, broad) = part.down(MOST), part.across(MOST)
    w, h = broad * x, high * ROW
    label = next((label for label in labels if w >= len(label) * 6.2 and h >= 12), None)
    for row, column in itertools.product(rows, columns):
        left, up = column * x, row * ROW
        yield f'<rect x="{left:g}" y="{up:g}" width="{w:g}" height="{h:g}" fill="{colour}" stroke="#000" {FAINT}/>'
        if label is not None:
            yield _text(left + w / 2, up + h / 2 + 4, label, SANS, 11, "#000", centre=True)


def _grid(drawn: Picture, x: float) -> str:
    """Thin lines between the elements."""
    width, height = drawn.columns * x, drawn.rows * ROW
    lines = [f"M0 {row * ROW}h{width:g}" for row in range(1, drawn.rows)]
    return "".join(lines + [f"M{column * x:g} 0v{height:g}" for column in range(1, drawn.columns)])


def _across(part: Part) -> int:
    return part.across(1)[1]


def _label(part: Part, by: Sequence[str]) -> str:
    """The tensor, and of the axes that were asked for the indices."""
    said = [part.tensor]
    for axis in by:
        span = next(((a.lo, a.lo + a.size - 1) for a in part.axes if a.axis == axis), None)
        if span is not None:
            said.append(f"{axis} {span[0]}" if span[0] == span[1] else f"{axis} {span[0]}-{span[1]}")
    return " ".join(said)


def _text(
    x: float, y: float, text: str, family: str, size: int, fill: str, *, bold: bool = False, centre: bool = False
) -> str:
    style = f'{family} font-size="{size}" fill="{fill}"' + (' font-weight="600"' if bold else "")
    if centre:
        style += ' text-anchor="middle" font-weight="600" stroke="#fff" stroke-width="2.6" paint-order="stroke"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'
