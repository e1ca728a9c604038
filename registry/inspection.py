"""inspect(): what a directory is, at a glance."""

from __future__ import annotations

from collections import Counter
from typing import Any

from attrs import asdict, frozen

from registry.decoding import stored
from registry.dtypes import ITEMSIZE
from registry.places import is_path
from registry.source import Source
from registry.storage import slot_bytes


@frozen
class Inspection:
    """What a checkpoint holds."""

    path: str
    format: str
    architecture: str
    variants: dict[str, str]
    parameters: int
    dtypes: dict[str, int]
    nbytes: int
    tensors: int
    files: int
    parallel: str
    iteration: int | None
    facts: dict[str, Any]
    left_out: dict[str, str]
    missing: tuple[str, ...]
    side_files: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        types = ", ".join(f"{name} {count:,}" for name, count in self.dtypes.items())
        rows = [
            ("format", self.format + "".join(f", {k} {v}" for k, v in self.variants.items())),
            ("architecture", self.architecture),
            ("parameters", f"{self.parameters:,} ({types})"),
            ("on disk", f"{self.tensors:,} tensors in {self.files} files, {self.nbytes / 1e6:,.1f} MB"),
            ("parallel", self.parallel),
            ("iteration", "-" if self.iteration is None else str(self.iteration)),
            ("facts", ", ".join(f"{k} {v}" for k, v in self.facts.items())),
        ]
        reasons = Counter(self.left_out.values())
        rows += [("beside", f"{count} x {reason}") for reason, count in reasons.items()]
        rows += [("travels along", ", ".join(self.side_files))] if self.side_files else []
        rows += [("missing", name) for name in self.missing]
        rows += [("note", note) for note in self.notes]
        return "\n".join([self.path, *(f"  {label:<14}{text}" for label, text in rows)])


def inspection(source: Source) -> Inspection:
    """Sum a bound checkpoint up. No tensor data is read."""
    opened, model = source.opened, source.model
    on_disk = list(stored(opened))
    types: Counter[str] = Counter()
    for tensor in model.tensors:
        types["/".join(sorted(source.dtypes.get(tensor, {source.dtype})))] += model.volume(tensor)
    assert all(part in ITEMSIZE for name in types for part in name.split("/"))
    return Inspection(
        path=str(opened.path),
        format=source.spec.name,
        architecture=source.architecture.name,
        variants=dict(source.bound.variants),
        parameters=sum(types.values()),
        dtypes=dict(types),
        nbytes=sum(slot_bytes(piece) for piece in on_disk),
        tensors=len({(piece.rank, piece.name) for piece in on_disk}),
        files=sum(is_path(file) for file in opened.files),
        parallel=str(opened.parallel or "one rank"),
        iteration=opened.iteration,
        facts=model.facts,
        left_out=dict(source.bound.left_out),
        missing=tuple(source.bound.missing),
        side_files=tuple(opened.side_files),
        notes=source.notes,
    )
