"""Which checkpoints of a training run go away."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import define, field, frozen

from registry.errors import ArgumentError


@frozen
class Retention:
    """Keep the newest `last` checkpoints (None: all), and of the others those whose iteration `every` divides."""

    last: int | None = None
    every: int | None = None

    def __attrs_post_init__(self) -> None:
        bad = [f"{k} is {v!r}" for k, v in (("last", self.last), ("every", self.every)) if not _counts(v)]
        if bad:
            raise ArgumentError(
                "not a number of checkpoints", where="retention", expected="None, or 1 and more", found=", ".join(bad),
                hint="the newest checkpoint always stays; give None to keep them all",
            )  # fmt: skip

    def expendable(
        self, numbers: Sequence[int], latest: int | None, torn: Callable[[int], str | None], notes: list[str]
    ) -> list[int]:
        """What is not to be kept of these iterations, given newest first; in the order to remove them, oldest first.

        It counts back from `latest`, the tracker's. What is newer belongs to a run that was rolled back, and stays; so
        does what is not whole as far as we can tell: it may be in somebody else's format.
        """
        if self.last is None:
            return []
        kept, found = 0, []
        for i in numbers:
            beyond = latest is not None and i > latest
            if beyond or (kept >= self.last and self.every is not None and i % self.every == 0):
                continue
            reason = torn(i)
            if reason is not None:
                notes.append(f"iteration {i} is left alone: {reason}")
            elif kept < self.last:
                kept += 1
            else:
                found.append(i)
        return found[::-1]


def _counts(value: object) -> bool:
    return value is None or (type(value) is int and value >= 1)


@define
class Pruned:
    """What a round of retention did: the iterations removed, oldest first, and what it left alone and why."""

    removed: list[int] = field(factory=list)
    notes: list[str] = field(factory=list)
