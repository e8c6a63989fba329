"""Sums and histograms of the mismatch are what the tokens themselves give, however they lie over ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rl.corrections import correction_metrics, importance_weights, measure_mismatch
from megatron_klear.rl.mismatch import MismatchSums


def drawn(seed: int, count: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    sampler = -generator.exponential(1.0, count)
    return torch.from_numpy(sampler + generator.normal(0, scale, count)).float(), torch.from_numpy(sampler).float()


def sums(trainer: torch.Tensor, sampler: torch.Tensor, correction: str = "truncated") -> MismatchSums:
    factors = importance_weights(trainer, sampler, correction)
    return MismatchSums.of(trainer, sampler, factors, trainer - sampler, correction)


@given(seed=st.integers(0, 99), count=st.integers(1, 400), scale=st.sampled_from([1e-6, 1e-3, 0.1, 2.0]))
def test_statistics_are_those_of_the_tokens(seed, count, scale):
    trainer, sampler = drawn(seed, count, scale)
    cut = count // 3
    parts = [sums(trainer[:cut], sampler[:cut]), sums(trainer[cut:], sampler[cut:])]
    found = MismatchSums.total(parts).mismatch()
    expected = measure_mismatch(trainer, sampler, torch.ones(count))
    assert found.tokens == expected.tokens
    for name in ("mean", "max", "kl_k1", "kl_k3"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-15)
    for percent, ratio in expected.ratio_percentiles.items():
        assert np.log(found.ratio_percentiles[percent]) == pytest.approx(np.log(ratio), rel=0.013, abs=1e-8)


@pytest.mark.parametrize("correction", ["none", "truncated", "masked"])
def test_what_the_correction_touched(correction):
    trainer, sampler = drawn(3, 500, 1.0)
    factors = importance_weights(trainer, sampler, correction)
    found = sums(trainer, sampler, correction).correction_metrics()
    assert found == pytest.approx(correction_metrics(factors, trainer - sampler, correction))


def test_no_tokens_are_no_mismatch():
    found = MismatchSums.total([])
    assert found.mismatch() == measure_mismatch(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert found.correction_metrics()["correction_weight_mean"] == 1.0


def test_a_logprob_that_is_not_finite_shows():
    trainer, sampler = torch.tensor([-1.0, -np.inf, -1.0]), torch.tensor([-1.0, -2.0, -1.0])
    factors, log_ratio = torch.ones(3), torch.zeros(3)
    assert MismatchSums.of(trainer, sampler, factors, log_ratio, "none").mismatch().mean == np.inf
    broken = MismatchSums.of(torch.tensor([np.nan, -1.0]), sampler[:2], factors[:2], log_ratio[:2], "none").mismatch()
    assert np.isnan(broken.mean)
    assert broken.ratio_percentiles[99] == np.inf


def test_a_share_is_a_few_kilobytes():
    part = sums(*drawn(0, 100_000, 0.1))
    assert part.sums.nbytes + part.histogram.nbytes < 20_000
