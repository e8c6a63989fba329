"""Values of expected expressions, worked out without running the test's code: literals and a little arithmetic."""

from __future__ import annotations

import ast
import collections
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

_MAX_SIZE = 1_000_000  # of a sequence or an integer's bits: a test's own numbers stay far below
_MAX_DEPTH = 100


class NotLiteralError(Exception):
    """An expression whose value only running code would tell."""


def _sized(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _MAX_SIZE:
        raise NotLiteralError
    if hasattr(value, "__len__") and len(value) > _MAX_SIZE:
        raise NotLiteralError
    return value


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _MAX_SIZE:
        raise NotLiteralError
    return base**exponent


def _times(left: Any, right: Any) -> Any:
    for sequence, count in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(count, int) and len(sequence) * count > _MAX_SIZE:
            raise NotLiteralError
    return left * right


def _range(*bounds: int) -> list[int]:
    found = range(*bounds)
    if len(found) > _MAX_SIZE:
        raise NotLiteralError
    return list(found)


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _times,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: lambda left, right: left % right if not isinstance(left, str | bytes) else _refuse(),
    ast.Pow: _power,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_CALLS: Mapping[str, Callable[..., Any]] = {
    **{kind.__name__: kind for kind in (set, frozenset, tuple, list, dict, float, int, str, complex, bool)},
    **{function.__name__: function for function in (len, sum, abs, round, sorted, min, max)},
    "range": _range,
    "deque": collections.deque,
    "Counter": lambda *given: dict(collections.Counter(*given)),
    "math.sqrt": math.sqrt,
    "sqrt": math.sqrt,
}
_NAMES: Mapping[str, Any] = {
    **{f"{module}{name}": getattr(math, name) for module in ("", "math.") for name in ("inf", "nan", "pi", "e")},
}


def _refuse() -> Any:
    raise NotLiteralError


def value_of(node: ast.expr, known: Mapping[str, Any] | None = None) -> Any:
    """The value of an expression of literals, of plain calls on them, and of the names in `known`.

    Raises NotLiteralError where it is none, or large.
    """
    try:
        return _value(node, known or {}, 0)
    except NotLiteralError:
        raise
    except Exception:  # whatever the arithmetic of a test raises
        raise NotLiteralError from None


def _value(node: ast.expr, known: Mapping[str, Any], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise NotLiteralError

    def inner(part: ast.expr) -> Any:
        return _value(part, known, depth + 1)

    match node:
        case ast.Constant(value=value) if value is not Ellipsis:
            return value
        case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            return {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]([inner(part) for part in parts])
        case ast.Dict(keys=keys, values=values):
            return {inner(key) if key else _refuse(): inner(entry) for key, entry in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](inner(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _sized(_BINARY[type(op)](inner(left), inner(right)))
        case ast.Name() | ast.Attribute():
            name = ast.unparse(node)
            found = known[name] if name in known else _NAMES.get(name, NotLiteralError)
            return found if found is not NotLiteralError else _refuse()
        case ast.Subscript(value=held, slice=place) if not isinstance(place, ast.Slice):
            return inner(held)[inner(place)]
        case ast.Call(func=function, args=arguments, keywords=[]):
            called = _CALLS.get(ast.unparse(function))
            if called is None or ast.unparse(function) in known:
                raise NotLiteralError
            return _sized(called(*[inner(argument) for argument in arguments]))
    raise NotLiteralError
