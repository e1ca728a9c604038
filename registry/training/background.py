"""One save at a time beside the training: a thread writes what was copied, and its error comes out at the next call."""

from __future__ import annotations

import atexit
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from attrs import evolve

from registry.training.local import Key, Shard

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Task:
    """A call in a thread. The program does not end before it."""

    def __init__(self, call: Callable[[], object], name: str) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Has it ended, well or not?"""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for its end. Raises what went wrong in it, once."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def last_words(self) -> None:
        """A program that ends without another call must not lose the error."""
        if self._error is not None:
            traceback.print_exception(self._error)


_latest: Task | None = None
_copies: dict[Key, torch.Tensor] = {}


def start(call: Callable[[], object], name: str) -> Task:
    """Run a call in the background, when nothing else is in flight any more."""
    global _latest
    finish()
    if _latest is None:
        atexit.register(lambda: _latest.last_words() if _latest else None)
    _latest = Task(call, name)
    return _latest


def finish() -> None:
    """Wait for what is in flight. Raises what went wrong in it."""
    if _latest is not None and threading.current_thread() is not _latest._thread:
        _latest.wait()


def copied(shards: Mapping[Key, Shard]) -> dict[Key, Shard]:
    """The tensors in host memory of their own. The memory is kept for the next time: fresh memory takes longer to get
    than to fill. Nothing may be in flight.
    """
    import torch

    for key in _copies.keys() - shards.keys():
        del _copies[key]
    on_gpu = False
    for key, shard in shards.items():
        old, cuda = _copies.get(key), shard.tensor.is_cuda
        if old is None or old.shape != shard.tensor.shape or old.dtype != shard.tensor.dtype:
            old = torch.empty(shard.tensor.shape, dtype=shard.tensor.dtype, pin_memory=cuda)
        _copies[key] = old.copy_(shard.tensor, non_blocking=cuda)
        on_gpu |= cuda
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return {key: evolve(shard, tensor=_copies[key]) for key, shard in shards.items()}


def now(call: Callable[[], T]) -> Callable[[], T]:
    """Call it now. What is returned gives the result, or raises the error, to whoever calls that."""
    try:
        value = call()
    except Exception as error:
        failure = error

        def fail() -> T:
            raise failure

        return fail
    return lambda: value
