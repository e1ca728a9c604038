"""One operation, broken at each of its calls in each way, and what came of it."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import random
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from registry.errors import RegistryError
from tests.faults.inject import CHANGES, MOVES_BYTES, TAKES_SPACE, Action, Call, Fault, Watch
from tests.faults.operations import Operation, State, held, left_over, seen
from tests.faults.order import violations

_PATIENCE = 60  # seconds that one call of an operation may take
#: Calls whose failure a writer must tell, unless they clear up. (A copy by the system may be made in another way.)
_MUST_TELL = frozenset({"create", "write", "truncate", "sync", "rename", "mkdir"})

KINDS = ("killed", "ENOSPC", "EIO", "disk gone", "short", "short, full")


def faults(calls: Sequence[Call]) -> Iterator[tuple[str, Fault]]:
    """Every way to break each call that a run without faults made.

    A process that dies before a call leaves what it left when it died after the call before; and a call that changes
    nothing leaves what was there. So those that change something are enough to kill it at, and the first.
    """
    for at, call in enumerate(calls):
        if at == 0:
            yield "killed", Fault(at, Action.KILL_BEFORE)
        if call.kind in CHANGES:
            yield "killed", Fault(at, Action.KILL_AFTER)
            yield "disk gone", Fault(at, Action.FAIL, errno.EIO, CHANGES | {"sync"}, errno.EIO)
        if call.kind in TAKES_SPACE:
            yield "ENOSPC", Fault(at, Action.FAIL, errno.ENOSPC)
        yield "EIO", Fault(at, Action.FAIL, errno.EIO)
        if call.kind in MOVES_BYTES and call.size > 1:
            yield "short", Fault(at, Action.SHORT)
        if call.kind in MOVES_BYTES - {"read"} and call.size > 1:
            yield "short, full", Fault(at, Action.SHORT, then=frozenset({"write", "copy"}), then_error=errno.ENOSPC)


@dataclass
class Row:
    """The line of one operation in the table; `bad` are the trials that broke a promise."""

    name: str
    calls: int = 0
    trials: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    left: int = 0  # trials whose process lived, and left something for the next one to remove
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Row) -> None:
        """The other's trials too."""
        self.trials += other.trials
        self.outcomes += other.outcomes
        self.left += other.left
        self.bad += other.bad
        self.seconds += other.seconds


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How a process ended: `said` is "ok", "error: ..." for one of ours, "stranger: ...", or "" where it was killed."""

    said: str

    @property
    def ok(self) -> bool:
        return self.said == "ok"

    @property
    def killed(self) -> bool:
        return self.said == ""


def _called(operation: Operation, root: Path, watch: Watch | None) -> str:
    """Make the call here, armed with what `watch` is set to, and say how it ended."""
    try:
        random.seed(0)  # a fork draws anew, and the generators' states are saved
        if watch is not None:
            watch.arm()
        try:
            operation.act(root)
            return "ok"
        except RegistryError as error:
            return f"error: {type(error).__name__}: {error}"
        finally:
            if watch is not None:
                watch.disarm()
    except BaseException:
        return f"stranger: {traceback.format_exc()}"


def _child(operation: Operation, root: Path, rank: int, store: Path, watch: Watch | None, pipe: int) -> None:
    said = "stranger: nothing was called"
    try:
        if operation.ranks > 1:
            _join(operation.ranks, rank, store)
        said = _called(operation, root, watch if rank == operation.injected else None)
    except BaseException:
        said = f"stranger: {traceback.format_exc()}"
    finally:
        os.write(pipe, said.encode(errors="replace")[:60000])
        os._exit(0)


def _join(ranks: int, rank: int, store: Path) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=30)
    )


def run(operation: Operation, root: Path, watch: Watch | None, *, fork: bool) -> list[End]:
    """The operation's call, one process armed with what `watch` is set to: forked if it may die, or has company."""
    if not fork and operation.ranks == 1:
        return [End(_in_time(lambda: _called(operation, root, watch)))]
    with tempfile.TemporaryDirectory(prefix="store-") as folder:
        started = []
        for rank in range(operation.ranks):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                _child(operation, root, rank, Path(folder, "store"), watch, writing)
            os.close(writing)
            started.append((pid, reading))
        deadline = time.monotonic() + _PATIENCE
        return [_ended(pid, reading, deadline) for pid, reading in started]


def _in_time(call: Callable[[], str]) -> str:
    def late(*_: object) -> None:
        raise TimeoutError("it did not end")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(_PATIENCE)
    try:
        return call()
    finally:
        signal.alarm(0)


def _ended(pid: int, reading: int, deadline: float) -> End:
    said = b""
    late = False
    while True:
        if not select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
            late = True
            os.kill(pid, signal.SIGKILL)
            break
        data = os.read(reading, 1 << 16)
        if not data:
            break
        said += data
    os.close(reading)
    status = os.waitpid(pid, 0)[1]
    if late:
        return End("stranger: it did not end")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        return End(f"stranger: signal {os.WTERMSIG(status)}")
    return End(said.decode())


# --- trials -----------------------------------------------------------------------------------------------------------


