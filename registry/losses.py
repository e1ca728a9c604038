"""What a conversion loses: how far values are from what they were, noted as they are rounded."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from registry.casts import extremes, spare
from registry.dtypes import ITEMSIZE, is_float

if TYPE_CHECKING:
    import torch

    from registry.planning import Values


@frozen
class Loss:
    """What a tensor lost: in which step, the most that a value did, and that as a part of the largest value."""

    step: str
    max: float
    relative: float


@define(eq=False)
class Watch:
    """Notes what is lost when values are rounded to a type, by logical tensor. Any number of threads may use one."""

    _found: dict[tuple[str, str], tuple[float, float]] = field(factory=dict)
    _lock: threading.Lock = field(factory=threading.Lock)

    @staticmethod
    def rounds(values: Values) -> bool:
        """May values be rounded? Codecs of rules and what is cast twice say for themselves that they are lossy."""
        a, b = values.source_dtype, values.target_dtype
        if values.source.codec or values.target.codec or values.target.via or not (is_float(a) and is_float(b)):
            return False
        if values.source[:2] != values.target[:2]:
            return True
        return a != b and ITEMSIZE[b] <= ITEMSIZE[a]

    def note(
        self, tensor: str, values: Values, before: torch.Tensor, after: torch.Tensor, low: float, high: float
    ) -> None:
        """Compare values before and after. `low` and `high` are the least and the largest before."""
        import torch

        if before.dtype == torch.float32:
            off = spare("off", after.shape).copy_(after).sub_(before)
        else:
            wide = torch.promote_types(before.dtype, torch.float32)
            off = after.to(wide).sub_(before)
        least, most = extremes(off)
        self.add({(tensor, f"{values.source_dtype} to {values.target_dtype}"): (max(-least, most), max(-low, high))})

    def found(self) -> dict[tuple[str, str], tuple[float, float]]:
        """(tensor, step) -> the most that a value lost, and the largest value; for `add` in another process."""
        with self._lock:
            return dict(self._found)

    def add(self, found: Mapping[tuple[str, str], tuple[float, float]]) -> None:
        """Take in what another watch has found."""
        with self._lock:
            for key, (lost, largest) in found.items():
                known = self._found.get(key, (0.0, 0.0))
                self._found[key] = max(known[0], lost), max(known[1], largest)

    def losses(self) -> dict[str, Loss]:
        """What was lost, by logical tensor; those that lost nothing are left out."""
        return {
            tensor: Loss(step, off, off / largest if largest else 0.0)
            for (tensor, step), (off, largest) in self._found.items()
            if off
        }
