"""Formulas of quantisation: a closed language over blocks of one matrix.

    clamp(round(smoothed / weights_scaling_factor), -8, 7)

A formula is evaluated for some rows and columns of the matrix. Everything in it is a block of float32 values that
stretches over them: a scale of the whole matrix, of each row, of each group of columns, or of each value. The grammar
is a part of Python's expressions, walked by hand: numbers, quoted names of types, names, + - * /, `a if c else b`,
`and`, `or`, `not`, and the functions below. Nothing is compiled or executed.
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
from registry.expressions import checked

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
        """Are there ranges, or a further tensor, of this name?"""

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
    """The nearest values that FP4 (E2M1) has; of two that are as near, the one whose last bit is 0.

    Without conditions, which cost several times what arithmetic does. Neighbours of 2**22 times a power of two are half
    of that power away, as those of values with one bit of mantissa are; below 1 they are a half away, as at 1. So
    adding that number rounds, and half as much again keeps the sum there for negative values too.
    """
    import torch

    found = value.clamp(-6.0, 6.0)
    power = found.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power.clamp_(min=1.0).mul_(6291456.0)
    found.add_(power).sub_(power)
    sign = (value + 0.0).view(torch.int32).bitwise_and_(-0x80000000)  # small negative values become -0, and -0 does not
    found.view(torch.int32).bitwise_or_(sign)
    return found


def fp4_pairs(value: torch.Tensor) -> torch.Tensor:
    """Values that FP4 has, two in a byte: each the sign, two bits of exponent and one of mantissa.

    These are the bits of the same numbers in float16, 2**14 times as small, so that 1 has the smallest exponent there.
    """
    import torch

    halves = value.mul(2.0**-14).to(torch.float16).view(torch.int32)  # of two numbers the first is the low one
    codes = (halves >> 12).bitwise_and_(0x80008).bitwise_or_((halves >> 9).bitwise_and_(0x70007))
    return codes.bitwise_or_(codes >> 12).to(torch.uint8)


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
    return Formula(text, *checked(text, "a formula", _check))


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
        case ast.BoolOp(values=values):
            inner = values
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
                expected="numbers, names, + - * /, a if c else b, and, or, not, given(), "
                + ", ".join([*FUNCTIONS, *REDUCTIONS]),
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
        case ast.BoolOp(op=op, values=values):
            decided = any if isinstance(op, ast.Or) else all
            return decided(evaluate(value, block) for value in values)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return evaluate(body if evaluate(test, block) else orelse, block)
        case ast.Call(func=ast.Name(id="given"), args=[ast.Name(id=name)]):
            return block.given(name)
        case ast.Call(func=ast.Name(id=name), args=[inner]) if name in REDUCTIONS:
            return block.reduce(name, inner)
        case ast.Call(func=ast.Name(id=name), args=args):
            return FUNCTIONS[name](*(evaluate(arg, block) for arg in args))
    raise TypeError(f"unexpected {ast.dump(node)}")
