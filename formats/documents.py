"""Small files of a checkpoint: JSON documents read with care, and what travels along with the tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from registry import documents
from registry.documents import MAX_CONFIG
from registry.errors import CheckpointError
from registry.storage import Opened, Request, Small

MANIFEST = "registry.json"
HUB = "huggingface"


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a missing, huge or malformed file (NaN and duplicate keys included)."""
    try:
        data = documents.read_json(path, limit)
    except FileNotFoundError:
        raise CheckpointError(
            "a file is missing", where=path, expected=path.name, found="no such file",
            hint="copy the checkpoint again, whole",
        ) from None  # fmt: skip
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "not a readable JSON file", where=path, expected="a JSON object", found=error,
            hint="correct the file, or get it again",
        ) from None  # fmt: skip
    if not isinstance(data, dict):
        raise CheckpointError(
            "not a JSON object", where=path, expected='{"name": value, ...}', found=type(data).__name__,
            hint="correct the file, or get it again",
        )  # fmt: skip
    return data


def to_json(data: Mapping[str, Any]) -> bytes:
    """A document as transformers writes it: two spaces, sorted keys, a newline at the end."""
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def plain_name(name: object) -> bool:
    """Is this the name of a file right inside a directory, and nothing cleverer?"""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(name) < 256


def side_files(directory: Path, leave: Iterable[str]) -> dict[str, Path]:
    """The plain files of a directory that are not in `leave`: tokenizer, generation config and the like.

    A link is followed where it stays in the directory, or leads to the blobs of the hub's cache that this is a snapshot
    in; a link to anywhere else could carry a file of the user's own into the target.
    """
    left = set(leave)
    root = directory.resolve()
    within = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]

    def stays(path: Path) -> bool:
        return not path.is_symlink() or path.resolve().parent in within

    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.name not in left and not path.name.startswith(".") and path.is_file() and stays(path)
    }


def read_carried(opened: Opened) -> None:
    """Take up what this library left beside a checkpoint that is not HuggingFace's: config, side files, manifest."""
    manifest = opened.path / MANIFEST
    if manifest.is_file():
        data = read_json(manifest)
        architecture = data.get("architecture")
        opened.architecture = architecture if isinstance(architecture, str) else None
        opened.state["metadata"] = data.get("metadata")
        opened.state["variants"] = data.get("variants")
        opened.state["dtypes"] = data.get("dtypes")
    hub = opened.path / HUB
    if hub.is_dir() and not hub.is_symlink():
        opened.side_files = side_files(hub, ())
        if "config.json" in opened.side_files:
            opened.hub_config = read_json(opened.side_files["config.json"])


def carry(request: Request, prefix: str = "") -> tuple[dict[str, Small], dict[str, Path]]:
    """What to leave beside such a checkpoint: (small files, files to copy), as `Laid` takes them."""
    small: dict[str, Small] = {f"{prefix}{MANIFEST}": request.manifest}
    copies = {f"{prefix}{HUB}/{name}": path for name, path in request.side_files.items() if name != "config.json"}
    place_config(request, f"{prefix}{HUB}/config.json", small, copies)
    return small, copies


def place_config(request: Request, name: str, small: dict[str, Small], copies: dict[str, Path]) -> None:
    """The HuggingFace config: the source's own file where nothing in it changed, so that it stays the same bytes."""
    own = request.side_files.get("config.json")
    if own is not None and read_json(own) == request.hub_config:
        copies[name] = own
    else:
        small[name] = to_json(request.hub_config)
