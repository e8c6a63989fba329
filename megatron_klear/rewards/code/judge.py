"""A program against the tests of a problem: the sandbox runs it, what it gave is judged here."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..sandbox.outcome import Limits, Outcome, Program, Sandbox
from ..sandbox.values import MAX_DEPTH, TOO_DEEP, decode, encode
from .compare_text import same_as_livecodebench as livecodebench_text
from .compare_text import same_text, same_tokens
from .compare_values import same_as_livecodebench as livecodebench_value
from .compare_values import same_value
from .extract import dedented
from .problem import AnyOf, Case, Check, Is, Near, Problem, Test, Text
from .settings import Comparison

Status = Literal["passed", "failed", "timeout", "memory", "crashed", "contained", "malformed", "error"]
"""How a program fared: that of the first test that it did not pass."""
_STATUS: dict[str, Status] = {
    "done": "failed",
    "timeout": "timeout",
    "memory": "memory",
    "crashed": "crashed",
    "compile": "crashed",
    "contained": "contained",
    "output": "contained",
    "skipped": "timeout",
    "unusable": "error",
}
_TEXT: dict[Comparison, Callable[[bytes, bytes], bool]] = {
    "judge": same_text,
    "livecodebench": livecodebench_text,
    "tokens": same_tokens,
}
_SPARE_BYTES, _MANY_TIMES = 4096, 32
_TOO_DEEP = json.dumps(["?", TOO_DEEP]).encode()
_SHOWN = 60  # characters of an output in a note
_EXIT = "exit "  # how the note of a crash begins that was an exit by the program's own will


@dataclass(frozen=True, slots=True)
class Result:
    """Tests passed, of how many, and why not all."""

    status: Status
    passed: int
    total: int
    note: str = ""


def judge(
    program: str,
    problem: Problem,
    sandbox: Sandbox,
    *,
    limits: Limits,
    comparison: Comparison = "judge",
    first_failure_decides: bool = False,
) -> Result:
    """Run a program on the tests of a problem, all within `limits.total_seconds`.

    With `first_failure_decides` nothing is run once a test is not passed. A program that dies, loops or does what it
    may not has failed its test; only a sandbox that does not work raises.
    """
    source = dedented(program) if problem.complete is None else problem.complete(program)
    asked = Program(source=source, mode=problem.mode, prelude=problem.prelude, entry=problem.entry)
    deadline = time.monotonic() + limits.total_seconds
    found: dict[int, Outcome] = {}
    cases = [(number, test) for number, test in enumerate(problem.tests) if isinstance(test, Case)]
    answers = _Answers([case for _, case in cases], comparison, deadline)

    def enough(place: int, outcome: Outcome) -> bool:
        right_in_time = answers.right(place, outcome)  # asked of every outcome that counts, as soon as it is there
        return first_failure_decides and not right_in_time

    right: set[int] = set()
    if cases:
        inputs = [case.input for _, case in cases]
        outcomes = sandbox.run(asked, inputs, limits=limits, passed=answers.right, enough=enough)
        found.update(zip((number for number, _ in cases), outcomes, strict=True))
        right |= {number for place, (number, _) in enumerate(cases) if answers.right(place, found[number])}
    for number, test in enumerate(problem.tests):
        if not isinstance(test, Check) or (first_failure_decides and len(right) < len(found)):
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            found[number] = Outcome(status="skipped")
            continue
        found[number] = sandbox.run_check(asked, test.source, limits=replace(limits, total_seconds=left))
        if found[number].status == "done":
            right.add(number)
    unusable = next((number for number in found if found[number].status == "unusable"), None)
    if unusable is not None:
        return Result("error", 0, len(problem.tests), f"test {unusable + 1} is unusable: {found[unusable].note}")
    return _result(problem.tests, found, right)


class _Answers:
    """Which answers are right. Each is read once: it may have been made to take long."""

    def __init__(self, cases: Sequence[Case], comparison: Comparison, deadline: float) -> None:
        self._cases, self._comparison, self._deadline = cases, comparison, deadline
        self._known: dict[int, tuple[Outcome, bool]] = {}

    def right(self, place: int, outcome: Outcome) -> bool:
        """Whether what came of a case is right; nothing is after the deadline."""
        known = self._known.get(place)
        if known is None or known[0] is not outcome:
            in_time = time.monotonic() < self._deadline
            known = outcome, in_time and passes(self._cases[place], outcome, self._comparison)
            self._known[place] = known
        return known[1]


def passes(case: Case, outcome: Outcome, comparison: Comparison) -> bool:
    """Whether a program's answer to a case is right. The answer is data, whatever it says."""
    expected = case.expected
    if isinstance(expected, Text):
        exited = comparison == "livecodebench" and outcome.status == "crashed" and outcome.note.startswith(_EXIT)
        return (outcome.status == "done" or exited) and _TEXT[comparison](outcome.stdout, expected.text)
    if outcome.status != "done":
        return False
    if len(outcome.result) > _longest(expected):
        return False
    value = decode(outcome.result)
    match expected:
        case AnyOf(values=values):
            same = livecodebench_value if comparison == "livecodebench" else same_value
            return any(same(value, wanted) for wanted in values)
        case Is(value=wanted):
            return value is wanted
        case Near():
            return _near(value, expected)


