"""All figures of a set of problems from the verdicts and votes of their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .intervals import benchmark_interval, run_to_run
from .metrics import maj_at_k, pass_at_k


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What k samples of each problem say; shares, not percentages."""

    num_problems: int
    samples: int
    accuracy: float
    """avg@k over all problems."""
    low: float
    high: float
    """Of the 95 % interval over problems like these."""
    run_to_run: float | None
    """Standard deviation of `accuracy` when the same problems are sampled again; None with one sample."""
    pass_at: dict[int, float]
    """pass@1, 2, 4, ... and k."""
    majority: float | None
    """maj@k with k all samples, ties split; None where no sample has a vote (programs)."""


def figures_of(right: Sequence[Sequence[bool]], votes: Sequence[Sequence[str | None]]) -> Figures:
    """Figures from `right` [problems][k], whether each sample is, and `votes` [problems][k], what it answered.

    A vote is "right", the one of all right answers, a wrong answer's text, or None where the sample has no vote. Raises
    ValueError without problems, or where they differ in their number of samples.
    """
    k = len(right[0]) if right else 0
    if {len(of_problem) for of_problem in right} - {k}:
        raise ValueError("problems differ in their number of samples")
    counts = [sum(of_problem) for of_problem in right]
    interval = benchmark_interval(counts, k)
    voted = any(vote is not None for of_problem in votes for vote in of_problem)
    majorities = [maj_at_k(v, r) for v, r in zip(votes, right, strict=True)] if voted else []
    return Figures(
        num_problems=len(counts),
        samples=k,
        accuracy=interval.value,
        low=interval.low,
        high=interval.high,
        run_to_run=run_to_run(counts, k) if k > 1 else None,
        pass_at={j: sum(pass_at_k(k, c, j) for c in counts) / len(counts) for j in _powers(k)},
        majority=sum(majorities) / len(majorities) if majorities else None,
    )


def _powers(k: int) -> list[int]:
    """1, 2, 4, ... and k."""
    return sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})
