"""Bounds on what a pickle has made, checked before anything walks it.

A graph of a few bytes can be nested a million deep, hold itself, or be so shared that a walk over it never ends: each
list holds the one below it twice. Readers here walk state by recursion, so they are given trees of a sane size only.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from registry.errors import CheckpointError

from .pickle_nodes import Call, InertDict, Persistent

#: Containers in containers. What Megatron saves is nested less than ten deep.
MAX_DEPTH = 64
#: Visits of a walk: for what honest sharing adds, so many times the objects, and for small graphs so many in all.
_SHARED = 16
_SMALL = 1_000_000


def contents(value: object) -> Iterable[Any]:
    """What a value holds; nothing for what is no container."""
    if isinstance(value, dict):
        own: Iterable[Any] = (value.args, value.state) if isinstance(value, InertDict) else ()
        return chain(value, value.values(), own)
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, Call):
        return (value.args, value.state, value.items, value.pairs)
    return (value.pid,) if isinstance(value, Persistent) else ()


_CONTAINERS = (dict, list, tuple, set, frozenset, Call, Persistent)


def check_tree(root: Any, where: str) -> Any:
    """The graph itself. Raises CheckpointError where a walk would go too deep, in circles or on for ever."""
    sizes: dict[int, int] = {}  # of what each container unfolds to; 0 while it is walked

    def size(value: object, left: int) -> int:
        if not isinstance(value, _CONTAINERS):
            return 1
        known = sizes.get(id(value))
        if known is not None and known:
            return known
        if known == 0 or not left:
            problem = "holds itself" if known == 0 else f"is nested deeper than {MAX_DEPTH}"
            raise CheckpointError(f"pickled state {problem}", where=where, expected="plain nested data", found=problem)
        sizes[id(value)] = 0
        if isinstance(value, dict | set | frozenset):
            _check_keys(value, where)
        total = 1
        for inner in contents(value):
            total += size(inner, left - 1) if isinstance(inner, _CONTAINERS) else 1
        sizes[id(value)] = total
        return total

    whole, most = size(root, MAX_DEPTH), max(_SMALL, _SHARED * len(sizes))
    if whole > most and whole > _SHARED * _leaves(root):
        raise CheckpointError(
            "pickled state unfolds to far more than it is", where=where, expected=f"at most {most} values",
            found=whole if whole < 1 << 62 else "more than can be counted",
        )  # fmt: skip
    return root


def _check_keys(keys: Iterable[object], where: str) -> None:
    """An object that was given its state after it became a key may have no hash any more."""
    try:
        for key in keys:
            if isinstance(key, Call | tuple):
                hash(key)
    except TypeError as error:
        raise CheckpointError("a pickle's key cannot be one", where=where, expected="scalars", found=error) from None


def _leaves(root: object) -> int:
    """Values that there are, each container once."""
    seen: set[int] = set()
    todo, count = [root], 0
    while todo:
        value = todo.pop()
        if id(value) not in seen:
            seen.add(id(value))
            for inner in contents(value):
                count += 1
                if isinstance(inner, _CONTAINERS):
                    todo.append(inner)
    return count
