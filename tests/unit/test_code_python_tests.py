"""Tests written in Python, through the sandbox: KodCode's functions, classes, pytest, unittest, LeetCode's lists."""

from __future__ import annotations

import pytest
from code_sandbox import shared_sandbox

from megatron_klear.rewards.code.forms import read_problem
from megatron_klear.rewards.code.judge import Result, judge
from megatron_klear.rewards.sandbox.outcome import Limits

LIMITS = Limits(cpu_seconds=2.0, total_seconds=20.0)
STACK = """
class Stack:
    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def __len__(self):
        return len(self.items)

def area(r):
    if r < 0:
        raise ValueError(f"negative radius {r}")
    return 3.141592653589793 * r * r

def extend(items):
    items.append(len(items))
"""
TESTS: dict[str, tuple[str, int]] = {
    "an object over several asserts": (
        "from solution import Stack\ndef test_a():\n    s = Stack()\n    s.push(1)\n    s.push(2)\n"
        "    assert s.pop() == 2\n    assert s.pop() == 1\n    with pytest.raises(IndexError):\n        s.pop()",
        3,
    ),
    "exceptions": (
        "import pytest\nfrom solution import area\ndef test_a():\n"
        "    with pytest.raises(ValueError, match='negative'):\n        area(-1)\n"
        "    with pytest.raises((TypeError, ValueError)) as told:\n        area(-2)\n"
        "    assert 'radius -2' in str(told.value)",
        3,
    ),
    "exceptions by hand": (
        "def test_a():\n    try:\n        area(-1)\n        assert False, 'none was raised'\n"
        "    except ValueError:\n        pass",
        1,
    ),
    "parametrised": (
        "import pytest\nfrom solution import area\n"
        "@pytest.mark.parametrize('r, wanted', [(1, 3.14159265), pytest.param(2, 12.5663706)])\n"
        "def test_a(r, wanted):\n    assert area(r) == pytest.approx(wanted)\n"
        "@pytest.mark.parametrize('r', [0])\ndef test_b(r):\n    assert area(r) == 0",
        2,
    ),
    "a class of tests": (
        "from solution import Stack\nclass TestStack:\n    def setup_method(self):\n        self.stack = Stack([1])\n"
        "    def test_pop(self):\n        assert self.stack.pop() == 1\n"
        "    def test_len(self):\n        assert len(self.stack) == 1",
        2,
    ),
    "what stands around tests": (
        "from solution import Stack\ntold = []\ndef setup_module(module):\n    told.append('module')\n"
        "class TestStack:\n    @classmethod\n    def setup_class(cls):\n        told.append(cls.__name__)\n"
        "    def setup_method(self, method):\n        told.append(method.__name__)\n        self.stack = Stack([1])\n"
        "    def teardown_method(self):\n        assert len(self.stack) == 0\n"
        "    def test_pop(self):\n        assert told == ['module', 'TestStack', 'test_pop']\n"
        "        assert self.stack.pop() == 1\n"
        "class TestOther:\n    def setup_class(cls):\n        cls.stack = Stack([2])\n"
        "    def test_pop(self):\n        assert self.stack.pop() == 2",
        2,
    ),
    "unittest around": (
        "import unittest\nfrom solution import Stack\nclass Tests(unittest.TestCase):\n    @classmethod\n"
        "    def setUpClass(cls):\n        cls.stack = Stack([1])\n"
        "    def test_pop(self):\n        self.assertEqual(self.stack.pop(), 1)",
        1,
    ),
    "unittest": (
        "import unittest\nfrom solution import area, Stack\nclass Tests(unittest.TestCase):\n    def setUp(self):\n"
        "        self.stack = Stack()\n    def test_area(self):\n"
        "        self.assertAlmostEqual(area(1), 3.14159265, places=6)\n"
        "    def test_raises(self):\n        self.assertRaises(IndexError, self.stack.pop)\n"
        "if __name__ == '__main__':\n    unittest.main()",
        2,
    ),
    "a helper with asserts": (
        "def ask(given, wanted):\n    assert abs(area(given) - wanted) < 1e-6\nask(1, math.pi)\nask(0, 0)",
        2,
    ),
    "arguments that are changed, in a check": (
        "for n in range(3):\n    items = [0] * n\n    extend(items)\n    assert items == [0] * n + [n]",
        1,
    ),
    "random inputs": (
        "import random\nrandom.seed(1)\nfor _ in range(50):\n    r = random.random()\n"
        "    assert math.isclose(area(r), math.pi * r**2)",
        1,
    ),
    "a docstring and a print": ("def test_a():\n    '''Of area.'''\n    print('hello')\n    assert area(0) == 0", 1),
}  # fmt: skip


def judged(program: str, tests: object) -> Result:
    return judge(program, read_problem(tests), shared_sandbox(), limits=LIMITS)


