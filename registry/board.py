"""How the ranks of a background save agree: notes on a board that everybody can read, and no barrier.

A collective call in the background would meet those of the training it runs beside; a note does not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from registry.errors import TargetError


class Board(Protocol):
    """Notes by key, the same for all ranks of one run. Made anew for every run: old notes would be believed."""

    def post(self, key: str, text: str) -> None:
        """Put up a note, whole or not at all."""

    def read(self, key: str) -> str | None:
        """The note, or None as long as there is none. Does not wait."""

    def remove(self, key: str) -> None:
        """Take a note down, if it is there."""


class FileBoard:
    """A board in an empty directory that all ranks see."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def post(self, key: str, text: str) -> None:
        target = self._path / key
        fresh = target.with_name(f".{key}.{os.getpid()}")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(target)

    def read(self, key: str) -> str | None:
        try:
            return (self._path / key).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def remove(self, key: str) -> None:
        (self._path / key).unlink(missing_ok=True)


class StoreBoard:
    """A board in a `torch.distributed` store: one of its own, or a `PrefixStore` upon a clone of the group's."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def post(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def read(self, key: str) -> str | None:
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else None

    def remove(self, key: str) -> None:
        self._store.delete_key(key)


class Notes:
    """The notes of one save: rank 0 opens it and ends it, and every rank says how its part went."""

    def __init__(self, board: Board, number: int, *, timeout: float, poll: float) -> None:
        self._board, self._number, self._timeout, self._poll = board, number, timeout, poll

    def post(self, what: str, **content: Any) -> None:
        self._board.post(self._key(what), json.dumps(content))

    def wait(self, *what: str) -> tuple[str, dict[str, Any]]:
        """The first of these notes to be there. Raises TargetError after the timeout."""
        until = time.monotonic() + self._timeout
        while True:
            for name in what:
                text = self._board.read(self._key(name))
                if text is not None:
                    return name, json.loads(text)
            if time.monotonic() > until:
                raise TargetError(
                    "a rank does not answer", where=f"save {self._number}", expected=" or ".join(what),
                    found=f"nothing for {self._timeout:g} seconds", hint="is it alive? see its own messages",
                )  # fmt: skip
            time.sleep(self._poll)

    def clear(self, what: Sequence[str]) -> None:
        """Take down these notes of the save before the last: nobody will read them again."""
        for name in what if self._number > 2 else ():
            self._board.remove(f"{self._number - 2}.{name}")

    def _key(self, what: str) -> str:
        return f"{self._number}.{what}"
