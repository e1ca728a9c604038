"""Pause the garbage collector while many small objects are made that all survive."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Nothing made in the block has cycles; looking for them again and again would double the time.

    Nor are they looked at right after: to freeze and unfreeze makes all objects old, which takes no time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if not gc.get_freeze_count():  # what the program froze stays so
                gc.freeze()
                gc.unfreeze()
            gc.enable()
