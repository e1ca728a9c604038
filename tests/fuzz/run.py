"""Feed one parser: `python -m tests.fuzz.run NAME COUNT SECONDS REPORT`.

By atheris where it is installed, which keeps the inputs that reach new code and damages those further; else by the same
damage to the seeds, at random.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    atheris = None

READERS = ("formats.torch_dcp", "formats.torch_dist", "formats.torch_ranks", "formats.huggingface", "formats.trtllm")
with contextlib.nullcontext() if atheris is None else atheris.instrument_imports(include=["formats", "registry"]):
    for module in (*READERS, "registry.source", "registry.manifest", "registry.quantization.decoding"):
        importlib.import_module(module)

from tests.fuzz.mutations import mutate  # noqa: E402
from tests.fuzz.targets import TARGETS  # noqa: E402

#: An input must be done with in so many seconds of this process's time. (A second is promised; machines are shared.)
SLOW = 4.0


class Tally:
    """Inputs so far, and what went wrong: place in the code -> the first such input."""

    def __init__(self, read: Callable[[bytes], object], report: Path, count: int, seconds: float) -> None:
        self.read, self.report, self.count = read, report, count
        self.inputs = self.refused = 0
        self.crashes: dict[str, str] = {}
        self.begin = time.monotonic()
        self.until = self.begin + seconds

    def feed(self, data: bytes) -> None:
        """Read one input; anything but a RegistryError is written down, with the input beside the report."""
        from registry.errors import RegistryError

        self.inputs += 1
        begin = time.process_time()
        try:
            self.read(data)
        except RegistryError as error:
            self.refused += 1
            if len(str(error)) > 20_000:
                self.note("a message of more than 20,000 characters", data)
        except Exception as error:
            frame = next(
                f for f in reversed(traceback.extract_tb(error.__traceback__)) if "site-packages" not in f.filename
            )
            self.note(f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:100]}", data,
                      traceback.format_exc())  # fmt: skip
        if (took := time.process_time() - begin) > SLOW:
            self.note(f"slow: more than {SLOW} s", data, f"{took}")
        if self.inputs % 500 == 0:
            self.save()
            if self.inputs >= self.count or time.monotonic() > self.until:
                os._exit(0)

    def note(self, what: str, data: bytes, details: str = "") -> None:
        where = what.split(": ")[0] if " at " in what else what
        if where not in self.crashes:
            self.crashes[where] = what
            self.report.with_suffix(f".{len(self.crashes)}.input").write_bytes(data)
            self.report.with_suffix(f".{len(self.crashes)}.txt").write_text(f"{what}\n{details}")

    def save(self) -> None:
        told: dict[str, Any] = {"inputs": self.inputs, "refused": self.refused, "crashes": list(self.crashes.values())}
        told["seconds"] = time.monotonic() - self.begin
        self.report.write_text(json.dumps(told))


def main() -> None:
    name, count, seconds, report = sys.argv[1:5]
    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("FUZZ_DIR")))
    seeds, read = target.prepare(folder)
    tally = Tally(read, Path(report), int(count), float(seconds))
    rng = random.Random(int(os.environ.get("FUZZ_SEED", "1")))
    for seed in seeds:
        tally.feed(seed)
    if atheris is None:
        while True:
            tally.feed(mutate(rng.choice(seeds), target.kind, rng))
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(seeds):
        (corpus / str(i)).write_bytes(seed)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        source = random.Random(seed)
        return mutate(data if data and source.random() < 0.5 else source.choice(seeds), target.kind, source)[:most]

    largest = max(64 << 10, 2 * max(map(len, seeds)))
    options = [
        f"-max_len={largest}",
        "-timeout=60",
        "-rss_limit_mb=3000",
        "-verbosity=0",
        f"-seed={rng.randrange(2**31)}",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], tally.feed, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
