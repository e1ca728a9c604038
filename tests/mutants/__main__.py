"""The command line: `python -m tests.mutants`."""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from functools import cache
from itertools import chain
from pathlib import Path

import yaml

from tests.mutants.goldens import every
from tests.mutants.goldens import run as run_goldens
from tests.mutants.runner import Outcome, all_mutants, run

EQUIVALENT = Path(__file__).with_name("equivalent.yaml")


def main() -> int:
    """Run what was asked for, print the score. Returns 1 where a mutant survived that is not known to be equivalent."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Damages specs and goldens.")
    parser.add_argument("--only", action="append", default=[], help="the name of a spec; may be given several times")
    parser.add_argument("--kind", action="append", default=[], help="a kind of damage; may be given several times")
    parser.add_argument("--sample", type=int, help="this many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--goldens", type=int, help="this many goldens, drawn at random; 0 for none")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--all", type=Path, default=Path(os.devnull), help="write the outcome of every mutant there")
    chosen = parser.parse_args()
    found = [m for m in all_mutants(chosen.only) if not chosen.kind or m.kind in chosen.kind]
    if chosen.sample is not None and chosen.sample < len(found):
        found = random.Random(chosen.seed).sample(found, chosen.sample)
    if chosen.list:
        print(*found, sep="\n")
        return 0
    start = time.perf_counter()
    outcomes = []
    goldens = every() if chosen.goldens is None else random.Random(chosen.seed).sample(every(), chosen.goldens)
    with chosen.all.open("w") as log:
        for n, outcome in enumerate(chain(run_goldens(goldens, chosen.seed), run(found, chosen.workers)), 1):
            outcomes.append(outcome)
            print(outcome.by, outcome.tried, outcome.mutant, outcome.said, sep="\t", file=log, flush=True)
            if n % 200 == 0:
                print(f"{n} of {len(found)}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return report(outcomes)


@cache
def known() -> dict[re.Pattern[str], str]:
    """What mutants that are no damage look like -> why. In equivalent.yaml a * stands for anything."""
    said = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or []
    patterns = ((glob, entry["reason"]) for entry in said for glob in entry["mutants"])
    return {re.compile(".*".join(map(re.escape, glob.split("*")))): reason for glob, reason in patterns}


def reason(mutant: str) -> str | None:
    """Why a mutant is no damage, if it is none."""
    return next((why for pattern, why in known().items() if pattern.fullmatch(mutant)), None)


def report(outcomes: list[Outcome]) -> int:
    """Print the score by kind and the survivors. Returns 1 where there is one without a reason."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    excused = {o.mutant for o in outcomes if o.by is None and reason(o.mutant)}
    for outcome in outcomes:
        fate = outcome.by or ("equivalent" if outcome.mutant in excused else "SURVIVED")
        by_kind[outcome.kind][fate] += 1
    fates = sorted({fate for counts in by_kind.values() for fate in counts})
    print(f"{'':28}{'mutants':>9}" + "".join(f"{fate:>14}" for fate in fates))
    for kind, counts in sorted(by_kind.items()):
        print(f"{kind:28}{sum(counts.values()):>9}" + "".join(f"{counts[fate]:>14}" for fate in fates))
    left = [o for o in outcomes if o.by is None and o.mutant not in excused]
    killed = sum(o.by is not None for o in outcomes)
    print(
        f"score: {killed} of {len(outcomes)} killed, {len(outcomes) - killed - len(left)} equivalent, {len(left)} left"
    )
    for outcome in sorted(left, key=lambda o: o.mutant):
        print(f"  survived {outcome.tried} cases: {outcome.mutant} {outcome.said}".rstrip())
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
