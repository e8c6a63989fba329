"""Keep code problems that have enough tests, which their reference solutions pass and agree on."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from megatron_klear.config.base import Settings
from megatron_klear.rewards.base import BUILT_IN, find
from megatron_klear.rewards.code.problem import Problem

from .code_tests import as_response, as_value, contradiction, num_distinct, only, references_of, tests_of
from .distill import store_path
from .grading import Graded, Grader, GradingConfig, Truth, open_grades, truth_of
from .output import TESTS, Output, finished_hits, raw_hits
from .report import Judged, Report
from .rows import BadRow, Row, Unusable, problem_text
from .run import Files, Place, Work, carry_out
from .text import problem_id

_ROWS_AT_ONCE = 32
_FIELDS = ("solutions", "solution", "reference_solution", "canonical_solution", "code")
_REFERENCES = (*_FIELDS, *(f"extra_info.{name}" for name in _FIELDS))


class FilterCodeSettings(Settings):
    """Keep code problems that have enough tests, which their reference solutions pass and agree on."""

    min_tests: PositiveInt = 16
    """Tests that a problem must have; equal ones count once."""
    drop_failing_tests: bool = False
    """Drop tests that the reference fails, where enough are left, instead of their problem."""
    without_reference: Literal["keep", "drop"] = "keep"
    """What becomes of problems without a reference solution, whose tests nothing has judged; they are counted."""
    ambiguous: Literal["keep", "drop"] = "drop"
    """What becomes of problems with two accepted outputs: one input with two expected outputs, or a test that one
    reference passes while another, which passes other tests, ends well with another output."""
    reference: tuple[str, ...] = _REFERENCES
    """Fields that may hold reference solutions, dots for fields inside; the first that a row has counts."""
    max_references: PositiveInt = 2
    """Run at most so many of a problem's."""
    store: Path | None = None
    """Folder of grades.jsonl, which only grows and is where a command that was stopped goes on. Unset is the output's
    folder."""
    reward: GradingConfig = GradingConfig()

    @model_validator(mode="after")
    def _check(self) -> FilterCodeSettings:
        if self.reward.code.kind != "soft" or self.reward.code.max_tests:
            raise ValueError("every test is run and counted: leave reward.code.kind soft and reward.code.max_tests 0")
        return self


def run_filter_code(files: Files, settings: FilterCodeSettings) -> dict[str, Any] | None:
    """Run reference solutions and keep problems whose tests hold; returns the report, None where all is there already.

    Raises DataError for what cannot be read or written, RewardError where programs cannot be run.
    """
    named = {
        **settings.model_dump(mode="json", exclude={"reward", "store"}),
        "reward": settings.reward.identity(),
    }
    folder = store_path(files, settings.store).parent
    return carry_out(files, "filter-code", named, lambda: _CodeFilter(files, settings, folder))


@dataclass(slots=True)
class _Problem:
    """A row, and what is found of it."""

    row: Row
    name: str
    truth: Truth
    tests: Problem
    distinct: int
    references: list[str]
    ambiguous: str = ""
    reason: str = ""
    results: list[Graded] = field(default_factory=list)
    """Of each reference, all tests together."""
    statuses: list[list[str]] = field(default_factory=list)
    """Of each reference and test, how it ended; where single tests had to be looked at."""
    line: bytes = b""
    dropped_tests: list[int] = field(default_factory=list)
    """Numbers from 1."""

    def details(self) -> dict[str, Any]:
        """What examples show."""
        return {"tests": self.distinct, **({"why": self.ambiguous} if self.reason == "ambiguous" else {})}