def _not_of(broken: Call) -> str:
    """The error that a call does not make: what cannot be read is no fault of the target, and the other way round."""
    return "TargetError" if broken.path.startswith("source") else "CheckpointError"


class Bench:
    """An operation made ready: what is there before, and what is there after it without faults."""

    def __init__(self, operation: Operation, folder: Path) -> None:
        self.operation = operation
        self.root = folder / "root"
        self._kept = folder / "kept"
        operation.prepare(self.root)
        if (self.root / "targets").exists():
            shutil.copytree(self.root / "targets", self._kept)
        self.source = held(self.root / "source")
        self.old = held(self._kept)
        self.watch = Watch(self.root, exchange=operation.exchange)
        self._again: dict[bytes, str] = {}
        self.calls, self.new = self._without_faults()

    def _without_faults(self) -> tuple[list[Call], State]:
        self.watch.set(Fault())
        ends = run(self.operation, self.root, self.watch, fork=True)
        assert all(end.ok for end in ends), ends
        new = held(self.root / "targets")
        assert not left_over(new) and self.outcome(new) == "new", sorted(new)
        calls = self.watch.calls()
        _in_a_fork(lambda: self.operation.check(self.root))
        self.reset()
        return calls, new

    def reset(self) -> None:
        """Put back what was there before."""
        if (self.root / "targets").exists():
            shutil.rmtree(self.root / "targets")
        if self._kept.exists():
            shutil.copytree(self._kept, self.root / "targets")

    def outcome(self, state: State) -> str:
        """What a state of `targets` is."""
        new = getattr(self, "new", state)
        return self.operation.outcome(state, self.old, new)

    def attempt(self, row: Row, kind: str, fault: Fault) -> None:
        """Break one call, and note what came of it."""
        self.watch.set(fault)
        ends = run(self.operation, self.root, self.watch, fork=kind == "killed")
        broken = self.watch.calls()[fault.at] if self.watch.count > fault.at else None
        state = held(self.root / "targets")
        outcome = self.outcome(state)
        row.trials[kind] += 1
        row.outcomes[outcome] += 1
        row.left += bool(left_over(state)) and kind not in ("killed", "disk gone")
        problems = list(self._problems(ends, fault, broken, outcome))
        problem = self._repeated(state)
        if problem:
            problems.append(problem)
        where = f"{broken.kind} {broken.path} {broken.to}".strip() if broken else "a call that was not made"
        row.bad += [f"{row.name}: {kind} at {fault.at} ({where}): {problem}" for problem in problems]
        self.reset()

    def _problems(self, ends: Sequence[End], fault: Fault, broken: Call | None, outcome: str) -> Iterator[str]:
        own = ends[self.operation.injected]
        if outcome == "torn" or (outcome == "aside" and self.operation.exchange):
            yield outcome
        for end in ends:
            if end.said.startswith("stranger"):
                yield end.said
            if broken is not None and broken.kind != "copy" and end.said.startswith(f"error: {_not_of(broken)}"):
                yield f"blames the wrong side: {end.said}"
            if end.ok and outcome != "new":
                yield f"said to have been written, and is {outcome}"
        if own.killed and fault.action not in (Action.KILL_BEFORE, Action.KILL_AFTER):
            yield "was killed"
        if not own.killed and len({end.ok for end in ends}) > 1:
            yield f"the ranks disagree: {ends}"
        clears_up = broken is not None and (".deleted" in broken.to or ".lock" in broken.path)
        needed = broken is not None and broken.kind in _MUST_TELL and not self.calls[fault.at].failed
        if fault.action == Action.FAIL and needed and own.ok and not clears_up:
            yield "failed, and nobody was told"

    def _repeated(self, state: State) -> str:
        """What is wrong after the next run, which suffers no fault, if anything is. Equal states end equally."""
        told = repr(sorted(state.items())).encode()
        key = hashlib.sha256(told).digest()
        if key not in self._again:
            ends = run(self.operation, self.root, None, fork=False)
            after = held(self.root / "targets")
            problems = [f"the next run failed: {end.said}" for end in ends if not end.ok]
            if seen(after) != seen(self.new):
                problems.append(f"the next run left it {self.outcome(after)}")
            if left_over(after):
                problems.append(f"the next run left {', '.join(left_over(after))}")
            self._again[key] = "; ".join(problems)
        return self._again[key]


def _in_a_fork(call: Callable[[], None]) -> None:
    """The call must not fail; nothing that it starts stays in this process, which must fork cleanly."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def tried(operation: Operation, folder: Path, every: int = 1, phase: int = 0) -> Row:
    """One of `every` faults of an operation, from number `phase` on; with the first, the order of calls."""
    start = time.perf_counter()
    bench = Bench(operation, folder)
    row = Row(operation.name, len(bench.calls))
    gc.freeze()  # the forks share the pages of what is imported
    if phase == 0:
        row.bad += [f"{operation.name}: {one}" for one in violations(bench.calls)]
    for i, (kind, fault) in enumerate(faults(bench.calls)):
        if i % every == phase:
            bench.attempt(row, kind, fault)
    if held(bench.root / "source") != bench.source:
        row.bad.append(f"{operation.name}: the source was changed")
    row.seconds = time.perf_counter() - start
    return row
