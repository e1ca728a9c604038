"""diff(): how two checkpoints differ, in any formats, layouts, types and shapes: their facts, tensors and values.

Both are read side by side as logical tensors, a stretch at a time by several threads, so that memory does not grow with
them. `verify` asks only whether they are the same, and reads them one after the other.
"""

from __future__ import annotations

import math
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from attrs import asdict, define, field, frozen

from registry.dtypes import ITEMSIZE, torch_dtype
from registry.errors import MappingError
from registry.execute import Progress, default_threads
from registry.places import PathLike
from registry.problems import collapse
from registry.progress import Tally
from registry.source import Source, load, load_pair
from registry.storage import Slot, slot_bytes
from registry.tables import Shown, Table
from registry.verification import Logical, fact_differences, kind, logical

#: Elements that are compared at once: in float64, those of both sides and their difference stay in the cache.
_STRETCH = 1 << 18
#: Stretches that are one piece of work.
_PART = 16
#: Lines of each kind that are printed; `as_dict()` has them all.
_LINES = 20


@frozen
class Values:
    """How the values of a tensor differ: `count` of `of` elements.

    The largest absolute difference is at the index `at`, where the two have `a` and `b`; it is nan where one is. Equal
    types are compared bit for bit, so that two zeros of other signs differ, by 0; others by value.
    """

    count: int
    of: int
    largest: float
    at: tuple[int, ...]
    a: float
    b: float


@frozen
class TensorDifference:
    """A logical tensor (at one index of the axes that names spell) that differs; `values` where they were compared."""

    tensor: str
    problem: str
    values: Values | None = None


@frozen
class Side:
    """What one of the two is."""

    path: str
    format: str
    architecture: str
    parallel: str
    iteration: int | None
    tensors: int


