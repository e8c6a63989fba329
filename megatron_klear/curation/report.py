"""What became of the rows of a curation: counts that add up, and examples with their places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .rows import Unusable

MOST_EXAMPLES = 20
SHOWN_CHARACTERS = 300
"""Of a problem, in an example."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One row after a verb has looked at it: kept where `reason` is empty."""

    number: int
    line: bytes = b""
    """The JSON of a row that is kept."""
    reason: str = ""
    bad: bool = False
    """Whether the row could not be used, other than one that the verb drops."""
    details: dict[str, Any] = field(default_factory=dict)
    """What an example of it shows besides file and row."""

    @classmethod
    def unusable(cls, row: Unusable) -> Judged:
        """A row that is counted as bad."""
        return cls(row.number, reason=row.kind, bad=True, details={"why": row.reason})


@dataclass(slots=True)
class Report:
    """Counts by source and by reason, and the first 20 examples of each reason."""

    sources: dict[str, Counter[str]]
    """By file, in the order given."""
    dropped: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    """Kept rows by the number of binary digits of their length in bytes of JSON."""

    def add(self, source: str, judged: Judged) -> None:
        """Count one row."""
        counts = self.sources[source]
        counts["rows"] += 1
        if not judged.reason:
            counts["kept"] += 1
            self.lengths[len(judged.line).bit_length()] += 1
            return
        counts["bad" if judged.bad else "dropped"] += 1
        (self.bad if judged.bad else self.dropped)[judged.reason] += 1
        examples = self.examples.setdefault(judged.reason, [])
        if len(examples) < MOST_EXAMPLES:
            examples.append({"file": source, "row": judged.number, **judged.details})

    def totals(self) -> dict[str, int]:
        """Rows, kept, dropped and bad, of all sources."""
        return {name: sum(counts[name] for counts in self.sources.values()) for name in _COUNTS}

    def content(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "counts": self.totals(),
            "dropped": dict(sorted(self.dropped.items())),
            "bad": dict(sorted(self.bad.items())),
            "sources": [
                {"file": source, **{name: counts[name] for name in _COUNTS}} for source, counts in self.sources.items()
            ],
            "lengths": [[1 << (digits - 1), count] for digits, count in sorted(self.lengths.items())],
            "examples": dict(sorted(self.examples.items())),
        }


def in_words(report: Mapping[str, Any]) -> str:
    """How many rows a report's step kept, and why not the others: `7 of 9 rows kept (1 duplicate, 1 wrong_type)`."""
    counts = report["counts"]
    why = [f"{count} {reason}" for part in ("dropped", "bad") for reason, count in report[part].items()]
    told = f" ({', '.join(why)})" if why else ""
    return f"{counts['kept']} of {counts['rows']} rows kept{told}"


_COUNTS = ("rows", "kept", "dropped", "bad")
