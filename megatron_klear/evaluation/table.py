"""What an evaluation found, beside what others published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_klear.errors import UserError
from megatron_klear.statistics.figures import Figures, figures_of
from megatron_klear.statistics.intervals import paired
from megatron_klear.types import Verdict

from .benchmarks import KNOWN, OWN, Problem, Published
from .protocols import Protocol
from .store import Grade, Key, Response

NOT_GRADED = (Verdict.TIMEOUT, Verdict.ERROR)
"""What the grader says where it has no verdict; such a response counts as wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResult(Figures):
    """One benchmark's figures."""

    name: str
    cut_off: float
    """Share of responses that reached the length cap."""
    malformed: float
    not_graded: int
    """Responses that the grader failed on."""
    mean_tokens: float
    protocol: str
    right: dict[str, int]
    """Right responses of each problem."""
    published: list[Published] = field(default_factory=list)


def result_of(
    name: str,
    problems: Sequence[Problem],
    responses: Mapping[Key, Response],
    grades: Mapping[Key, Grade],
    protocol: Protocol,
) -> BenchmarkResult:
    """Count. Raises ValueError where a response or a grade is missing: that is never a zero."""
    k = protocol.samples
    keys = {problem.id: [(problem.id, number) for number in range(k)] for problem in problems}
    missing = [key for of_problem in keys.values() for key in of_problem if key not in grades or key not in responses]
    if missing:
        raise ValueError(f"{len(missing)} of {k * len(problems)} responses of {name} are missing, first {missing[0]}")
    all_grades = [[grades[key] for key in of_problem] for of_problem in keys.values()]
    verdicts = [[grade.verdict == Verdict.RIGHT for grade in of_problem] for of_problem in all_grades]
    votes = [[grade.vote or None for grade in of_problem] for of_problem in all_grades]
    everything = [responses[key] for of_problem in keys.values() for key in of_problem]
    return BenchmarkResult(
        **asdict(figures_of(verdicts, votes)),
        name=name,
        cut_off=_mean([response.finish == "length" for response in everything]),
        malformed=_mean([grade.verdict == Verdict.MALFORMED for of_problem in all_grades for grade in of_problem]),
        not_graded=sum(grade.verdict in NOT_GRADED for of_problem in all_grades for grade in of_problem),
        mean_tokens=_mean([response.num_tokens for response in everything]),
        protocol=f"avg@{k}, {protocol.words()}",
        right={problem.id: sum(of_problem) for problem, of_problem in zip(problems, verdicts, strict=True)},
        published=list(KNOWN.get(name, OWN).published),
    )


def markdown(results: Sequence[BenchmarkResult]) -> str:
    """The table for a terminal or a README, and under it what was published for the same benchmarks."""
    lines = [
        "| benchmark | problems x samples | avg@k [95 % over problems] | run to run | pass@k | maj@k | cut off "
        "| malformed | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        run = "" if r.run_to_run is None else f"±{100 * r.run_to_run:.1f}"
        best = max(r.pass_at)
        passes = f"{100 * r.pass_at[best]:.1f} (k = {best})"
        majority = "" if r.majority is None else f"{100 * r.majority:.1f}"
        lines.append(
            f"| {r.name} | {r.num_problems} x {r.samples} | {100 * r.accuracy:.1f} [{100 * r.low:.1f}, "
            f"{100 * r.high:.1f}] | {run} | {passes} | {majority} | {100 * r.cut_off:.1f} % "
            f"| {100 * r.malformed:.1f} % | {r.mean_tokens:,.0f} |"
        )
    beside = [f"- {r.name}: {p.model} {p.score} ({p.protocol})" for r in results for p in r.published]
    drawn = [f"- {r.name}: drawn with {r.protocol}" for r in results]
    drawn += [
        f"- {r.name}: {r.not_graded} of {r.num_problems * r.samples} responses could not be graded and count as wrong; "
        "the same command tries them again"
        for r in results
        if r.not_graded
    ]
    return "\n".join([*lines, "", *drawn, *(["", "Published:", *beside] if beside else [])])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def comparison(folders: Sequence[Path]) -> str:
    """Differences of evaluations to the first of them, on the same problems, with intervals.

    Says under the table which were drawn by another protocol, or with another number of samples.
    Raises UserError where a folder is no evaluation, or two have no benchmark in common.
    """
    read = [(folder, _results_in(folder)) for folder in folders]
    (first_folder, first), *others = read
    short = {folder: folder.name for folder in folders}
    told_as = short if len(set(short.values())) == len(folders) else {folder: str(folder) for folder in folders}
    lines = [
        f"| benchmark | {told_as[first_folder]} | against | avg@k | difference on the same problems [95 %] |",
        "| --- | --- | --- | --- | --- |",
    ]
    apart = []
    for folder, results in others:
        shared = [name for name in first if name in results]
        if not shared:
            raise UserError(f"{first_folder} and {folder} have no benchmark in common")
        for name in shared:
            a, b = first[name], results[name]
            problems = [problem for problem in a["right"] if problem in b["right"]]
            if not problems:
                raise UserError(f"{name} of {first_folder} and of {folder} have no problem in common")
            before, after = ([r["right"][problem] / r["samples"] for problem in problems] for r in (a, b))
            found = paired(before, after)
            told = f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
            sampled = f"{100 * _mean(before):.1f} | {told_as[folder]} | {100 * _mean(after):.1f}"
            lines.append(f"| {name}, {len(problems)} problems | {sampled} | {told} |")
            if (one := a.get("protocol")) != (other := b.get("protocol")):
                apart.append(f"- {name} was drawn otherwise: {told_as[first_folder]} {one}; {told_as[folder]} {other}")
    return "\n".join([*lines, *(["", *apart] if apart else [])])


def _results_in(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*/result.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(result["right"], dict) or not result["samples"] > 0:
                raise ValueError("no right responses of problems")
            found[str(result["name"])] = result
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error!r}") from None
    if not found:
        raise UserError(f"{folder} is no evaluation: it has no BENCHMARK/result.json")
    return found
