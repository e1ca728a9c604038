"""What must not be in any message: the passwords, keys and signatures that URLs may carry."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^/@\s'\"]+@")
_QUERY = re.compile(r"(?<=[?&;])([^=&;\s'\"]{1,100})=[^&;\s'\"]+")
_HIDDEN: set[str] = set()
#: Shorter ones are words that messages are made of.
_SHORTEST = 6


def hide(secret: object) -> None:
    """Never show this text, wherever it comes from."""
    if isinstance(secret, str) and len(secret) >= _SHORTEST:
        _HIDDEN.add(secret)


def redacted(text: str) -> str:
    """A text without what lies between :// and @, without the values of queries, and without what is hidden."""
    for secret in _HIDDEN:
        text = text.replace(secret, "***")
    if "://" in text:
        text = _QUERY.sub(r"\1=***", _USER.sub("***@", text))
    return text
