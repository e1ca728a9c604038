"""`make faults`: every file system call of every writer is broken in every way, and what is left is looked at.

python -m tests.faults                    all of it: some ten thousand trials
python -m tests.faults --every 50         every fiftieth trial
python -m tests.faults --only trtllm      the operations with this in their name
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.inject import built, compiler, environment, present
from tests.faults.operations import by_name
from tests.faults.trials import KINDS, Row, tried

#: Parts of an operation's trials that are made side by side.
SLICES = 4
OUTCOMES = ("absent", "old", "part", "aside", "new", "torn")
HEAD = (
    f"{'writer: operation':42s} calls trials | " + " ".join(f"{kind:>11s}" for kind in KINDS) + " | "
    + " ".join(f"{outcome:>6s}" for outcome in OUTCOMES) + " |  left   bad  seconds"
)  # fmt: skip


def line(row: Row) -> str:
    """A line of the table."""
    kinds = " ".join(f"{row.trials[kind]:11d}" for kind in KINDS)
    outcomes = " ".join(f"{row.outcomes[outcome]:6d}" for outcome in OUTCOMES)
    return (
        f"{row.name:42s} {row.calls:5d} {row.trials.total():6d} | {kinds} | {outcomes} | "
        f"{row.left:5d} {len(row.bad):5d} {row.seconds:8.1f}"
    )


def scratch() -> str | None:
    """A file system in memory, where there is one: the order of calls is looked at, not the disk."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and os.access(memory, os.W_OK) else None


def one(task: tuple[str, int, int]) -> Row:
    """The row of an operation."""
    name, every, phase = task
    with tempfile.TemporaryDirectory(prefix="faults-", dir=scratch()) as folder:
        return tried(by_name()[name], Path(folder), every, phase)


def rows(names: list[str], every: int, jobs: int) -> Iterator[Row]:
    """All rows. The trials are made in processes of their own, for what forks must have one thread."""
    warm(names)
    slices = SLICES if every == 1 else 1
    tasks = [(name, every * slices, phase) for name in names for phase in range(slices)]
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        found = pool.imap(one, tasks, chunksize=1)
        for name in names:
            parts = [next(found) for _ in range(slices)]
            row = Row(name, parts[0].calls)
            for part in parts:
                row.add(part)
            yield row


def warm(names: list[str]) -> None:
    """Import what every trial needs, once, by making each call without faults."""
    import torch.distributed  # noqa: F401

    for name in names:
        operation = by_name()[name]
        with tempfile.TemporaryDirectory(prefix="faults-", dir=scratch()) as folder:
            operation.prepare(Path(folder, "root"))
            if operation.ranks == 1:
                operation.act(Path(folder, "root"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="of how many trials one is made")
    parser.add_argument("--only", default="", help="operations with this in their names")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="a line of JSON for each operation")
    given = parser.parse_args()
    if compiler() is None:
        sys.exit("the fault injector is C: install a C compiler (cc, gcc or clang)")
    if not present():
        with tempfile.TemporaryDirectory(prefix="inject-") as folder:
            command = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
            pid = os.posix_spawn(sys.executable, command, environment(built(Path(folder))))
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    report([name for name in by_name() if given.only in name], given.every, given.jobs, given.json)


def report(names: list[str], every: int, jobs: int, as_json: bool) -> None:
    start = time.perf_counter()
    total = Row("all")
    if not as_json:
        print(HEAD)
    for row in rows(names, every, jobs):
        print(json.dumps(vars(row)) if as_json else "\n".join([line(row), *row.bad[:20]]), flush=True)
        total.calls += row.calls
        total.add(row)
    total.seconds = time.perf_counter() - start
    if not as_json:
        print(line(total))
    sys.exit(bool(total.bad))


if __name__ == "__main__":
    main()
