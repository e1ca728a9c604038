"""`python -m benchmarks.large`: a model larger than memory, from a cold cache, beside `cp`.

Both run in a cgroup that limits their memory, page cache included; without the right to make one, the machine's own
memory is the limit, and --size has to be larger. Before each run the source leaves the page cache. Both sync what they
write, for else the one that leaves more dirty pages behind would win.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure, models

_ROOT = Path("/sys/fs/cgroup")
#: `sh` enters the group, and becomes what is to be limited.
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@contextmanager
def limited(nbytes: int) -> Iterator[list[str]]:
    """What to put before a command so that it has no more memory than this; nothing where that is not permitted."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    old = next((path for _, controllers, path in lines if "memory" in controllers.split(",")), None)
    new = next((path for number, _, path in lines if number == "0"), "/")
    above = _ROOT / "memory" / old.lstrip("/") if old is not None else _ROOT / new.lstrip("/")
    group = above / f"registry-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old is not None else "memory.max")).write_text(str(nbytes))
        under = ["sh", "-c", _ENTER, str(group)]
        subprocess.run([*under, "true"], check=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no cgroup: {error}; only the cache is cold", file=sys.stderr)
        under = []
    try:
        yield under
    finally:
        for _ in range(50 if group.exists() else 0):  # the last process has to be gone
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def forget(path: Path) -> None:
    """Take the files of a directory out of the page cache."""
    os.sync()
    for file in measure.files_of(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


_CP = 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +'


def main(argv: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = measure.options(__doc__, "large")
    parser.add_argument("--size", type=measure.size, default="4GB", help="bytes of the Llama (default 4GB)")
    parser.add_argument("--limit", type=measure.size, default="1GB", help="bytes of memory (default 1GB)")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of runs")
    chosen = parser.parse_args(argv)
    folder = measure.made(chosen.dir)
    source = models.write(folder / f"llama-{chosen.size >> 20}", *models.llama(chosen.size))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch, limited(chosen.limit) as under:
        target = Path(scratch, "target")
        ours = ("convert", source, target, "megatron", {"tp": 2, "pp": 2}, None, True, {})
        runs: dict[bool, list[measure.Run]] = {False: [], True: []}
        for i in range(chosen.pairs):
            for mine in (i % 2 == 1, i % 2 == 0):
                forget(source)
                measure.settle()
                if mine:
                    runs[mine].append(measure.job(*ours, under=under)[0])
                else:
                    start, before = time.perf_counter(), os.times()
                    subprocess.run([*under, "sh", "-c", _CP, str(source), str(target)], check=True)
                    seconds, after = time.perf_counter() - start, os.times()
                    cpu = after.children_user - before.children_user + after.children_system - before.children_system
                    runs[mine].append(measure.Run(seconds, cpu, seconds))
                measure.clean(target)
                print("ours" if mine else "cp", *(f"{run.call:.1f} s" for run in runs[mine][-1:]), flush=True)
        both = list(zip(runs[True], runs[False], strict=True))
        rows.append({
            "name": "hf-megatron", "nbytes": measure.nbytes_of(source), "limit": chosen.limit if under else None,
            "cp": median(c.call for c in runs[False]), "cp_cpu": median(c.cpu for c in runs[False]),
            "call": median(r.call for r in runs[True]), "call_cpu": median(r.cpu for r in runs[True]),
            "ratio": median(r.call / c.call for r, c in both), "ratios": sorted(r.call / c.call for r, c in both),
            "peak": max(r.peak for r in runs[True]),
        })  # fmt: skip
    columns = {"MB": "nbytes", "cp s": "cp", "cpu": "cp_cpu", "call s": "call", "cpu ": "call_cpu", "ratio": "ratio"}
    print(*measure.table(rows, {**columns, "anon MiB": "peak"}), sep="\n")
    measure.write(chosen.output, folder, rows, pairs=chosen.pairs)


if __name__ == "__main__":
    main()