def _longest(expected: AnyOf | Is | Near) -> int:
    """Bytes beyond which no value can be the expected one: what is longer may be made to take long to read."""
    held = expected.values if isinstance(expected, AnyOf) else ()
    return _SPARE_BYTES + _MANY_TIMES * max((len(encode(value)) for value in held), default=0)


def sampled(problem: Problem, count: int, program: str) -> Problem:
    """At most so many of the tests, drawn by a seed of the program and the tests: the same for the same two."""
    if len(problem.tests) <= count:
        return problem
    seed = hashlib.sha256(program.encode("utf-8", "surrogatepass"))
    for test in problem.tests:
        told = test.source if isinstance(test, Check) else repr((test.input, test.expected))
        seed.update(told.encode("utf-8", "surrogatepass"))
    drawn = sorted(random.Random(seed.digest()).sample(range(len(problem.tests)), count))
    return problem.of(tuple(problem.tests[number] for number in drawn))


def _near(value: Any, expected: Near) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | complex):
        return False
    try:
        distance = abs(value - expected.value)
        allowed = max(expected.absolute, expected.relative * max(abs(value), abs(expected.value)))
    except OverflowError:
        return False
    if value == expected.value and expected.inclusive:
        return True
    if not (math.isfinite(distance) and math.isfinite(allowed)):
        return False
    return distance <= allowed if expected.inclusive else distance < allowed


def _result(tests: Sequence[Test], found: dict[int, Outcome], right: set[int]) -> Result:
    """The outcome of all tests together; the note is on the first that was run and not passed."""
    if len(right) == len(tests):
        return Result("passed", len(right), len(tests))
    number = min(set(range(len(tests))) - right, key=lambda place: (place not in found, place))
    test, outcome = tests[number], found.get(number, Outcome(status="skipped"))
    status = _STATUS[outcome.status]
    told = _wrong(test, outcome) if outcome.status == "done" else outcome.note or outcome.status
    if isinstance(test, Check) and outcome.status == "crashed" and outcome.note.startswith("AssertionError"):
        status = "failed"
    if outcome.status == "skipped":
        told = "no time was left for it"
    return Result(status, len(right), len(tests), f"test {number + 1}: {told}")


def _wrong(test: Test, outcome: Outcome) -> str:
    if not isinstance(test, Case):
        return "wrong"
    match test.expected:
        case Text(text=text):
            return f"printed {_shown(outcome.stdout)}, expected {_shown(text)}"
        case AnyOf(values=values):
            wanted: Any = values[0]
        case Is(value=value) | Near(value=value):
            wanted = value
    if _TOO_DEEP in outcome.result:
        return f"gave a value nested more than {MAX_DEPTH} deep, expected {_short(wanted)}"
    if len(outcome.result) > _SPARE_BYTES:
        return f"gave a value of {len(outcome.result)} bytes, expected {_short(wanted)}"
    return f"gave {_short(decode(outcome.result))}, expected {_short(wanted)}"


def _shown(text: bytes) -> str:
    return repr(text[: 2 * _SHOWN].decode("utf-8", "replace")[:_SHOWN])


def _short(value: Any) -> str:
    try:
        told = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return f"a {type(value).__name__}"
    return told if len(told) <= _SHOWN else told[:_SHOWN] + "..."
