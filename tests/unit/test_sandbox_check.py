"""Trusted tests of untrusted programs: only right values pass, whatever the program writes, raises or returns."""

import pytest

from megatron_klear.rewards.sandbox import Limits, Program

QUICK = Limits(cpu_seconds=0.3, wall_seconds=0.6)


def check(slot, source, test, *, entry="f", prelude="", limits=QUICK):
    return slot.run_check(Program(source=source, entry=entry, prelude=prelude), test, limits=limits)


STACK = """
class Stack:
    made = 0
    def __init__(self, *items):
        Stack.made += 1
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
        return self
    def __len__(self):
        return len(self.items)
    def __iter__(self):
        return iter(self.items)
    def __getitem__(self, index):
        return self.items[index]
    def __str__(self):
        return f"Stack{self.items}"
class Empty(ValueError):
    pass
def pop(stack):
    if not stack.items:
        raise Empty("nothing there")
    return stack.items.pop()
def adder(n):
    return lambda x: x + n
limit = 7
"""
PASSES = {
    "values": ("def f(x):\n    return [x, (x, 1.5), {x: {x}}]", "assert candidate(2) == [2, (2, 1.5), {2: {2}}]"),
    "by its name": ("def f(x):\n    return x + 1", "assert f(1) == 2\nassert f(x=2) == 3"),
    "a method of Solution": (
        "class Solution:\n    n = 0\n    def f(self, x):\n        self.n += 1\n        return self.n",
        "assert candidate(1) == candidate(1) == 1\ns = Solution()\nassert (s.f(1), s.f(1)) == (1, 2)",
    ),
    "loops, tolerance, random inputs": (
        "def f(x):\n    return x ** .5",
        "import random\nfor _ in range(50):\n    x = random.random()\n    assert abs(candidate(x) ** 2 - x) < 1e-9",
    ),
    "a function named check": (
        "def f(x):\n    return x",
        "def check(candidate):\n    assert candidate(1) == 1\ncheck(candidate)",
    ),
    "lists are changed in place": (
        "def f(x, y=None):\n    x.sort()\n    x[0].append(9)\n    y['new'] = x.pop()",
        "inner = [1]\nmine, other = [[2], inner, [3]], {'a': 1}\nassert candidate(mine, y=other) is None\n"
        "assert mine == [[1, 9], [2]] and other == {'a': 1, 'new': [3]}",
    ),
    "sets and byte arrays": (
        "def f(s, b):\n    s.discard(1)\n    s.add(5)\n    b.extend(b'x')",
        "s, b = {1, 2}, bytearray(b'a')\ncandidate(s, b)\nassert s == {2, 5} and b == b'ax'",
    ),
    "a nested list stays the test's own": (
        "def f(x):\n    x[0].append(1)",
        "inner = []\nouter = [inner]\ncandidate(outer)\nassert inner == [1] and outer[0] is inner",
    ),
    "exceptions": (
        "def f(x):\n    raise [ValueError, KeyError][x]('words')",
        "for i, kind in enumerate((ValueError, KeyError)):\n    try:\n        candidate(i)\n        assert False\n"
        "    except kind as error:\n        assert 'words' in str(error)",
    ),
    "its own exceptions": (
        STACK + "f = pop",
        "try:\n    candidate(Stack())\n    assert False\nexcept ValueError as error:\n"
        "    assert str(error) == 'nothing there'",
    ),
    "objects": (
        STACK + "f = pop",
        "s = Stack(1, 2)\ns.push(3).push(4)\nassert len(s) == 4 and list(s) == [1, 2, 3, 4] and s[0] == 1\n"
        "assert str(s) == 'Stack[1, 2, 3, 4]' and s.items == [1, 2, 3, 4] and 3 in s\nassert pop(s) == 4\n"
        "assert adder(1)(2) == 3 and limit == 7 and Stack.made == 1 and s == s and s != Stack()",
    ),
    "generators": (
        "def f(n):\n    yield from range(n)",
        "assert list(candidate(3)) == [0, 1, 2]\nassert sum(candidate(3)) == 3",
    ),
    "generators without end": (
        "def f(n):\n    while True:\n        yield n\n        n += 1",
        "import itertools\nassert list(itertools.islice(candidate(3), 4)) == [3, 4, 5, 6]\n"
        "g = candidate(1)\nassert (next(g), next(g)) == (1, 2)",
    ),
    "imports of the solution": (
        "def f(x):\n    return x\nlimit = 1",
        "import solution\nfrom solution import f as g, limit\nassert g(1) == solution.f(1) == limit\n"
        "from solution import *\nassert f(2) == 2",
    ),
    "an entry that has a builtin's name": (
        "def sum(x):\n    return 7",
        "assert sum([1]) == 7\nassert candidate([1]) == 7",
    ),
    "big answers": ("def f(n):\n    return list(range(n))", "assert candidate(10**5)[-1] == 99999"),
    "no entry": ("def g():\n    return 1", "assert g() == 1"),
    "unittest": (
        "def f(x):\n    return x",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(candidate(1), 1)\n"
        "result = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\n"
        "assert result.wasSuccessful()",
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_right_programs_pass(slot, name):
    source, test = PASSES[name]
    entry = {"no entry": "", "an entry that has a builtin's name": "sum"}.get(name, "f")
    outcome = check(slot, source, test, entry=entry, limits=Limits())
    assert (outcome.status, outcome.note) == ("done", ""), outcome.stderr.decode()


TEST = "assert candidate(1) == 2, 'one'\nassert candidate(20) == 40, 'twenty'"
EVIL_OBJECT = """
class Evil{base}:
    def __getattr__(self, name):
        return lambda *a: True
    def __eq__(self, other):
        return True
    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: True
    __hash__ = None
    def __bool__(self):
        return True
    def __sub__(self, other):
        return self
    __rsub__ = __add__ = __radd__ = __mul__ = __sub__
    def __abs__(self):
        return 0
    def __float__(self):
        return 2.0
    def __contains__(self, item):
        return True
def f(x):
    return Evil{given}
"""
FAILS = {
    "wrong value": "def f(x):\n    return 3",
    "exit with success": "import sys\ndef f(x):\n    sys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit in a call": "import os\ndef f(x):\n    os._exit(0)",
    "exit after the first call": "import os\ndef f(x):\n    if x == 20:\n        os._exit(0)\n    return 2 * x",
    "SystemExit": "def f(x):\n    raise SystemExit(0)",
    "KeyboardInterrupt": "def f(x):\n    raise KeyboardInterrupt",
    "GeneratorExit": "def f(x):\n    raise GeneratorExit",
    "StopIteration": "def f(x):\n    raise StopIteration",
    "exception named SystemExit": "class SystemExit(Exception):\n    pass\ndef f(x):\n    raise SystemExit",
    "always equal": EVIL_OBJECT.format(base="", given="()"),
    "always equal integer": EVIL_OBJECT.format(base="(int)", given="(5)"),
    "always equal text": EVIL_OBJECT.format(base="(str)", given="('x')"),
    "always equal class": "class Meta(type):\n    def __eq__(self, other):\n        return True\n"
    "class A(metaclass=Meta):\n    pass\ndef f(x):\n    return A",
    "items too long": "def f(x):\n    yield 'x' * (20 << 20)",
    "items that are none": (
        'import os, struct\nclass A:\n    def __iter__(self):\n        content = b\'["l", [["s", "value"], 1]]\'\n'
        "        os.write(5, struct.pack('<I', len(content)) + content)\n        return self\ndef f(x):\n    return A()"
    ),
    "an iterator at its end": "def f(x):\n    return iter([])",
    "not a number": "def f(x):\n    return float('nan')",
    "builtins": "import builtins\nbuiltins.abs = lambda x: 0\nabs = lambda x: 0\nall = lambda x: True\n"
    "AssertionError = ValueError\ndef f(x):\n    return 3",
    "patched frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        frame.f_globals.clear() if frame.f_back is None else 0\n        frame = frame.f_back\n    return 3",
    "answers told ahead": "import os, struct, json\ndef tell(value):\n"
    "    content = json.dumps(['l', [['s', 'value'], value]]).encode()\n"
    "    os.write(5, struct.pack('<I', len(content)) + content)\ndef f(x):\n    for _ in range(9):\n"
    "        tell(True)\n    return True",
    "nonsense on the link": "import os\ndef f(x):\n    os.write(5, b'\\xff' * 1000)\n    return 2 * x",
    "closed link": "import os\ndef f(x):\n    os.close(5)\n    return 2 * x",
    "messages too long": "import os, struct\ndef f(x):\n    os.write(5, struct.pack('<I', 1 << 31))\n    return 2 * x",
    "answers too long": "def f(x):\n    return 'x' * (20 << 20)",
    "objects that do not exist": "import os, struct\ndef f(x):\n"
    '    content = b\'["l", [["s", "value"], ["@", [99, "int"]]]]\'\n'
    "    os.write(5, struct.pack('<I', len(content)) + content)",
    "success on every descriptor": "import os\nfor i in range(64):\n    try:\n"
    '        os.write(i, b\'{"first": true, "status": "done", "who": "check", "wait": 0}\')\n'
    "    except OSError:\n        pass\ndef f(x):\n    return 3",
    "kills what it can": "import os\ndef f(x):\n    for p in range(2, 300):\n        try:\n"
    "            p != os.getpid() and os.kill(p, 9)\n        except OSError:\n            pass\n    return 3",
    "does not end": "def f(x):\n    while True:\n        pass",
    "not defined": "def g(x):\n    return 2 * x",
    "does not compile": "def f(x:",
    "fork": "import os\ndef f(x):\n    os.fork()\n    return 2 * x",
    "memory": "def f(x):\n    return bytearray(1 << 40)",
    "the test's files": "import glob\ndef f(x):\n    return [open(p).read() for p in glob.glob('/proc/[0-9]*/fd/*')]",
}


@pytest.mark.parametrize("name", FAILS)
def test_nothing_but_right_values_passes(slot, name):
    for test in (
        TEST,
        "assert abs(candidate(1) - 2) < 1e-9",
        "assert all(map(lambda case: candidate(case[0]) == case[1], [(1, 2), (20, 40)]))",
        "cases = iter([(1, 2), (20, 40)])\nassert all(candidate(x) == y for x, y in cases)",
        "assert all(map(lambda x: next(candidate(x)) == 2 * x, [1, 20]))",
        "found = list(candidate(1))\nassert all(x == 2 for x in found) and len(found) == 1",
    ):
        if name in ("exit after the first call", "closed link") and "abs" in test:
            continue  # one call, rightly answered
        outcome = check(slot, FAILS[name], test)
        assert outcome.status != "done", test
    assert check(slot, "def f(x):\n    return 2 * x", TEST, limits=Limits()).status == "done"


@pytest.mark.parametrize(
    ("source", "status", "note"),
    [
        ("def f(x):\n    return 3", "crashed", "AssertionError: one"),
        ("def f(x:", "compile", "SyntaxError"),
        ("1 / 0", "crashed", "ZeroDivisionError"),
        ("def g():\n    pass", "crashed", "NameError: the program defines no 'f'"),
        ("def f(x):\n    while True:\n        pass", "timeout", "not done"),
        ("import os\ndef f(x):\n    os.fork()", "contained", "system call"),
        ("def f(x):\n    raise ValueError('words')", "crashed", "ValueError: words"),
    ],
)
def test_why_it_failed_is_told(slot, source, status, note):
    outcome = check(slot, source, TEST)
    assert outcome.status == status
    assert note in outcome.note


def test_a_check_has_limits_too(slot):
    assert check(slot, "def f(x):\n    return 2", "while candidate(1):\n    pass").status == "timeout"
    assert check(slot, "def f(x):\n    return 2", "x = bytearray(1 << 40)").status == "memory"
    assert check(slot, "def f(x):\n    return 2", "import os\nos.fork()").status == "contained"


def test_names_of_the_check_are_its_own(slot):
    source = "def helper(x):\n    return 2\nlen = sorted = lambda x: 2\nmath = None\ndef f(x):\n    return 3"
    test = (
        "import math\ndef helper(x):\n    return x\nassert candidate(1) == 3 and helper(5) == 5\n"
        "assert len([1]) == 1 and math.pi > 3"
    )
    assert check(slot, source, test).status == "done"


def test_a_star_import_hides_nothing_of_the_test(slot):
    source = (
        "abs = lambda x: 0\nclass math:\n    isclose = lambda *a: True\ndef f(x):\n    return 3\n"
        "def g(x):\n    return x"
    )
    test = "import math\nfrom solution import *\nassert g(1) == 1\nassert {}"
    for assertion in ("abs(candidate(1) - 2) < 1e-9", "math.isclose(candidate(1), 2)"):
        assert check(slot, source, test.format(assertion)).note == "AssertionError"


def test_a_prelude_is_in_front_of_both(slot):
    prelude = "from math import *"
    assert (
        check(slot, "def f(x):\n    return floor(x)", "assert candidate(2.5) == floor(2.5)", prelude=prelude).status
        == "done"
    )


def test_what_no_data_says_cannot_be_handed_over(slot):
    outcome = check(slot, "def f(x):\n    return x", "candidate(object())")
    assert (outcome.status, outcome.note) == (
        "unusable",
        "the test hands over an object of type object, which is no data",
    )
