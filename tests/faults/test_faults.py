"""A sample of `make faults`, and what shows that the injector and its judges see what there is to see."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.inject import CALLS, Call, built, compiler, environment
from tests.faults.order import violations

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(compiler() is None, reason="the fault injector is C, and there is no C compiler")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python with the injector before the C library."""
    library = built(tmp_path_factory.mktemp("inject"))

    def run(*arguments: object, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, sys.executable, *map(str, arguments)], env=environment(library), cwd=REPOSITORY, timeout=240,
            capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def sample(python: Run) -> list[dict[str, Any]]:
    """The rows of a sample of all trials."""
    done = python("-m", "tests.faults", "--json", "--every", "151")
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_fault_tears_a_checkpoint(sample: list[dict[str, Any]]) -> None:
    assert [problem for row in sample for problem in row["bad"]] == []


def test_the_sample_has_every_writer_and_every_fault(sample: list[dict[str, Any]]) -> None:
    from registry import catalog
    from tests.faults.trials import KINDS

    assert {row["name"].partition(":")[0] for row in sample} == set(catalog.names("format"))
    trials = sum((Counter(row["trials"]) for row in sample), Counter())
    assert set(trials) == set(KINDS)
    outcomes = sum((Counter(row["outcomes"]) for row in sample), Counter())
    assert outcomes["absent"] and outcomes["old"] and outcomes["new"] and not outcomes["torn"]


CARELESS = """
import os, sys
from pathlib import Path
from tests.faults.operations import Operation, whole
from tests.faults.trials import tried

def prepare(root):
    (root / "source").mkdir(parents=True)
    (root / "targets" / "out").mkdir(parents=True)
    (root / "targets" / "out" / "a").write_bytes(b"old")

def act(root):
    out = root / "targets" / "out"
    for name in "ab":
        fd = os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.write(fd, b"quite new")  # who knows how much of it
        try:
            os.fsync(fd)
        except OSError:
            pass
        os.close(fd)

row = tried(Operation("careless", "over", prepare, act, whole), Path(sys.argv[1]))
print(row.outcomes["torn"])
print(*row.bad, sep="\\n")
"""


def test_a_careless_writer_is_caught(python: Run, tmp_path: Path) -> None:
    """One that writes in place, ignores short writes and failed syncs, raises bare OSErrors and syncs no directory."""
    done = python("-c", CARELESS, tmp_path)
    torn, said = done.stdout.split("\n", 1)
    assert int(torn) > 5, done.stderr
    assert "said to have been written, and is torn" in said
    assert "short at" in said and "killed at" in said and "ENOSPC at" in said
    assert re.search(r"EIO at \d+ \(sync targets/out/a\): failed, and nobody was told", said)
    assert "stranger: " in said and "OSError: [Errno 5]" in said
    assert "at the end targets/out/b is no name on the disk" in said


# --- nothing goes past the injector -----------------------------------------------------------------------------------

TRACED = """
import os, sys
from pathlib import Path
from tests.faults.inject import Fault, Watch
from tests.faults.operations import by_name

root, operation = Path(sys.argv[1], "root"), by_name()[sys.argv[2]]
operation.prepare(root)
watch = Watch(root)
watch.set(Fault())
watch.arm()
os.access("/begin", os.F_OK)
operation.act(root)
os.access("/end", os.F_OK)
watch.disarm()
for call in watch.calls():
    print(call.kind)
"""

