"""From sampled groups to graded ones, with counts of how grading ended and an alarm when too much of it failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_klear.errors import UserError
from megatron_klear.types import Group, Prompt, Score, Verdict

from .format import complete
from .pool import GradingPool
from .worker import Request

_EXAMPLES = 3


class GradingAlarm(UserError):
    """Too many responses could not be graded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """Groups with scores, and how many responses ended in each verdict."""

    groups: list[Group]
    counts: Counter[Verdict] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float:
        """Share of responses that are right; 0 without any."""
        return self.counts[Verdict.RIGHT] / max(1, self.counts.total())


def score(groups: Sequence[Group], pool: GradingPool) -> Graded:
    """Grade every response of the groups. The groups are copied, never changed."""
    return with_scores(groups, pool.grade(requests_of(groups)))


def requests_of(groups: Sequence[Group]) -> list[Request]:
    """What is asked of a pool: every response, in the order of the groups and their samples."""
    return [request_of(group.prompt, text) for group in groups for text in group.texts]


def request_of(prompt: Prompt, text: str) -> Request:
    """What is asked of a pool about one response."""
    return Request(prompt.data_source, prompt.ground_truth, complete(prompt.text, text), prompt.extra_info)


def with_scores(groups: Sequence[Group], scores: Sequence[Score]) -> Graded:
    """Copies of the groups with the scores of all their responses, in order."""
    left = iter(scores)
    graded = [replace(group, scores=[next(left) for _ in group.texts]) for group in groups]
    counts = Counter(score.verdict for group in graded for score in group.scores or ())
    return Graded(groups=graded, counts=counts)


@dataclass(frozen=True, slots=True)
class ErrorAlarm:
    """Stops a run whose grading fails. One failure alone is none unless the allowed share is 0."""

    max_error_share: float

    def check(self, graded: Graded) -> None:
        """Raise GradingAlarm where more than the allowed share of responses ended as timeout or error."""
        total = graded.counts.total()
        failed = graded.counts[Verdict.TIMEOUT] + graded.counts[Verdict.ERROR]
        allowed = self.max_error_share * total
        if failed <= (max(allowed, 1.0) if self.max_error_share else 0.0):
            return
        notes = Counter(
            f"{group.prompt.data_source} prompt {group.prompt.id}: {score.verdict}: {score.note}"
            for group in graded.groups
            for score in group.scores or ()
            if score.verdict in (Verdict.TIMEOUT, Verdict.ERROR)
        )
        examples = "; ".join(note for note, _ in notes.most_common(_EXAMPLES))
        raise GradingAlarm(
            f"{failed} of {total} responses could not be graded ({graded.counts[Verdict.TIMEOUT]} timeouts, "
            f"{graded.counts[Verdict.ERROR]} errors), above reward.max_error_share {self.max_error_share:g}. "
            f"First of them: {examples}. Mend the reward or its data, raise reward.timeout_seconds, or allow more"
        )
