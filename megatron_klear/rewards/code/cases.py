"""Tests that are pairs of input and output: of whole programs, or of one function."""

from __future__ import annotations

import json
import keyword
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ..sandbox.outcome import DEFAULT_LIMITS
from ..sandbox.values import encode_arguments, unfit
from .prelude import PRELUDE
from .problem import AnyOf, Case, Problem, Text

_LONG = 1000  # digits


class FormError(ValueError):
    """A ground truth of a code problem that cannot be used; the message says what is wrong with it."""


def stdin_problem(inputs: Any, outputs: Any) -> Problem:
    """Programs that read standard input and print."""
    pairs = _pairs(inputs, outputs)
    cases = tuple(
        Case(_text(given, f"input {number}"), Text(_printable(_text(wanted, f"output {number}"), number)))
        for number, (given, wanted) in enumerate(pairs)
    )
    return Problem(mode="stdin", tests=cases)


def call_problem(inputs: Any, outputs: Any, name: str) -> Problem:
    """Calls of the function, or of the method of `Solution`, of that name.

    An input is the list of arguments, or a text with one argument a line in JSON (LiveCodeBench); an output the value,
    or its JSON where the input is a text. Where every output of a problem is a list of one value (APPS, TACO, PRIME),
    that value is right as well as the list.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise FormError(f"fn_name {name[:60]!r} is no name of a function")
    pairs = _pairs(inputs, outputs)
    wrapped = all(isinstance(wanted, list) and len(wanted) == 1 for _, wanted in pairs)
    cases = []
    for number, (given, wanted) in enumerate(pairs):
        arguments = _arguments(given, number)
        _check(arguments, f"input {number}")
        if isinstance(given, str) and isinstance(wanted, str):
            wanted = _json(wanted, f"output {number}")
        values = (wanted, wanted[0]) if wrapped and isinstance(wanted, list) else (wanted,)
        _check(wanted, f"output {number}")
        cases.append(Case(encode_arguments(arguments), AnyOf(values)))
    return Problem(mode="call", tests=tuple(cases), entry=name, prelude=PRELUDE)


def _pairs(inputs: Any, outputs: Any) -> list[tuple[Any, Any]]:
    for name, side in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(side, Sequence) or isinstance(side, str | bytes):
            raise FormError(f"`{name}` is of type {type(side).__name__}, expected a list")
    if len(inputs) != len(outputs):
        raise FormError(f"there are {len(inputs)} inputs and {len(outputs)} outputs")
    if not inputs:
        raise FormError("the ground truth holds no test")
    return list(zip(inputs, outputs, strict=True))


def _text(value: Any, place: str) -> bytes:
    """A text as it is, lines of a list joined, a number as Python writes it."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise FormError(f"{place} is of type {type(value).__name__}, expected a text or a list of lines")
    if isinstance(value, float) and not math.isfinite(value):
        raise FormError(f"{place} is {value}")
    try:
        return str(value).encode()
    except UnicodeEncodeError as error:
        raise FormError(f"{place} is no valid text ({error.reason})") from None


def _printable(wanted: bytes, number: int) -> bytes:
    most = DEFAULT_LIMITS.output_bytes
    if len(wanted) > most:
        raise FormError(f"output {number} has {len(wanted)} bytes, and programs may print {most}")
    return wanted


def _check(value: Any, place: str) -> None:
    if (words := unfit(value)) is not None:
        raise FormError(f"{place} {words}")


def _arguments(given: Any, number: int) -> list[Any]:
    if isinstance(given, str):
        lines = [line for line in given.split("\n") if line.strip()]
        return [_json(line, f"input {number}") for line in lines]
    if isinstance(given, list):
        return given
    raise FormError(f"input {number} is of type {type(given).__name__}, expected a list of arguments or JSON lines")


def load_json(text: str) -> Any:
    """JSON with integers of any length, which Python by itself refuses. Raises ValueError or RecursionError."""
    return json.loads(text, parse_int=lambda digits: int(Decimal(digits)) if len(digits) > _LONG else int(digits))


def _json(text: str, place: str) -> Any:
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        raise FormError(f"{place}, {text[:40]!r}, is no JSON ({error})") from None
