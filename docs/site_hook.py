"""A hook of mkdocs: links to files of the repository that are no pages become text, for the site does not have them."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")


def _leads_out(page: str, link: str) -> bool:
    """Does a relative link of a page lead out of docs/?"""
    depth = len(PurePosixPath(page).parent.parts)
    return link.count("../") > depth


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """What mkdocs makes a page of."""
    path = page.file.src_uri
    return _LINK.sub(lambda found: found[1] if _leads_out(path, found[2]) else found[0], markdown)
