"""One line on a terminal that says how far a command is: percent, bytes, GB/s, time left.

A `ProgressLine` is the `progress` argument of `registry.convert`, `verify` and `diff`. The library itself never makes
one; it counts with a `Tally`.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

#: Seconds between two drawings of the line.
INTERVAL = 0.1
#: Drawings that speed and time left are measured over: about ten seconds, so that they follow a disk that slows down.
WINDOW = 100


class Tally:
    """Counts the bytes that threads have done, for a progress function. `total` may be a guess: it is never passed."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So many more are done."""
        if self._progress is None:
            return
        with self._lock:
            self._done = min(self._done + nbytes, self._total)
            self._progress(self._done, self._total)


class ProgressLine:
    """Called with (bytes done, bytes in all) from any thread; draws on `stream`, and erases the line at the end.

    Only carriage returns and spaces move the cursor, so that every terminal can show it.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._shown = 0
        self._off = False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            if self._shown:
                self._put("\r" + " " * self._shown + "\r")
            self._off = True

    def __call__(self, done: int, total: int) -> None:
        with self._lock:
            now = self._clock()
            if self._off or (self._samples and (now - self._samples[-1][0] < INTERVAL or done < self._samples[-1][1])):
                return
            self._samples.append((now, done))
            width = columns(self._stream) - 1  # In the last column, some terminals would wrap.
            text = fit(parts(done, total, self._rate()), width)
            # What was drawn while the terminal was wider cannot be wiped: it has wrapped.
            self._put("\r" + text.ljust(min(self._shown, width)))
            self._shown = len(text)

    def _rate(self) -> float | None:
        """Bytes a second, once two drawings tell."""
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - begin) if end > begin and last > first else None

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # A terminal that has gone away is no reason to stop a conversion.
            self._off = True


def columns(stream: TextIO) -> int:
    """The width of the terminal behind `stream`, which need not be that of stdout."""
    try:
        found = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        found = 0
    return found or shutil.get_terminal_size().columns


def parts(done: int, total: int, rate: float | None) -> list[str]:
    """What the line says, the most wanted first."""
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    percent = 100 * done // total if total else 100
    said = [f"{percent:3d}%"]
    if rate:
        said += [f"{clock_face((total - done) / rate)} left", f"{rate / 1e9:.2f} GB/s"]
    return [*said, f"{done / unit:.1f} of {total / unit:.1f} {name}"]


def fit(said: list[str], width: int) -> str:
    """As many of the parts as `width` has room for, with room to breathe."""
    while len(said) > 1 and len("  ".join(said)) > width:
        said = said[:-1]
    return "  ".join(said)[: max(width, 0)]


def clock_face(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
