"""Runs the attacks of one file, each in a process of its own whose time and memory are measured.

@attack(CheckpointError, "deep.pt", "nested deeper than")
def lists_in_lists(folder):           # makes the file
    path = written(folder / "deep.pt", ...)
    return lambda: torchzip.read(path, where=str(path)).load()     # is measured, and must raise

test_attacks = cases(__name__)
"""

from __future__ import annotations

import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

#: Of the processor, and of memory beyond what the process has when the attack begins.
SECONDS = 1.0
MEGABYTES = 100
#: Of the clock: what waits for ever does not use the processor.
_ALARM = 20

Prepare = Callable[[Path], Callable[[], object]]


class Attack(NamedTuple):
    prepare: Prepare
    kind: type[Exception]
    says: tuple[str, ...]


_ATTACKS: dict[str, dict[str, Attack]] = {}


def attack(kind: type[Exception], *says: str) -> Callable[[Prepare], Prepare]:
    """Registers an attack: what it must raise, and what the message must say."""

    def add(prepare: Prepare) -> Prepare:
        own = _ATTACKS.setdefault(prepare.__module__, {})
        assert prepare.__name__ not in own
        own[prepare.__name__] = Attack(prepare, kind, says)
        return prepare

    return add


def written(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def archive(pickle: bytes, **members: bytes) -> bytes:
    """An archive of torch.save with that pickle, and members beside it under their names in its folder."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("archive/data.pkl", pickle)
        made.writestr("archive/byteorder", b"little")
        for name, content in members.items():
            made.writestr(f"archive/{name}", content)
    return out.getvalue()


def cases(module: str) -> Callable[..., None]:
    """The test of every attack that is registered in a module."""

    @pytest.fixture(scope="module")
    def outcomes() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.attacks.bounded", module], capture_output=True, timeout=200, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    sys.modules[module].__dict__["outcomes"] = outcomes

    @pytest.mark.parametrize("name", _ATTACKS[module])
    def test(name: str, outcomes: dict[str, Any]) -> None:
        expected, found = _ATTACKS[module][name], outcomes[name]
        assert not found["signal"], f"the process was ended by signal {found['signal']}"
        assert found["kind"] == expected.kind.__name__, f"{found['kind']}: {found['text']}"
        for text in expected.says:
            assert text in found["text"], f"{text!r} is not in: {found['text']}"
        assert "\n  where: " in found["text"] or "\n  - " in found["text"], "nothing is named"
        assert len(found["text"]) < 20_000
        assert found["seconds"] < SECONDS and found["megabytes"] < MEGABYTES, found
        assert not found["strange"], f"written outside of the attack's own folder: {found['strange']}"

    return test


def _memory(name: str) -> int:
    """VmRSS or VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _measured(one: Attack, folder: Path) -> dict[str, Any]:
    run = one.prepare(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before, begin = _memory("VmRSS"), time.process_time()
    kind, text = "nothing", "no error"
    try:
        run()
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    seconds = time.process_time() - begin
    megabytes = (_memory("VmHWM") - before) / 1e6
    return {"kind": kind, "text": text[:30_000], "seconds": seconds, "megabytes": megabytes}


def _apart(one: Attack, root: Path) -> dict[str, Any]:
    """One attack in a child of this process, which has imported everything already."""
    folder, result = root / "own", root / "result.json"
    folder.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        signal.alarm(_ALARM)
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        try:
            result.write_text(json.dumps(_measured(one, folder)))
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    found = json.loads(result.read_text()) if result.exists() else {"kind": "nothing", "text": "it ended early"}
    strange = [path.name for path in root.iterdir() if path not in (folder, result)]
    return {"seconds": 0, "megabytes": 0, **found, "signal": os.WTERMSIG(status), "strange": strange}


def main() -> None:
    module = sys.argv[1]
    importlib.import_module(module)
    importlib.import_module("registry.source")
    warm = importlib.import_module("registry.catalog")
    for kind in ("architecture", "format"):
        for name in warm.names(kind):
            warm.architecture(name) if kind == "architecture" else warm.format_spec(name)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({n: _apart(one, Path(folder) / n) for n, one in _ATTACKS[module].items()}))


if __name__ == "__main__":
    from tests.attacks import bounded  # the module that attacks register in is not __main__

    bounded.main()
