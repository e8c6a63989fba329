"""Intervals of benchmarks: what they promise, held in simulation."""

import math

import numpy as np
import pytest

from megatron_klear.statistics.intervals import benchmark_interval, paired, run_to_run


def covered(problems, samples, a, b, repeats, seed=0):
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(repeats):
        interval = benchmark_interval(rng.binomial(samples, rng.beta(a, b, problems)), samples)
        hits += interval.low <= a / (a + b) <= interval.high
    return hits / repeats


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    assert (
        0.9 <= covered(30, 16, 0.3, 1.2, repeats=120) <= 0.99
    )  # the whole table: tools/benchmark/interval_coverage.py


def test_more_samples_of_the_same_problems_do_not_buy_certainty_about_others():
    few, many = benchmark_interval([4, 0, 2, 4, 1] * 6, 4), benchmark_interval([64, 0, 32, 64, 16] * 6, 64)
    assert few.value == many.value == pytest.approx(0.55)
    assert many.high - many.low > 0.8 * (few.high - few.low)
    assert run_to_run([64, 0, 32, 64, 16] * 6, 64) < 0.3 * run_to_run([4, 0, 2, 4, 1] * 6, 4)


@pytest.mark.parametrize("counts", [[0] * 30, [8] * 30, [8], [3]])
def test_extremes_have_an_interval_that_holds_the_value(counts):
    interval = benchmark_interval(counts, 8)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.high - interval.low > 0.01


@pytest.mark.parametrize(("right", "problems"), [(13972, 14042), (14028, 14042), (1187, 1319), (5000, 100_000)])
def test_thousands_of_problems_have_an_interval_as_narrow_as_they_allow(right, problems):
    """One sample each: the posterior of a uniform prior is Beta(right + 1, wrong + 1)."""
    wrong = problems - right
    spread = math.sqrt(right * wrong / problems) / problems
    means = np.linspace(max(0.0, right / problems - 9 * spread), min(1.0, right / problems + 9 * spread), 200_001)[1:-1]
    logarithms = right * np.log(means) + wrong * np.log1p(-means)
    below = np.cumsum(np.exp(logarithms - logarithms.max()))
    low, high = np.interp([0.025, 0.975], below / below[-1], means)
    interval = benchmark_interval([1] * right + [0] * wrong, 1)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_run_to_run_is_the_spread_of_runs():
    rng = np.random.default_rng(1)
    chances = rng.beta(0.5, 0.25, 30)
    runs = [rng.binomial(16, chances) for _ in range(3000)]
    spread = np.std([run.mean() / 16 for run in runs])
    assert np.sqrt(np.mean([run_to_run(run, 16) ** 2 for run in runs])) == pytest.approx(spread, rel=0.05)
    assert math.isnan(run_to_run([1, 0], 1))


def test_pairs_are_of_the_same_problems():
    better = paired([0.1, 0.5, 0.9, 0.2], [0.3, 0.6, 1.0, 0.5])
    assert better.value == pytest.approx(0.175)
    assert better.excludes_zero
    with pytest.raises(ValueError, match="same problems"):
        paired([0.1], [0.1, 0.2])


@pytest.mark.parametrize(("counts", "samples"), [([], 4), ([5], 4), ([-1], 4), ([0], 0)])
def test_counts_that_cannot_be_are_refused(counts, samples):
    with pytest.raises(ValueError, match=r"interval|counts"):
        benchmark_interval(counts, samples)
