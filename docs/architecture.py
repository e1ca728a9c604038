"""The picture of one conversion's way through the modules, and what tests/test_architecture.py holds it to.

What is drawn is declared here: the steps in the order in which a conversion comes through them, and what each one asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Box:
    """A box of the picture: what it does, the modules that do it, where it stands, and how wide it is."""

    title: str
    modules: tuple[str, ...]
    column: int
    row: int
    width: int = 1
    says: str = ""


BOXES = {
    "command": Box("command line", ("cli", "arguments", "commands"), 0, 0, 2, "text in, text out"),
    "api": Box("public functions", ("api", "validation"), 2, 0, 3, "arguments checked, all problems at once"),
    "convert": Box("one conversion", ("conversion", "engines.work"), 0, 1, 5, "the five steps; a report comes back"),
    "open": Box("1 open", ("source", "bind"), 0, 2, 1, "what is stored where"),
    "prepare": Box("2 bind", ("prepare", "target"), 1, 2, 1, "what is to be stored"),
    "plan": Box("3 plan", ("planning",), 2, 2, 1, "which bytes go where; proof that all do"),
    "execute": Box("4 execute", ("execute", "assemble"), 3, 2, 1, "copies, in one pass"),
    "commit": Box("5 commit", ("commit", "manifest"), 4, 2, 1, "digests, sync, one rename"),
    "declared": Box("what is declared", ("catalog", "specs"), 0, 3, 1, "mappings/*.yaml"),
    "model": Box("the logical model", ("model", "groups"), 1, 3, 1, "facts, axes, tensors"),
    "notation": Box("the notation", ("layout", "boxes"), 2, 3, 1, "sums and products of axes"),
    "bytes": Box("bytes", ("files", "reading", "places"), 3, 3, 1, "disks and URLs"),
    "containers": Box("containers", ("storage",), 4, 3, 1, "the protocol of formats/*.py"),
}

#: Who asks whom. Each is an import, in this direction.
ARROWS = [
    ("command", "api"),
    ("api", "convert"),
    ("convert", "open"),
    ("convert", "prepare"),
    ("convert", "plan"),
    ("convert", "execute"),
    ("convert", "commit"),
    ("open", "declared"),
    ("prepare", "model"),
    ("plan", "notation"),
    ("execute", "bytes"),
    ("commit", "containers"),
]

#: The order in which the steps begin to work, each named by a function of one of its modules.
ORDER = [
    ("api", "registry.api", "convert"),
    ("convert", "registry.conversion", "convert"),
    ("open", "registry.source", "load"),
    ("prepare", "registry.prepare", "prepare"),
    ("plan", "registry.planning", "make_plan"),
    ("execute", "registry.execute", "execute"),
    ("commit", "registry.manifest", "write"),
]

_CELL, _HEIGHT, _GAP, _EDGE = 172, 74, 34, 12
_STYLE = """
  .box { fill: #ffffff; stroke: #57606a; }
  .step { fill: #ddf4ff; stroke: #0969da; }
  text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; font-size: 13px; }
  .module { font-family: ui-monospace, monospace; font-size: 11px; }
  .arrow { stroke: #57606a; fill: none; marker-end: url(#tip); }
  .tip { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #161b22; stroke: #8b949e; }
    .step { fill: #0c2d6b; stroke: #58a6ff; }
    text { fill: #e6edf3; }
    .arrow { stroke: #8b949e; }
    .tip { fill: #8b949e; }
  }
"""


def _place(box: Box) -> tuple[int, int, int]:
    """Left, top and width of a box, in pixels."""
    return _EDGE + box.column * (_CELL + 10), _EDGE + box.row * (_HEIGHT + _GAP), box.width * (_CELL + 10) - 10


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of about as many characters as fit into a box."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width // 7:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _drawn(name: str, box: Box) -> str:
    left, top, width = _place(box)
    middle = left + width / 2
    kind = "box step" if box.row == 2 else "box"
    parts = [f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{_HEIGHT}" rx="6"/>']
    lines = [("title", box.title), ("module", " · ".join(box.modules))]
    lines += [("", line) for line in _wrapped(box.says, width)]
    for number, (style, line) in enumerate(lines):
        where = f'x="{middle:g}" y="{top + 20 + number * 16}" text-anchor="middle"'
        parts.append(f'<text class="{style}" {where}>{escape(line)}</text>')
    return f'<g id="{name}">{"".join(parts)}</g>'


def _arrow(start: str, end: str) -> str:
    a, b = BOXES[start], BOXES[end]
    left, top, width = _place(b)
    if a.row == b.row:
        x, y = _place(a)[0] + _place(a)[2], top + _HEIGHT / 2
        return f'<path class="arrow" d="M{x} {y:g} H{left - 2}"/>'
    x = left + width / 2
    return f'<path class="arrow" d="M{x:g} {_place(a)[1] + _HEIGHT} V{top - 2}"/>'


def drawing() -> str:
    """The picture, as an SVG file."""
    width = 2 * _EDGE + 5 * (_CELL + 10) - 10
    height = 2 * _EDGE + 4 * (_HEIGHT + _GAP) - _GAP
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="The way of one conversion through the modules">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        *(_arrow(start, end) for start, end in ARROWS),
        *(_drawn(name, box) for name, box in BOXES.items()),
        "</svg>",
        "",
    ])  # fmt: skip
