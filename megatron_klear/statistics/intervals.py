"""How far a benchmark's figure can be trusted: over problems like these, and from run to run on these very ones.

Two different questions. The interval over problems (`benchmark_interval`) is for claims about the ability that the
benchmark stands for: 30 problems leave it wide however often each is sampled. `run_to_run` is for comparing with a
figure published for the same problems. Two models are compared by differences on the same problems (`paired`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .significance import Interval, mean_interval

_MEANS = 400  # points of the posterior's grid
_SPREADS = 60
_RESOLVED = 40  # points with weight that make ends of an interval smooth
_NEGLIGIBLE = 1e-12
_LEAST_SPREAD, _MOST_SPREAD = 0.05, 50.0


def benchmark_interval(right: Sequence[int], num_samples: int, confidence: float = 0.95) -> Interval:
    """avg@k over problems, and the interval for the mean over problems like them.

    `right` [problems] are the counts of right ones among `num_samples` samples each. The interval is of the posterior
    of the mean of a beta-binomial, c ~ BetaBinomial(k, m, phi) with uniform m and log-uniform phi, on a grid: below a
    few hundred problems it keeps its promise where intervals by the central limit theorem do not (Bowyer et al. 2025,
    arXiv 2503.01747; tools/benchmark/interval_coverage.py). Raises ValueError without problems or samples.
    """
    counts = np.asarray(right, dtype=np.int64)
    _check(counts, num_samples)
    means = (np.arange(_MEANS) + 0.5) / _MEANS
    weights = _mean_posterior(counts, num_samples, means)
    held = np.flatnonzero(weights > _NEGLIGIBLE)
    if len(held) < _RESOLVED:  # thousands of problems: the same grid over where the posterior lies
        start, end = max(int(held[0]) - 1, 0) / _MEANS, min(int(held[-1]) + 2, _MEANS) / _MEANS
        means = start + (end - start) * means
        weights = _mean_posterior(counts, num_samples, means)
    below = np.cumsum(weights) - weights / 2
    low, high = np.interp([(1 - confidence) / 2, (1 + confidence) / 2], below, means)
    value = float(counts.mean() / num_samples)
    return Interval(value, min(value, float(low)), max(value, float(high)))


def run_to_run(right: Sequence[int], num_samples: int) -> float:
    """Standard deviation of avg@k when the same problems are sampled again: sqrt(sum p (1 - p) / k) / n.

    With p (1 - p) estimated without bias as c (k - c) / (k (k - 1)); nan from one sample, which cannot tell.
    """
    counts = np.asarray(right, dtype=np.int64)
    _check(counts, num_samples)
    if num_samples == 1:
        return math.nan
    variances = counts * (num_samples - counts) / (num_samples * (num_samples - 1))
    return float(np.sqrt(variances.sum() / num_samples) / len(counts))


def paired(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean difference after - before over the same problems [problems], bootstrapped over problems.

    Raises ValueError where they are not the same number.
    """
    if len(before) != len(after):
        raise ValueError(f"a paired difference needs the same problems, not {len(before)} and {len(after)}")
    return mean_interval(np.subtract(after, before), confidence)


def _mean_posterior(
    counts: npt.NDArray[np.int64], num_samples: int, means: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Probability of each mean of the grid, the spread summed out."""
    spreads = np.geomspace(_LEAST_SPREAD, _MOST_SPREAD, _SPREADS)
    a, b = np.outer(means, spreads), np.outer(1 - means, spreads)
    # log B(a + c, b + k - c) - log B(a, b) as sums of logarithms, over all problems at once.
    likelihood = np.zeros_like(a)
    for i in range(num_samples):
        likelihood += np.sum(counts > i) * np.log(a + i) + np.sum(num_samples - counts > i) * np.log(b + i)
        likelihood -= len(counts) * np.log(spreads + i)
    posterior = np.exp(likelihood - likelihood.max()).sum(1)
    weights: npt.NDArray[np.float64] = posterior / posterior.sum()
    return weights


def _check(counts: npt.NDArray[np.int64], num_samples: int) -> None:
    if not len(counts) or num_samples < 1:
        raise ValueError("an interval needs at least one problem, and one sample of each")
    if counts.min() < 0 or counts.max() > num_samples:
        raise ValueError(f"counts of right samples must lie in 0 to {num_samples}")
