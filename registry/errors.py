"""The one error hierarchy.

Every error says what was expected, what was found, where, and what to do. Several problems of one kind are
collected and raised together, so that a user mends them in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from registry.redaction import redacted

#: Characters of one part of a message. What a hostile file calls things may be longer, and may talk to a terminal.
_LONGEST = 2000
#: Details that a message shows, and characters of them all.
_MOST = 100
_IN_ALL = 10_000


def _shown(text: str, longest: int = _LONGEST) -> str:
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _without_secrets(value: object) -> object:
    return redacted(value) if isinstance(value, str) else value


class RegistryError(Exception):
    """Base of everything this library raises on purpose.

    `problem` is one line. `where` names the file, tensor or rule; `expected` and `found` what disagreed; `hint` what
    to do next (by default the class's own `advice`). `details` lists further problems of the same report.
    """

    advice: ClassVar[str | None] = None

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        self.problem = redacted(problem)
        self.where, self.expected, self.found = map(_without_secrets, (where, expected, found))
        self.hint = hint or self.advice
        self.details = tuple(map(redacted, details))
        super().__init__(self._text())

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        super().__setstate__(state)
        self.args = (self._text(),)  # unpickling has made one of the text alone, which then says what to do twice

    @property
    def brief(self) -> str:
        """The message without the class's own advice, to stand within that of another error."""
        text = str(self)
        return text if self.advice is None else text.removesuffix(f"\n  to do: {self.advice}")

    def _text(self) -> str:
        lines = [_shown(self.problem)]
        for label, value in (("where", self.where), ("expected", self.expected), ("found", self.found)):
            if value is not None:
                lines.append(f"  {label}: {_shown(redacted(str(value)))}")
        details = [f"  - {_shown(detail, _LONGEST // 4)}" for detail in self.details[:_MOST]]
        while sum(map(len, details)) > _IN_ALL:
            details.pop()
        lines += details
        if len(self.details) > len(details):
            lines.append(f"  - and {len(self.details) - len(details)} more")
        if self.hint:
            lines.append(f"  to do: {self.hint}")
        return "\n".join(lines)


class LayoutError(RegistryError):
    """A layout string is wrong, or does not fit the axes and shapes it is used with."""

    advice = "correct the layout: docs/notation.md shows every construct"


class SpecError(RegistryError):
    """An architecture or format spec is wrong, or names something that is not there."""

    advice = "correct the spec: docs/notation.md says what it may hold, and `registry schema` tells an editor"


class CheckpointError(RegistryError):
    """A checkpoint on disk is corrupt, incomplete, hostile, or not what it claims to be."""

    advice = "get the file again; it is incomplete, was changed after it was written, or its writer is faulty"


class UnsafePickleError(CheckpointError):
    """A pickle names a global outside the allow-list, or an opcode that plain data never needs."""


class DetectionError(RegistryError):
    """The format or architecture of a checkpoint is unknown or ambiguous; `candidates` are those that fit."""

    advice = "name the directory of the checkpoint itself, and its model with architecture= or config="

    candidates: tuple[str, ...] = ()


class MappingError(RegistryError):
    """Specs and checkpoint disagree: a tensor without a rule, a missing tensor, a shape that does not fit."""

    advice = "check that no file is missing and that the config belongs to these tensors"


class ParallelError(RegistryError):
    """A parallel layout does not fit the model (a size that does not divide, stages that do not add up)."""

    advice = "choose another parallel layout"


class TargetError(RegistryError):
    """The target cannot be written: not empty, inside the source, read-only, or the disk is full."""

    advice = "choose another target; what was there before is untouched"


class AnotherRunError(TargetError):
    """Another run is writing the same target."""


class ArgumentError(RegistryError, ValueError):
    """A call of the public surface with arguments that break a rule; every broken rule is listed."""

    advice = "correct the argument: help() of the function, or --help of the command, says what it takes"


class ExperimentalError(RegistryError):
    """An experimental function or class was used without switching experimental features on."""

    advice = "switch experimental features on, or do without"
