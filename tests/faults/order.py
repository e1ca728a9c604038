"""Would the disk have it all, if the power failed? What the order of calls in a log says of that.

A file is on the disk when it is synced after its last write, a name when its directory is synced after it appeared.
Nothing may get a name that readers know before what it names is on the disk; and at the end every such name is, too.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from tests.faults.inject import Call

#: Names that nobody takes for a checkpoint: a crash may leave them in any state.
_HIDDEN = re.compile(r"(^|/)\.[^/]+\.(partial|partial\.old|lock|deleted)(/|$)")
_OF_TARGETS = re.compile(r"targets(/|$)")


def dirname(path: str) -> str:
    """The directory, as the log has it."""
    return posixpath.dirname(path) or "."


def violations(calls: Sequence[Call]) -> list[str]:
    """What is named before it is on the disk, and what is not there at the end."""
    found: list[str] = []
    files: set[str] = set()  # written since they were synced
    names: dict[str, set[str]] = {}  # directory -> names in it that are not on the disk
    for at, call in enumerate(calls):
        path = call.path
        changed = call.to if call.kind in ("rename", "copy") else path
        if call.failed or not (call.kind == "sync" or _OF_TARGETS.match(changed)):
            continue
        if call.kind == "sync":
            files.discard(path)
            names.pop(path, None)
        elif call.kind in ("create", "mkdir"):
            names.setdefault(dirname(path), set()).add(path)
        elif call.kind in ("write", "truncate"):
            files.add(path)
        elif call.kind == "copy":
            files.add(call.to)
        elif call.kind == "map" and call.to:
            found.append(f"call {at}: {path} is mapped for writing, and nothing says when it is on the disk")
        elif call.kind in ("unlink", "rmdir"):
            files.discard(path)
            names.get(dirname(path), set()).discard(path)
            names.pop(path, None)
        elif call.kind == "rename":
            found += _renamed(at, call, files, names)
    for fresh in names.values():
        found += [f"at the end {name} is no name on the disk" for name in sorted(fresh) if not _HIDDEN.search(name)]
    found += [f"at the end {path} is not on the disk" for path in sorted(files) if not _HIDDEN.search(path)]
    return found


def _renamed(at: int, call: Call, files: set[str], names: dict[str, set[str]]) -> list[str]:
    inside = re.compile(rf"{re.escape(call.path)}(/|$)")
    late = sorted(path for path in files if inside.match(path))
    late += sorted(name for directory, fresh in names.items() if inside.match(directory) for name in fresh)
    for path in late:
        files.discard(path)
    for directory in [directory for directory in names if inside.match(directory)]:
        del names[directory]
    names.get(dirname(call.path), set()).discard(call.path)
    names.setdefault(dirname(call.to), set()).add(call.to)
    if _HIDDEN.search(call.to):
        return []
    return [f"call {at}: {call.to} appears before {path} is on the disk" for path in late]