@frozen(repr=False)
class Comparison(Shown):
    """The outcome of `diff`. `equal`: the same architecture, facts, tensors, types and values, in whatever layout.

    `facts` are those that both know and that differ.
    """

    equal: bool
    a: Side
    b: Side
    facts: dict[str, tuple[Any, Any]]
    tensors: int
    differences: tuple[TensorDifference, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """The outcome, and every difference."""
        rows = [(f"fact {key}", f"{mine!r} against {other!r}", "") for key, (mine, other) in self.facts.items()]
        rows += [(one.tensor, one.problem, _spoken(one.values)) for one in self.differences]
        return Table(self._headline(), ("what", "difference", "values"), rows)

    def _headline(self) -> str:
        if self.equal:
            return f"equal: {self.tensors} logical tensors, bit for bit"
        facts = f", and {len(self.facts)} facts" if self.facts else ""
        return f"different: {len(self.differences)} of {self.tensors} logical tensors{facts}"

    def __str__(self) -> str:
        return "\n".join([self._headline(), *(f"  {line}" for line in self._lines())])

    def _lines(self) -> Iterator[str]:
        for what in ("path", "format", "parallel", "architecture", "iteration"):
            a, b = getattr(self.a, what), getattr(self.b, what)
            if a != b:
                yield f"{what:<14}{_said(a)} against {_said(b)}"
        for key, (a, b) in self.facts.items():
            yield f"fact          {key} is {a!r} against {b!r}"
        by_problem: dict[str, list[str]] = {}
        for one in self.differences:
            if one.values is None:
                by_problem.setdefault(one.problem, []).append(one.tensor)
        for problem, names in by_problem.items():
            yield from (f"{name}: {problem}" for name in collapse(names, _LINES))
        compared = [one for one in self.differences if one.values is not None]
        for one in sorted(compared, key=_weight)[:_LINES]:
            yield f"{one.tensor}: {one.problem}; {_spoken(one.values)}"
        if len(compared) > _LINES:
            yield f"and {len(compared) - _LINES} tensors whose values differ by less"
        if self.differences:
            name = shlex.quote(self.differences[0].tensor)
            yield f"where one is stored: registry explain {shlex.quote(self.a.path)} {name}"


def _said(value: object) -> str:
    return "-" if value is None else str(value)


def _weight(one: TensorDifference) -> float:
    """Those that differ most come first, and what is not a number before all."""
    assert one.values is not None
    return -math.inf if math.isnan(one.values.largest) else -one.values.largest


def _spoken(values: Values | None) -> str:
    if values is None:
        return ""
    if not values.count:
        return "the values are equal"
    return (
        f"{values.count:,} of {values.of:,} elements differ, by up to {values.largest:.3g}"
        f" at {list(values.at)}: {values.a:.6g} against {values.b:.6g}"
    )


def diff(
    a: PathLike, b: PathLike, *, config: PathLike | Mapping[str, Any] | None = None, architecture: str | None = None,
    progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """Compare two checkpoints of any formats, layouts, types and shapes."""
    left, right = _opened(a, b, config, architecture)
    facts = fact_differences(left, right)
    with logical(left) as first, logical(right) as second:
        found = tuple(_differences(first, second, progress))
        count = len({slot.name for side in (first, second) for slot in side.slots})
        one, other = _side(left, len(first.slots)), _side(right, len(second.slots))
    equal = not found and not facts and one.architecture == other.architecture
    return Comparison(equal, one, other, facts, count, found)


def _opened(
    a: PathLike, b: PathLike, config: PathLike | Mapping[str, Any] | None, architecture: str | None
) -> tuple[Source, Source]:
    """Both sides. A config that only one carries may not be that of the other, which then has to say its own sizes."""
    try:
        return load_pair(a, b, config=config, architecture=architecture)
    except MappingError as error:
        if config is not None:
            raise
        try:
            return load(a, architecture=architecture), load(b, architecture=architecture)
        except MappingError:
            raise error from None


def _side(source: Source, tensors: int) -> Side:
    opened = source.opened
    return Side(
        str(opened.path), source.spec.name, source.architecture.name, str(opened.parallel or "one rank"),
        opened.iteration, tensors,
    )  # fmt: skip


def _differences(first: Logical, second: Logical, progress: Progress | None) -> Iterator[TensorDifference]:
    """In the order of the first, and then what only the second has."""
    left = {slot.name: i for i, slot in enumerate(first.slots)}
    right = {slot.name: i for i, slot in enumerate(second.slots)}
    pairs = {
        name: _Pair(first, left[name], second, right[name])
        for name in left
        if name in right and first.slots[left[name]].shape == second.slots[right[name]].shape
    }
    _compare(list(pairs.values()), default_threads(first.remote or second.remote), progress)
    for name in [*left, *(name for name in right if name not in left)]:
        if name not in right:
            yield TensorDifference(name, "only in the first")
        elif name not in left:
            yield TensorDifference(name, "only in the second")
        else:
            one, other = first.slots[left[name]], second.slots[right[name]]
            values = pairs[name].values() if name in pairs else None
            if kind(one) != kind(other) or (values is not None and values.count):
                problem = f"{kind(one)} against {kind(other)}" if kind(one) != kind(other) else kind(one)
                yield TensorDifference(name, problem, values)


@define(eq=False)
class _Pair:
    """One logical tensor on both sides, and what has been found of it so far."""

    first: Logical
    left: int
    second: Logical
    right: int
    count: int = 0
    worst: tuple[float, int, float, float] | None = None
    lock: threading.Lock = field(factory=threading.Lock)

    @property
    def slots(self) -> tuple[Slot, Slot]:
        return self.first.slots[self.left], self.second.slots[self.right]

    @property
    def elements(self) -> int:
        return math.prod(self.slots[0].shape)

    def values(self) -> Values:
        """What was found, where all has been compared."""
        shape = self.slots[0].shape
        if self.worst is None:
            return Values(self.count, self.elements, 0.0, (0,) * len(shape), 0.0, 0.0)
        size, at, a, b = self.worst
        where = tuple(int(i) for i in np.unravel_index(at, shape)) if shape else ()
        lost = math.isinf(size) and (math.isnan(a) or math.isnan(b))
        return Values(self.count, self.elements, math.nan if lost else size, where, a, b)

    def compare(self, begin: int, end: int) -> None:
        """Compare the elements in [begin, end)."""
        one, other = self.slots
        a = bytearray((end - begin) * ITEMSIZE[one.dtype])
        b = bytearray((end - begin) * ITEMSIZE[other.dtype])
        self.first.read(memoryview(a), self.left, begin * ITEMSIZE[one.dtype])
        self.second.read(memoryview(b), self.right, begin * ITEMSIZE[other.dtype])
        if one.dtype == other.dtype and a == b:
            return
        left, right = _numbers(a, one.dtype), _numbers(b, other.dtype)
        with np.errstate(invalid="ignore"):
            apart = np.abs(left - right)
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        if one.dtype == other.dtype:
            width = ITEMSIZE[one.dtype]
            differ = (np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)).reshape(-1, width).any(axis=1)
        else:
            differ = ~same
        apart[same] = 0.0
        apart[np.isnan(apart)] = np.inf
        apart[~differ] = -1.0
        worst = int(np.argmax(apart))
        found = (float(apart[worst]), begin + worst, _float(left[worst]), _float(right[worst]))
        with self.lock:
            self.count += int(differ.sum())
            # of several that are as large, the first, whatever thread was quicker
            if found[0] >= 0 and (self.worst is None or (-found[0], found[1]) < (-self.worst[0], self.worst[1])):
                self.worst = found


def _float(value: Any) -> float:
    return float(abs(value)) if np.iscomplexobj(value) else float(value)


def _numbers(data: bytearray, dtype: str) -> np.ndarray:
    """Elements as float64, or complex128."""
    import torch

    tensor = torch.frombuffer(data, dtype=torch_dtype(dtype))
    return np.asarray(tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).numpy())


def _compare(pairs: Sequence[_Pair], threads: int, progress: Progress | None) -> None:
    """Compare every element of every pair."""
    tally = Tally(progress, sum(slot_bytes(slot) for pair in pairs for slot in pair.slots))

    def work(part: tuple[_Pair, int, int]) -> None:
        pair, begin, end = part
        width = sum(ITEMSIZE[slot.dtype] for slot in pair.slots)
        for low in range(begin, end, _STRETCH):
            high = min(low + _STRETCH, end)
            pair.compare(low, high)
            tally.add((high - low) * width)

    step = _STRETCH * _PART
    parts = [(pair, at, min(at + step, pair.elements)) for pair in pairs for at in range(0, pair.elements, step)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, parts):
            pass
