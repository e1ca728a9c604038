"""The directory of a training run: what is resumed, what is kept, and a crash at every call of the file system."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import registry
from registry import commit
from registry.errors import ArgumentError, CheckpointError, TargetError
from registry.training.manager import TRACKER, Checkpoints, Found, Iteration, openable, place
from registry.training.retention import Retention

# --- a checkpoint that says itself whether it is whole: two files of data and the digest of both ----------------------


def write(stage: Path, text: str = "data") -> None:
    (stage / "rank0").mkdir()
    (stage / "rank0" / "a").write_text(f"{text} a")
    (stage / "b").write_text(f"{text} b")
    (stage / "digest").write_text(digest(stage))


def digest(path: Path) -> str:
    return hashlib.sha256((path / "rank0" / "a").read_bytes() + (path / "b").read_bytes()).hexdigest()


def digested(path: Path) -> str | None:
    try:
        return None if digest(path) == (path / "digest").read_text() else "wrong digest"
    except FileNotFoundError as error:
        return f"no {error.filename}"


def run_at(root: Path, *iterations: Iteration, tracker: Iteration | None = None) -> Checkpoints:
    """A directory with these checkpoints, the last of them the latest, or the one given."""
    checkpoints = Checkpoints(root, check=digested, durable=False)
    for iteration in iterations:
        checkpoints.save(iteration, write)
    if tracker is not None:
        (root / TRACKER).write_text(str(tracker))
    return checkpoints


def tear(root: Path, *iterations: Iteration) -> None:
    for iteration in iterations:
        (root / place(iteration) / "digest").unlink()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def chosen(found: Found | None, *says: str) -> tuple[Path, Iteration]:
    """What was found, if its notes say just that."""
    assert found is not None and digested(found.path) is None
    assert bool(found.notes) == bool(says) and all(word in "\n".join(found.notes) for word in says), found.notes
    return found.path, found.iteration


def refused(call: Callable[[], object], *says: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert "to do: " in str(caught.value) and all(word in str(caught.value) for word in says), str(caught.value)


# --- which one to resume from -----------------------------------------------------------------------------------------


def test_layout_is_megatrons(tmp_path: Path) -> None:
    run_at(tmp_path / "new" / "run", 7, 1200, 12345678)
    assert names(tmp_path / "new" / "run") == ["iter_0000007", "iter_0001200", "iter_12345678", TRACKER]
    assert (tmp_path / "new" / "run" / TRACKER).read_bytes() == b"12345678"
    run_at(tmp_path / "r", "release")
    assert names(tmp_path / "r") == [TRACKER, "release"] and (tmp_path / "r" / TRACKER).read_bytes() == b"release"


@pytest.mark.parametrize("text", ["20", "20\n", " 20 "])
def test_tracker_decides(text: str, tmp_path: Path) -> None:
    run = run_at(tmp_path, 10, 20)
    (tmp_path / TRACKER).write_text(text)
    assert chosen(run.resume()) == (tmp_path / "iter_0000020", 20)


def test_tracker_set_back_by_hand(tmp_path: Path) -> None:
    run = run_at(tmp_path, 10, 20, 30, tracker=10)
    assert chosen(run.resume(), "iter_0000020", "iter_0000030", "newer") == (tmp_path / "iter_0000010", 10)


def test_release(tmp_path: Path) -> None:
    assert chosen(run_at(tmp_path, "release").resume()) == (tmp_path / "release", "release")
    assert chosen(run_at(tmp_path, 5).resume())[1] == 5
    tear(tmp_path, 5)
    assert chosen(run_at(tmp_path).resume(), "iter_0000005 is not whole", "release")[1] == "release"


def test_torn_latest_falls_back_to_the_newest_whole(tmp_path: Path) -> None:
    run = run_at(tmp_path, 10, 20, 30, 40)
    tear(tmp_path, 30, 40)
    found = run.resume()
    assert chosen(found, "iter_0000040 is not whole", "iter_0000030 is not whole", "iter_0000020")[1] == 20


def test_no_tracker(tmp_path: Path) -> None:
    run = run_at(tmp_path, 9, 10000000)
    (tmp_path / TRACKER).unlink()
    assert chosen(run.resume(), TRACKER)[1] == 10000000


def test_explicit_iteration(tmp_path: Path) -> None:
    run = run_at(tmp_path, 10, 20, 30)
    assert chosen(run.resume(10)) == (tmp_path / "iter_0000010", 10)
    tear(tmp_path, 20)
    refused(lambda: run.resume(20), "iteration 20", "digest")
    refused(lambda: run.resume(25, fresh=True), "iteration 25", "iter_0000030", "no such directory")


@pytest.mark.parametrize("text", ["", "latest", "40", "-1", "２０", "iter_0000020", "\0", "9" * 100])
def test_tracker_that_names_nothing(text: str, tmp_path: Path) -> None:
    run = run_at(tmp_path, 10, 20)
    (tmp_path / TRACKER).write_text(text)
    refused(lambda: run.resume(fresh=True), "tracker", TRACKER, "iter_0000020")
    assert chosen(run.resume(20))[1] == 20


def test_tracker_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_bytes(b"\xff\xfe")
    refused(lambda: Checkpoints(tmp_path).resume(fresh=True), "tracker")


@pytest.mark.parametrize("there", [False, True])
def test_nothing_at_all_is_a_fresh_start_only_if_allowed(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "run" / "tensorboard").mkdir(parents=True)
        (tmp_path / "run" / "iter_7").mkdir()  # not how an iteration is spelled
    run = Checkpoints(tmp_path / "run")
    refused(run.resume, "no checkpoint to resume", str(tmp_path / "run"), "fresh")
    assert run.resume(fresh=True) is None
    assert run.resume(fresh=True, non_persistent=Checkpoints(tmp_path / "second")) is None


def test_only_torn_ones_are_no_fresh_start(tmp_path: Path) -> None:
    run = run_at(tmp_path, 10, 20)
    tear(tmp_path, 10, 20)
    refused(lambda: run.resume(fresh=True), "whole", "iter_0000010 is not whole", "iter_0000020 is not whole")
    (tmp_path / TRACKER).unlink()
    refused(lambda: run.resume(fresh=True), "whole")


def test_a_checkpoint_itself_is_no_fresh_start(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    refused(lambda: Checkpoints(hf_model("llama3")).resume(fresh=True), "one checkpoint")
    run = run_at(tmp_path, 10)
    refused(lambda: Checkpoints(tmp_path / "iter_0000010", check=run._check).resume(fresh=True), "one checkpoint")


def test_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(lambda: Checkpoints(tmp_path / "file").resume(fresh=True), "cannot be read")
    refused(lambda: Checkpoints(tmp_path / "file").save(1, write), "cannot be written", kind=TargetError)
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: Checkpoints(tmp_path / "loop").save(1, write), "cannot be written", kind=TargetError)


@pytest.mark.parametrize("kind", ["megatron", "megatron-legacy"])
def test_whole_is_what_opens(kind: str, hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """With real checkpoints: each file of one is missed, and each data file that is cut short."""
    made = tmp_path / "made"
    registry.convert(hf_model("llama3"), made, to=kind, parallel=registry.Parallel(tp=2, pp=2), durable=False)
    run = Checkpoints(tmp_path / "run", durable=False)
    for iteration in (10, 20):
        run.save(iteration, lambda stage: shutil.copytree(made / "release", stage, dirs_exist_ok=True))
    found = run.resume()
    assert found is not None and found.iteration == 20 and not found.notes
    data = [p for p in found.path.rglob("*") if p.suffix in (".pt", ".distcp") and p.name != "common.pt"]
    data += [p for p in [found.path / ".metadata"] if p.exists()]
    assert len(data) >= 4
    for path in data:
        for size in (None, path.stat().st_size // 2, path.stat().st_size - 1, 0):
            hidden = path.rename(tmp_path / "hidden")
            if size is not None:
                path.write_bytes(hidden.read_bytes()[:size])
            back = run.resume()
            assert back is not None and back.iteration == 10 and back.notes, (path, size)
            hidden.replace(path)
    assert run.resume() == found


# --- a second place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "latest"),
    [([10], [20], 20), ([20], [10], 20), ([20], [20], 20), ([], [10], 10), ([10], [], 10), (["release"], [3], 3)],
)
def test_newer_of_both_places(first: list[Any], second: list[Any], latest: int, tmp_path: Path) -> None:
    run, other = run_at(tmp_path / "a", *first), run_at(tmp_path / "b", *second)
    found = run.resume(non_persistent=other)
    assert found is not None and chosen(found)[1] == latest
    assert found.persistent == (second == [] or (first == [20] and second == [10]))


def test_second_place_that_is_broken_costs_nothing(tmp_path: Path) -> None:
    run, other = run_at(tmp_path / "a", 10), run_at(tmp_path / "b", 20, 30)
    tear(tmp_path / "b", 30)
    assert chosen(run.resume(non_persistent=other), "iter_0000030", "iter_0000020")[1] == 20
    tear(tmp_path / "b", 20)
    assert chosen(run.resume(non_persistent=other), str(tmp_path / "b"), "ignored")[1] == 10
    (tmp_path / "b" / TRACKER).write_text("nonsense")
    assert chosen(run.resume(non_persistent=other), "nonsense", "ignored")[1] == 10
    assert chosen(run.resume(non_persistent=run_at(tmp_path / "c", "release")), "no release", "ignored")[1] == 10
    empty = Checkpoints(tmp_path / "empty", check=digested)
    refused(lambda: empty.resume(fresh=True, non_persistent=other), "nonsense")


def test_second_place_helps_where_the_first_is_torn(tmp_path: Path) -> None:
    run, other = run_at(tmp_path / "a", 30), run_at(tmp_path / "b", 20)
    tear(tmp_path / "a", 30)
    assert chosen(run.resume(non_persistent=other), "iter_0000030")[1] == 20
    refused(lambda: run.resume(non_persistent=Checkpoints(tmp_path / "c")), "iter_0000030")
    (tmp_path / "a" / TRACKER).write_text("40")  # but what only a person can have done, a person decides
    refused(lambda: run.resume(non_persistent=other), "tracker")


def test_explicit_iteration_in_either_place(tmp_path: Path) -> None:
    run, other = run_at(tmp_path / "a", 10, 20), run_at(tmp_path / "b", 10, 30)
    for iteration, place_, persistent in ((10, "a", True), (20, "a", True), (30, "b", False)):
        found = run.resume(iteration, non_persistent=other)
        assert found == Found(tmp_path / place_ / place(iteration), iteration, persistent)
    refused(lambda: run.resume(40, non_persistent=other), str(tmp_path / "a"), str(tmp_path / "b"))


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "every", "left"),
    [
        (1, None, [100]),
        (3, None, [80, 90, 100]),
        (1, 30, [30, 60, 90, 100]),
        (2, 50, [50, 90, 100]),
        (None, 50, list(range(10, 101, 10))),
        (99, None, list(range(10, 101, 10))),
    ],
)
def test_retention(last: int | None, every: int | None, left: list[int], tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, check=digested, durable=False)
    removed = []
    for iteration in range(10, 101, 10):
        pruned = run.save(iteration, write, retention=Retention(last, every))
        assert pruned.removed == sorted(pruned.removed) and not pruned.notes
        removed += pruned.removed
    assert run.present() == left[::-1] and sorted(removed + left) == list(range(10, 101, 10))
    assert names(tmp_path) == [*map(place, left), TRACKER]


def test_retention_spares_what_is_named_newest_or_not_whole(tmp_path: Path) -> None:
    run = run_at(tmp_path, *range(10, 71, 10), "release", tracker=50)
    tear(tmp_path, 20, 70)
    pruned = run.prune(Retention(last=1))
    assert pruned.removed == [10, 30, 40] and "iteration 20 is left alone" in "\n".join(pruned.notes)
    assert run.present() == [70, 60, 50, 20, "release"]
    tear(tmp_path, 50)  # the tracker's: now the newest whole one counts
    assert run.prune(Retention(last=1)).removed == [] and 60 in run.present()
    for text in ("nonsense", "55"):
        (tmp_path / TRACKER).write_text(text)
        pruned = run.prune(Retention(last=1))
        assert pruned.removed == [] and text in "\n".join(pruned.notes)


def test_retention_leaves_links(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run", 10, 20)
    (tmp_path / "run" / "iter_0000010").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "iter_0000010").symlink_to(tmp_path / "elsewhere")
    pruned = run.save(30, write, retention=Retention(last=1))
    assert pruned.removed == [20] and "link" in "\n".join(pruned.notes) and digested(tmp_path / "elsewhere") is None


@given(
    numbers=st.sets(st.integers(0, 12), max_size=12), bad=st.sets(st.integers(0, 12)), last=st.integers(1, 4),
    every=st.none() | st.integers(1, 4), data=st.data(),
)  # fmt: skip
def test_what_retention_keeps(numbers: set[int], bad: set[int], last: int, every: int | None, data: Any) -> None:
    """Said the other way round: what goes is whole, older than enough whole ones up to the tracker's, no multiple."""
    whole = numbers - bad
    latest = data.draw(st.none() | st.sampled_from(sorted(whole))) if whole else None
    gone = Retention(last, every).expendable(
        sorted(numbers, reverse=True), latest, lambda i: "torn" if i in bad else None, []
    )
    assert gone == sorted(gone) and len(gone) == len(set(gone))
    for i in numbers:
        younger = [j for j in whole if j > i and (latest is None or j <= latest)]
        beyond = latest is not None and i > latest
        assert (i in gone) == (i in whole and not beyond and len(younger) >= last and not (every and i % every == 0))


