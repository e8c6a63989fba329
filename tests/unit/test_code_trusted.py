"""Tests that run beside their program use its objects as Python would; what they cannot is an error of their row."""

from __future__ import annotations

import pytest
from code_sandbox import fenced, shared_sandbox

from megatron_klear.rewards.base import SCHEMES
from megatron_klear.rewards.code.reward import CodeReward
from megatron_klear.rewards.code.settings import CodeSettings
from megatron_klear.types import Score, Verdict


def graded(program: str, tests: str) -> Score:
    settings = CodeSettings(cpu_seconds=2.0, total_seconds=20.0)
    return CodeReward(SCHEMES["paper"], settings=settings, sandbox=shared_sandbox())(
        fenced(program), {"pytest": f"from solution import *\n{tests}"}
    )


VECTOR = """
class Vector:
    def __init__(self, *parts):
        self.parts = list(parts)
    def __add__(self, other):
        return Vector(*(a + b for a, b in zip(self.parts, other.parts)))
    def __mul__(self, factor):
        return Vector(*(factor * a for a in self.parts))
    __rmul__ = __mul__
    def __neg__(self):
        return self * -1
    def __iadd__(self, other):
        self.parts = (self + other).parts
        return self
    def __abs__(self):
        return sum(a * a for a in self.parts) ** .5
    def __eq__(self, other):
        return isinstance(other, Vector) and self.parts == other.parts
    def __lt__(self, other):
        return abs(self) < abs(other)
    def __hash__(self):
        return hash(tuple(self.parts))
    def __len__(self):
        return len(self.parts)
    def __bool__(self):
        return any(self.parts)
    def __iter__(self):
        return iter(self.parts)
    def __contains__(self, part):
        return part in self.parts
    def __getitem__(self, place):
        return self.parts[place]
    def __setitem__(self, place, part):
        self.parts[place] = part
    def __repr__(self):
        return f"Vector{tuple(self.parts)}"
    def __call__(self, x):
        return sum(a * x ** n for n, a in enumerate(self.parts))
def unit(n, place):
    return Vector(*(int(i == place) for i in range(n)))
"""
MONEY = """
from fractions import Fraction
class Money:
    def __init__(self, cents):
        self.cents = cents
    def __eq__(self, other):
        return self.cents == (other.cents if isinstance(other, Money) else other)
    def __add__(self, other):
        return Money(self.cents + (other.cents if isinstance(other, Money) else other))
    __radd__ = __add__
"""
ERRORS = """
import json
class BankError(Exception):
    pass
class NoMoney(BankError):
    def __init__(self, missing):
        super().__init__(f"{missing} are missing")
        self.missing = missing
class Account:
    def __init__(self):
        self.balance = 0
        self.open = False
    def take(self, n):
        if n > self.balance:
            raise NoMoney(n - self.balance)
        self.balance -= n
    def __enter__(self):
        self.open = True
        return self
    def __exit__(self, kind, error, trace):
        self.open = False
        return kind is NoMoney
def read(text):
    return json.loads(text)
def lookup(d, k):
    return d[k]
"""
WAITS = """
import asyncio
class Client:
    def __init__(self):
        self.log = []
    async def fetch(self, n):
        await asyncio.sleep(0)
        if n < 0:
            raise ValueError("negative")
        self.log.append(n)
        return n * 2
    async def __aenter__(self):
        return self
    async def __aexit__(self, *error):
        self.log.append("closed")
async def numbers(n):
    for i in range(n):
        yield i
async def double(n):
    return 2 * n
"""
KINDS = """
import collections, enum
Point = collections.namedtuple("Point", "x y")
class Color(enum.Enum):
    RED = 1
    BLUE = 2
class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
def origin():
    return Point(0, 0)
def count(text):
    return collections.Counter(text)
def last(node):
    return node if node.next is None else last(node.next)
def apply(function, items):
    return [function(item) for item in items]
def each(items, then):
    for item in items:
        then(item)
def say(words):
    print(words)
def tomorrow(day):
    import datetime
    return day + datetime.timedelta(days=1)
"""
RIGHT: dict[str, tuple[str, str]] = {
    "operators": (
        VECTOR,
        "def test_a():\n    v = Vector(1, 2)\n    assert v + Vector(3, 4) == Vector(4, 6)\n"
        "    assert v * 3 == 3 * v == Vector(3, 6) and -v == Vector(-1, -2)\n    w = v\n    w += Vector(1, 1)\n"
        "    assert w is v and v == Vector(2, 3) and v != Vector(2, 2)\n"
        "    assert unit(2, 0) + unit(2, 1) == Vector(1, 1)",
    ),
    "order": (
        VECTOR,
        "def test_a():\n    a, b = Vector(3), Vector(1, 1)\n    assert b < a and a > b and not a < b\n"
        "    assert sorted([a, b]) == [b, a] and max(a, b) == a",
    ),
    "containers": (
        VECTOR,
        "def test_a():\n    v = Vector(1, 2)\n    v[0] = 5\n"
        "    assert v[0] == 5 and len(v) == 2 and list(v) == [5, 2]\n"
        "    assert 2 in v and 7 not in v and v and not Vector(0) and v[-1:] == [2]\n"
        "    assert repr(v) == 'Vector(5, 2)' == f'{v}' and abs(Vector(3, 4)) == 5 and v(2) == 9\n"
        "    assert {v, Vector(5, 2)} == {v} and isinstance(v, Vector) and not isinstance(3, Vector)\n"
        "    v.parts = [1]\n    assert v.parts == [1] and unit(1, 0) in [v]",
    ),
    "with data": (MONEY, "def test_a():\n    assert Money(5) == 5\n    assert sum([Money(2), Money(3)]) == Money(5)"),
    "its own exceptions": (
        ERRORS,
        "import pytest\ndef test_a():\n    with pytest.raises(NoMoney, match='7 are') as told:\n"
        "        Account().take(7)\n"
        "    assert told.value.missing == 7 and told.type is NoMoney and 'missing' in str(told.value)\n"
        "    assert isinstance(told.value, BankError) and issubclass(NoMoney, BankError)\n"
        "    try:\n        Account().take(1)\n    except BankError as error:\n"
        "        assert error.args == ('1 are missing',)\n"
        "    else:\n        assert False\n    assert NoMoney(3).missing == 3 and str(NoMoney(3)) == '3 are missing'",
    ),
    "exceptions of the library": (
        ERRORS,
        "import json, pytest\ndef test_a():\n    with pytest.raises(json.JSONDecodeError):\n        read('{')\n"
        "    with pytest.raises(KeyError) as told:\n        lookup({}, 'k')\n    assert told.value.args[0] == 'k'\n"
        "    told = pytest.raises(TypeError, lookup, 3, 4)\n    assert told.typename == 'TypeError'",
    ),
    "with": (
        ERRORS,
        "def test_a():\n    with Account() as account:\n        assert account.open\n        account.take(3)\n"
        "    assert not account.open",
    ),
    "coroutines": (
        WAITS,
        "import asyncio\ndef test_a():\n    assert asyncio.run(double(4)) == 8\n"
        "async def test_b():\n    async with Client() as client:\n        assert await client.fetch(1) == 2\n"
        "        assert await asyncio.gather(client.fetch(2), client.fetch(3)) == [4, 6]\n"
        "        with pytest.raises(ValueError, match='negative'):\n            await client.fetch(-1)\n"
        "    assert client.log == [1, 2, 3, 'closed']\n    assert [n async for n in numbers(3)] == [0, 1, 2]",
    ),
    "named tuples, counters and enumerations": (
        KINDS,
        "def test_a():\n    p = origin()\n    for _ in [1]:\n"
        "        assert p.x == 0 and p == (0, 0) and p._replace(y=2) == (0, 2)\n"
        "    c = count('aab')\n    assert c['a'] == 2 and c['z'] == 0 and c.most_common(1) == [('a', 2)]\n"
        "    assert Color.RED is Color.RED and Color.RED is not Color.BLUE and Color(1) == Color.RED\n"
        "    assert Color.RED.value == 1 and Color.BLUE.name == 'BLUE'",
    ),
    "linked objects": (
        KINDS,
        "def test_a():\n    c = Node(3)\n    a = Node(1, Node(2, c))\n    assert last(a) is c and a.next.next is c\n"
        "    assert a.next.value == 2 and c.next is None and c.next == None",
    ),
    "functions of the test": (
        KINDS,
        "def test_a():\n    seen = []\n    for _ in [1]:\n        assert apply(lambda x: x * 2, [1, 2]) == [2, 4]\n"
        "    each([1, 2], seen.append)\n    assert seen == [1, 2]\n"
        "    each([3], lambda x: seen.append(last(Node(x)).value))\n    assert seen == [1, 2, 3]\n"
        "    assert apply(str, (n for n in [1, 2])) == ['1', '2'] and apply(len, {'ab': 1}.keys()) == [2]\n"
        "    def fail(x):\n        raise LookupError('mine')\n    with pytest.raises(LookupError, match='mine'):\n"
        "        apply(fail, [1])",
    ),
    "what it prints": (
        KINDS,
        "import contextlib, io\ndef test_a():\n    out = io.StringIO()\n    with contextlib.redirect_stdout(out):\n"
        "        say('hello')\n    assert out.getvalue() == 'hello\\n'",
    ),
    "dates and exact numbers": (
        KINDS,
        "from datetime import date\nfrom decimal import Decimal\ndef test_a():\n"
        "    assert tomorrow(date(2020, 2, 28)) == date(2020, 2, 29)\n"
        "    assert apply(lambda x: x + 1, [Decimal('1.5')]) == [Decimal('2.5')]",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(name: str) -> None:
    program, tests = RIGHT[name]
    score = graded(program, tests)
    assert (score.reward, score.verdict) == (1.0, Verdict.RIGHT), score.note


EVIL = """
class Evil(BaseException):
    def __init__(self, *given):
        pass
    def __getattr__(self, name):
        return Evil()
    def yes(self, *given):
        return True
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __exit__ = __bool__ = yes
    def give(self, *given):
        return self
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __call__ = __enter__ = give
    __iadd__ = __getitem__ = __await__ = __aenter__ = give
    def __abs__(self):
        return 0
    __len__ = __hash__ = __int__ = __index__ = __abs__
    def __float__(self):
        return 0.0
    def __iter__(self):
        return iter([])
"""
NAMES = (
    *("Vector", "Money", "Account", "NoMoney", "BankError", "Client", "Point", "Color", "Node"),
    *("unit", "read", "lookup", "numbers", "double", "origin", "count", "last", "apply", "each", "say", "tomorrow"),
)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("base", ["Exception", "object", "int"])
def test_objects_that_say_yes_to_everything_do_not_pass(name: str, base: str) -> None:
    evil = EVIL.replace("BaseException", base)
    evil = evil.replace(
        "def __init__(self, *given):\n        pass", "def __new__(cls, *given):\n        return super().__new__(cls)"
    )
    for made in ("{0} = Evil", "{0} = Evil()", "def {0}(*given, **named):\n    return Evil()"):
        score = graded(evil + "".join(made.format(one) + "\n" for one in NAMES), RIGHT[name][1])
        assert (score.reward < 1.0, score.verdict) == (True, Verdict.WRONG), (made, score.note)


WRONG = {
    "a value that is expected is not the program's to compare": (
        EVIL.replace("(BaseException)", "") + "def f(x):\n    return Evil()",
        "def test_a():\n    for x in [1]:\n        assert {}",
        ("f(x) == 4", "abs(f(x) - 2) < 1", "4 in f(x)", "f(x) < 5", "f(x) == [4]", "f(x) + 1 == 5", "f(x).g() == 4"),
    ),
    "nor where it makes a class of what the test takes for a function": (
        "class Split:\n    def __init__(self, x):\n        pass\n    def __eq__(self, other):\n"
        "        return isinstance(other, list)\n    def __sub__(self, other):\n        return 0\n",
        "def test_a():\n    for x in ['a b']:\n        assert {}",
        ("Split(x) == ['a', 'b']", "abs(Split(x) - 3) < 1"),
    ),
    "a failure of the test is not the program's to take away": (
        "class Manager:\n    def __enter__(self):\n        return 3\n    def __exit__(self, *error):\n"
        "        return True",
        "def test_a():\n    with {} as x:\n        assert x == 4",
        ("Manager()",),
    ),
    "nor that of a function that it was given": (
        "def each(items, then):\n    for item in items:\n        try:\n            then(item)\n"
        "        except BaseException:\n"
        "            pass",
        "def test_a():\n    def then(x):\n        assert x == 4\n    each([3], {})",
        ("then",),
    ),
    "nor its own end": (
        "import os\ndef f():\n    os._exit(79)",
        "def test_a():\n    try:\n        assert {} == 3\n    except:\n        pass",
        ("f()",),
    ),
    "a value too deep": (
        "def f(x):\n    for _ in range(200):\n        x = [x]\n    return x",
        "def test_a():\n    for x in [1]:\n        assert {} != 3",
        ("f(x)",),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_the_programs_to_decide(name: str) -> None:
    program, test, asked = WRONG[name]
    for one in asked:
        score = graded(program, test.format(one))
        assert (score.reward, score.verdict) == (0.0, Verdict.WRONG), (one, score.note)


UNUSABLE = {
    "an object of the test": (
        "class Mine:\n    pass\ndef test_a():\n    assert f(Mine()) != 3",
        "an object of type Mine",
    ),
    "a class of the test's own": (
        "def test_a():\n    class Mine(Thing):\n        pass\n    assert Mine().x == 1",
        "inherits from the program's Thing",
    ),
    "an exception of the test's own": (
        "def test_a():\n    class Mine(Bad):\n        pass\n    assert str(Mine()) == ''",
        "inherits from the program's Bad",
    ),
    "something deep": (
        "def test_a():\n    x = 1\n    for _ in range(200):\n        x = [x]\n    assert f(x) == x",
        "more than 100 deep",
    ),
    "something long": ("def test_a():\n    for n in [9 << 20]:\n        assert f('x' * n) != n", "are the most"),
    "a caught error": (
        "def test_a():\n    try:\n        assert f(object())\n    except:\n        pass",
        "an object of type object",
    ),
    "a patch": (
        "from unittest.mock import patch\n@patch('solution.g')\ndef test_a(g):\n    assert f(1) == 1",
        "patches 'solution.g'",
    ),
    "an input": (
        "import sys, io\ndef test_a():\n    sys.stdin = io.StringIO('1')\n    assert f(1) == 1",
        "replaces sys.stdin",
    ),
    "a fixture": ("def test_a(capsys):\n    assert f(1) == 1", "takes a fixture"),
    "a fixture beside parameters": (
        "@pytest.mark.parametrize('x', [1])\ndef test_a(x, tmp_path):\n    assert f(x) == x",
        "takes a fixture",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_test_that_cannot_be_run_is_an_error_of_its_row(name: str) -> None:
    test, words = UNUSABLE[name]
    score = graded("class Bad(Exception):\n    pass\nclass Thing:\n    x = 1\ndef f(x):\n    return x", test)
    assert (score.reward, score.verdict) == (0.0, Verdict.ERROR), score.note
    assert words in score.note
