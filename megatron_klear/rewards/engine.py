"""math-verify as this package uses it: without its own clock, and without its chopping of small numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

_CLOSE = 1e-12  # relative
_SMALL, _CLOSE_DECIMALS = 1e-4, 1e-4
_DIGITS = 30


@cache
def warm_up() -> None:
    """Import the symbolic engine, which takes a second or two, before any clock runs."""
    from math_verify import grader

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeout is off, as it must be
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)
    # math-verify 0.9 takes (a - b).evalf(chop=True) == 0 as equality, which holds for any two numbers below about
    # 1e-16, and rounds decimals to six places however small they are.
    grader.sympy_numeric_eq = _relative(grader.sympy_numeric_eq)
    forms = [_parse(text) for text in ("\\boxed{\\frac{1}{2}}", "\\boxed{0.25 + x}")]
    grader.verify(*forms, timeout_seconds=None)


def parse(text: str) -> list[Any]:
    """What math-verify makes of a text: symbolic forms and, last, the text itself."""
    warm_up()
    return _parse(text)


def _parse(text: str) -> list[Any]:
    """`parse` before the engine is ready."""
    from math_verify import parse as parse_text

    return list(parse_text(text, parsing_timeout=None))


def verify(gold_forms: list[Any], forms: list[Any], *, inequalities: bool = False) -> bool:
    """Whether one of the forms equals one of the ground truth's; `inequalities` may stand for an interval."""
    from math_verify import verify as verify_forms

    warm_up()
    return bool(verify_forms(gold_forms, forms, timeout_seconds=None, allow_set_relation_comp=inequalities))


def _relative(by_library: Callable[..., bool]) -> Callable[..., bool]:
    """The library's numeric equality of two expressions, held to the size of the numbers."""

    def numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        return bool(by_library(a, b, float_rounding, numeric_precision)) and _near(a, b)

    return numeric_eq


def _near(a: Any, b: Any) -> bool:
    from sympy import Basic, Float, simplify

    if not (isinstance(a, Basic) and isinstance(b, Basic)):
        return True  # matrices: their entries come here one by one
    if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        try:
            return bool(simplify(a - b) == 0) or a.has(Float) or b.has(Float)
        except (TypeError, AttributeError):
            return True
    try:
        difference = abs((a - b).evalf(_DIGITS))
        size = max(abs(a.evalf(_DIGITS)), abs(b.evalf(_DIGITS)))
        if a.has(Float) or b.has(Float):
            return bool(size == 0 or size >= _SMALL or difference <= _CLOSE_DECIMALS * size)
        return bool(difference <= _CLOSE * size)
    except (TypeError, AttributeError):
        return True  # not a number after all; the library's word stands
