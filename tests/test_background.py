"""Saving beside the training: when it waits, where errors come out, and ranks that agree or do not."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from registry.background import AsyncSaver, Write
from registry.board import Board, FileBoard, StoreBoard
from registry.errors import ArgumentError, TargetError
from registry.manager import TRACKER, Checkpoints
from registry.retention import Retention

WORLD = 4


def complete(path: Path) -> str | None:
    """Whole if the seal, which is written last, names all files that are there."""
    try:
        expected = (path / "seal").read_text().split()
    except FileNotFoundError:
        return "no seal"
    found = sorted(p.name for p in path.iterdir() if p.name != "seal")
    return None if expected == found and all((path / name).stat().st_size == 9 for name in found) else "files missing"


def seal(stage: Path) -> None:
    (stage / "seal").write_text(" ".join(sorted(p.name for p in stage.iterdir())))


def put(stage: Path, name: str = "rank0", text: str = "some data") -> None:
    (stage / name).write_text(text)


def write(stage: Path) -> None:
    put(stage)
    seal(stage)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "run", check=complete, durable=False)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a writer waits for; opened at the end, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


def gated(gate: threading.Event) -> Write:
    def wait_and_write(stage: Path) -> None:
        assert gate.wait(30)
        write(stage)

    return wait_and_write


# --- one rank ---------------------------------------------------------------------------------------------------------


def test_snapshot_now_and_the_rest_later(run: Checkpoints, gate: threading.Event) -> None:
    """The training goes on when the snapshot has been taken, and what it changes then is not what is saved."""
    state = torch.zeros(9, dtype=torch.uint8)
    with AsyncSaver() as saver:

        def snapshot() -> Write:
            copy = state.clone()

            def later(stage: Path) -> None:
                assert gate.wait(30)
                (stage / "rank0").write_bytes(copy.numpy().tobytes())
                seal(stage)

            return later

        saver.save(run, 10, snapshot)
        state += 1
        assert saver.in_flight and run.resume(fresh=True) is None
        gate.set()
        saver.wait()
        assert not saver.in_flight and run.tracked() == 10
    assert (run.root / "iter_0000010" / "rank0").read_bytes() == bytes(9)


def test_second_save_waits(run: Checkpoints, gate: threading.Event) -> None:
    seen = []
    with AsyncSaver() as saver:
        saver.save(run, 10, lambda: gated(gate))
        threading.Timer(0.1, gate.set).start()
        saver.save(run, 20, lambda: (seen.append(run.tracked()), write)[1])
    assert seen == [10] and run.tracked() == 20


def test_second_save_is_refused_where_that_is_asked(run: Checkpoints, gate: threading.Event) -> None:
    with AsyncSaver(busy="refuse") as saver:
        saver.save(run, 10, lambda: gated(gate))
        with pytest.raises(TargetError, match="still in flight"):
            saver.save(run, 20, lambda: write)
        gate.set()
        saver.wait()
        saver.save(run, 30, lambda: write)
    assert run.present() == [30, 10]


def fails(stage: Path) -> None:
    put(stage)
    raise OSError(28, "No space left on device", str(stage / "rank0"))


@pytest.mark.parametrize("call", ["save", "wait", "close", "exit"])
def test_error_comes_out_at_the_next_call(call: str, run: Checkpoints) -> None:
    run.save(10, write)
    saver = AsyncSaver()
    saver.save(run, 20, lambda: fails)
    with pytest.raises(TargetError, match="No space left"):
        if call == "save":
            saver.save(run, 30, lambda: write)
        elif call == "exit":
            with saver:
                pass
        else:
            getattr(saver, call)()
    assert run.tracked() == 10 and names(run.root) == ["iter_0000010", TRACKER]
    saver.wait()  # told once
    if call in ("save", "wait"):
        saver.save(run, 30, lambda: write)
        saver.close()
        assert run.tracked() == 30


def test_error_of_the_training_is_not_hidden(run: Checkpoints) -> None:
    with pytest.raises(ZeroDivisionError) as caught, AsyncSaver() as saver:
        saver.save(run, 10, lambda: fails)
        raise ZeroDivisionError
    assert "No space left" in "".join(caught.value.__notes__)


def test_snapshot_that_fails(run: Checkpoints) -> None:
    with AsyncSaver() as saver:
        with pytest.raises(ZeroDivisionError):
            saver.save(run, 10, lambda: 1 // 0)  # type: ignore[arg-type,return-value]
        with pytest.raises(ArgumentError, match="nothing to run"):
            saver.save(run, 10, lambda: None)  # type: ignore[arg-type,return-value]
        saver.save(run, 20, lambda: write)
    assert run.present() == [20]


def test_closed(run: Checkpoints) -> None:
    with AsyncSaver() as saver:
        pass
    with pytest.raises(ArgumentError, match="closed"):
        saver.save(run, 10, lambda: write)


def test_program_that_ends_without_close(tmp_path: Path) -> None:
    """The save is ended first, and its error is printed."""
    program = """
