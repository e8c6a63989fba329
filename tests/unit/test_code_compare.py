"""Printed text and returned values against what is expected, by the rules of each comparison."""

from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rewards.code import compare_text, compare_values
from megatron_klear.rewards.sandbox.values import Opaque

BIG = "1" + "0" * 5000
# printed, expected; right by `judge`, `livecodebench`, `tokens`
TEXTS: dict[str, tuple[str, str, bool, bool, bool]] = {
    "the same": ("1 2\n", "1 2\n", True, True, True),
    "spaces and blank lines at the ends": ("1 2  \n3 \n\n\n", "1 2\n3", True, True, True),
    "no newline at the end": ("5", "5\n", True, True, True),
    "carriage returns": ("1\r\n2\r\n", "1\n2\n", True, True, True),
    "blank lines and spaces in front": ("\n  1\n", "1\n", True, True, True),
    "other line breaks": ("1 2", "1\n2", False, False, True),
    "a blank line between": ("1\n\n2", "1\n2", False, False, True),
    "spaces between words": ("a  b", "a b", True, False, True),
    "spaces between numbers": ("1  2", "1 2", True, True, True),
    "more after the answer": ("5\ndone", "5", False, False, False),
    "debug prints before": ("n = 3\n5", "5", False, False, False),
    "nothing": ("", "5", False, False, False),
    "nothing expected": ("", "", True, True, True),
    "case": ("YES", "Yes", False, False, False),
    "fewer decimals": ("0.333333", "0.333333333333", True, False, True),
    "too few decimals": ("0.33333", "0.333333333333", False, False, False),
    "relative": ("1234567891.0", "1234567890.0", True, False, True),
    "a large exponent": ("1.0000001e9", "1e9", True, False, True),
    "an integer is exact": ("1.0000001", "1", False, False, False),
    "equal by value": ("1.0", "1", True, True, True),
    "exponent": ("1e3", "1000", True, True, True),
    "a zero in front": ("007", "7", False, True, False),
    "a zero in front of the expected one": ("10", "0010", False, True, False),
    "rows of digits": ("0010\n10", "0010\n0010", False, True, False),
    "the same row of digits": ("0010", "0010", True, True, True),
    "a zero before the point": (".5", "0.50", True, True, True),
    "an exponent of the expected one": ("100000", "1e5", True, True, True),
    "plus": ("+7", "7", True, True, True),
    "large integers": ("50000000000000000", "50000000000000001", False, False, False),
    "large integers, as decimals": ("50000000000000000.0", "50000000000000001", False, False, False),
    "negative zero": ("-0.0", "0.0", True, True, True),
    "nan": ("nan", "nan", True, True, True),
    "nan for a number": ("nan", "1.5", False, False, False),
    "a number for nan": ("1.5", "nan", False, False, False),
    "NaN for nan": ("NaN", "nan", False, False, False),
    "infinity for a number": ("inf", "1e5", False, False, False),
    "infinity, spelt out": ("Infinity", "inf", False, True, False),
    "an overflow is no infinity": ("1e999", "1e400", False, False, False),
    "a signalling nan": ("sNaN", "1", False, False, False),
    "digits of Python": ("1_000", "1000", False, True, False),
    "digits of other scripts": ("\u0661", "1", False, True, False),
    "more digits than Python prints": (BIG, BIG, True, True, True),
    "more digits, by value": (BIG + ".0", BIG, True, True, True),
    "more digits, another": (BIG[:-1] + "1", BIG, False, False, False),
    "an exponent beyond all": ("1e99999999999999999999", "1", False, False, False),
    "a word for a number": ("x", "1", False, False, False),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str) -> None:
    printed, expected, judge, livecodebench, tokens = TEXTS[name]
    sides = printed.encode(), expected.encode()
    assert compare_text.same_text(*sides) is judge
    assert compare_text.same_as_livecodebench(*sides) is livecodebench
    assert compare_text.same_tokens(*sides) is tokens


def test_bytes_that_are_no_text() -> None:
    for same in (compare_text.same_text, compare_text.same_as_livecodebench, compare_text.same_tokens):
        assert not same(b"\xff\xfe1", b"1")
    assert not compare_text.same_text("\ufffd".encode(), b"\xff")