@pytest.mark.parametrize("values", [{"last": 0}, {"last": -1}, {"every": 0}, {"last": True}, {"every": 1.5}])
def test_retention_that_makes_no_sense(values: dict[str, Any]) -> None:
    refused(lambda: Retention(**values), next(iter(values)), kind=ArgumentError)


# --- saves that fail, and two at a time -------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", [-1, True, "latest", 1.0])
def test_iteration_that_is_none(iteration: Any, tmp_path: Path) -> None:
    refused(lambda: Checkpoints(tmp_path).save(iteration, write), "not an iteration", kind=ArgumentError)
    refused(lambda: Checkpoints(tmp_path).resume(iteration), "not an iteration", kind=ArgumentError)


def test_save_that_fails_changes_nothing(tmp_path: Path) -> None:
    run = run_at(tmp_path, 10)

    def fails(stage: Path) -> None:
        write(stage)
        raise RuntimeError("out of luck")

    for iteration in (10, 20):
        with pytest.raises(RuntimeError, match="out of luck"):
            run.save(iteration, fails)
        refused(lambda i=iteration: run.save(i, lambda _: None), "no whole checkpoint", kind=TargetError)
        assert names(tmp_path) == ["iter_0000010", TRACKER] and chosen(run.resume())[1] == 10
    with pytest.raises(TargetError, match="nothing was written"):
        run.save(20, lambda _: None, verify=False)


