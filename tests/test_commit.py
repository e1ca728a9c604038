"""The target: refused when it must be, and at every moment either what was there before or the whole new checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import registry
from registry import commit
from registry.cli import main
from registry.errors import CheckpointError, RegistryError, TargetError

OLD = {"model.safetensors": b"the only copy", "sub/notes.txt": b"of great value"}


def files(folder: Path) -> dict[str, bytes]:
    """The files below a directory: names and bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(target: Path) -> Path:
    for name, data in OLD.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    return target


@pytest.fixture
def model(hf_model: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(hf_model("llama3"), tmp_path / "model")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A target with something in it, alone in its directory."""
    return fill(tmp_path / "targets" / "out")


def refused(source: Path, target: Path, *says: str, overwrite: bool = True, **arguments: Any) -> TargetError:
    """The error of a conversion, from Python and from the command line."""
    with pytest.raises(TargetError) as caught:
        registry.convert(source, target, to="megatron", overwrite=overwrite, durable=False, **arguments)
    text = str(caught.value)
    assert "to do: " in text and caught.value.where is not None
    assert caught.value.expected is not None and caught.value.found is not None
    assert all(each in text for each in says), text
    line = ["convert", str(source), str(target), "--to", "megatron", "--no-sync", "--quiet"]
    assert main([*line, "--overwrite"] if overwrite else line) == 1
    return caught.value


def is_new(target: Path) -> bool:
    return bool(registry.verify(target, target.parent.parent / "model"))


# --- where the target is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["model", "model/out", "model/a/b", ".", "model/../model/x", "link/out", "link"])
def test_target_overlaps_the_source(where: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    before = files(tmp_path)
    refused(model, tmp_path / where, "overlap", str(model))
    assert files(tmp_path) == before


def test_a_neighbour_with_a_longer_name_is_not_inside(model: Path, tmp_path: Path) -> None:
    registry.convert(model, tmp_path / "model-megatron", to="megatron", durable=False)
    assert registry.verify(model, tmp_path / "model-megatron")


def test_target_is_not_empty(model: Path, target: Path) -> None:
    refused(model, target, "not empty", str(target), "model.safetensors", "--overwrite", overwrite=False)
    assert files(target.parent) == files_at(target)


def files_at(target: Path) -> dict[str, bytes]:
    return {f"{target.name}/{name}": data for name, data in OLD.items()}


def test_target_holds_a_hidden_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("")
    refused(model, tmp_path / "out", ".hidden", overwrite=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".hidden"]


@pytest.mark.parametrize("name", ["file", "pipe", "device"])
def test_target_is_no_directory(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    refused(model, tmp_path / name, "no directory", name)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["file/out", "loop/out", "x" * 300])
def test_target_cannot_be(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    before = files(tmp_path)
    refused(model, tmp_path / name, "cannot be written")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["s3://", "nul\0l"])
def test_target_is_no_path(name: str, model: Path) -> None:
    with pytest.raises(RegistryError, match=r"not a path|not the URL"):
        registry.convert(model, name, to="megatron")


@pytest.mark.parametrize("there", [False, True])
def test_target_is_empty_or_absent(there: bool, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    if there:
        target.mkdir(parents=True)
    registry.convert(model, target, to="megatron", durable=False)
    assert registry.verify(model, target)
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("there", ["full", "empty", "absent"])
def test_target_is_a_link(there: str, model: Path, tmp_path: Path) -> None:
    """What the link points to is replaced, and the link stays."""
    real, link = tmp_path / "disk" / "out", tmp_path / "link"
    real.parent.mkdir()
    if there != "absent":
        real.mkdir()
    if there == "full":
        fill(real)
    link.symlink_to(real)
    registry.convert(model, link, to="megatron", overwrite=True, durable=False)
    assert link.is_symlink() and registry.verify(model, real)
    assert names(real.parent) == ["out"] and names(tmp_path) == ["disk", "link", "model"]


def test_relative_target(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registry.convert("model", "out", to="megatron", durable=False)
    assert registry.verify("model", "out")


# --- overwriting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_overwrite_replaces_the_whole(durable: bool, model: Path, target: Path) -> None:
    registry.convert(model, target, to="megatron", overwrite=True, durable=durable)
    assert is_new(target) and not (target / "sub").exists()
    assert names(target.parent) == ["out"]


def test_overwrite_where_directories_cannot_be_swapped(
    model: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems have no exchange of two names: then it takes two steps."""
    monkeypatch.setattr(commit.ctypes, "CDLL", lambda *_, **__: object())
    registry.convert(model, target, to="megatron", overwrite=True, durable=False)
    assert is_new(target) and names(target.parent) == ["out"]


def test_a_swap_that_fails_is_undone(model: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit.ctypes, "CDLL", lambda *_, **__: object())
    rename = Path.rename

    def fail_once(self: Path, to: Path) -> Path:
        if to == target and self.name == ".out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_once)
    refused(model, target, "Input/output error")
    assert files(target.parent) == files_at(target)


def test_target_that_fills_up_meanwhile_is_not_replaced(model: Path, tmp_path: Path) -> None:
    """It was empty when the run began; without `overwrite` what came since must stay."""
    target = tmp_path / "targets" / "out"

    def meanwhile(done: int, total: int) -> None:
        fill(target)

    with pytest.raises(TargetError, match="not empty"):
        registry.convert(model, target, to="megatron", durable=False, progress=meanwhile)
    assert files(target.parent) == files_at(target)


# --- crashes, and runs at the same time -------------------------------------------------------------------------------

#: Where a process dies, as Python that makes it so.
CRASHES = {
    "before the first byte": "registry.conversion.write_small = die",
    "amid the tensors": "arguments['progress'] = die",
    "before syncing the directories": "registry.commit.sync_directory = die",
    "before the swap": "registry.commit._exchange = die",
    "between the steps of a swap": """
        registry.commit.ctypes.CDLL = lambda *_, **__: object()
        rename = pathlib.Path.rename
        pathlib.Path.rename = lambda self, to: (rename(self, to), die())
    """,
    "after the swap": "registry.commit.shutil.rmtree = die",
}


@pytest.mark.parametrize("crash", CRASHES)
def test_crash(crash: str, model: Path, target: Path) -> None:
    """The process dies: the old state or the new one is there, and the next run does not mind."""
    program = f"""
import os, pathlib, sys
import registry, registry.commit, registry.conversion
die = lambda *_, **__: os._exit(9)
arguments = {{}}
{textwrap.dedent(CRASHES[crash])}
registry.convert(sys.argv[1], sys.argv[2], to="megatron", overwrite=True, **arguments)
"""
    assert subprocess.run([sys.executable, "-c", program, model, target]).returncode == 9
    left = names(target.parent)
    assert any(name.startswith(".out.") for name in left), "it died too late to show anything"
    if crash == "after the swap":
        assert is_new(target)
    elif crash == "between the steps of a swap":  # where the system knows no better; nothing is lost
        assert not target.exists() and files(target.parent / ".out.partial.old") == OLD
    else:
        assert files(target) == OLD
    registry.convert(model, target, to="megatron", overwrite=True, durable=False)
    assert is_new(target) and names(target.parent) == ["out"]


def test_a_swap_cut_short_is_undone_by_the_next_run(model: Path, target: Path) -> None:
    """Even by one that fails."""
    target.rename(target.with_name(".out.partial.old"))
    with pytest.raises(RuntimeError), commit.staged(target, needed=0, durable=False):
        raise RuntimeError
    assert files(target.parent) == files_at(target)


def test_what_a_dead_run_left_goes_away(model: Path, tmp_path: Path) -> None:
    stage = tmp_path / "targets" / ".out.partial"
    fill(stage)
    (stage / "link").symlink_to(model)
    registry.convert(model, tmp_path / "targets" / "out", to="megatron", durable=False)
    assert "model.safetensors" not in files(tmp_path / "targets" / "out") and names(stage.parent) == ["out"]
    assert (model / "model.safetensors").exists()


@pytest.mark.parametrize("at", ["stage", "lock"])
def test_links_in_the_way_lead_nowhere(at: str, model: Path, target: Path, tmp_path: Path) -> None:
    """In a directory that others can write to, a link under our names must not send us elsewhere."""
    other = fill(tmp_path / "other")
    target.with_name(".out.partial" if at == "stage" else ".out.lock").symlink_to(other)
    try:
        registry.convert(model, target, to="megatron", overwrite=True, durable=False)
    except TargetError:
        assert at == "lock" and files(target) == OLD
    assert files(other) == OLD


def test_second_run_is_refused(model: Path, target: Path) -> None:
    """While the first writes; it ends well, and then another may run."""
    seen = []

    def second(done: int, total: int) -> None:
        if not seen:
            seen.append(refused(model, target, "another run", str(target), "wait"))

    registry.convert(model, target, to="megatron", overwrite=True, durable=False, progress=second)
    assert seen and is_new(target) and names(target.parent) == ["out"]
    registry.convert(model, target, to="megatron", overwrite=True, durable=False)


def test_second_process_is_refused(model: Path, target: Path) -> None:
    """The lock holds between processes, and dies with the one that holds it."""
    program = """
import sys, time
import registry.commit
from pathlib import Path
with registry.commit.staged(Path(sys.argv[1]), needed=0, durable=False):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, target], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refused(model, target, "another run")
        holder.kill()
    assert files(target) == OLD
    registry.convert(model, target, to="megatron", overwrite=True, durable=False)
    assert is_new(target)


def test_lock_that_was_removed_under_us_does_not_count(target: Path) -> None:
    """The run before removes its lock file when it ends, perhaps after we opened the file and before we locked it."""
    path = target.with_name(".out.lock")
    flock, opened = commit.fcntl.flock, []

    def removed_first(fd: int, operation: int) -> None:
        flock(fd, operation)
        opened.append(fd)
        if len(opened) == 1:
            path.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit.fcntl, "flock", removed_first)
        with commit.locked(path, target):
            assert len(opened) == 2 and path.exists()
            with pytest.raises(TargetError), commit.locked(path, target):
                pass
    assert not path.exists()


def test_file_system_without_locks(model: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(commit.fcntl, "flock", flock)
    registry.convert(model, target, to="megatron", overwrite=True, durable=False)
    assert is_new(target)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_interrupted(error: type[BaseException], model: Path, target: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise error

    with pytest.raises(error):
        registry.convert(model, target, to="megatron", overwrite=True, durable=False, progress=stop)
    assert files(target.parent) == files_at(target)


# --- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(where: Path, options: str) -> Iterator[Path]:
    """A small file system in memory at `where`; the test is skipped where that is not allowed."""
    where.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", where], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def test_disk_is_too_small(model: Path, tmp_path: Path) -> None:
    """Known before the first byte is written."""
    with mounted(tmp_path / "disk", "size=256k") as disk:
        target = fill(disk / "out")
        refused(model, target, "too full", str(disk), "bytes free")
        assert files(disk) == files_at(target)


def test_disk_fills_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may fill it while we write."""
    monkeypatch.setattr(commit, "check_space", lambda *_: None)
    with mounted(tmp_path / "disk", "size=256k") as disk:
        target = fill(disk / "out")
        refused(model, target, "No space left on device")
        assert files(disk) == files_at(target)


def test_space_that_a_dead_run_takes_is_free(model: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1500k") as disk:
        (disk / ".out.partial").mkdir()
        (disk / ".out.partial" / "model.safetensors").write_bytes(bytes(1 << 20))
        registry.convert(model, disk / "out", to="megatron", durable=False)
        assert registry.verify(disk / "out", model)
        assert registry.verify(model, disk / "out")


def test_little_space_as_the_system_tells(model: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(target)
    fields = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    monkeypatch.setattr(os, "statvfs", lambda _: type("statvfs", (), {**fields, "f_bavail": 10, "f_frsize": 4096}))
    refused(model, target, "too full", "40960 bytes free")
    assert files(target.parent) == files_at(target)


def test_read_only_disk(model: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        target = fill(disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(model, target, "Read-only file system", str(disk))
        refused(model, disk / "new", "Read-only file system", overwrite=False)
        assert files(disk) == files_at(target)


def test_mount_point(model: Path, tmp_path: Path) -> None:
    """It cannot be replaced in one step: better said before the work than after it."""
    with mounted(tmp_path / "disk", "size=4m") as disk:
        refused(model, disk, "mount point", "below")
        registry.convert(model, disk / "out", to="megatron", durable=False)


@pytest.fixture
def commons(model: Path) -> Iterator[Path]:
    """A directory that everyone may enter, and only its owner write to, with a model that everyone may read."""
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(model, Path(name, "model"))
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        Path(name).chmod(0o555)
        yield Path(name)
        subprocess.run(["chmod", "-R", "u+rwX", name], check=True)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Whom permissions bind, in the block."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_read_only_parent(commons: Path) -> None:
    with unprivileged():
        refused(commons / "model", commons / "out", "Permission denied", str(commons), overwrite=False)
    assert names(commons) == ["model"]


def test_parent_that_cannot_be_entered(commons: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    with unprivileged():
        refused(commons / "model", tmp_path / "closed" / "out", "Permission denied")
    (tmp_path / "closed").chmod(0o700)
    assert not list((tmp_path / "closed").iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", ""])
def test_source_that_cannot_be_read(name: str, commons: Path) -> None:
    culprit = commons / "model" / name
    culprit.chmod(0o000)
    commons.chmod(0o777)
    with unprivileged(), pytest.raises(CheckpointError) as caught:
        registry.convert(commons / "model", commons / "out", to="megatron", durable=False)
    assert "Permission denied" in str(caught.value) and str(culprit) in str(caught.value)
    assert names(commons) == ["model"]


# --- how long it takes ------------------------------------------------------------------------------------------------


def test_refusals_come_before_the_source_is_read(model: Path, target: Path) -> None:
    """A wrong target is said at once, however large the source."""
    (model / "model.safetensors").unlink()
    start = time.process_time()
    refused(model, target, "not empty", overwrite=False)
    assert time.process_time() - start < 0.5
