"""Small expressions over named facts, as specs use them: `heads // kv_heads`, `tied_embeddings and pp > 1`.

The grammar is a closed subset of Python's expressions, walked by hand: numbers, strings, lists, mappings with text as
keys, names, dotted fields, `x[i]` of lists and strings, arithmetic (no powers; `+` also joins strings and lists, `*`
also repeats lists), comparisons, `and/or/not`, `a if c else b`, and the functions in `FUNCTIONS` and `MODEL_FUNCTIONS`.
A name that the environment lacks is None, and so is a field or an element of None. Nothing is ever compiled or
executed.
"""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from attrs import frozen

from registry.documents import parse_json
from registry.errors import SpecError

MAX_LENGTH = 500


def _ceil_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _omit(table: Mapping[str, Any] | None, *keys: str) -> dict[str, Any] | None:
    if table is not None and not isinstance(table, Mapping):
        raise TypeError(f"omit() of {table!r}")
    return None if table is None else {k: v for k, v in table.items() if k not in keys}


def _renamed(table: Mapping[str, Any] | None, old: str, new: str) -> dict[str, Any] | None:
    """A table with an older key under its newer name, which holds where both are there."""
    kept = _omit(table, old)
    return kept if kept is None or table is None or old not in table else {new: table[old], **kept}


def _lcm(*numbers: int) -> int:
    return math.lcm(*numbers)


def _index(items: Sequence[Any] | None, value: Any) -> int | None:
    """Where `value` first stands in a list; the list's length where it does not."""
    if items is None:
        return None
    return next((i for i, item in enumerate(items) if item == value), len(items))


def _count(items: Sequence[Any] | None, value: Any) -> int | None:
    return None if items is None else sum(item == value for item in items)


def _indices(items: Sequence[Any] | None, value: Any) -> list[int] | None:
    """Everywhere that `value` stands in a list."""
    return None if items is None else [i for i, item in enumerate(items) if item == value]


def _from_json(text: str | None) -> Any:
    return None if text is None else parse_json(text.encode())


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ceil_to": _ceil_to,
    "omit": _omit,
    "renamed": _renamed,
    "from_json": _from_json,
    "to_json": json.dumps,
    "lcm": _lcm,
    "index": _index,
    "count": _count,
    "indices": _indices,
    "min": min,
    "max": max,
    "len": len,
    "int": int,
    "float": float,
    "bool": bool,
}

#: Functions that the environment brings: `has('mlp.router.weight')`, does the model (or the layer in question) have
#: this logical tensor; `each('mlp.router.weight')`, the same as 0 or 1 for every layer, as a list.
MODEL_FUNCTIONS = ("has", "each")
#: A list is repeated to at most so many elements.
MAX_LIST = 1 << 16

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


@frozen
class Expression:
    """A parsed expression; `names` are the facts that it reads."""

    text: str
    tree: ast.expr
    names: frozenset[str]

    def __call__(self, env: Mapping[str, Any]) -> Any:
        """Evaluate. Raises SpecError, which quotes the expression."""
        try:
            return _evaluate(self.tree, env)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            known = ", ".join(f"{name}={env.get(name)!r}" for name in sorted(self.names))
            raise SpecError(f"cannot evaluate {self.text!r}: {error}", found=known) from error


@lru_cache(maxsize=4096)
def parse(text: str) -> Expression:
    """Parse and check. Raises SpecError, which quotes the expression and names what is not allowed."""
    return Expression(text, *checked(text, "an expression", _check))


