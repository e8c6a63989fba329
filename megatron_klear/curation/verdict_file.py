"""Recorded verdicts of completions: which passed, and what share of a problem's did."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klear.data.rows import DataError

EXPECTED = 'expected {"problem": 32 hexadecimal digits, "sample": a whole number, "passed": true or false, ...}'


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdicts by problem (`text.problem_id`) and number of the completion; about 300 bytes a problem."""

    passed: dict[bytes, dict[int, bool]]

    def of(self, problem: str) -> dict[int, bool]:
        """Whether each recorded completion passed; empty where none is recorded."""
        return self.passed.get(bytes.fromhex(problem), {})

    def pass_rate(self, problem: str) -> float | None:
        """Share of the recorded completions that passed; None where none is recorded."""
        recorded = self.of(problem)
        return sum(recorded.values()) / len(recorded) if recorded else None


def read_verdicts(paths: Sequence[Path]) -> Verdicts:
    """Read `verdicts.jsonl` files: a line for each problem and completion, of which other keys are left alone.

    Raises DataError where a line is of another form, or two lines differ on one completion.
    """
    passed: dict[bytes, dict[int, bool]] = {}
    for path in paths:
        for where, problem, sample, verdict in _lines(path):
            recorded = passed.setdefault(problem, {})
            if recorded.setdefault(sample, verdict) != verdict:
                raise DataError(f"--verdicts {where}: sample {sample} of {problem.hex()} both passes and does not")
    return Verdicts(passed)


def _lines(path: Path) -> Iterator[tuple[str, bytes, int, bool]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                entry = json.loads(line)
                problem, sample, verdict = bytes.fromhex(entry["problem"]), entry["sample"], entry["passed"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DataError(f"--verdicts {where}: {EXPECTED}") from None
            if len(problem) != 16 or type(sample) is not int or not isinstance(verdict, bool):
                raise DataError(f"--verdicts {where}: {EXPECTED}")
            yield where, problem, sample, verdict