class _CodeFilter(Work):
    """Counts, runs the references, looks at single tests where one fails, and decides, row by row."""

    lines = TESTS

    def __init__(self, files: Files, settings: FilterCodeSettings, folder: Path) -> None:
        self._files, self._settings, self._folder = files, settings, folder
        self._references: Counter[str] = Counter()
        self._ambiguous = self._thinned = self._tests_dropped = 0

    def judge(self, output: Output) -> Iterator[Place]:
        """Every row, with a line about its tests."""
        if self._files.strict:  # before anything is run
            for path, _, row in self._files.rows():
                usable = self._usable(row)
                if isinstance(usable, Unusable):
                    yield path, Judged.unusable(usable)
        with ExitStack() as stack:
            reward, workers = self._settings.reward, self._files.workers
            file = stack.enter_context(open_grades(self._folder))
            grader = Grader(
                reward,
                lambda: stack.enter_context(reward.open_pool({"code"}, workers, programs=True)),
                file,
                programs=True,
            )
            rows = self._files.rows()
            while chunk := [(path, self._usable(row)) for path, _, row in islice(rows, _ROWS_AT_ONCE)]:
                problems = [row for _, row in chunk if isinstance(row, _Problem) and not row.reason]
                self._run(problems, grader)
                for path, found in chunk:
                    if isinstance(found, Unusable):
                        yield path, Judged.unusable(found)
                    else:
                        yield path, self._decide(path, found, output)
            grader.check()

    def finish(self, report: Report) -> dict[str, Any]:
        """How the references fared, and what was flagged."""
        os.replace(raw_hits(self._files.output), finished_hits(self._files.output))
        return {
            "references": dict(sorted(self._references.items())),
            "ambiguous": self._ambiguous,
            "problems_with_dropped_tests": self._thinned,
            "dropped_tests": self._tests_dropped,
        }

    def _usable(self, row: Row | Unusable) -> _Problem | Unusable:
        if isinstance(row, Unusable):
            return row
        settings = self._settings
        try:
            name = problem_id(problem_text(row.value))
            truth = truth_of(row.value, settings.reward.functions)
            if find(truth.data_source, settings.reward.functions)[0] != BUILT_IN["code"]:
                raise BadRow("no_code", f"the reward of data_source {truth.data_source!r} runs no programs")
            tests = tests_of(truth.ground_truth)
        except BadRow as error:
            return error.at(row.number)
        references = references_of(row.value, settings.reference)[: settings.max_references]
        found = _Problem(row, name, truth, tests, num_distinct(tests.tests), references, line=row.line)
        if pair := contradiction(tests.tests):
            found.ambiguous = f"tests {pair[0]} and {pair[1]} have one input and different outputs"
        if found.distinct < settings.min_tests:
            found.reason = "too_few_tests"
        elif found.ambiguous and settings.ambiguous == "drop":
            found.reason = "ambiguous"
        elif not references and settings.without_reference == "drop":
            found.reason = "no_reference"
        return found

    def _run(self, problems: Sequence[_Problem], grader: Grader) -> None:
        """Run the references, and those that fail on each test by itself."""
        asked = [(problem, reference) for problem in problems for reference in problem.references]
        grades = grader.grade([(problem.truth, as_response(reference)) for problem, reference in asked])
        for (problem, _), graded in zip(asked, grades, strict=True):
            problem.results.append(graded)
        looked_at = [(problem, _single_tests(problem)) for problem in problems if self._is_looked_at(problem)]
        ends = iter(
            grader.grade(
                [
                    (truth, as_response(reference))
                    for problem, truths in looked_at
                    for reference in problem.references
                    for truth in truths
                ]
            )
        )
        for problem, truths in looked_at:
            if truths:
                problem.statuses = [[next(ends).verdict for _ in truths] for _ in problem.references]
        for problem in problems:
            problem.ambiguous = problem.ambiguous or _disagreement(problem)
            if problem.ambiguous and self._settings.ambiguous == "drop":
                problem.reason = "ambiguous"
            else:
                self._judge_reference(problem)

    def _is_looked_at(self, problem: _Problem) -> bool:
        """Whether it matters which of the tests a reference fails."""
        several = len(problem.references) > 1 or self._settings.drop_failing_tests
        return several and not all(graded.passed for graded in problem.results)

    def _judge_reference(self, problem: _Problem) -> None:
        """The reference that passes most tests judges them."""
        if not problem.references or any(graded.passed for graded in problem.results):
            return
        problem.reason = "reference_fails"
        if not self._settings.drop_failing_tests or not problem.statuses:
            return
        best = max(problem.statuses, key=lambda statuses: statuses.count("passed"))
        kept = [number for number, status in enumerate(best) if status == "passed"]
        if num_distinct([problem.tests.tests[number] for number in kept]) < self._settings.min_tests:
            return
        truth = only(problem.truth.ground_truth, problem.tests, kept)
        if truth is not None:
            reward = {**problem.row.value["reward_model"], "ground_truth": truth}
            made = {**problem.row.value, "reward_model": reward}
            problem.line, problem.reason = json.dumps(made, ensure_ascii=False).encode(), ""
            problem.dropped_tests = [number + 1 for number in range(len(best)) if number not in set(kept)]

    def _decide(self, path: Path, problem: _Problem, output: Output) -> Judged:
        best = max(problem.results, key=lambda graded: graded.score, default=None)
        reference = "absent" if not problem.references else best.verdict if best is not None else "not_run"
        self._references[reference] += 1
        self._ambiguous += bool(problem.ambiguous)
        if problem.dropped_tests and not problem.reason:
            self._thinned += 1
            self._tests_dropped += len(problem.dropped_tests)
        count = len(problem.tests.tests)
        line = {
            "file": str(path),
            "row": problem.row.number,
            "problem": problem.name,
            "kept": not problem.reason,
            "reason": problem.reason,
            "tests": count,
            "distinct_tests": problem.distinct,
            "reference": reference,
            "references": [{"status": g.verdict, "passed": round(g.score * count)} for g in problem.results],
            "dropped_tests": problem.dropped_tests,
            "ambiguous": problem.ambiguous,
        }
        output.hits.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        return Judged(problem.row.number, problem.line, problem.reason, details=problem.details())


def _single_tests(problem: _Problem) -> list[Truth]:
    """Each test as a ground truth by itself; none where the form does not allow that."""
    truth, found = problem.truth, []
    plain = as_value(truth.ground_truth)  # not read anew for every test
    for number in range(len(problem.tests.tests)):
        single = only(plain, problem.tests, [number])
        if single is None:
            return []
        found.append(Truth(truth.data_source, single, truth.extra_info))
    return found


def _disagreement(problem: _Problem) -> str:
    """Where two references give different outputs that can both be meant; "" where they do not."""
    if not problem.statuses:
        one_passes = any(graded.passed for graded in problem.results)
        if one_passes and any(graded.verdict == "failed" and graded.score > 0 for graded in problem.results):
            return "a reference passes all tests, and another gives another output in one of them"
        return ""
    credible = [statuses for statuses in problem.statuses if "passed" in statuses]
    for number, ends in enumerate(zip(*credible, strict=True), 1):
        if {"passed", "failed"} <= set(ends):
            return f"test {number}: a reference passes it, and another gives another output"
    return ""