def checked(text: str, what: str, check: Callable[[ast.expr, str], Iterable[str]]) -> tuple[ast.expr, frozenset[str]]:
    """The tree of a text and the names that `check(tree, text)` finds. Raises SpecError, as `check` does."""
    if len(text) > MAX_LENGTH:
        raise SpecError(f"{what} that is too long", expected=f"at most {MAX_LENGTH} characters", found=len(text))
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return tree, frozenset(check(tree, text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError(f"not {what}: {text!r}", found=str(error)) from None


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _check(node: ast.expr, text: str) -> set[str]:
    """Names read below `node`; refuses every construct that `_evaluate` does not know."""
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, bool | int | float | str):
            return set()
        case ast.Name(id=name) if not name.startswith("__") and name not in MODEL_FUNCTIONS:
            return set() if name in _CONSTANTS else {name}
        case ast.Attribute(value=value, attr=attr) if not attr.startswith("__"):
            return _check(value, text)
        case ast.Subscript(value=value, slice=index) if not isinstance(index, ast.Slice):
            return _check(value, text) | _check(index, text)
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.BoolOp(values=items):
            return set().union(*(_check(item, text) for item in items))
        case ast.Dict(keys=keys, values=items) if all(_is_text(key) for key in keys):
            return set().union(*(_check(item, text) for item in items))
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            return _check(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _check(left, text) | _check(right, text)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            return _check(left, text).union(*(_check(other, text) for other in others))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _check(test, text) | _check(body, text) | _check(orelse, text)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS or name in MODEL_FUNCTIONS:
            return set().union(*(_check(arg, text) for arg in args))
    raise SpecError(
        f"{ast.unparse(node)!r} is not allowed in an expression",
        where=text,
        expected="arithmetic, comparisons, and/or/not, a if c else b, or " + ", ".join(FUNCTIONS),
    )


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _element(value: Any, index: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return value.get(index)
    if not isinstance(value, list | str) or type(index) is not int:
        raise TypeError(f"element {index!r} of {value!r}")
    if not 0 <= index < len(value):
        raise IndexError(f"element {index} of {len(value)}")
    return value[index]


def _evaluate(node: ast.expr, env: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return _CONSTANTS[name] if name in _CONSTANTS else env.get(name)
        case ast.Attribute(value=value, attr=attr):
            return _field(_evaluate(value, env), attr)
        case ast.Subscript(value=value, slice=index):
            return _element(_evaluate(value, env), _evaluate(index, env))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_evaluate(item, env) for item in items]
        case ast.Dict(keys=keys, values=items):
            names = [key.value for key in keys if isinstance(key, ast.Constant)]
            return {name: _evaluate(item, env) for name, item in zip(names, items, strict=True)}
        case ast.BoolOp(op=op, values=items):
            for item in items:
                result = _evaluate(item, env)
                if bool(result) != isinstance(op, ast.And):
                    break
            return result
        case ast.UnaryOp(op=op, operand=operand):
            result = _evaluate(operand, env)
            return not result if isinstance(op, ast.Not) else -result
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _evaluate(left, env), _evaluate(right, env)
            if isinstance(op, ast.Add) and type(a) is type(b) and isinstance(a, str | list):
                return a + b
            if isinstance(op, ast.Mult) and isinstance(a, list) and type(b) is int:
                if len(a) * b > MAX_LIST:
                    raise ValueError(f"a list of more than {MAX_LIST} elements")
                return a * b
            if not (isinstance(a, int | float) and isinstance(b, int | float)):
                raise TypeError(f"arithmetic on {a!r} and {b!r}")
            return _BINARY[type(op)](a, b)
        case ast.Compare(left=left, ops=ops, comparators=others):
            a = _evaluate(left, env)
            for comparison, other in zip(ops, others, strict=True):
                b = _evaluate(other, env)
                if not _COMPARE[type(comparison)](a, b):
                    return False
                a = b
            return True
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _evaluate(body if _evaluate(test, env) else orelse, env)
        case ast.Call(func=ast.Name(id=name), args=args):
            function = FUNCTIONS[name] if name in FUNCTIONS else env.get(name)
            if not callable(function):
                raise TypeError(f"{name}() asks about a model, and there is none yet")
            return function(*(_evaluate(arg, env) for arg in args))
    raise TypeError(f"unexpected {ast.dump(node)}")
