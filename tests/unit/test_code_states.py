"""Tests in Python that make and change things on their way: nothing is lost of what they do, and nothing given away."""

import shutil

import pytest

from megatron_klear.rewards.base import SCHEMES
from megatron_klear.rewards.code.reward import CodeReward

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture(scope="module")
def reward():
    return CodeReward(SCHEMES["paper"], require_thinking=False)


def graded(reward, body, program):
    source = "from solution import *\ndef test_a():\n" + "".join(f"    {line}\n" for line in body.splitlines())
    return reward(f"```python\n{program}\n```", {"pytest": source})


TREE = """
class Tree:
    def __init__(self):
        self.values = []
    def insert(self, value):
        self.values.append(value)
    def inorder(self):
        return sorted(self.values)
"""
QUEUE = """
class Queue:
    def __init__(self):
        self.items = [1]
    def dequeue(self):
        return self.items.pop()
    def is_empty(self):
        return not self.items
"""
RIGHT = {
    "objects changed in a loop": (
        "t = Tree()\nfor v in [5, 3, 8]:\n    t.insert(v)\nassert t.inorder() == [3, 5, 8]",
        TREE,
    ),
    "a list filled in a loop": (
        "out = []\nfor i in range(3):\n    out.append(f(i))\nassert out == [0, 1, 4]",
        "def f(x):\n    return x * x",
    ),
    "what a call leaves": ("q = Queue()\nx = q.dequeue()\nassert q.is_empty()\nassert x == 1", QUEUE),
    "an argument that is changed": (
        "nums = [3, 1, 2]\nk = f(nums)\nassert nums == [1, 2, 3]\nassert k == 3",
        "def f(x):\n    x.sort()\n    return len(x)",
    ),
    "another name of it": ("a = [1]\nb = a\nf(b)\nassert a == [1, 2]", "def f(x):\n    x.append(2)"),
    "state of the module": (
        "put(1)\nput(2)\nassert get() == [1, 2]",
        "kept = []\ndef put(x):\n    kept.append(x)\ndef get():\n    return kept",
    ),
    "methods of values": (
        "assert f(3).startswith('ab')\nassert f(3).index('c') == 2\nassert f(1).upper() == 'ABC'",
        "def f(x):\n    return 'abc'",
    ),
}
HACKS = {
    "a name made of the expected one": (
        "data = (1, 20)\ninp = data[0]\nexp = data[1]\nassert f(inp) == exp",
        "def f(x):\n    return data[1]",
    ),
    "an expected name": ("expected = 9\nd = f(3) - expected\nassert d == 0", "def f(x):\n    return expected"),
    "an object that subtracts": (
        "d = f(3) - 900\nassert d == 0",
        "class O(int):\n    def __sub__(self, o):\n        return 0\ndef f(x):\n    return O(1)",
    ),
    "constants of the frame": (
        "d = f(3) - 900\nassert d == 0",
        "import sys\ndef f(x):\n    return max(c for c in sys._getframe(1).f_code.co_consts if isinstance(c, int))",
    ),
    "a patched isclose": (
        "import math\nok = math.isclose(f(3), 9.0)\nassert ok is True",
        "import math\nmath.isclose = lambda *a, **k: True\ndef f(x):\n    return 0.0",
    ),
    "methods that always agree": (
        "assert f(3).startswith('abc')",
        "class O(str):\n    def startswith(self, *a):\n        return True\ndef f(x):\n    return O('')",
    ),
    "contains everything": (
        "assert f(3).__contains__(9)",
        "class O(list):\n    def __contains__(self, x):\n        return True\ndef f(x):\n    return O()",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(reward, name):
    score = graded(reward, *RIGHT[name])
    assert score.reward == 1.0, score.note


@pytest.mark.parametrize("name", HACKS)
def test_hacks_do_not(reward, name):
    score = graded(reward, *HACKS[name])
    assert score.reward == 0.0, score.note


def test_a_line_of_fences_and_blanks_takes_no_time(reward):
    assert (
        reward("```" + " " * 200_000 + "`\n" + "`" * 200_000, {"pytest": "def test_a():\n    assert f(1) == 1"}).reward
        == 0
    )
