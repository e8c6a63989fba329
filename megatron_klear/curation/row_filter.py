"""What a selection asks of each row by itself: its source, its fields, its verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_klear.data.sources import Chunk

from .features import terms
from .report import SHOWN_CHARACTERS, Judged
from .rows import BadRow, Problem, Unusable, field_of, read_problems
from .text import problem_id
from .verdict_file import Verdicts

_NO_TERMS: NDArray[np.int64] = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Looked:
    """A row, what drops it if anything does, and what a choice among the others needs."""

    judged: Judged
    source: str = ""
    terms: NDArray[np.int64] = field(default_factory=lambda: _NO_TERMS)
    pass_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Looker:
    """What a worker needs to look at chunks."""

    max_row_bytes: int
    source: str
    sources: frozenset[str] | None
    wanted: tuple[tuple[str, str], ...]
    verdicts: Verdicts | None
    correct: str
    sample: str
    difficulty: str
    easy_rate: float
    hashes_terms: bool = False

    def with_terms(self) -> Looker:
        """The same, which also hashes the words of problems."""
        return replace(self, hashes_terms=True)

    def __call__(self, task: tuple[Path, Chunk]) -> list[Looked]:
        """Look at the rows of a chunk."""
        path, chunk = task
        rows = read_problems(chunk, self.max_row_bytes)
        return [
            Looked(Judged.unusable(row)) if isinstance(row, Unusable) else self._look(row, str(path)) for row in rows
        ]

    def _look(self, problem: Problem, path: str) -> Looked:
        row = problem.row
        try:
            source = str(field_of(row.value, self.source)) if self.source else path
            if self.sources is not None and source not in self.sources:
                return _dropped(problem, "other_source", source=source)
            for name, value in self.wanted:
                if (found := str(field_of(row.value, name))) != value:
                    return _dropped(problem, f"other_{name}", found=found[:SHOWN_CHARACTERS])
            rate = None
            if self.verdicts is not None:
                identity = problem_id(problem.text)
                rate = self.verdicts.pass_rate(identity)
                if rate is None:
                    raise BadRow("no_verdict", "no completion of this problem has a verdict")
                if self.correct != "mixed":
                    passed = self.verdicts.of(identity).get(number := field_of(row.value, self.sample))
                    if passed is None:
                        raise BadRow("no_verdict", f"completion {number!r} of this problem has no verdict")
                    if passed != (self.correct == "only"):
                        return _dropped(problem, "correct" if passed else "wrong")
                if self.difficulty != "all" and (rate > self.easy_rate) != (self.difficulty == "easy"):
                    return _dropped(problem, "easy" if rate > self.easy_rate else "hard", pass_rate=rate)
        except BadRow as error:
            return Looked(Judged.unusable(Unusable(row.number, error.kind, str(error))))
        return Looked(
            Judged(row.number, row.line), source, terms(problem.text) if self.hashes_terms else _NO_TERMS, rate
        )


def _dropped(problem: Problem, reason: str, **details: Any) -> Looked:
    shown = {"problem": problem.text[:SHOWN_CHARACTERS], **details}
    return Looked(Judged(problem.row.number, reason=reason, details=shown))
