"""`python -m benchmarks.workers`: the speed of one conversion against the number of workers, by engine.

Local workers are threads of one process; those of Ray and of torchrun are processes of one thread each, on this
machine. Each run is a fresh set of processes, which converts three times: the first time brings imports, plans and the
target's pages in, and the best of the others counts. What the engines write is compared with what the first one wrote.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure, models

_TIMES = 3


def child(engine: str, workers: int, source: str, target: str) -> None:
    """Convert, several times, in this process; the first of several prints the seconds."""
    import registry

    if engine == "ray":
        import ray

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    threads = workers if engine == "local" else 1
    seconds = [
        registry.convert(
            source, target, to="megatron", parallel=registry.Parallel(tp=2, pp=4), engine=engine, threads=threads,
            overwrite=True, durable=False,
        ).seconds
        for _ in range(_TIMES)
    ]  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(seconds))


def timed(engine: str, workers: int, source: Path, target: Path) -> float:
    """The best time of a set of processes, in seconds."""
    command = [sys.executable]
    if engine == "torchrun":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        own = ["--nproc-per-node", str(workers), "--master-addr", "127.0.0.1", "--master-port", port]
        command += ["-m", "torch.distributed.run", *own]
    command += ["-m", "benchmarks.workers", "--child", engine, str(workers), str(source), str(target)]
    measure.settle()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=3600, check=True)
    seconds: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return min(seconds[1:])


def same(a: Path, b: Path) -> bool:
    """Do two directories hold the same?"""
    return subprocess.run(["diff", "-rq", str(a), str(b)], stdout=subprocess.DEVNULL).returncode == 0


def main() -> None:
    """Print a table, and write the figures where `--output` says."""
    parser = measure.options(__doc__, "workers")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="+", default=["local", "ray", "torchrun"])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        engine, workers, source, target = args.child
        child(engine, int(workers), source, target)
        return
    scratch = Path(tempfile.mkdtemp(dir=measure.made(args.dir)))
    rows: list[dict[str, Any]] = []
    try:
        source = models.write(scratch / "model", *models.llama(int(args.gigabytes * 1e9)))
        nbytes = sum(path.stat().st_size for path in source.iterdir())
        print(f"{nbytes / 1e9:.2f} GB, huggingface -> megatron tp2 pp4, {os.cpu_count()} processors")
        print(f"{'engine':<10}{'workers':>8}{'seconds':>10}{'GB/s':>8}{'speed-up':>10}")
        first = None
        for engine in args.engines:
            if engine == "ray" and importlib.util.find_spec("ray") is None:
                print("ray is not installed")
                continue
            for workers in args.workers:
                target = scratch / f"{engine}-{workers}"
                seconds = timed(engine, workers, source, target)
                rows.append({"engine": engine, "workers": workers, "seconds": seconds, "nbytes": nbytes})
                alone = next(row["seconds"] for row in rows if row["engine"] == engine)
                speed = nbytes / seconds / 1e9
                print(f"{engine:<10}{workers:>8}{seconds:>10.2f}{speed:>8.2f}{alone / seconds:>10.2f}", flush=True)
                if first is None:
                    first = target
                elif not same(first, target):
                    raise SystemExit(f"{target} differs from {first}")
                else:
                    shutil.rmtree(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    measure.write(args.output, args.dir, rows)


if __name__ == "__main__":
    main()
