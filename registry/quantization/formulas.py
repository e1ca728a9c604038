"""Formulas of quantisation: a closed language over blocks of one matrix.

    clamp(round(smoothed / weights_scaling_factor), -8, 7)

A formula is evaluated for some rows and columns of the matrix. Everything in it is a block of float32 values that
stretches over them: a scale of the whole matrix, of each row, of each group of columns, or of each value. The grammar
is a part of Python's expressions, walked by hand: numbers, quoted names of types, names, + - * /, `a if c else b`,
`not`, comparisons of plain numbers, and the functions below. Nothing is compiled or executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from attrs import frozen

from registry.dtypes import ITEMSIZE, torch_dtype
from registry.errors import SpecError

if TYPE_CHECKING:
    import torch

#: Functions over a stretch of the matrix, which the block's owner answers: of the whole matrix (of each expert, and of
#: the matrices that share a scale), of each row, column or group of columns; over all parts of it, or of one of them.
REDUCTIONS = ("absmax", "row_absmax", "column_absmax", "group_absmax", "largest", "own_largest", "mean", "part_absmax")
#: Values that fp4 (E2M1) has.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Block(Protocol):
    """What a formula is evaluated on."""

    def name(self, name: str) -> Any:
        """The value of a name over the block: a tensor, a number, a type, or whether it is known."""

    def given(self, name: str) -> bool:
        """Are there ranges of this name?"""

    def reduce(self, function: str, inner: ast.expr) -> torch.Tensor:
        """One of the REDUCTIONS of a formula, over the block."""


def _clamp(value: Any, low: float, high: float) -> Any:
    return value.clamp(low, high)


def _nonzero(value: torch.Tensor) -> torch.Tensor:
    """Zeros become ones: what they divide is zero too."""
    return value.masked_fill(value == 0, 1.0)


def _cast(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """Values as a type can hold them, rounded to even; still float32, or float64 where that is asked for."""
    import torch

    if dtype == "float64":
        return value.to(torch.float64)
    return value.to(torch_dtype(dtype)).to(torch.float32)


def _fp4(value: torch.Tensor) -> torch.Tensor:
    """The nearest values that FP4 (E2M1) has; of two that are as near, the one whose last bit is 0."""
    import torch

    size = value.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    found = (size / step).round_().mul_(step).clamp_(max=6.0)
    return torch.where(value < 0, -found, found)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda value: value.abs(),
    "round": lambda value: value.round(),
    "clamp": _clamp,
    "cast": _cast,
    "nonzero": _nonzero,
    "fp4": _fp4,
    "sqrt": lambda value: value.sqrt(),
    "power": lambda value, exponent: value.pow(exponent),
    "max": lambda a, b: _either("maximum", a, b),
    "min": lambda a, b: _either("minimum", a, b),
}


def _either(name: str, a: Any, b: Any) -> torch.Tensor:
    import torch

    found: torch.Tensor = getattr(torch, name)(*(x if torch.is_tensor(x) else torch.tensor(float(x)) for x in (a, b)))
    return found


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@frozen
class Formula:
    """A parsed formula; `names` are those that it reads."""

    text: str
    tree: ast.expr
    names: frozenset[str]

    def __call__(self, block: Block) -> Any:
        """Evaluate over a block."""
        return evaluate(self.tree, block)


@lru_cache(maxsize=1024)
def parse(text: str) -> Formula:
    """Parse and check. Raises SpecError, which quotes the formula and names what is not allowed."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        names = frozenset(_check(tree, text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError(f"not a formula: {text!r}", found=str(error)) from None
    return Formula(text, tree, names)


def _check(node: ast.expr, text: str) -> Iterator[str]:
    """Names read below `node`; refuses every construct that `evaluate` does not know."""
    inner: list[ast.expr] = []
    match node:
        case ast.Constant(value=value) if type(value) in (int, float) or (type(value) is str and value in ITEMSIZE):
            pass
        case ast.Name(id=name) if not name.startswith("__"):
            yield name
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            inner = [operand]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            inner = [left, right]
        case ast.IfExp(test=test, body=body, orelse=orelse):
            inner = [test, body, orelse]
        case ast.Call(func=ast.Name(id="given"), args=[ast.Name()], keywords=[]):
            pass
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            inner = args
        case ast.Call(func=ast.Name(id=name), args=[arg], keywords=[]) if name in REDUCTIONS:
            inner = [arg]
        case _:
            raise SpecError(
                f"{ast.unparse(node)!r} is not allowed in a formula", where=text,
                expected="numbers, names, + - * /, a if c else b, given(), " + ", ".join([*FUNCTIONS, *REDUCTIONS]),
            )  # fmt: skip
    for part in inner:
        yield from _check(part, text)


def evaluate(node: ast.expr, block: Block) -> Any:
    """The value of a checked formula, or of a part of one, over a block."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return block.name(name)
        case ast.UnaryOp(op=op, operand=operand):
            value = evaluate(operand, block)
            return not value if isinstance(op, ast.Not) else -value
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](evaluate(left, block), evaluate(right, block))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return evaluate(body if evaluate(test, block) else orelse, block)
        case ast.Call(func=ast.Name(id="given"), args=[ast.Name(id=name)]):
            return block.given(name)
        case ast.Call(func=ast.Name(id=name), args=[inner]) if name in REDUCTIONS:
            return block.reduce(name, inner)
        case ast.Call(func=ast.Name(id=name), args=args):
            return FUNCTIONS[name](*(evaluate(arg, block) for arg in args))
    raise TypeError(f"unexpected {ast.dump(node)}")
