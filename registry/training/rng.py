"""The states of random number generators: taken and put back, under the names that Megatron gives them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from registry.errors import ArgumentError

#: An object with get_states() and set_states(), such as Megatron's tracker, or generators by name.
Trackers = Any


def states(trackers: Trackers = None) -> dict[str, Any]:
    """The states of python, numpy, torch and the trackers, and of the own GPU where there is one in use."""
    import torch

    found = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": _tracked(trackers),
    }
    if _on_gpu():
        found["cuda_rng_state"] = torch.cuda.get_rng_state()
    return found


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _tracked(trackers: Trackers) -> dict[str, Any]:
    if trackers is None:
        return {}
    if hasattr(trackers, "get_states"):
        return dict(trackers.get_states())
    if isinstance(trackers, Mapping) and all(hasattr(one, "get_state") for one in trackers.values()):
        return {str(name): one.get_state() for name, one in trackers.items()}
    raise ArgumentError(
        "no random trackers", expected="an object with get_states() and set_states(), or generators by name",
        found=type(trackers).__name__,
    )  # fmt: skip


def restore(found: Mapping[str, Any], trackers: Trackers = None) -> list[str]:
    """Put the states back. Returns what could not be: nothing, where all was saved and is here."""
    import torch

    notes = []
    if "random_rng_state" in found:
        version, internal, gauss = found["random_rng_state"]
        random.setstate((version, tuple(internal), gauss))
    if "np_rng_state" in found:
        np.random.set_state(tuple(found["np_rng_state"]))
    if "torch_rng_state" in found:
        torch.set_rng_state(found["torch_rng_state"])
    absent = [k for k in ("random_rng_state", "np_rng_state", "torch_rng_state") if k not in found]
    notes += [f"the checkpoint has no {name}: that generator is left as it is" for name in absent]
    if _on_gpu():
        if "cuda_rng_state" in found:
            torch.cuda.set_rng_state(found["cuda_rng_state"])
        else:
            notes.append("the checkpoint has no cuda_rng_state: the GPU's generator is left as it is")
    stored = dict(found.get("rng_tracker_states") or {})
    if trackers is None:
        return notes + ([f"random trackers without a place here: {', '.join(stored)}"] if stored else [])
    if hasattr(trackers, "set_states"):
        trackers.set_states(stored)
        return notes
    for name, one in trackers.items():
        if name in stored:
            one.set_state(stored.pop(name))
        else:
            notes.append(f"the checkpoint has no random tracker {name!r}: it is left as it is")
    return notes + [f"random tracker without a place here: {name}" for name in stored]
