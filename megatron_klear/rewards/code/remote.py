"""Functions and asserts on a sandbox that only runs programs which read and print: a service elsewhere."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..base import RewardError
from ..sandbox.inside import values
from ..sandbox.outcome import Limits, Outcome, Program, Sandbox, Verdict

_HARNESS = """\
import builtins, json, sys, types
told = json.loads({told!r})
sys.setrecursionlimit(told["recursion"])
sys.set_int_max_str_digits(0)
main = types.ModuleType("solution")
main.__dict__["__builtins__"] = builtins
sys.modules[main.__name__] = main
ready = dict()
exec(told["prelude"], ready)
for name in ready.keys() - vars(builtins).keys():
    setattr(builtins, name, ready[name])
exec(compile(told["source"], "main.py", "exec", dont_inherit=True), main.__dict__)
values = types.ModuleType("values")
sys.modules["values"] = values
exec(told["values"], values.__dict__)
if told["mode"] == "call":
    owner = getattr(main, "Solution", None)
    function = getattr(owner(), told["entry"]) if hasattr(owner, told["entry"]) else getattr(main, told["entry"])
    result = function(*values.decode(sys.stdin.buffer.read()))
else:
    asked = json.load(sys.stdin)
    for name in asked.get("asks", ()):
        if not hasattr(main, name):
            raise NameError("the program defines no " + repr(name))
    exec(asked["setup"], main.__dict__)
    result = eval(asked["expression"], main.__dict__)
sys.__stdout__.write(told["mark"] + values.encode(result).decode())
"""


class PrintedValues:
    """A Sandbox in which a returned value is printed, after a random mark.

    Whoever prints the mark and another value has only answered otherwise: no expected value is there. Trusted tests
    beside a program need a sandbox of this machine.
    """

    def __init__(self, inner: Sandbox) -> None:
        self._inner = inner

    def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        *,
        limits: Limits | None = None,
        passed: Verdict | None = None,
        enough: Verdict | None = None,
    ) -> list[Outcome]:
        """As `Sandbox.run` says."""
        limits = limits or Limits()
        if program.mode == "stdin":
            return self._inner.run(program, inputs, limits=limits, passed=passed, enough=enough)
        mark = secrets.token_hex(16)
        told = {name: getattr(program, name) for name in ("mode", "prelude", "entry", "source")}
        told |= {"values": Path(values.__file__).read_text(), "recursion": limits.recursion, "mark": mark}
        known: dict[int, tuple[Outcome, Outcome]] = {}

        def split(number: int, outcome: Outcome) -> Outcome:
            """With the value apart from what was printed; the same object however often it is asked for."""
            if number not in known or known[number][0] is not outcome:
                known[number] = outcome, _split(outcome, mark)
            return known[number][1]

        outcomes = self._inner.run(
            Program(source=_HARNESS.format(told=json.dumps(told))),
            inputs,
            limits=limits,
            passed=passed and (lambda number, outcome: passed(number, split(number, outcome))),
            enough=enough and (lambda number, outcome: enough(number, split(number, outcome))),
        )
        return [split(number, outcome) for number, outcome in enumerate(outcomes)]

    def run_check(self, program: Program, check: str, *, limits: Limits | None = None) -> Outcome:
        """Raises RewardError: a test must not share a process with the program, and there is only one."""
        raise RewardError(
            "this problem has tests that run beside the program (loops, random inputs, helpers), which a remote "
            'sandbox cannot do: take reward.code.sandbox = "bubblewrap" or "landlock", or leave such problems out'
        )

    def close(self) -> None:
        """Close the sandbox behind it."""
        self._inner.close()


def _split(outcome: Outcome, mark: str) -> Outcome:
    printed, _, value = outcome.stdout.rpartition(mark.encode())
    return replace(outcome, stdout=printed, result=value)