def test_same_iteration_again_replaces_it(tmp_path: Path) -> None:
    run = run_at(tmp_path, 10)
    run.save(10, lambda stage: write(stage, "new"))
    assert (tmp_path / "iter_0000010" / "b").read_text() == "new b" and names(tmp_path) == ["iter_0000010", TRACKER]


def test_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    run, second = run_at(tmp_path, 10), Checkpoints(tmp_path, check=digested)
    with run.saving(20) as (stage, _):
        refused(lambda: second.save(30, write), "another run", kind=TargetError)
        refused(lambda: second.prune(Retention(last=1)), "another run", kind=TargetError)
        assert chosen(second.resume())[1] == 10
        write(stage)
    second.save(30, write)
    assert run.present() == [30, 20, 10]


def test_stage_of_a_conversion_that_runs_is_left_alone(tmp_path: Path) -> None:
    """Which does not know of our lock, only of its own."""
    run = run_at(tmp_path, 10)
    with commit.staged(tmp_path / "iter_0000015", needed=0, durable=False) as stage:
        write(stage)
        assert "lock" in "\n".join(run.save(20, write).notes)
    assert run.present() == [20, 15, 10]


# --- crashes ----------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is dead. Nothing catches it."""


WRITES = {
    os: ["rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "open"],
    io: ["open"],
}


@contextmanager
def dying(at: int | None, *, swap: bool) -> Iterator[list[str]]:
    """Let the call of this number, and all after it, fail. Yields the names of the calls that were made.

    Without `swap` directories cannot be exchanged in one step.
    """
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if at is not None and len(calls) >= at:
                raise Crash
            calls.append(name)
            return None if name == "fsync" else function(*args, **kwargs)  # the disk need not turn for this

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, functions in WRITES.items():
            for name in functions:
                patch.setattr(module, name, counted(name, getattr(module, name)))
        patch.setattr(commit.shutil, "_use_fd_functions", True)
        if swap:
            patch.setattr(commit, "_exchange", counted("swap", commit._exchange))
        else:
            patch.setattr(commit.ctypes, "CDLL", lambda *_, **__: object())
        yield calls


def crashes(at: int | None, swap: bool, run: Callable[[], object]) -> list[str] | None:
    """The calls that were made, or None if it died."""
    with dying(at, swap=swap) as calls:
        try:
            run()
        except Crash:
            return None
        return list(calls)


#: What is there, what the tracker names, and what is saved, with what retention.
SCENARIOS: dict[str, tuple[list[int], int | None, int, Retention | None]] = {
    "first": ([], None, 10, None),
    "next": ([10, 20], None, 30, None),
    "retention": ([10, 20, 30], None, 40, Retention(last=2)),
    "retention of some": ([10, 20, 30, 40], None, 50, Retention(last=1, every=20)),
    "replacing": ([10, 20], None, 20, Retention(last=1)),
    "rolled back": ([10, 20, 30], 10, 20, Retention(last=1)),
}


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_crash_at_every_call(scenario: str, swap: bool, tmp_path: Path) -> None:
    """And a second one in the run that comes after it: at every 23rd call, beginning with another each time."""
    there, tracker, saved, retention = SCENARIOS[scenario]
    start = tmp_path / "start"
    start.mkdir()
    run_at(start, *there, tracker=tracker)
    old = Checkpoints(start, check=digested).tracked()
    for first in range(10**6):
        root = shutil.copytree(start, tmp_path / f"{first}")
        run = Checkpoints(root, check=digested)
        done = crashes(first, swap, lambda run=run: run.save(saved, lambda s: write(s, "new"), retention=retention))
        check_state(root, old, there, saved, retention)
        for second in range(first % 23, 10**6, 23):
            again = shutil.copytree(root, tmp_path / f"{first}.{second}")
            later = Checkpoints(again, check=digested)
            ended = crashes(second, swap, lambda run=later: run.save(saved, write, retention=retention))
            check_state(again, old, there, saved, retention)
            if ended is not None:
                assert later.tracked() == saved and not [n for n in names(again) if n.startswith(".")]
            shutil.rmtree(again)
            if ended is not None:
                break
        shutil.rmtree(root)
        if done is not None:
            assert first > 10 and done.count("fsync") >= 5
            break


def check_state(root: Path, old: Any, there: list[int], saved: int, retention: Retention | None) -> None:
    """Everything that can be seen is whole, the latest one is the old or the new one, and what must stay has stayed."""
    run = Checkpoints(root, check=digested)
    if old is None:
        found = run.resume(fresh=True)
        assert found is None or chosen_any(found) == saved
    else:
        found = run.resume()
        assert found is not None and chosen_any(found) in (old, saved)
    if found is not None:
        assert run.torn(found.iteration) is None
    present = set(run.present())
    assert all(run.torn(i) is None for i in present)
    kept = set(there)
    if retention is not None and retention.last is not None:
        before = sorted({i for i in {*there, saved} if i <= saved}, reverse=True)
        kept -= {i for i in before[retention.last :] if not (retention.every and i % retention.every == 0)}
    assert kept <= present <= {*there, saved}


def chosen_any(found: Found) -> Iteration:
    assert digested(found.path) is None
    return found.iteration


def test_everything_is_synced_before_it_is_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files before the directory is renamed, its new name before the tracker, the tracker before anything goes."""
    log: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(fd: int) -> None:
        log.append("sync " + Path(f"/proc/self/fd/{fd}").readlink().relative_to(tmp_path).as_posix())
        fsync(fd)

    def moved(function: Callable[..., None]) -> Callable[..., None]:
        def call(a: Path, b: Path) -> None:
            log.append(f"move {Path(a).name} {Path(b).name}")
            function(a, b)

        return call

    run = run_at(tmp_path, 10)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved(replace))
    monkeypatch.setattr(os, "rename", moved(rename))
    Checkpoints(tmp_path, check=digested).save(20, write, retention=Retention(last=1))
    assert run.present() == [20]
    stage = ".iter_0000020.partial"
    files = {f"sync {stage}/{name}" for name in ("rank0/a", "b", "digest", "rank0")} | {f"sync {stage}"}
    at = log.index(f"move {stage} iter_0000020")
    assert files <= set(log[:at])
    assert log[at + 1 :] == [
        "sync .", f"sync .{TRACKER}.partial", f"move .{TRACKER}.partial {TRACKER}", "sync .",
        "move iter_0000010 .iter_0000010.deleted", "sync .",
    ]  # fmt: skip


def save_until_killed(root: Path, begin: int, seed: int) -> None:
    """A training run: checkpoints of some size, fast, every other one twice."""
    draw = random.Random(seed)
    run = Checkpoints(root, check=digested)
    for i in range(10**6):
        text = draw.randbytes(draw.randrange(100_000)).hex()
        run.save(begin + i * 2 // 3, lambda stage, t=text: write(stage, t), retention=Retention(2, 10))


def test_killed_again_and_again(tmp_path: Path) -> None:
    """Fifty runs, or as many as it takes to get on, each killed at a moment of chance; the next one resumes."""
    run, latest = Checkpoints(tmp_path, check=digested), 0
    context = multiprocessing.get_context("fork")
    for seed in range(500):
        if seed >= 50 and latest > 50:
            break
        process = context.Process(target=save_until_killed, args=(tmp_path, latest + 1, seed))
        process.start()
        time.sleep(random.Random(seed).uniform(0.0, 0.12))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = run.resume(fresh=latest == 0)
        if found is None:
            continue
        assert digested(found.path) is None and isinstance(found.iteration, int)
        assert all(run.torn(i) is None for i in run.present())
        assert found.iteration >= latest and run.tracked() in (found.iteration, None)
        latest = found.iteration
    assert latest > 50, "the runs hardly got anywhere"
    run.save(latest + 1, write, retention=Retention(2, 10))
    assert [n for n in names(tmp_path) if n.startswith(".")] == []
    assert set(range(10, latest, 10)) <= set(run.present())


def test_openable_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    assert "metadata" in str(openable(tmp_path)) and openable(tmp_path / "none") == "no such checkpoint"
