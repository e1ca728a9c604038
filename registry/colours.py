"""Colours for what the command line says, where it says it to a terminal that shows them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TextIO

_BOLD, _RED, _GREEN, _YELLOW = "1", "1;31", "1;32", "33"
#: What a line of a result or an error begins with, and what it is shown in.
_LINES = [
    (re.compile(r"(registry:)( .*)"), (_RED, _BOLD)),
    (re.compile(r"(whole:|equal:)( .*)"), (_GREEN, "")),
    (re.compile(r"(damaged:|different:)( .*)"), (_RED, "")),
    (re.compile(r"( +(?:to do:|try) )(.*)"), (_GREEN, "")),
    (re.compile(r"( +(?:note:?|lossy:|missing|padded|unfinished|problem|refused) )(.*)"), (_YELLOW, "")),
]


def wanted(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Is this a terminal that shows colours, and does the user want them? (https://no-color.org)"""
    if environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return False
    return stream.isatty()


def coloured(text: str) -> str:
    """The text with its headline and marks in colours."""
    return "\n".join(_line(line, first=i == 0) for i, line in enumerate(text.split("\n")))


def _line(line: str, *, first: bool) -> str:
    for pattern, codes in _LINES:
        if match := pattern.fullmatch(line):
            return "".join(_in(code, part) for code, part in zip(codes, match.groups(), strict=True))
    return _in(_BOLD, line) if first else line


def _in(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if code and text else text
