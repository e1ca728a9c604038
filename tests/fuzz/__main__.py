"""`make fuzz`: every parser is fed inputs, and a table says how many and what went wrong; then the exit code is 1."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.targets import TARGETS


def _run(name: str, count: int, seconds: float, folder: Path) -> dict[str, object]:
    report = folder / f"{name.replace(' ', '-').replace('.', '')}.json"
    memory = Path("/dev/shm")
    scratch = tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None)
    begin = time.monotonic()
    environment = {**os.environ, "FUZZ_DIR": scratch, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", name, str(count), str(seconds), str(report)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=seconds + 300, check=False,
    )  # fmt: skip
    shutil.rmtree(scratch, ignore_errors=True)
    found = json.loads(report.read_text()) if report.exists() else {"inputs": 0, "refused": 0, "crashes": []}
    if done.returncode:
        tail = " ".join(done.stderr.decode(errors="replace").strip().splitlines()[-3:])
        found["crashes"].append(f"the process ended with {done.returncode}: {tail[:400]}")
    return {**found, "seconds": time.monotonic() - begin}


def main() -> int:
    """Run what the command line asks for. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"parsers; by default all: {', '.join(TARGETS)}")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each parser (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=900, help="at most, for each parser (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to leave the inputs that went wrong")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    names = args.names or list(TARGETS)
    bad = 0
    print(f"{'parser':28}{'inputs':>9}{'refused':>9}{'seconds':>9}  new crashes", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, found in zip(
            names, pool.map(lambda n: _run(n, args.inputs, args.seconds, folder), names), strict=True
        ):
            crashes = found["crashes"]
            assert isinstance(crashes, list)
            row = f"{name:28}{found['inputs']:>9}{found['refused']:>9}{found['seconds']:>9.0f}  {len(crashes)}"
            print(row + "".join(f"\n    {line}" for line in crashes), flush=True)
            bad += len(crashes)
    print(f"what went wrong is in {folder}" if bad else "nothing went wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
