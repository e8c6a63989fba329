"""Keep problems that neither too few nor too many of their responses solve."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from megatron_klear.config.base import Settings
from megatron_klear.data.prompts import problem_id as evaluation_id
from megatron_klear.data.rows import DataError, read_problem
from megatron_klear.data.sources import resolve_files

from .distill import draw_missing, store_path
from .draw import TeacherConfig, TeacherSampling, Wanted, prompt_of, wanted_of
from .grading import Graded, Grader, GradingConfig, Truth, open_grades, truth_of
from .output import VERDICTS, Output, finished_hits, raw_hits
from .recorded import RecordedResponses, Response
from .report import Judged, Report
from .response_store import ResponseStore
from .rows import BadRow, Row, Unusable, problem_text
from .run import Files, Place, Work, carry_out
from .text import problem_id

_ROWS_AT_ONCE = 32
_PAPER_RATE = 0.5  # arXiv 2508.07629, section 3.2.1: more than half of 16, for maths "a majority"
_ENDS = ("stop", "length")


class PassRateSettings(Settings):
    """Keep problems by the share of their responses that the reward finds right."""

    samples: PositiveInt = 16
    """Responses to each problem; a problem with fewer is dropped and counted."""
    above_rate: float | None = Field(default=None, ge=0, lt=1)
    """Keep problems of which more than this share passed; 0.5 where min_rate is unset as well."""
    min_rate: float | None = Field(default=None, ge=0, le=1)
    """Keep problems of which at least this share passed."""
    max_rate: float = Field(default=1, ge=0, le=1)
    """Keep problems of which at most this share passed."""
    responses: tuple[str, ...] = ()
    """Files with recorded responses, or globs: responses.jsonl of distill or of an evaluation, rows for SFT, or rows
    with `responses`, a list of texts. Unset, they are drawn from the endpoint, as distill does."""
    recorded: bool = False
    """Ask nothing: take what the store has of the endpoint's model with this sampling."""
    store: Path | None = None
    """Folder of responses.jsonl and grades.jsonl, which only grow and are where a command that was stopped goes on;
    several outputs may share one. Unset is the output's folder."""
    endpoint: TeacherConfig = TeacherConfig()
    sampling: TeacherSampling = TeacherSampling()
    reward: GradingConfig = GradingConfig()

    @model_validator(mode="after")
    def _check(self) -> PassRateSettings:
        if self.above_rate is not None and self.min_rate is not None:
            raise ValueError("above_rate and min_rate say the same, once strictly; give one")
        if bool(self.responses) == bool(self.endpoint.model):
            raise ValueError("give responses, files that hold them, or endpoint.model, whose they are")
        if self.endpoint.model and not self.endpoint.urls and not self.recorded:
            raise ValueError("endpoint.urls is not set: where the model is served; or pass recorded")
        return self

    def why_dropped(self, passed: int) -> str:
        """Why a problem of which so many responses passed is dropped, "" where it is kept."""
        rate = Fraction(passed, self.samples)
        if rate > Fraction(str(self.max_rate)):
            return "rate_too_high"
        if self.min_rate is not None:
            return "" if rate >= Fraction(str(self.min_rate)) else "rate_too_low"
        return "" if rate > Fraction(str(self._above)) else "rate_too_low"

    @property
    def _above(self) -> float:
        return _PAPER_RATE if self.above_rate is None else self.above_rate

    def rule(self) -> str:
        """The rule in words."""
        lowest = f"> {self._above:g}" if self.min_rate is None else f">= {self.min_rate:g}"
        return f"pass rate {lowest} and <= {self.max_rate:g}, of {self.samples} responses"


def run_filter_pass_rate(files: Files, settings: PassRateSettings) -> dict[str, Any] | None:
    """Grade responses and keep problems by how many passed; returns the report, None where all is there already.

    Raises DataError for what cannot be read or written, RewardError where grading fails, and what `distill` raises.
    """
    responses = resolve_files(settings.responses, "--responses") if settings.responses else []
    path = store_path(files, settings.store)
    named: dict[str, Any] = {"rule": settings.rule(), "reward": settings.reward.identity()}
    if settings.endpoint.model:
        named |= {"model": settings.endpoint.model, "sampling": settings.sampling.model_dump()}
    read = {"responses": responses} if responses else {"store": [path]} if settings.recorded else {}
    work = _PassRate(files, settings, responses, path)
    return carry_out(files, "filter-pass-rate", named, lambda: work, read=read)


@dataclass(frozen=True, slots=True)
class _Problem:
    """A row that can be judged."""

    row: Row
    ids: tuple[str, ...]
    """`text.problem_id`, and the id that an evaluation gives it."""
    truth: Truth


Find = Callable[[_Problem], list[Response]]
"""The responses to a problem that are there, at most as many as are wanted, in the order of their numbers."""