import sys, time
from pathlib import Path
from registry.background import AsyncSaver
from registry.manager import Checkpoints
def write(stage):
    time.sleep(0.3)
    (stage / "file").write_text("data")
    if len(sys.argv) > 2: raise RuntimeError("out of luck")
saver = AsyncSaver()
saver.save(Checkpoints(sys.argv[1], check=lambda path: None), 10, lambda: write)
"""
    line = [sys.executable, "-c", program, str(tmp_path / "run")]
    ended = subprocess.run([*line, "bad"], capture_output=True, text=True, timeout=60)
    assert "out of luck" in ended.stderr and names(tmp_path / "run") == []
    assert subprocess.run(line, capture_output=True, text=True, timeout=60).stderr == ""
    assert (tmp_path / "run" / TRACKER).read_text() == "10"


def test_retention_and_a_second_place(tmp_path: Path, run: Checkpoints) -> None:
    other = Checkpoints(tmp_path / "local", check=complete, durable=False)
    with AsyncSaver() as saver:
        for iteration in range(10, 61, 10):
            saver.save(run, iteration, lambda: write, retention=Retention(last=2))
            saver.save(other, iteration + 5, lambda: write, retention=Retention(last=1))
        assert saver.wait().removed == [15, 10, 25, 20, 35, 30, 45, 40, 55]
        assert saver.wait().removed == []
    assert run.present() == [60, 50] and other.present() == [65]
    found = run.resume(non_persistent=other)
    assert found is not None and found.iteration == 65 and not found.persistent


def test_two_savers_on_one_directory(run: Checkpoints, gate: threading.Event) -> None:
    with AsyncSaver() as saver, AsyncSaver() as second:
        entered = threading.Event()

        def slow(stage: Path) -> None:
            entered.set()
            gated(gate)(stage)

        saver.save(run, 10, lambda: slow)
        assert entered.wait(30)
        second.save(run, 20, lambda: write)
        with pytest.raises(TargetError, match="another run"):
            second.wait()
        gate.set()
    assert run.present() == [10]


# --- a process that writes --------------------------------------------------------------------------------------------


def write_tensor(stage: Path, tensor: torch.Tensor, pid: int) -> None:
    assert os.getpid() != pid
    put(stage, text=bytes(tensor.tolist()).decode())
    seal(stage)


def say_and_sleep(stage: Path, says: Path) -> None:
    says.write_text(str(os.getpid()))
    time.sleep(60)


def test_process_writes(run: Checkpoints) -> None:
    tensor = torch.tensor(list(b"some data"), dtype=torch.uint8)
    with AsyncSaver(processes=True) as saver:
        saver.save(run, 10, lambda: functools.partial(write_tensor, tensor=tensor, pid=os.getpid()))
        saver.wait()
        saver.save(run, 20, lambda: fails)
        with pytest.raises(TargetError, match="No space left"):
            saver.wait()
        saver.save(run, 30, lambda: lambda stage: None)
        with pytest.raises(Exception, match="pickle"):
            saver.wait()
    assert (run.root / "iter_0000010" / "rank0").read_text() == "some data" and run.present() == [10]


def test_process_that_is_killed(run: Checkpoints, tmp_path: Path) -> None:
    says = tmp_path / "says"
    with AsyncSaver(processes=True) as saver:
        saver.save(run, 10, lambda: functools.partial(say_and_sleep, says=says))
        os.kill(int(awaited(says)), signal.SIGKILL)
        with pytest.raises(TargetError, match="exit status -9"):
            saver.wait()
    assert run.present() == [] and names(run.root) == []


def awaited(path: Path) -> str:
    until = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return path.read_text()


def test_process_dies_with_the_training(tmp_path: Path) -> None:
    """Else it would write on when the lock is gone, perhaps into the directory of the next run."""
    program = """
import functools, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.test_background import say_and_sleep
from registry.background import AsyncSaver
from registry.manager import Checkpoints
if __name__ == "__main__":
    saver = AsyncSaver(processes=True)
    saver.save(Checkpoints(sys.argv[1]), 10, lambda: functools.partial(say_and_sleep, says=Path(sys.argv[2])))
"""
    (tmp_path / "program.py").write_text(program)
    says = tmp_path / "says"
    home = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, tmp_path / "program.py", tmp_path / "run", says, home]) as training:
        writer = int(awaited(says))
        training.kill()
    until = time.monotonic() + 10
    while alive(writer) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(writer)
    run = Checkpoints(tmp_path / "run", check=complete)
    run.save(20, write)
    assert names(run.root) == ["iter_0000020", TRACKER]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["files", "store"])
def boards(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Board]:
    """Each rank's own hold on one board."""
    if request.param == "files":
        (tmp_path / "board").mkdir()
        return lambda: FileBoard(tmp_path / "board")
    master = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: StoreBoard(torch.distributed.TCPStore("127.0.0.1", master.port, wait_for_workers=False))


