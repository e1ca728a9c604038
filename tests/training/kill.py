"""`make kill`: one of four ranks is killed with SIGKILL at a random moment of a save, once a seed.

Whatever it was doing, the newest checkpoint that is whole must be found and must load bit for bit, and must be at least
as new as the last save that returned.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training import Job, run
from tests.training.jobs import trained

WORLD, LAYOUT = 4, {"tp": 2}
FIRST = 7
SPAN = 4.0  # seconds in which the rank dies, while some saves are made


@dataclass(frozen=True)
class Outcome:
    """What one kill did: `problem` is empty if all is as it should be.

    `wrote` are the writes that another rank had made of the save in which the kill came.
    """

    seed: int
    rank: int
    after: float
    saved: int
    resumed: int
    wrote: int
    left: list[str]
    problem: str

    def row(self) -> str:
        """A line of the table."""
        hidden = ", ".join(name for name in self.left if name.startswith(".")) or "-"
        whole = sum(bool(re.fullmatch(r"iter_\d+", name)) for name in self.left)
        return (
            f"{self.seed:4d} {self.rank:4d} {self.after * 1000:7.0f} {self.saved:6d} {self.resumed:8d} {whole:6d} "
            f"{self.wrote:6d}  {self.problem or 'ok'}  {hidden}"
        )


HEAD = "seed rank      ms  saved  resumed  whole writes  outcome, and hidden names that were left"


def outcomes(seeds: Iterable[int], whole: Path, folder: Path) -> Iterator[Outcome]:
    """Kill once for each seed."""
    for seed in seeds:
        draw = random.Random(seed)
        rank, after = draw.randrange(WORLD), draw.random() * SPAN
        given = {"path": folder / str(seed), "whole": whole, "layout": LAYOUT}
        good, killed, again = run(
            [
                Job("save", WORLD, {**given, "iteration": FIRST}),
                Job("killed", WORLD, {**given, "rank": rank, "after": after}),
                Job("after_kill", 2, given),
            ]
        )
        yield judged(seed, rank, after, good, killed, again)


def judged(seed: int, rank: int, after: float, good: Any, killed: Any, again: Any) -> Outcome:
    """What came of it."""
    alive = [one for i, one in enumerate(killed) if i != rank]
    problems = [str(one)[:300] for one in (*good, *alive, *again) if "result" not in one]
    if killed[rank] != {"killed": -9}:
        problems.append(f"rank {rank} was not killed: {str(killed[rank])[:300]}")
    if problems:
        return Outcome(seed, rank, after, -1, -1, 0, [], "; ".join(problems))
    told = [one["result"] for one in alive]
    saved = max(FIRST if one["saved"] is None else one["saved"] for one in told)
    problems += [f"told: {one['said']}" for one in told if "a rank is gone" not in one["said"]]
    found = [one["result"] for one in again]
    resumed = found[0]["resumed"]
    if any((one["resumed"], one["loaded"]) != (resumed, resumed) for one in found):
        problems.append(f"the ranks resume from other iterations: {found}")
    if resumed not in (saved, saved + 1):
        problems.append(f"resumed from {resumed}, although {saved} was saved")
    problems += [f"not bit for bit: {one['differ'][:3]}" for one in found if one["differ"]]
    wrote = max(one["wrote"] for one in told)
    return Outcome(seed, rank, after, saved, resumed, wrote, found[0]["left"], "; ".join(problems))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    count = parser.parse_args().seeds
    start, bad, torn = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        trained(Path(name) / "state.pt", "dense")
        print(HEAD)
        for one in outcomes(range(count), Path(name) / "state.pt", Path(name)):
            print(one.row(), flush=True)
            bad += bool(one.problem)
            torn += one.wrote > 0
    print(f"{count} kills, {torn} of them after writing had begun, {bad} bad, {time.perf_counter() - start:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