class _PassRate(Work):
    """Drawing or looking up, grading, and a decision on every row, in order."""

    lines = VERDICTS

    def __init__(self, files: Files, settings: PassRateSettings, responses: list[Path], path: Path) -> None:
        self._files, self._settings, self._responses, self._path = files, settings, responses, path
        self._seen: set[str] = set()
        self._passed: Counter[int] = Counter()
        self._kept_rates: Counter[int] = Counter()
        """By tenths."""
        self._verdicts: Counter[str] = Counter()
        self._recorded: RecordedResponses | None = None
        self._grader: Grader | None = None

    def judge(self, output: Output) -> Iterator[Place]:
        """Every row, with a line of the verdicts for each of its responses."""
        sources = set()
        for path, _, row in self._files.rows():
            usable = self._usable(row)
            if isinstance(usable, _Problem):
                sources.add(usable.truth.data_source)
            elif self._files.strict:
                yield path, Judged.unusable(usable)  # before anything is drawn or graded
        with ExitStack() as stack:
            find = self._open_responses(stack)
            reward = self._settings.reward
            file = stack.enter_context(open_grades(self._path.parent))
            workers = self._files.workers
            self._grader = Grader(reward, lambda: stack.enter_context(reward.open_pool(sources, workers)), file)
            rows = self._files.rows()
            while chunk := list(islice(rows, _ROWS_AT_ONCE)):
                yield from self._judge([(path, row) for path, _, row in chunk], find, self._grader, output)
            self._grader.check()

    def finish(self, report: Report) -> dict[str, Any]:
        """The rule, how many problems had how many right responses, and how the responses were graded."""
        os.replace(raw_hits(self._files.output), finished_hits(self._files.output))
        samples = self._settings.samples
        added: dict[str, Any] = {
            "rule": self._settings.rule(),
            "problems_by_passed": {str(passed): self._passed[passed] for passed in range(samples + 1)},
            "pass_rates": [self._kept_rates[tenth] for tenth in range(11)],
            "verdicts": dict(sorted(self._verdicts.items())),
            "not_graded": self._grader.failed if self._grader else 0,
        }
        if self._recorded is not None:
            counts = dict(self._recorded.counts)
            total = counts.pop("responses", 0)
            used = sum(self._verdicts.values())
            added["responses"] = {"read": total, "not_used": total - used, "bad": dict(sorted(counts.items()))}
            added["bad_responses"] = self._recorded.examples
        return added

    def _usable(self, row: Row | Unusable) -> _Problem | Unusable:
        if isinstance(row, Unusable):
            return row
        try:
            name = problem_id(problem_text(row.value))
            truth = truth_of(row.value, self._settings.reward.functions)
            if self._settings.endpoint.model:
                prompt_of(row.value)
        except BadRow as error:
            return error.at(row.number)
        ids = [name]
        with suppress(DataError):  # rows for SFT are no problems of an evaluation
            ids.append(evaluation_id(read_problem(row.value)))
        return _Problem(row, tuple(ids), truth)

    def _open_responses(self, stack: ExitStack) -> Find:
        settings = self._settings
        if self._responses:
            files = self._files
            self._recorded = recorded = RecordedResponses(self._responses, files.max_row_bytes, strict=files.strict)
            return lambda problem: list(recorded.of(*problem.ids).values())[: settings.samples]
        store = stack.enter_context(ResponseStore(self._path, settings.endpoint.model))
        if not settings.recorded:
            draw_missing(self._files, settings.endpoint, settings.sampling, self._wanted(), store)

        def find(problem: _Problem) -> list[Response]:
            drawn = [store.get(one.key) for one in self._wanted_of(problem.row, "")]
            return [
                Response(one.problem, one.sample, one.text, refused=one.finish not in _ENDS)
                for one in drawn
                if one is not None
            ]

        return find

    def _wanted(self) -> Iterator[Wanted]:
        for _, place, row in self._files.rows():
            usable = self._usable(row)
            if isinstance(usable, _Problem):
                yield from self._wanted_of(usable.row, place)

    def _wanted_of(self, row: Row, place: str) -> Iterator[Wanted]:
        settings = self._settings
        return wanted_of(row.value, place, settings.endpoint.model, settings.sampling, settings.samples)

    def _judge(
        self, chunk: list[tuple[Path, Row | Unusable]], find: Find, grader: Grader, output: Output
    ) -> Iterator[Place]:
        """Some rows, whose responses are graded together."""
        found: list[tuple[Path, Judged | _Problem, list[Response]]] = []
        for path, row in chunk:
            usable = self._usable(row)
            if isinstance(usable, Unusable):
                found.append((path, Judged.unusable(usable), []))
            elif usable.ids[0] in self._seen:
                found.append((path, Judged(usable.row.number, reason="duplicate"), []))
            else:
                self._seen.add(usable.ids[0])
                responses = find(usable)
                few = {"responses": len(responses)}
                missing = Judged(usable.row.number, reason="too_few_responses", details=few)
                enough = len(responses) >= self._settings.samples
                found.append((path, usable, responses) if enough else (path, missing, []))
        asked = [(row.truth, one.text) for _, row, ones in found if isinstance(row, _Problem) for one in ones]
        grades = iter(grader.grade(asked))
        for path, judged, ones in found:
            yield path, self._decide(judged, ones, grades, output) if isinstance(judged, _Problem) else judged

    def _decide(
        self, problem: _Problem, responses: Iterable[Response], grades: Iterator[Graded], output: Output
    ) -> Judged:
        passed = 0
        for response in responses:
            graded = next(grades)
            if response.refused:
                graded = replace(graded, verdict="refused")
            line = {"problem": problem.ids[0], "sample": response.sample, **asdict(graded)}
            output.hits.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            self._verdicts[graded.verdict] += 1
            passed += graded.passed
        self._passed[passed] += 1
        reason = self._settings.why_dropped(passed)
        if not reason:
            self._kept_rates[10 * passed // self._settings.samples] += 1
        details = {"passed": passed, "responses": self._settings.samples}
        return Judged(problem.row.number, problem.row.line, reason, details=details)
