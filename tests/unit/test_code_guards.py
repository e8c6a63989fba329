"""What a program catches, ends or compares leaves no assert of a test unrun; honest programs lose nothing."""

from __future__ import annotations

import pytest
from code_sandbox import fenced, shared_sandbox

from megatron_klear.rewards.base import SCHEMES
from megatron_klear.rewards.code.forms import FormError, check_form
from megatron_klear.rewards.code.reward import CodeReward
from megatron_klear.rewards.code.settings import CodeSettings
from megatron_klear.types import Score


def graded(program: str, tests: str) -> Score:
    settings = CodeSettings(cpu_seconds=2.0, total_seconds=20.0)
    return CodeReward(SCHEMES["paper"], settings=settings, sandbox=shared_sandbox())(
        fenced(program), {"pytest": f"from solution import *\n{tests}"}
    )


SWALLOWING = """
class Session:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        return True
    async def __aenter__(self):
        return self
    async def __aexit__(self, *error):
        return True
    def total(self):
        TOTAL
def apply(function, *given):
    try:
        return function(*given)
    except BaseException:
        return 5
"""
TOTALS = {"it raises": "raise ValueError", "an index": "return []", "an object": "return Session()"}
IN_WITH = {
    "with": """
def test_total():
    with Session() as session:
        total = session.total()
        assert total[0] == 5
""",
    "unittest": """
import unittest
class TestTotal(unittest.TestCase):
    def has(self, session, value):
        self.assertEqual(session.total()[0], value)
    def test_total(self):
        with Session() as session:
            self.has(session, 5)
""",
    "async with": """
import asyncio
def test_total():
    async def held():
        async with Session() as session:
            assert session.total()[0] == 5
    asyncio.run(held())
""",
    "ExitStack": """
from contextlib import ExitStack
def test_total():
    with ExitStack() as stack:
        session = stack.enter_context(Session())
        assert session.total()[0] == 5
""",
    "a function of the test": """
def test_total():
    session = Session()
    def has(value):
        assert session.total()[0] == value
        return 5
    for _ in range(2):
        assert apply(has, 5) == 5
""",
}


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("tests", IN_WITH)
def test_an_exception_that_the_program_catches_passes_no_test_whose_asserts_follow(tests: str, total: str) -> None:
    assert graded(SWALLOWING.replace("TOTAL", TOTALS[total]), IN_WITH[tests]).reward == 0


def test_a_right_program_passes_the_same_tests() -> None:
    for tests in IN_WITH.values():
        score = graded(SWALLOWING.replace("TOTAL", "return [5]"), tests)
        assert score.reward == 1, (tests, score.note)


def test_a_program_may_catch_what_no_assert_follows() -> None:
    score = graded(
        SWALLOWING.replace("TOTAL", "raise KeyError"),
        """
def test_caught():
    with Session() as session:
        assert session is not None
        session.total()
    with Session():
        int("x")
    calls = []
    def flaky(n):
        assert n == 2
        calls.append(n)
        raise ValueError
    assert apply(flaky, 2) == 5
    assert calls == [2]
""",
    )
    assert score.reward == 1, score.note


ITERATORS = """
def numbers(n):
    yield from range(n)
"""


def test_a_test_that_waits_for_the_end_of_an_iterator_gets_it() -> None:
    score = graded(
        ITERATORS,
        """
import pytest
import unittest
def test_default():
    held = numbers(1)
    assert next(held) == 0
    assert next(held, None) is None
def test_raises():
    held = numbers(0)
    with pytest.raises(StopIteration):
        next(held)
    try:
        next(held)
        assert False
    except StopIteration:
        pass
class TestNumbers(unittest.TestCase):
    def test_end(self):
        self.assertRaises(StopIteration, next, numbers(0))
""",
    )
    assert score.reward == 1, score.note


@pytest.mark.parametrize(
    "tests",
    [
        "def test_end():\n    assert all(map(lambda n: next(numbers(n)) == 7, [1, 2]))\n",
        "def test_end():\n    def has(n):\n        with open('/dev/null'):\n            assert next(numbers(n)) == 7\n"
        "        return True\n    assert all(map(has, [1, 2]))\n",
    ],
)
def test_an_iterator_at_its_end_ends_no_loop_of_the_test(tests: str) -> None:
    assert graded("def numbers(n):\n    return iter(())\n", tests).reward == 0


def test_equality_that_takes_its_own_kind_alone_is_equality() -> None:
    point = (
        "class Point:\n    def __init__(self, x):\n        self.x = x\n    def __eq__(self, other):\n        return "
    )
    tests = (
        "def test_same():\n    for x in (1, 2):\n        assert Point(x) == Point(x)\n        assert Point(x).x == x\n"
    )
    assert graded(point + "self.x == other.x\n", tests).reward == 1
    assert graded(point + "True\n", tests).reward == 0


def test_a_number_of_an_object_is_data() -> None:
    """`abs(Vector(3, 4)) == 5` must not be for what `__abs__` gave to decide."""
    yes = "class Yes:\n    def __eq__(self, other):\n        return type(other) is int\n"
    vector = "class Vector:\n    def __init__(self, *x):\n        self.x = list(x)\n    def __abs__(self): return "
    tests = "def test_abs():\n    vector = Vector(3, 4)\n    assert abs(vector) == 5 and vector.x == [3, 4]\n"
    assert graded(vector + "5.0\n", tests).reward == 1
    assert graded(yes + vector + "Yes()\n", tests).reward == 0


def test_a_range_of_large_numbers_is_data() -> None:
    tests = "def test_range():\n    for n in (60, 70):\n        assert list(wide(n)) == [0, 2 ** n]\n"
    assert graded("def wide(n):\n    return range(0, 2 ** n + 1, 2 ** n)\n", tests).reward == 1


@pytest.mark.parametrize(
    "inner",
    [
        "    seen = 0\n    def note(n):\n        nonlocal seen\n        seen += n\n        return seen\n"
        "    assert twice(note(2)) == 4\n    assert twice(seen) == 4\n",
        "    for n in (1, 2):\n        assert twice(n) == 2 * n\n    return\n",
    ],
)
@pytest.mark.parametrize("head", ["def test_twice():\n", "def check(candidate):\n"])
def test_statements_that_only_a_function_may_hold_stay_in_it(inner: str, head: str) -> None:
    tests = head + inner + ("check(twice)\n" if "check" in head else "")
    assert graded("def twice(n):\n    return 2 * n\n", tests).reward == 1
    assert graded("def twice(n):\n    return n\n", tests).reward == 0


def test_a_source_that_cannot_be_compiled_is_told_by_its_row() -> None:
    with pytest.raises(FormError, match="nonlocal"):
        check_form({"pytest": "def test_a():\n    def f():\n        nonlocal seen\n    assert g(1) == 2\n"})
    with pytest.raises(FormError, match="outside function"):
        check_form({"pytest": "return\nassert g(1) == 2\n"})
