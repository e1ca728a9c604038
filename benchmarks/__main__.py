"""`python -m benchmarks`: every benchmark once, with its results in benchmarks/results/ and the plots made of them.

Takes about half an hour on a quiet machine of two processors; names of benchmarks run those alone.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.measure import RESULTS

#: Name -> its arguments.
ALL: dict[str, list[str]] = {
    "bench": [], "peers": [], "training": ["--layers", "4", "--pairs", "2"], "memory": [], "large": [], "use": [],
    "workers": [], "scale": [],
}  # fmt: skip


def main() -> int:
    """Run all, or those that are named; one that fails does not keep the others from running."""
    failed = []
    for name in sys.argv[1:] or [*ALL, "plot"]:
        output = [] if name == "plot" else ["--output", str(RESULTS / f"{name}.json")]
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *ALL.get(name, []), *output])
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
        if done.returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