@pytest.mark.parametrize("name", TESTS)
def test_right_programs_pass_and_wrong_ones_do_not(name: str) -> None:
    tests, count = TESTS[name]
    assert judged(STACK, tests) == Result("passed", count, count), name
    wrong = (
        STACK.replace("* r * r", "* r * r + 1")
        .replace("pop()", "clear()")
        .replace("Error(", "Error if 0 else KeyError(")
    )
    result = judged(wrong.replace("append(len(items))", "append(None)"), tests)
    assert result.passed < count
    assert judged("def nothing():\n    pass", tests).passed == 0


def test_names_of_the_prelude_are_the_programs_where_it_is_asked_for_them() -> None:
    tests = (
        "from solution import gcd, lcm\ndef test_a():\n    for a in range(1, 5):\n"
        "        assert gcd(a, 6) * lcm(a, 6) == 6 * a"
    )
    right = "import math\ndef gcd(a, b):\n    return math.gcd(a, b)\ndef lcm(a, b):\n    return a * b // math.gcd(a, b)"
    assert judged(right, tests).status == "passed"
    assert judged(right.replace("return math.gcd", "return 1 + math.gcd"), tests).status == "failed"
    assert judged("x = 1", tests).passed == 0
    assert judged("x = 1", ["assert gcd(4, 6) == 2"]).passed == 0
    assert judged("x = 1", ["assert sum([4, 6]) == 10"]).passed == 0
    assert judged("x = 1", {"inputs": [[4, 6]], "outputs": [2], "fn_name": "gcd"}).passed == 0
    assert judged(right, {"inputs": [[4, 6]], "outputs": [2], "fn_name": "gcd"}).passed == 1


ADD, NEGATE = "def add(a, b):\n    return a + b", "def negate(x):\n    return -x"
USES_BOTH = {
    "asserts": ["assert add(1, 2) == 3", "assert negate(3) == -3"],
    "functions": "def test_a():\n    assert add(1, 2) == 3\ndef test_b():\n    assert negate(3) == -3",
    "checks": (
        "def test_a():\n    for n in range(3):\n        assert add(n, 2) == n + 2\n"
        "def test_b():\n    for n in range(3):\n        assert negate(n) == -n"
    ),
    "exceptions": (
        "def test_a():\n    with pytest.raises(Exception):\n        add(1, None)\n"
        "def test_b():\n    with pytest.raises(Exception):\n        negate('x')"
    ),
    "a class": (
        "class TestAll:\n    def test_a(self):\n        assert add(1, 2) == 3\n"
        "    def test_b(self):\n        assert negate(3) == -3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USES_BOTH)
def test_nothing_stands_in_for_a_function_that_a_program_lacks(name: str) -> None:
    tests = USES_BOTH[name]
    assert judged(f"{ADD}\n{NEGATE}", tests).passed == 2
    assert judged(f"from operator import add\n{NEGATE}", tests).passed == 2
    assert judged(NEGATE, tests).passed == 1
    assert judged(ADD, tests).passed == 1
    assert judged("x = 1", tests).passed == 0


def test_names_that_tests_compare_with_or_import_are_their_own() -> None:
    third = "def third(x):\n    return x / 3"
    assert (
        judged(third, ["assert isclose(third(1), 0.33333333333)", "assert fabs(third(2) - 0.6666) < 1e-2"]).passed == 2
    )
    assert judged(third, "from math import *\nassert third(6) == sqrt(4) and third(0) < pi").passed == 1
    assert judged(third, ["assert sqrt(16) == 4", "assert third(6) == 2"]).passed == 1
    for name in ("gcd", "max"):
        method = f"class Solution:\n    def {name}(self, a, b):\n        return {name}(a, b)"
        assert judged(method, {"inputs": [[4, 4]], "outputs": [4], "fn_name": name}).passed == 1


def test_linked_lists_and_trees_come_and_go_as_lists() -> None:
    tests = {
        "functional": "def check(candidate):\n"
        "    assert is_same_list(candidate(head = list_node([1, 2, 3])), list_node([3, 2, 1]))\n"
        "    assert is_same_list(candidate(head = list_node([])), list_node([]))\n\ncheck(Solution().reverse)"
    }
    right = (
        "class Solution:\n    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:\n        last = None\n"
        "        while head:\n            head.next, last, head = last, head, head.next\n        return last"
    )
    assert judged(right, tests) == Result("passed", 2, 2)
    assert judged(right.replace("return last", "return head"), tests).passed == 1
    tests = {
        "functional": "def check(candidate):\n    assert is_same_tree(candidate(root = tree_node([2, 1, 3, None, 4])), "
        "tree_node([2, 3, 1, None, None, 4]))\n\ncheck(Solution().invert)"
    }
    right = (
        "class Solution:\n    def invert(self, root: Optional[TreeNode]) -> Optional[TreeNode]:\n        if root:\n"
        "            root.left, root.right = self.invert(root.right), self.invert(root.left)\n        return root"
    )
    assert judged(right, tests) == Result("passed", 1, 1)
    assert judged(right.replace("self.invert(root.left)", "root.left"), tests).passed == 0
