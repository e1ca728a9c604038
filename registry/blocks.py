"""What has been read of remote files, in blocks, so that nothing is fetched again that has just been.

Ranks that want the same tensor, or different columns of the same rows, want it at about the same time: who comes first
fetches it for all.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future

from registry.remote import RemotePath

#: Bytes of a block, and of all that are kept.
BLOCK = 256 << 10
KEPT = 64 << 20
#: Blocks that are one request at most.
_TOGETHER = 32


class Blocks:
    """Aligned blocks of files, those used last kept. Any number of threads may use one."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[RemotePath, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, path: RemotePath, size: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` of a file of `size` bytes. Raises OSError."""
        end = offset + len(buffer)
        first, last = offset // BLOCK, (end - 1) // BLOCK
        for number, block in zip(range(first, last + 1), self._get(path, size, first, last), strict=True):
            at = number * BLOCK
            low, high = max(offset, at), min(end, at + BLOCK)
            buffer[low - offset : high - offset] = block.result()[low - at : high - at]

    def _get(self, path: RemotePath, size: int, first: int, last: int) -> list[Future[bytes]]:
        """The blocks `first` to `last`; those that nobody has asked for are read, neighbours in one request."""
        missing: list[int] = []
        with self._lock:
            found = []
            for number in range(first, last + 1):
                if (path, number) not in self._blocks:
                    self._blocks[path, number] = Future()
                    missing.append(number)
                self._blocks.move_to_end((path, number))
                found.append(self._blocks[path, number])
            while len(self._blocks) * BLOCK > KEPT:
                self._blocks.popitem(last=False)
        for run in _runs(missing):
            mine = [found[number - first] for number in run]
            begin, end = run[0] * BLOCK, min((run[-1] + 1) * BLOCK, size)
            try:
                data = path.fetch(begin, end - begin)
            except BaseException as error:
                with self._lock:
                    for number in missing:
                        self._blocks.pop((path, number), None)
                for number in missing:  # whoever waits for one of them gets the error too
                    if not found[number - first].done():
                        found[number - first].set_exception(error)
                raise
            for i, future in enumerate(mine):
                future.set_result(data[i * BLOCK : (i + 1) * BLOCK])
        return found


def _runs(numbers: list[int]) -> list[list[int]]:
    """Consecutive numbers together, up to some."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1 and len(runs[-1]) < _TOGETHER:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
