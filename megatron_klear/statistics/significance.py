"""Whether a model really got better: intervals around accuracies, gains and trends.

The unit is the prompt. Several samples of one prompt are more alike than samples of different prompts, so prompts are
what the bootstrap draws again, and before and after are compared on the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_DRAWS = 10_000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(of_prompts: Sequence[float] | npt.NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """Mean over prompts [P], with the percentile bootstrap over prompts (Efron and Tibshirani 1993, chapter 13).

    Of differences after - before on the same prompts this is the paired interval of a gain. The draws are seeded: the
    same numbers give the same interval. Raises ValueError without prompts.
    """
    values = np.asarray(of_prompts, dtype=np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one prompt")
    rng = np.random.default_rng(_SEED)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(_DRAWS)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def seed_interval(of_seeds: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Mean over seeds with Student's interval; None for a single seed, which says nothing of others."""
    values = np.asarray(of_seeds, dtype=np.float64)
    if len(values) < 2:
        return None
    reach = student_quantile((1 + confidence) / 2, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean()) - reach, float(values.mean()) + reach)


def trend(steps: Sequence[float], values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Slope of the least-squares line through values over steps, with Student's interval.

    It takes the noise of different steps as independent, which holds where every step has fresh prompts. Raises
    ValueError below three steps, or where all steps are the same.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    freedom = len(x) - 2
    if freedom < 1 or np.ptp(x) == 0:
        raise ValueError(f"a trend needs at least three different steps, got {len(x)}")
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ (y - y.mean())) / spread
    residuals = y - y.mean() - slope * centred
    error = float(np.sqrt(residuals @ residuals / freedom / spread))
    reach = student_quantile((1 + confidence) / 2, freedom) * error
    return Interval(slope, slope - reach, slope + reach)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for a probability in [0.5, 1), by bisection of its distribution function."""
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability must lie in [0.5, 1), got {probability}")
    low, high = 0.0, 1.0
    while _student_between(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_between(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high


def _student_between(t: float, freedom: int) -> float:
    """Probability that Student's t lies in [-t, t] (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(1 + odd, freedom, 2):  # terms of cosine to the power `power - 1`
        total += term
        term *= power / (power + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
