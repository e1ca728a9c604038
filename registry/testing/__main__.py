"""`python -m registry.testing PATH...`: do these specs and checkpoints survive the way through the formats and back?

For workflows and commit hooks (docs/ecosystem.md). Of an architecture's spec a small model is made, which goes into
each format that takes it and back, at several layouts; a format's spec is tried on a few architectures. A checkpoint is
converted into the formats that take it and back, and compared. All of it is done in a temporary directory. Exits with 1
where anything differs or is refused.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import registry
from registry.errors import MappingError, RegistryError
from registry.parallel import Parallel
from registry.testing import models
from registry.testing.comparison import same_directory
from registry.testing.formats import exact_architectures

_SPECS = (".yaml", ".yml")


class Start(NamedTuple):
    """Where trips begin: a checkpoint, its model's config, the formats to go through, and where the config lies."""

    path: Path
    config: Mapping[str, Any]
    formats: Sequence[str]
    beside: Path | None = None


def starts(path: Path, folder: Path, wanted: Sequence[str], of: Path | None) -> Iterator[Start]:
    """What is to be tried of a path: a checkpoint (its config may lie elsewhere), or small models for a spec."""
    if path.suffix not in _SPECS:
        checkpoint = registry.open(path, config=of)
        yield Start(path, checkpoint.config, [to for to in wanted if to != checkpoint.format], of)
        return
    name = registry.register(path)
    is_format = yaml.safe_load(path.read_text(encoding="utf-8"))["kind"] == "format"
    configs = dict(exact_architectures(name)) if is_format else {name: models.small_config(name)}
    for model, config in configs.items():
        yield Start(models.random_model(config, folder / model), config, [name] if is_format else wanted)


def trip(start: Start, to: str, parallel: Parallel, folder: Path) -> str:
    """Convert there and back. Returns what is to be said of it; raises AssertionError or RegistryError."""
    checkpoint = registry.open(start.path, config=start.beside)
    registry.convert(start.path, folder / "there", to=to, parallel=parallel, config=start.beside, durable=False)
    registry.convert(
        folder / "there", folder / "back", to=checkpoint.format, parallel=checkpoint.parallel, durable=False
    )
    if not models.is_exact(to, dict(start.config)):
        return "back; the format stores some tensors otherwise, so bits were not compared"
    outcome = registry.verify(start.path, folder / "back", config=start.beside)
    assert outcome, str(outcome)
    if start.path.parent == folder.parent:  # a model of ours, all of whose files come back
        same_directory(start.path, folder / "back")
    return "back, bit for bit"


def trips(start: Start, layouts: Sequence[Parallel], folder: Path) -> Iterator[tuple[str, str | None]]:
    """Each way there and back: what is to be said of it, and what is wrong."""
    for to in start.formats:
        if not models.takes(to, dict(start.config)):
            yield f"{start.path.name}: {to} has no place for some of its tensors", None
            continue
        for parallel in models.fitting_layouts(to, dict(start.config), layouts):
            what = f"{start.path.name}: {to} ({parallel})"
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                try:
                    yield f"{what}: {trip(start, to, parallel, Path(scratch))}", None
                except (AssertionError, RegistryError) as error:
                    yield what, str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all trips, and print a line for each. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m registry.testing", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a spec file, or a checkpoint's directory")
    parser.add_argument("--to", action="append", metavar="FORMAT", help="the formats to go through; default: all")
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="a tensor parallel size to try; default: 2")
    parser.add_argument("--pp", type=int, default=2, metavar="N", help="pipeline stages to try; default: 2")
    parser.add_argument("--config", type=Path, help="a HuggingFace directory or config.json, for a checkpoint without")
    args = parser.parse_intermixed_args(argv)
    layouts = [Parallel(), Parallel(tp=args.tp), Parallel(tp=args.tp, pp=args.pp)]
    wrong = 0
    for path in args.paths:
        with tempfile.TemporaryDirectory() as scratch:
            tried = 0
            try:
                for start in starts(path, Path(scratch), args.to or registry.formats(), args.config):
                    for said, problem in trips(start, layouts, Path(scratch)):
                        print(said if problem is None else f"{said}: WRONG\n{problem}", flush=True)
                        tried, wrong = tried + 1, wrong + (problem is not None)
                if not tried:
                    raise MappingError(
                        "nothing was tried", where=path, expected="a format that takes it",
                        hint="name another format with --to; `registry formats` lists them",
                    )  # fmt: skip
            except RegistryError as error:
                print(f"{path}: WRONG\n{error}", flush=True)
                wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
