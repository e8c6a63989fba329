"""Programs in the sandbox: what right ones may do, and how others end.

Both kinds of sandbox run the same cases, but for those about files, which Landlock programs may not write.
"""

import json
import sys
from pathlib import Path

import pytest

from megatron_klear.rewards.base import RewardError
from megatron_klear.rewards.sandbox import Limits, Program, open_sandbox
from megatron_klear.rewards.sandbox.inside import landlock
from megatron_klear.rewards.sandbox.values import Opaque, decode, encode_arguments
from tests.hostile_runs import HONEST, INPUTS, right
from tests.sandboxes import one

QUICK = Limits(cpu_seconds=0.3, wall_seconds=0.5)


@pytest.fixture(scope="module")
def contained():
    """A slot of the kind with namespaces."""
    sandbox = open_sandbox("bubblewrap")
    yield sandbox
    sandbox.close()


DEPTH_THROUGH_C = 20_000 if sys.version_info < (3, 12) else 200
"""Later interpreters have a limit of their own on recursion through functions in C."""
# Source, standard input, standard output; all end well.
FINE = {
    "input()": ("print(int(input()) + int(input()))", b"1\n2\n", b"3\n"),
    "sys.stdin": ("import sys\nfor line in sys.stdin:\n    print(line.strip())", b"1\n2", b"1\n2\n"),
    "sys.stdin.buffer": ("import sys\nprint(sys.stdin.buffer.read())", b"1 2", b"b'1 2'\n"),
    "os.read": ("import os\nprint(os.read(0, 99))", b"1 2", b"b'1 2'\n"),
    "open(0)": ("print(open(0).read())", b"1 2", b"1 2\n"),
    "/dev/stdin": ("print(open('/dev/stdin').read())", b"1 2", b"1 2\n"),
    "fileinput": ("import fileinput\nprint([*fileinput.input()])", b"1\n2\n", b"['1\\n', '2\\n']\n"),
    "the rest after input()": ("import sys\nprint(input(), sys.stdin.read())", b"1\n2\n", b"1 2\n\n"),
    "lines with carriage returns": ("print(repr(input()))", b"1 2\r\n3", b"'1 2'\n"),
    "no input": ("print(3)", b"", b"3\n"),
    "sys.stdout.buffer": ("import sys\nsys.stdout.buffer.write(b'1\\n')\nprint(2)", b"", b"1\n2\n"),
    "os.write": ("import os\nos.write(1, b'3')", b"", b"3"),
    "bytes that are no UTF-8": ("import os\nos.write(1, bytes([255, 254]))", b"", b"\xff\xfe"),
    "written at its end": (
        "import atexit, io, os, sys\nsys.stdout = io.StringIO()\n"
        "atexit.register(lambda: os.write(1, sys.stdout.getvalue().encode()))\nprint(3)",
        b"",
        b"3\n",
    ),
    "main": ("if __name__ == '__main__':\n    print(3)", b"", b"3\n"),
    "main in the middle": (
        "def f():\n    print(1)\nif __name__ == '__main__':\n    f()\ndef g():\n    print(2)\ng()",
        b"",
        b"1\n2\n",
    ),
    "exit()": ("print(3)\nexit()", b"", b"3\n"),
    "quit() in a function": ("def f():\n    print(3)\n    quit()\nf()\nprint(4)", b"", b"3\n"),
    "sys.exit(0)": ("import sys\nprint(3)\nsys.exit(0)", b"", b"3\n"),
    "raise SystemExit": ("print(3)\nraise SystemExit", b"", b"3\n"),
    "a thread with a larger stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\ndef f(n):\n    return n and 1 + f(n - 1)\n"
        "def main():\n    print(f(50000) + sum(map(int, input().split())))\n"
        "threading.stack_size(1 << 27)\nthreading.Thread(target=main).start()",
        b"1 2",
        b"50003\n",
    ),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n):\n    return n and 1 + f(n - 1)\nprint(f(10**5))",
        b"",
        b"100000\n",
    ),
    "recursion without a raised limit": ("def f(n):\n    return n and 1 + f(n - 1)\nprint(f(20000))", b"", b"20000\n"),
    "recursion through a cache": (
        "import sys, functools\nsys.setrecursionlimit(10**6)\n@functools.cache\ndef f(n):\n"
        "    return n and 1 + f(n - 1)\n"
        f"print(f({DEPTH_THROUGH_C}))",
        b"",
        b"%d\n" % DEPTH_THROUGH_C,
    ),
    "long integers": ("print(len(str(10**5000)))", b"", b"5001\n"),
    "asyncio": ("import asyncio\nasync def f():\n    print(3)\nasyncio.run(f())", b"", b"3\n"),
    "dataclasses": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int' = 3\nprint(P().x)",
        b"",
        b"3\n",
    ),
    "pickle of its own class": (
        "import pickle\nclass A:\n    x = 3\nprint(pickle.loads(pickle.dumps(A())).x)",
        b"",
        b"3\n",
    ),
    "libraries in C": (
        "import zlib, hashlib, decimal, sqlite3\nprint(hashlib.md5(zlib.compress(b'x')).hexdigest()[:0] + '3')",
        b"",
        b"3\n",
    ),
    "hash seed": ("print(hash('a') == hash('a') and __import__('sys').flags.hash_randomization)", b"", b"0\n"),
    "time zones": ("import zoneinfo\nprint(zoneinfo.ZoneInfo('UTC'))", b"", b"UTC\n"),
    "its own signals": (
        "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *a: print(3))\nos.kill(os.getpid(), signal.SIGUSR1)",
        b"",
        b"3\n",
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_right_programs_run_as_in_a_terminal(slot, name):
    source, stdin, stdout = FINE[name]
    outcome = one(slot, source, stdin)
    assert (outcome.status, outcome.stdout) == ("done", stdout), outcome


def test_right_programs_that_share_a_process_run_alike(slot):
    for name, (source, stdin, stdout) in FINE.items():
        outcomes = slot.run(Program(source=source), [stdin] * 3, passed=lambda i, o, stdout=stdout: o.stdout == stdout)
        assert [(o.status, o.stdout) for o in outcomes] == [("done", stdout)] * 3, name


def test_files_are_its_own_and_gone_with_its_test(contained):
    write = (
        "import os\nprint(os.path.exists('/tmp/x'), os.getcwd())\nopen('x', 'w').write('1')\n"
        "print(open('/tmp/x').read())"
    )
    for passed in (None, lambda i, o: True):
        outcomes = contained.run(Program(source=write), [b""] * 3, passed=passed)
        assert [o.stdout for o in outcomes] == [b"False /tmp\n1\n"] * 3
    assert one(contained, "import tempfile\nprint(tempfile.gettempdir())").stdout == b"/tmp\n"


def test_a_full_disk_is_the_programs_own(contained):
    fill = "for i in range(99):\n    with open(f'{i}', 'wb') as f:\n        f.write(bytes(1 << 20))"
    outcome = one(contained, fill)
    assert outcome.status == "crashed"
    assert "No space left" in outcome.note
    assert one(contained, fill.replace("99", "3")).status == "done"


def test_under_landlock_no_file_is_written():
    if landlock.version() < landlock.NEEDED_VERSION:
        pytest.skip(f"the kernel has no Landlock {landlock.NEEDED_VERSION}")
    sandbox = open_sandbox("landlock")
    try:
        assert "Permission denied" in one(sandbox, "open('/tmp/x', 'w')").note
        assert "Permission denied" in one(sandbox, f"print(open({str(Path(__file__))!r}).read())").note
    finally:
        sandbox.close()


@pytest.mark.parametrize(
    ("source", "status", "note"),
    [
        ("print(1)\n1 / 0", "crashed", "ZeroDivisionError: division by zero"),
        ("print(1)\nraise SystemExit(3)", "crashed", "exit 3"),
        ("import sys\nsys.exit('words')", "crashed", "exit 1"),
        ("import os\nos._exit(4)", "crashed", "exit 4"),
        ("import os\nos.abort()", "crashed", "SIGABRT"),
        ("print('\\ud800')", "crashed", "UnicodeEncodeError"),
        ("x = bytearray(1 << 40)", "memory", "more memory"),
        ("while True:\n    pass", "timeout", "computing"),
        ("import time\ntime.sleep(99)", "timeout", "by the clock"),
        ("while True:\n    print('x' * 9999)", "output", "wrote more"),
        ("import os\nos.fork()", "contained", "system call"),
        ("def f(:", "compile", "SyntaxError"),
        ("x = 1\n" * 10, "done", ""),
    ],
)
def test_endings(slot, source, status, note):
    outcome = one(slot, source, limits=QUICK)
    assert outcome.status == status
    assert note in outcome.note
    assert outcome.cpu_seconds < 2


def test_a_traceback_tells_of_the_program_alone(slot):
    outcome = one(slot, "def f():\n    return 1 / 0\nf()")
    lines = outcome.stderr.decode().splitlines()
    assert lines[1:3] == ['  File "main.py", line 3, in <module>', '  File "main.py", line 2, in f']


def test_limits_hold(slot):
    limits = Limits(memory_bytes=128 << 20, output_bytes=1000, recursion=500, source_bytes=200, cpu_seconds=1)
    assert one(slot, "x = bytearray(200 << 20)", limits=limits).status == "memory"
    assert one(slot, "print('x' * 2000)", limits=limits).status == "output"
    assert one(slot, "import sys\nprint(sys.getrecursionlimit())", limits=limits).stdout == b"500\n"
    assert one(slot, "#" * 201, limits=limits).status == "compile"
    outcomes = slot.run(
        Program(source="while True:\n    pass"), [b""] * 9, limits=Limits(cpu_seconds=0.2, total_seconds=0.5)
    )
    statuses = [o.status for o in outcomes]
    assert statuses == sorted(statuses, reverse=True)
    assert (statuses[0], statuses[-1]) == ("timeout", "skipped")


def test_threads_are_limited(contained):
    start = (
        "import threading\nn, ended = 0, threading.Event()\ntry:\n    for n in range(60):\n"
        "        threading.Thread(target=ended.wait).start()\nexcept RuntimeError:\n    print(n)\nended.set()"
    )
    outcome = one(contained, start, limits=Limits(threads=10))
    assert (outcome.status, outcome.stdout) == ("done", b"10\n")


def test_what_was_used_is_told(slot):
    outcome = one(slot, "x = bytearray(50 << 20)\nfor i in range(10**6):\n    pass")
    assert 0.001 < outcome.cpu_seconds <= outcome.wall_seconds + 0.1
    assert outcome.peak_bytes > 50 << 20


def test_a_call_gets_values_and_returns_one(slot):
    source = (
        "class Solution:\n    n = 0\n    def f(self, a, b):\n        self.n += 1\n"
        "        return a, {b: self.n}\ndef g(x):\n    yield x"
    )
    inputs = [encode_arguments([[1.5, None], "b"]), encode_arguments([(2**70, {1, 2}), b"\xff"])]
    outcomes = slot.run(Program(source=source, mode="call", entry="f"), inputs)
    assert [decode(o.result) for o in outcomes] == [([1.5, None], {"b": 1}), ((2**70, {1, 2}), {b"\xff": 1})]
    (of_generator,) = slot.run(Program(source=source, mode="call", entry="g"), [encode_arguments([1])])
    assert isinstance(decode(of_generator.result), Opaque)
    (of_nothing,) = slot.run(Program(source=source, mode="call", entry="h"), [encode_arguments([])])
    assert (of_nothing.status, of_nothing.note) == ("crashed", "NameError: the program defines no 'h'")


def test_an_expression_is_evaluated_where_the_program_was(slot):
    program = Program(source="def f(x):\n    return x + 1", mode="expression")
    inputs = [{"setup": "y = f(1)", "expression": "[y, f(y)]"}, {"setup": "", "expression": "y"}]
    first, second = slot.run(program, [json.dumps(one).encode() for one in inputs])
    assert decode(first.result) == [2, 3]
    assert second.note == "NameError: name 'y' is not defined"


def test_a_prelude_gives_names_and_is_not_run_again(slot):
    prelude = "from math import *\nfrom builtins import *\ncounted = [0]"
    own = "sorted(globals().keys() & {'factorial', 'f'})"
    source = f"counted[0] += 1\ndef f():\n    return pow(2, 3), pi > 3, counted, {own}"
    program = Program(source=source, mode="call", entry="f", prelude=prelude)
    (outcome,) = slot.run(program, [encode_arguments([])])
    assert decode(outcome.result) == (8, True, [1], ["f"])
    with pytest.raises(RewardError, match="prelude of a program fails: ModuleNotFoundError"):
        slot.run(Program(source="", prelude="import no_such_module"), [b""])
    assert right(0, slot.run(HONEST, INPUTS)[0])