def together(boards: Callable[[], Board], work: Callable[[AsyncSaver, int], Any], **options: Any) -> list[str]:
    """What each rank's work raised, or "". The ranks are threads, each with a saver of its own."""
    said = [""] * WORLD

    def rank(i: int) -> None:
        saver = AsyncSaver(rank=i, world=WORLD, board=boards(), timeout=20, poll=0.005, **options)
        try:
            with saver:
                work(saver, i)
        except Exception as error:
            said[i] = f"{error}" or type(error).__name__

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return said


def part(i: int, wait: float = 0) -> Write:
    def write_part(stage: Path) -> None:
        time.sleep(wait)
        put(stage, f"rank{i}")

    return write_part


ALL = [f"rank{i}" for i in range(WORLD)]


def test_ranks_write_one_checkpoint(boards: Callable[[], Board], run: Checkpoints) -> None:
    """And rank 0 seals it when the last one, each time another, has written."""

    def work(saver: AsyncSaver, i: int) -> None:
        for n in range(1, 9):
            wait = 0.05 if n % WORLD == i else 0
            saver.save(run, n, lambda wait=wait: part(i, wait), finalize=seal, retention=Retention(last=3))

    assert together(boards, work) == [""] * WORLD
    assert run.present() == [8, 7, 6] and run.tracked() == 8
    assert all(names(run.root / f"iter_000000{n}") == [*ALL, "seal"] for n in (6, 7, 8))


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("how", ["write", "snapshot", "iteration", "busy"])
def test_one_rank_that_fails_fails_all(how: str, bad: int, boards: Callable[[], Board], run: Checkpoints) -> None:
    """On every rank, without a hang; the next save, of all of them, ends well."""
    run.save(10, write)
    raised: dict[int, str] = {}

    def snapshot(i: int) -> Write:
        if how == "snapshot" and i == bad:
            raise RuntimeError("out of luck")
        return fails if how == "write" and i == bad else part(i)

    def work(saver: AsyncSaver, i: int) -> None:
        try:
            if how == "busy" and i == bad:
                saver._closed = True
            saver.save(run, 21 if how == "iteration" and i == bad else 20, lambda: snapshot(i), finalize=seal)
            saver.wait()
        except Exception as error:
            raised[i] = str(error)
        saver._closed = False
        saver.save(run, 30, lambda: part(i), finalize=seal)

    assert together(boards, work) == [""] * WORLD
    assert sorted(raised) == list(range(WORLD))
    word = {"write": "No space left", "snapshot": "out of luck", "iteration": "disagree", "busy": "closed"}[how]
    assert all(word in text for text in raised.values()), raised
    assert run.present() == [30, 10] and names(run.root / "iter_0000030") == [*ALL, "seal"]


def test_directory_is_not_let_go_while_a_rank_writes(boards: Callable[[], Board], run: Checkpoints) -> None:
    """Rank 0 fails at once; the slow one still writes into a directory that is locked."""
    seen = []

    def slow(stage: Path) -> None:
        time.sleep(0.3)
        put(stage, "rank1")
        with pytest.raises(TargetError, match="another run"):
            run.save(50, write)
        seen.append(stage.exists())

    def work(saver: AsyncSaver, i: int) -> None:
        saver.save(run, 20, lambda: fails if i == 0 else slow if i == 1 else part(i), finalize=seal)

    assert all("No space left" in text for text in together(boards, work))
    assert seen == [True] and names(run.root) == []


def test_ranks_without_a_board() -> None:
    with pytest.raises(ArgumentError, match="agree by"):
        AsyncSaver(rank=1, world=2)


def train(root: Path, board: Path, rank: int, begin: int) -> None:
    run = Checkpoints(root, check=complete)
    draw = random.Random(rank)
    with AsyncSaver(rank=rank, world=WORLD, board=FileBoard(board), timeout=0.25, poll=0.001) as saver:
        for n in range(begin, 10**6):
            wait = draw.uniform(0, 0.004)
            saver.save(run, n, lambda wait=wait: part(rank, wait), finalize=seal, retention=Retention(last=2))


def test_killed_ranks(tmp_path: Path) -> None:
    """Fifty runs of four processes, one of which is killed at a moment of chance: the others end with an error."""
    run, latest = Checkpoints(tmp_path / "run", check=complete), 0
    context = multiprocessing.get_context("fork")
    for seed in range(50):
        draw = random.Random(seed)
        board = tmp_path / f"board{seed}"
        board.mkdir()
        ranks = [context.Process(target=train, args=(run.root, board, i, latest + 1)) for i in range(WORLD)]
        for process in ranks:
            process.start()
        time.sleep(draw.uniform(0, 0.15))
        victim = draw.choice(ranks)
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        for process in ranks:
            process.join(30)
            assert process.exitcode == (-signal.SIGKILL if process is victim else 1)
        assert all(run.torn(i) is None for i in run.present())
        found = run.resume(fresh=latest == 0)
        if found is not None:
            assert isinstance(found.iteration, int) and found.iteration >= latest
            assert names(found.path) == [*ALL, "seal"]
            latest = found.iteration
    assert latest > 20, "the runs hardly got anywhere"
