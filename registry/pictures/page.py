"""One HTML page of a scene: self-contained, and inert whatever the names in it say.

Data stand in the page as JSON that cannot end its element, the script makes text nodes of them alone, and the policy
in the page's head lets run and style nothing but the scripts and the style sheet beside this module.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

#: Colours that people with any kind of colour vision can tell apart: those of Okabe and Ito (2008), with the wine of
#: Tol's muted scheme in the place of black.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#882255")


def page(scene: Mapping[str, Any]) -> str:
    """The page of a scene (see `registry.pictures.scene`)."""
    style, script = _part("page.css"), "".join(map(_part, ("data.js", "drawing.js", "page.js")))
    data = json.dumps({**scene, "colours": COLOURS}, separators=(",", ":"))
    for mark in "<>&":
        data = data.replace(mark, f"\\u{ord(mark):04x}")
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return (
        "<!doctype html>\n"
        '<html lang="en">\n'
        "<head>\n"
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(_text(scene['title']))}</title>\n"
        f"<style>{style}</style>\n"
        "</head>\n"
        "<body>\n"
        "<noscript>This page draws with JavaScript, which is switched off.</noscript>\n"
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<script>{script}</script>\n"
        "</body>\n"
        "</html>\n"
    )


def _part(name: str) -> str:
    return "\n" + (files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _text(value: object) -> str:
    """Text that any encoding can say: a path may hold bytes that are no characters."""
    return str(value).encode("utf-8", "backslashreplace").decode()
