"""Which asserts are split, what goes inside with the program, and that no expected value is in it."""

from __future__ import annotations

import ast
import json

import pytest

from megatron_klear.rewards.code.literals import NotLiteralError, value_of
from megatron_klear.rewards.code.problem import AnyOf, Case, Check, Expected, Is, Near
from megatron_klear.rewards.code.python_tests import read_source

SPLIT: dict[str, tuple[str, str, Expected]] = {
    "call == literal": ("assert f(1) == [2]", "f(1)", AnyOf(([2],))),
    "literal == call": ("assert [2] == f(1)", "f(1)", AnyOf(([2],))),
    "arithmetic outside": ("assert f(1) == (3 + 5, 3 ** 5)", "f(1)", AnyOf(((8, 243),))),
    "calls outside": ("assert set(f(1)) == set([1, 2])", "set(f(1))", AnyOf(({1, 2},))),
    "a conversion inside": ("assert sorted(f(1)) == [1, 2]", "sorted(f(1))", AnyOf(([1, 2],))),
    "infinity": ("assert f(1) == float('-inf')", "f(1)", AnyOf((float("-inf"),))),
    "a method of Solution": ("assert Solution().f(1) == 2", "Solution().f(1)", AnyOf((2,))),
    "an item": ("assert f(1)[0] == 2", "f(1)[0]", AnyOf((2,))),
    "several calls": ("assert [f(1), f(2)] == [2, 3]", "[f(1), f(2)]", AnyOf(([2, 3],))),
    "truth": ("assert f(1) == True", "f(1)", AnyOf((True,))),
    "is": ("assert f(1) is None", "f(1)", Is(None)),
    "a call": ("assert f(1)", "bool(f(1))", Is(True)),
    "not": ("assert not f(1)", "bool(f(1))", Is(False)),
    "message": ("assert f(1) == 2, 'no'", "f(1)", AnyOf((2,))),
    "isclose": ("assert math.isclose(f(1), 2.5, abs_tol=0.1)", "f(1)", Near(2.5, 1e-9, 0.1)),
    "approx": ("assert f(1) == pytest.approx(2.5)", "f(1)", Near(2.5, 1e-6, 1e-12)),
    "distance": ("assert abs(2.5 - f(1)) <= 0.1", "f(1)", Near(2.5, 0.0, 0.1)),
    "linked lists": (
        "assert is_same_list(f(list_node([1])), list_node([2]))", "list_values(f(list_node([1])))", AnyOf(([2],))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_split(name: str) -> None:
    source, inside, expected = SPLIT[name]
    (test,) = read_source(source).tests
    assert isinstance(test, Case)
    assert json.loads(test.input) == {"setup": "", "expression": inside}
    assert test.expected == expected


WHOLE = {
    "a comparison inside": "assert (f(1) == 2) == True",
    "a comparison in a list": "assert [x for x in f(1) if x != 3] == [2]",
    "a built-in that says yes or no": "assert isinstance(f(1), int)",
    "all": "assert all(f(1))",
    "an order": "assert f(1) > 2",
    "a member": "assert f(1) in (2, 3)",
    "several": "assert f(1) == 2 and f(2) == 3",
    "a loop": "for x in range(3):\n    assert f(x) == x",
    "another function of the program": "assert f(1) == g(1)",
    "an expected value that goes in as well": "x = [1]\nassert f(x) == x",
    "a helper of the test": "def same(a, b):\n    return a == b\nassert same(f(1), 2)",
    "a helper that asserts": "def ask(a, b):\n    assert f(a) == b\nask(1, 2)",
    "a comparison kept in a name": "same = f(1) == 2\nassert same is True",
    "an exception": "with pytest.raises(ValueError):\n    f(-1)",
    "an exception by hand": "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass",
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_split_is_a_test_of_its_own(name: str) -> None:
    (test,) = read_source(WHOLE[name]).tests
    assert isinstance(test, Check)
    assert test.source.rstrip().endswith(ast.unparse(ast.parse(WHOLE[name])).splitlines()[-1].strip())


def inside(source: str) -> list[str]:
    found = []
    for test in read_source(source).tests:
        assert isinstance(test, Case)
        told = json.loads(test.input)
        found.append("; ".join(filter(None, [*told["setup"].splitlines(), told["expression"]])))
    return found


def test_statements_go_inside_with_what_builds_on_them() -> None:
    assert inside("def made(n):\n    return [n] * n\nassert f(made(2)) == 4") == [
        "def made(n):;     return [n] * n; f(made(2))"
    ]
    assert inside("expected = {'a': 1}\nassert f('a') == expected") == ["f('a')"]
    assert inside("def check(candidate):\n    y = 2\n    assert candidate(y) == 4\n\ncheck(Solution().f)") == [
        "y = 2; Solution().f(y)"
    ]


def test_what_a_test_makes_and_changes_goes_with_each_of_its_asserts() -> None:
    tests = read_source("s = Stack()\nfor v in (1, 2):\n    s.push(v)\nassert s.pop() == 2\nassert s.size() == 1").tests
    first = "from solution import Stack\n_are_classes('Stack')\ns = Stack()\nfor v in (1, 2):\n    s.push(v)\n"
    assert [test.source for test in tests if isinstance(test, Check)] == [
        first + "assert s.pop() == 2\n",
        first + "s.pop() == 2\nassert s.size() == 1\n",
    ]
    assert isinstance(read_source("assert f(3).startswith('abc')").tests[0], Check)
    assert isinstance(read_source("assert f(3).upper() == 'ABC'").tests[0], Case)


def test_a_value_that_may_have_changed_is_not_taken_as_expected() -> None:
    tests = read_source("x = [1]\nf(x)\nassert g(1) == x").tests
    assert isinstance(tests[0], Check)


def test_asserts_of_nothing_are_no_tests() -> None:
    assert len(read_source("assert True\nassert f(1) == 1\nassert True, 'for later'").tests) == 1


def test_a_function_may_have_the_name_of_a_built_in_one() -> None:
    problem = read_source("assert sum(10, 15) == 6")
    assert problem.entry == "sum"
    assert isinstance(problem.tests[0], Case)
    assert read_source("for x in range(3):\n    assert abs(gcd(x, 2) - 2) < 3").entry == "gcd"


def test_checks_bring_what_they_take_for_granted() -> None:
    source = "for x in range(3):\n    assert isclose(f(x), sqrt(x))\n    with pytest.raises(ValueError):\n        f(-x)"
    (test,) = read_source(source).tests
    assert isinstance(test, Check)
    names = ast.parse(test.source)
    assert "from math import isclose" in test.source
    assert any(isinstance(node, ast.ClassDef) and node.name == "pytest" for node in names.body)
    (leetcode,) = read_source("for x in range(3):\n    assert gcd(x, 2) == 1").tests
    assert isinstance(leetcode, Check)
    assert leetcode.source.startswith("from solution import gcd\n")


VALUES = [
    "1 + 2",
    "[1] * 3",
    "-2 ** 3",
    "{'a': (1, 2.5)}",
    "set()",
    "round(2.567, 2)",
    "math.pi",
    "'a' + 'b'",
    "[1, 2][0]",
]
NO_VALUES = [
    "f(1)", "x", "10 ** 10 ** 10", "[0] * 10 ** 9", "'%s' % 1", "__import__('os')", "open('x')", "(1).bit_length()",
    "[x for x in range(3)]", "range(10 ** 9)", "1 / 0", "lambda: 1", "...", "f'{1}'",
]  # fmt: skip


@pytest.mark.parametrize("source", VALUES)
def test_values_that_need_no_running(source: str) -> None:
    import math

    assert value_of(ast.parse(source, mode="eval").body) == eval(source, {"math": math})


@pytest.mark.parametrize("source", NO_VALUES)
def test_values_that_only_running_code_would_tell(source: str) -> None:
    with pytest.raises(NotLiteralError):
        value_of(ast.parse(source, mode="eval").body)
