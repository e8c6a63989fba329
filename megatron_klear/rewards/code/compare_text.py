"""What a program printed against what it should have printed. Reads bytes, decodes nothing, imports nothing heavy."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation

TOLERANCE = 1e-6
"""Absolute or relative, of decimals with a point or an exponent."""
_NUMBER = re.compile(rb"[+-]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\Z")
"""A zero in front makes a text of it, as in grids of digits and codes; testlib reads no such number either."""
_SPARE_DIGITS = 4096
"""By which a number may be longer than the expected one and still be read: reading takes more than its length."""


def same_text(printed: bytes, expected: bytes) -> bool:
    """The rules of contest judges: the same lines of the same tokens.

    White space at the ends of the text and of lines, and how much of it separates tokens, does not count. Numbers are
    equal by value, and close where the expected one is a decimal with a point or an exponent; digits after a zero in
    front are no number.
    """
    printed, expected = printed.strip(), expected.strip()
    if printed == expected:
        return True
    got, wanted = printed.split(b"\n"), expected.split(b"\n")
    return len(got) == len(wanted) and all(
        have == want or _same_tokens(have.split(), want.split()) for have, want in zip(got, wanted, strict=True)
    )


def same_tokens(printed: bytes, expected: bytes) -> bool:
    """The same tokens, wherever lines break."""
    return printed == expected or _same_tokens(printed.split(), expected.split())


def same_as_livecodebench(printed: bytes, expected: bytes) -> bool:
    """LiveCodeBench's `grade_stdio`: stripped lines that are equal, or all of whose tokens are equal as Decimal."""
    try:
        got, wanted = ([line.strip() for line in text.decode().strip().split("\n")] for text in (printed, expected))
    except UnicodeDecodeError:
        return False
    return len(got) == len(wanted) and all(
        have == want or _same_decimals(have, want) for have, want in zip(got, wanted, strict=True)
    )


def _same_tokens(got: list[bytes], wanted: list[bytes]) -> bool:
    return len(got) == len(wanted) and all(
        have == want or _same_number(have, want) for have, want in zip(got, wanted, strict=True)
    )


def _same_number(have: bytes, want: bytes) -> bool:
    """NaN and infinity are no numbers here: they are right where the texts are equal."""
    if len(have) > len(want) + _SPARE_DIGITS or not (_NUMBER.match(have) and _NUMBER.match(want)):
        return False
    try:
        if Decimal(have.decode()) == Decimal(want.decode()):
            return True
    except InvalidOperation:  # an exponent beyond what Decimal holds
        return False
    if not any(mark in want for mark in b".eE"):
        return False
    value, target = float(have), float(want)
    return math.isfinite(value) and math.isfinite(target) and close(value, target)


def close(value: float, target: float) -> bool:
    """Within the tolerance of a finite target."""
    return abs(value - target) <= TOLERANCE * max(1.0, abs(target))


def _same_decimals(have: str, want: str) -> bool:
    try:
        return [Decimal(token) for token in have.split()] == [Decimal(token) for token in want.split()]
    except InvalidOperation:
        return False