@given(st.lists(st.lists(st.from_regex(r"-?[a-z0-9.]{1,6}", fullmatch=True), min_size=1), min_size=1))
def test_a_text_is_right_however_it_is_spaced(lines: list[list[str]]) -> None:
    plain = "\n".join(" ".join(line) for line in lines).encode()
    spaced = ("\r\n".join("  ".join(["", *line, ""]) for line in lines) + "\n\n ").encode()
    for same in (compare_text.same_text, compare_text.same_tokens):
        assert same(plain, plain)
        assert same(spaced, plain)
    assert not compare_text.same_text(plain + b"\nz", plain)
    assert not compare_text.same_tokens(plain + b" z", plain)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.integers(0, 3))
def test_numbers_are_equal_by_value(number: Any, zeros: int) -> None:
    longer = f"{number}{'0' * zeros}".encode()
    assert compare_text.same_text(longer, str(number).encode())
    assert compare_text.same_as_livecodebench(longer, str(number).encode())


NAN = float("nan")
# returned, expected; right by `judge`, `livecodebench`
VALUES: dict[str, tuple[Any, Any, bool, bool]] = {
    "the same": ([1, "a", None], [1, "a", None], True, True),
    "a tuple for a list": ((1, 2), [1, 2], True, True),
    "a tuple for a list, inside": ([(1, 2)], [[1, 2]], True, False),
    "a list for a tuple": ([1, 2], (1, 2), False, False),
    "a deque for a list": (deque([1, 2]), [1, 2], True, False),
    "a list for a set": ([1, 2], {1, 2}, False, False),
    "another order": ([2, 1], [1, 2], False, False),
    "a set": ({1, 2}, {2, 1}, True, True),
    "a truth value for a number": (True, 1, False, True),
    "a truth value for a number, inside": ([True], [1], False, True),
    "a truth value for a number in a set": ({True}, {1}, False, True),
    "a number for a truth value": (1, True, False, True),
    "a float for an integer": (1.0, 1, True, True),
    "an integer for a float": (1, 1.0, True, True),
    "about an integer": (1.0000001, 1, False, False),
    "about a float": (0.1 + 0.2, 0.3, True, False),
    "about floats, inside": ([[0.1 + 0.2]], [[0.3]], True, False),
    "about floats in a dict": ({"a": 0.1 + 0.2}, {"a": 0.3}, True, False),
    "not about": (0.31, 0.3, False, False),
    "a large float": (1e12 + 1, 1e12, True, False),
    "nan for a number": (NAN, 0.3, False, False),
    "nan": (NAN, NAN, True, False),
    "infinity": (float("inf"), float("inf"), True, True),
    "infinity for a number": (float("inf"), 1e300, False, False),
    "an integer that no float holds": (10**400, 1.5, False, False),
    "large integers": (50000000000000000, 50000000000000001, False, False),
    "order of keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True, True),
    "keys as the test wrote them": ({1: "a"}, {"1": "a"}, False, False),
    "a key more": ({"a": 1, "b": 2}, {"a": 1}, False, False),
    "a truth value as a key": ({True: 1}, {1: 1}, False, True),
    "a counter": (dict(Counter("aab")), {"a": 2, "b": 1}, True, True),
    "text for a number": ("1", 1, False, False),
    "nothing": (None, 0, False, False),
    "an object": (Opaque("Always"), 1, False, False),
    "an object, inside": ([Opaque("Always")], [1], False, False),
    "complex": (1 + 2j, 1 + 2j, True, True),
    "bytes": (b"a", b"a", True, True),
    "bytes for text": (b"a", "a", False, False),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    value, expected, judge, livecodebench = VALUES[name]
    assert compare_values.same_value(value, expected) is judge
    assert compare_values.same_as_livecodebench(value, expected) is livecodebench


data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
)


@given(data)
def test_a_value_is_itself(value: Any) -> None:
    assert compare_values.same_value(value, value)


@given(data, data)
def test_unlike_values_are_unlike(first: Any, second: Any) -> None:
    if type(first) is not type(second) and not {type(first), type(second)} <= {int, float, list, tuple}:
        assert not compare_values.same_value(first, second)


def test_depth_is_bounded() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert not compare_values.same_value(deep, deep)
    assert not compare_values.same_as_livecodebench(deep, [1])
