"""The code reward: the program of a response, run on the tests of its problem."""

from __future__ import annotations

import functools
from typing import Any

from megatron_klear.types import ProgramResult, Score, Verdict

from ..base import Scheme
from ..format import OPEN, Thinking, split_thinking
from ..sandbox.outcome import Limits, Program, Sandbox
from .extract import Extracted, find_program, whole_program
from .forms import FormError, read_problem
from .judge import Result, judge, sampled
from .problem import Problem
from .settings import RELEASED_TESTS, CodeSettings, SandboxKind

_FENCE = "```"
_GIB = 1 << 30
_WALL_FACTOR = 4  # a test's time by the clock over its computing time: a busy machine fails no program


@functools.cache
def _opened(kind: SandboxKind, packages: tuple[str, ...], url: str) -> Sandbox:
    """The sandbox of this process, which it ends with. It has run a program, so that what it lacks is told at once."""
    from ..sandbox import open_sandbox
    from ..sandbox.remote import RemoteSandbox
    from .remote import PrintedValues

    sandbox = PrintedValues(RemoteSandbox(url)) if kind == "remote" else open_sandbox(kind, packages)
    sandbox.run(Program(source=""), [b""])
    return sandbox


class CodeReward:
    """Runs the last block of Python after the thinking; `[reward.code]` says what passed tests are worth.

    `soft` (the paper) is the share of tests passed, `hard` 1 for all of them and else 0, `released` 2p - 1 of at most
    16 tests as the published code has it, all or nothing where the tests are Python source. A response without a
    program has passed no test. A broken thinking format has the scheme's values, as in maths.

    A program that crashes, loops or tries to get out is wrong. `error` is left for ground truths that are none and for
    sandboxes that do not work. Not thread-safe: the sandbox belongs to the thread that graded first.
    """

    def __init__(
        self,
        scheme: Scheme,
        *,
        require_thinking: bool = True,
        settings: CodeSettings | None = None,
        sandbox: Sandbox | None = None,
    ) -> None:
        """`sandbox` stands in for the one that the settings name."""
        self.scheme, self.require_thinking = scheme, require_thinking
        self.settings = settings or CodeSettings()
        self._sandbox = sandbox

    def prepare(self) -> None:
        """Start the sandbox. Raises RewardError, with the remedy, where this machine has none."""
        if self._sandbox is None:
            self._sandbox = _opened(self.settings.sandbox, self.settings.packages, self.settings.url)

    def __call__(self, response: str, ground_truth: Any) -> Score:
        """Judge one response. Raises RewardError where the sandbox does not work."""
        if self.settings.whole_programs and response.startswith(_FENCE):
            return self.grade(find_program(response), ground_truth)  # a program may speak of thinking
        parts = split_thinking(response)
        if self.require_thinking and parts.thinking is not Thinking.KEPT:
            reward = self.scheme.value(Verdict.MALFORMED, parts.thinking)
            return Score(
                reward=reward,
                verdict=Verdict.MALFORMED,
                note=parts.thinking.value,
                program=ProgramResult("malformed", 0, 0),
            )
        if parts.answer is None and response.lstrip().startswith(OPEN):
            return self.grade(Extracted(None, Thinking.NOT_CLOSED.value), ground_truth)
        find = whole_program if self.settings.whole_programs else find_program
        return self.grade(find(response if parts.answer is None else parts.answer), ground_truth)

    def grade(self, extracted: Extracted, ground_truth: Any) -> Score:
        """Judge what was found in a response."""
        try:
            problem = read_problem(ground_truth)
        except FormError as error:
            return self._score(Result("error", 0, 0, str(error)), whole=False)
        if extracted.program is None:
            total = len(problem.tests)
            return self._score(Result("malformed", 0, total, extracted.reason), whole=problem.whole)
        return self._run(extracted.program, problem)

    def _run(self, program: str, problem: Problem) -> Score:
        self.prepare()
        assert self._sandbox is not None
        settings = self.settings
        all_or_nothing = settings.kind == "hard" or (settings.kind == "released" and problem.whole)
        most = settings.max_tests or (RELEASED_TESTS if settings.kind == "released" else 0)
        if most and not (settings.kind == "released" and problem.whole):
            problem = sampled(problem, most, program)
        limits = Limits(
            cpu_seconds=settings.cpu_seconds,
            wall_seconds=min(_WALL_FACTOR * settings.cpu_seconds, settings.total_seconds),
            total_seconds=settings.total_seconds,
            memory_bytes=round(settings.memory_gib * _GIB),
        )
        result = judge(
            program,
            problem,
            self._sandbox,
            limits=limits,
            comparison=settings.comparison,
            first_failure_decides=all_or_nothing,
        )
        return self._score(result, whole=problem.whole)

    def _score(self, result: Result, *, whole: bool) -> Score:
        share = result.passed / result.total if result.total else 0.0
        if self.settings.kind == "hard" or (self.settings.kind == "released" and whole):
            share = float(result.status == "passed")
        told = f"{result.status}, {result.passed} of {result.total} tests passed"
        return Score(
            reward=2 * share - 1 if self.settings.kind == "released" else share,
            verdict=_VERDICTS.get(result.status, Verdict.WRONG),
            note=f"{told}; {result.note}" if result.note else told,
            program=ProgramResult(result.status, result.passed, result.total),
        )


_VERDICTS = {"passed": Verdict.RIGHT, "malformed": Verdict.MALFORMED, "error": Verdict.ERROR}
"""All else is wrong: whatever a program does with its time and memory is the policy's doing."""
