"""Who carries out a conversion: this process, the workers of a Ray cluster, or the ranks that torchrun has started."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry.engines.work import Crew, Order

ENGINES = ("local", "ray", "torchrun")


def crew(engine: str, order: Order, threads: int | None) -> AbstractContextManager[Crew]:
    """Those who carry out the conversion that `order` describes. Raises ArgumentError where they cannot be had."""
    if engine == "ray":
        from registry.engines.cluster import on_ray

        return on_ray(order, threads)
    if engine == "torchrun":
        from registry.engines.torchrun import on_torchrun

        return on_torchrun(threads)
    from registry.engines.work import here

    return here(threads)
