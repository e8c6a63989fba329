"""The verdict on every kind of program, by the default rules and by LiveCodeBench's, run in the sandbox."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from code_sandbox import shared_sandbox

from megatron_klear.rewards.code.forms import read_problem
from megatron_klear.rewards.code.judge import judge
from megatron_klear.rewards.sandbox.outcome import Limits

LIMITS = Limits(cpu_seconds=1.5, wall_seconds=6.0, total_seconds=30.0, memory_bytes=512 << 20)


class Row(NamedTuple):
    program: str
    tests: Any
    judge: str = "passed"
    livecodebench: str = "passed"


def prints(program: str, expected: str, *statuses: str, given: str = "") -> Row:
    return Row(program, {"inputs": [given], "outputs": [expected]}, *statuses)


def returns(value: str, expected: Any, *statuses: str) -> Row:
    """A function `f` that returns the value of an expression, where JSON holds what it should return."""
    return Row(
        f"def f():\n    return {value}", {"inputs": [""], "outputs": [json.dumps(expected)], "fn_name": "f"}, *statuses
    )


def asserts(program: str, *tests: str, status: str = "passed") -> Row:
    return Row(program, list(tests), status, status)


def big(digits: int) -> str:
    return "1" + "0" * (digits - 1)


READS = {
    "input": "a, b = int(input()), int(input())",
    "sys.stdin": "import sys\na, b = map(int, sys.stdin)",
    "sys.stdin.read": "import sys\na, b = map(int, sys.stdin.read().split())",
    "sys.stdin.buffer": "import sys\na, b = map(int, sys.stdin.buffer.read().split())",
    "os.read": "import os\na, b = map(int, os.read(0, 100).split())",
    "open(0)": "a, b = map(int, open(0))",
    "/dev/stdin": "a, b = map(int, open('/dev/stdin'))",
    "fileinput": "import fileinput\na, b = map(int, fileinput.input())",
}
ENDS = {
    "exit()": "exit()",
    "quit()": "quit()",
    "sys.exit()": "import sys\nsys.exit()",
    "SystemExit": "raise SystemExit",
    "exit in a function": "def main():\n    exit(0)\nmain()",
}
WRITES = {
    "sys.stdout.buffer": "import sys\nsys.stdout.buffer.write(b'5\\n')",
    "os.write": "import os\nos.write(1, b'5\\n')",
    "a writer flushed at exit": (
        "import sys, io, atexit\nout = io.BytesIO()\nsys.stdout = io.TextIOWrapper(out)\n"
        "def flush():\n    sys.stdout.flush()\n    sys.__stdout__.write(out.getvalue().decode())\n"
        "atexit.register(flush)\nprint(5)"
    ),
    "no newline": "print(5, end='')",
    "under main": "if __name__ == '__main__':\n    print(5)",
    "under main, in the middle": "x = 5\nif __name__ == '__main__':\n    y = x\nprint(y)",
    "in a thread with a larger stack": (
        "import threading, sys\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        "def down(n):\n    return 0 if n == 0 else 1 + down(n - 1)\ndef go():\n    print(down(100000) - 99995)\n"
        "threading.Thread(target=go).start()"
    ),
    "20,000 calls deep": "def down(n):\n    return 0 if n == 0 else 1 + down(n - 1)\nprint(down(20000) - 19995)",
    "100,000 calls deep": (
        "import sys\nsys.setrecursionlimit(200000)\ndef down(n):\n    return 0 if n == 0 else 1 + down(n - 1)\n"
        "print(down(100000) - 99995)"
    ),
}  # fmt: skip
WRITES |= {
    "detached and wrapped": "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach())\nprint(5)",
    "detached": "import sys\nsys.stdout.detach().write(b'5')",
    "detached and put in place": "import sys\nsys.stdout = sys.stdout.detach()\nsys.stdout.write(b'5')",
    "a wrapper that is not flushed": "import io, sys\nout = io.TextIOWrapper(sys.stdout.buffer)\nout.write('5')",
    "open(1)": "import sys\nsys.stdout = open(1, 'w')\nprint(5)",
    "open(1), not flushed": "class A:\n    out = [open(1, 'w')]\na = A()\na.out[0].write('5')",
    "an output of its own": (
        "import io, os, sys\nclass Out(io.IOBase):\n    def __init__(self):\n        self.held = io.BytesIO()\n"
        "    def write(self, text):\n        self.held.write(text.encode())\n    def flush(self):\n"
        "        os.write(1, self.held.getvalue())\n        self.held = io.BytesIO()\nsys.stdout = Out()\nprint(5)"
    ),
    "after a byte order mark": "\ufeffprint(5)",
    "closed": "import sys\nprint(5)\nsys.stdout.close()",
}  # fmt: skip
ROWS: dict[str, Row] = {
    **{f"reads by {name}": prints(f"{read}\nprint(a + b)", "5", given="2\n3\n") for name, read in READS.items()},
    **{f"ends by {name}": prints(f"print(5)\n{end}", "5") for name, end in ENDS.items()},
    **{f"writes: {name}": prints(write, "5") for name, write in WRITES.items()},
    "spaces at the ends": prints("print('1 2  ')\nprint('3 ')\nprint()", "1 2\n3"),
    "carriage returns": prints("print('1\\r')\nprint('2\\r')", "1\n2\n"),
    "spaces in front": prints("print()\nprint('  5')", "5"),
    "other line breaks": prints("print(1, 2)", "1\n2", "failed", "failed"),
    "more after the answer": prints("print(5)\nprint('done')", "5", "failed", "failed"),
    "case": prints("print('YES')", "Yes", "failed", "failed"),
    "fewer decimals": prints("print('0.333333')", "0.333333333333", "passed", "failed"),
    "equal by value": prints("print('1.0')\nprint('1e3')", "1\n1000"),
    "a zero in front": prints("print('0010')", "10", "failed", "passed"),
    "white space in a text": prints("print(len('''a\n   \n'''))", "6"),
    "an indent of all lines": prints("    x = 5\n    print(x)", "5"),
    "large integers": prints("print(50000000000000000)", "50000000000000001", "failed", "failed"),
    "negative zero": prints("print(-0.0)", "0.0"),
    "nan": prints("print(float('nan'))", "nan"),
    "nan for a number": prints("print(float('nan'))", "1.5", "failed", "failed"),
    "another valid output": prints("print(2, 1)", "1 2", "failed", "failed"),
    "more digits than Python prints": prints("print(10**5000)", big(5001)),
    "sys.exit(1) after the answer": prints("import sys\nprint(5)\nsys.exit(1)", "5", "crashed", "passed"),
    "an exception after the answer": prints("print(5)\n1 / 0", "5", "crashed", "crashed"),
    "os._exit before the flush": prints("import os\nprint(5)\nos._exit(0)", "5", "failed", "failed"),
    "a syntax error": prints("print(5", "5", "crashed", "crashed"),
    "a loop": prints("while True:\n    pass", "5", "timeout", "timeout"),
    "memory": prints("x = bytearray(4 << 30)", "5", "memory", "memory"),
    "a new process": prints("import os\nos.fork()\nprint(5)", "5", "contained", "contained"),
    "bytes that are no text": prints("import sys\nsys.stdout.buffer.write(b'5\\xff')", "5", "failed", "failed"),
    "a lone surrogate": prints("print('5\\ud800')", "5", "crashed", "crashed"),
    "more output than is kept": prints("for _ in range(10**6):\n    print('x' * 1000)", "5", "contained", "contained"),
    "nothing of the functional prelude": prints("print(gcd(10, 5))", "5", "crashed", "crashed"),
    "a method of Solution": Row(
        "class Solution:\n    n = 0\n    def add(self, a, b):\n        self.n += 1\n        return a + b + self.n - 1",
        {"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"},
    ),
    "a bare function": Row(
        "def add(a, b):\n    return a + b", {"inputs": ["1\n2"], "outputs": ["3"], "fn_name": "add"}
    ),
    "names that LeetCode has": Row(
        "class Solution:\n    def f(self, x: List[int]) -> int:\n        return pow(2, gcd(x[0], inf and 8), 99)",
        {"inputs": ["[4]"], "outputs": ["16"], "fn_name": "f"},
    ),
    "no function of that name": Row(
        "def g():\n    return 1", {"inputs": [""], "outputs": ["1"], "fn_name": "f"}, "crashed", "crashed"
    ),
    "a tuple for a list": returns("(1, 2)", [1, 2]),
    "a tuple for a list, inside": returns("[(1, 2)]", [[1, 2]], "passed", "failed"),
    "a set for a list": returns("{1, 2}", [1, 2], "failed", "failed"),
    "another order": returns("[2, 1]", [1, 2], "failed", "failed"),
    "a truth value for a number": returns("True", 1, "failed", "passed"),
    "a float for an integer": returns("1.0", 1),
    "floats in lists": returns("[[0.1 + 0.2]]", [[0.3]], "passed", "failed"),
    "order of keys": returns("{'b': 2, 'a': 1}", {"a": 1, "b": 2}),
    "keys that are integers": returns("{1: 2}", {"1": 2}, "failed", "failed"),
    "a generator": returns("(x for x in [1, 2])", [1, 2], "failed", "failed"),
    "a subclass of int": returns("type('I', (int,), {'__eq__': lambda *_: True})(3)", 4, "failed", "failed"),
    "a subclass of int, right": returns("type('I', (int,), {})(3)", 3),
    "equal to everything": returns("type('A', (), {'__eq__': lambda *_: True})()", 4, "failed", "failed"),
    "equal to everything, inside": returns("[type('A', (), {'__eq__': lambda *_: True})()]", [4], "failed", "failed"),
    "more digits than Python reads": Row(
        "def f(n):\n    return n * 10", {"inputs": [big(5001)], "outputs": [big(5002)], "fn_name": "f"}
    ),
    "no value": returns("None", 0, "failed", "failed"),
    "an argument changed": asserts("def f(x):\n    x.sort()", "x = [2, 1]\nf(x)\nassert x == [1, 2]"),
    "an argument changed instead of a value": asserts(
        "def f(x):\n    x.sort()", "assert f([2, 1]) == [1, 2]", status="failed"
    ),
    "a set is compared as the test has it": asserts("def f():\n    return [2, 1]", "assert set(f()) == {1, 2}"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("comparison", ["judge", "livecodebench"])
def test_verdict(name: str, comparison: Any) -> None:
    row = ROWS[name]
    result = judge(row.program, read_problem(row.tests), shared_sandbox(), limits=LIMITS, comparison=comparison)
    assert result.status == (row.judge if comparison == "judge" else row.livecodebench), result.note
    assert result.passed == (result.total if result.status == "passed" else 0)


def test_the_looser_comparison_goes_by_name() -> None:
    problem = read_problem({"inputs": [""], "outputs": ["1\n2"]})
    assert judge("print(1, 2)", problem, shared_sandbox(), limits=LIMITS, comparison="tokens").status == "passed"


def test_a_program_fails_the_tests_it_fails_and_no_others() -> None:
    problem = read_problem({"inputs": [f"{n}\n" for n in range(8)], "outputs": [str(n * n) for n in range(8)]})
    program = (
        "n = int(input())\nif n == 3:\n    raise ValueError('three')\nif n == 5:\n    while True:\n        pass\n"
        "print(n * n if n != 6 else 0)"
    )
    result = judge(program, problem, shared_sandbox(), limits=LIMITS)
    assert (result.status, result.passed, result.total) == ("crashed", 5, 8)
    assert "test 4" in result.note
    first = judge(program, problem, shared_sandbox(), limits=LIMITS, first_failure_decides=True)
    assert (first.status, first.passed, first.total) == ("crashed", 3, 8)
