"""What a function returned against what it should have returned; both are plain data, and nothing of either is run."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from .compare_text import close

_MAX_DEPTH = 200


def same_value(value: Any, expected: Any) -> bool:
    """Equal with exact types, but for what a test's source cannot tell apart.

    A list may be expected of any sequence, at any depth; a number of another number of the same value, never of a truth
    value; a float within the tolerance. Sets and the keys of dicts are compared as they are. What is no plain data
    equals nothing.
    """
    return _same(value, expected, 0)


def same_as_livecodebench(value: Any, expected: Any) -> bool:
    """LiveCodeBench's `grade_call_based`: a tuple is taken as a list, then `==`."""
    if isinstance(value, tuple):
        value = list(value)
    return plain(value) and bool(value == expected)


def plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is data through and through."""
    if depth > _MAX_DEPTH:
        return False
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return True
    if isinstance(value, dict):
        return all(plain(key, depth + 1) and plain(entry, depth + 1) for key, entry in value.items())
    return isinstance(value, list | tuple | set | frozenset | deque) and all(plain(entry, depth + 1) for entry in value)


def _same(value: Any, expected: Any, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        return False
    if expected is None or isinstance(expected, bool):
        return value is expected
    if isinstance(expected, int | float | complex):
        return _same_number(value, expected)
    if isinstance(expected, list):
        return isinstance(value, list | tuple | deque) and _same_entries(value, expected, depth)
    if isinstance(expected, tuple | deque):
        return isinstance(value, type(expected)) and _same_entries(value, expected, depth)
    if isinstance(expected, set | frozenset):
        return isinstance(value, set | frozenset) and _same_set(value, expected)
    if isinstance(expected, dict):
        return isinstance(value, dict) and _same_dict(value, expected, depth)
    return type(value) is type(expected) and bool(value == expected)


def _same_number(value: Any, expected: complex) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | complex):
        return False
    if value == expected:
        return True
    if isinstance(expected, int):
        return False
    if isinstance(expected, complex) or isinstance(value, complex):
        value, expected = complex(value), complex(expected)
        return _close(value.real, expected.real) and _close(value.imag, expected.imag)
    return _close(value, expected)


def _close(value: float, expected: float) -> bool:
    """NaN is right where NaN is expected; neither it nor infinity passes a tolerance."""
    if math.isnan(expected):
        return isinstance(value, float) and math.isnan(value)
    try:
        return value == expected or (math.isfinite(value) and math.isfinite(expected) and close(value, expected))
    except OverflowError:  # an integer that no float holds
        return False


def _same_entries(value: Any, expected: Any, depth: int) -> bool:
    return len(value) == len(expected) and all(
        _same(have, want, depth + 1) for have, want in zip(value, expected, strict=True)
    )


def _same_set(value: Any, expected: Any) -> bool:
    return len(value) == len(expected) and {_key(entry) for entry in value} == {_key(entry) for entry in expected}


def _same_dict(value: dict[Any, Any], expected: dict[Any, Any], depth: int) -> bool:
    if len(value) != len(expected):
        return False
    found = {_key(key): entry for key, entry in value.items()}
    return all(_key(key) in found and _same(found[_key(key)], want, depth + 1) for key, want in expected.items())


def _key(key: Any) -> Any:
    """A key that tells a truth value from the number it equals."""
    return (type(key) is bool, tuple(map(_key, key)) if isinstance(key, tuple) else key)