#: System call -> what the injector calls it. What is left out changes nothing, and has no data.
KINDS = {
    "read": "read", "pread64": "read", "preadv": "read", "preadv2": "read", "readv": "read",
    "write": "write", "pwrite64": "write", "pwritev": "write", "pwritev2": "write", "writev": "write",
    "ftruncate": "truncate", "truncate": "truncate", "fallocate": "truncate",
    "fsync": "sync", "fdatasync": "sync", "syncfs": "sync", "sync_file_range": "flush",
    "rename": "rename", "renameat": "rename", "renameat2": "rename",
    "unlink": "unlink", "unlinkat": "unlink", "rmdir": "rmdir", "mkdir": "mkdir", "mkdirat": "mkdir",
    "link": "link", "linkat": "link", "symlink": "link", "symlinkat": "link", "flock": "lock",
    "sendfile": "copy", "copy_file_range": "copy", "mmap": "map",
    "chmod": "attributes", "fchmod": "attributes", "fchmodat": "attributes", "utimensat": "attributes",
    "statfs": "space", "fstatfs": "space",
}  # fmt: skip
_LINE = re.compile(r"(?:\[pid +)?\d+\]? +(\w+)\((.*)")


def traced(log: str, prefix: str) -> Counter[str]:
    """What the system saw of calls below a directory."""
    found: Counter[str] = Counter()
    for match in map(_LINE.match, log[log.index('"/begin"') : log.index('"/end"')].splitlines()):
        if match is None or f"{prefix}/" not in f"{match[2]}/".replace(">", "/").replace('"', "/"):
            continue
        name, given = match.groups()
        if name in ("open", "openat", "creat"):
            if not ("O_NONBLOCK" in given and "O_DIRECTORY" in given):  # opendir
                found["create" if "O_CREAT" in given or "O_TRUNC" in given else "open"] += 1
        elif name in KINDS:
            found["rmdir" if "AT_REMOVEDIR" in given else KINDS[name]] += 1
    return found


@pytest.mark.parametrize("name", ["megatron: over, from legacy", "megatron: save, third of two kept"])
def test_nothing_goes_past_the_injector(name: str, python: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = ("strace", "-f", "-y", "-s", "400", "-e", "trace=%file,%desc", "-o", str(log))
    if shutil.which("strace") is None or subprocess.run(["strace", "-o", "/dev/null", "true"]).returncode:
        pytest.skip("there is no strace, or it may not trace here")
    done = python("-c", TRACED, tmp_path, name, before=before)
    assert done.returncode == 0, done.stderr
    counted = Counter(done.stdout.split())
    assert counted.keys() <= set(CALLS)
    matter = {*KINDS.values(), "open", "create"}
    assert traced(log.read_text(errors="replace"), str(tmp_path / "root")) == Counter(
        {kind: n for kind, n in counted.items() if kind in matter}
    )
    assert {"create", "write", "sync", "rename", "mkdir", "unlink", "rmdir", "lock"} <= counted.keys()


# --- the order of calls -----------------------------------------------------------------------------------------------


def log(*calls: str) -> list[Call]:
    """Calls from lines like "write a" and "rename a b"."""
    found = []
    for line in calls:
        kind, path, to = [*line.split(), ""][:3]
        found.append(Call(kind, path, to, 1, 0))
    return found


GOOD = (
    "create targets/.out.lock", "mkdir targets/.out.partial", "create targets/.out.partial/a",
    "write targets/.out.partial/a", "sync targets/.out.partial/a", "sync targets/.out.partial",
    "rename targets/.out.partial targets/out", "sync targets", "unlink targets/.out.lock",
)  # fmt: skip


def test_an_order_that_survives_a_power_failure() -> None:
    assert violations(log(*GOOD)) == []


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ("sync targets/.out.partial/a", "targets/out appears before targets/.out.partial/a is on the disk"),
        ("sync targets/.out.partial", "targets/out appears before targets/.out.partial/a is on the disk"),
        ("sync targets", "at the end targets/out is no name on the disk"),
    ],
)
def test_an_order_that_does_not(without: str, says: str) -> None:
    assert any(says in one for one in violations(log(*(line for line in GOOD if line != without))))


def test_a_write_after_the_sync_counts() -> None:
    late = [*GOOD[:5], "write targets/.out.partial/a", *GOOD[5:]]
    assert any("is on the disk" in one for one in violations(log(*late)))


def test_a_sync_that_failed_is_none() -> None:
    calls = log(*GOOD)
    calls[4] = Call("sync", "targets/.out.partial/a", "", 0, 5)
    assert violations(calls)
