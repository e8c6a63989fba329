"""Train/sampler mismatch: importance weights and statistics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rl.corrections import importance_weights, log_ratios, measure_mismatch

values = st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=20)


@given(values)
def test_no_mismatch_changes_nothing(logprobs: list[float]) -> None:
    tensor = torch.tensor(logprobs)
    for correction in ("none", "truncated", "masked"):
        assert importance_weights(tensor, tensor, correction).tolist() == [1.0] * len(logprobs)
    found = measure_mismatch(tensor, tensor, torch.ones_like(tensor))
    assert (found.mean, found.max, found.kl_k1, found.kl_k3) == (0, 0, 0, 0)
    assert set(found.ratio_percentiles.values()) == {1.0}


@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0)), min_size=1), st.floats(1.01, 20))
def test_weights_keep_their_bounds(pairs: list[tuple[float, float]], cap: float) -> None:
    ours, theirs = torch.tensor(pairs, dtype=torch.float64).T
    truncated = importance_weights(ours, theirs, "truncated", cap)
    masked = importance_weights(ours, theirs, "masked", cap)
    assert bool(((truncated >= 0) & (truncated <= cap * (1 + 1e-5))).all())
    kept = masked != 0
    assert bool((masked[kept] == truncated[kept]).all())
    assert bool((masked[kept] >= 1 / cap * (1 - 1e-5)).all())


def test_values_by_hand() -> None:
    ratios = torch.tensor([0.25, 0.5, 1.0, 2.0, 8.0]).log()
    zeros = torch.zeros(5)
    torch.testing.assert_close(
        importance_weights(ratios, zeros, "truncated", 3.0), torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0])
    )
    torch.testing.assert_close(
        importance_weights(ratios, zeros, "masked", 3.0), torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0])
    )


LEVELS = ("sequence", "sequence_geometric")


def ragged(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of trainer and sampler, the trained tokens and the bounds of responses laid end to end."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, sum(lengths), generator=generator).mul(0.3).sub(2)
    trained = torch.rand(sum(lengths), generator=generator) < 0.7
    return ours, theirs, trained, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("correction", ["truncated", "masked"])
@pytest.mark.parametrize("level", LEVELS)
def test_responses_of_one_token_are_tokens(correction: str, level: str) -> None:
    ours, theirs, _, bounds = ragged([1] * 50)
    trained = torch.ones(50, dtype=torch.bool)
    of_tokens = importance_weights(ours, theirs, correction, 1.3)
    found = importance_weights(ours, theirs, correction, 1.3, level=level, trained=trained, cu_seqlens=bounds)
    assert found.tolist() == of_tokens.tolist()
    assert len(set((of_tokens == 0).tolist())) == (2 if correction == "masked" else 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 99), st.sampled_from(LEVELS))
def test_a_response_s_ratio_does_not_depend_on_its_row(lengths: list[int], seed: int, level: str) -> None:
    ours, theirs, trained, bounds = ragged(lengths, seed)
    together = log_ratios(ours, theirs, level, trained=trained, cu_seqlens=bounds)
    pieces = zip(ours.split(lengths), theirs.split(lengths), trained.split(lengths), strict=True)
    alone = [
        log_ratios(a, b, level, trained=mask, cu_seqlens=torch.tensor([0, len(a)], dtype=torch.int32))
        for a, b, mask in pieces
    ]
    assert together.tolist() == torch.cat(alone).tolist()
    assert bool((together[~trained] == 0).all())


def test_sequence_ratios_by_hand() -> None:
    log_ratio = torch.tensor([9.0, 0.4, 0.2, -0.3, -0.5, 7.0])
    trained = torch.tensor([False, True, True, True, True, False])
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    given = {"trained": trained, "cu_seqlens": bounds}
    zeros = torch.zeros(6)
    product = torch.tensor([0, 0.6, 0.6, -0.8, -0.8, 0])
    torch.testing.assert_close(log_ratios(log_ratio, zeros, "sequence", **given), product)
    torch.testing.assert_close(log_ratios(log_ratio, zeros, "sequence_geometric", **given), product / 2)
    cap = math.exp(0.7)
    masked = importance_weights(log_ratio, zeros, "masked", cap, level="sequence", **given)
    torch.testing.assert_close(masked[trained], torch.tensor([0.6, 0.6, -math.inf, -math.inf]).exp())
    truncated = importance_weights(log_ratio, zeros, "truncated", math.exp(0.5), level="sequence", **given)
    torch.testing.assert_close(truncated[trained], torch.tensor([0.5, 0.5, -0.8, -0.8]).exp())


def test_the_ratio_of_a_very_long_response_stays_finite() -> None:
    ours, theirs = torch.full((32_768,), -1.0), torch.full((32_768,), -2.0)
    given = {"trained": torch.ones(32_768, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 32_768])}
    assert importance_weights(ours, theirs, "truncated", level="sequence", **given)[0] == pytest.approx(2)
    assert importance_weights(ours, theirs, "masked", level="sequence", **given)[0] == 0
    assert importance_weights(theirs, ours, "truncated", level="sequence", **given)[0] == 0


def test_extremes_stay_finite_and_carry_no_gradient() -> None:
    ours = torch.tensor([-1e4, 0.0, -math.inf], requires_grad=True)
    theirs = torch.tensor([0.0, -1e4, 0.0])
    for correction, expected in (("truncated", [0.0, 2.0, 0.0]), ("masked", [0.0, 0.0, 0.0])):
        weights = importance_weights(ours, theirs, correction)
        assert weights.tolist() == pytest.approx(expected)
        assert not weights.requires_grad


def test_unusable_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"token 1: log-probs nan"):
        importance_weights(torch.tensor([0.0, math.nan]), torch.zeros(2), "truncated")
    with pytest.raises(ValueError, match="shapes"):
        importance_weights(torch.zeros(2), torch.zeros(3), "none")
    with pytest.raises(ValueError, match=r"between 1\.0 and 1\.0"):
        importance_weights(torch.zeros(2), torch.zeros(2), "masked", 1.0)
    with pytest.raises(ValueError, match="needs the responses' bounds"):
        importance_weights(torch.zeros(2), torch.zeros(2), "masked", level="sequence")
    with pytest.raises(ValueError, match="unknown level 'word'"):
        importance_weights(torch.zeros(2), torch.zeros(2), "masked", level="word")
    with pytest.raises(ValueError, match="shapes"):
        measure_mismatch(torch.zeros(2), torch.zeros(2), torch.zeros(3))


def test_only_trained_tokens_count() -> None:
    ours, theirs = torch.tensor([-1.0, -2.0, -50.0]), torch.tensor([-1.5, -1.0, 0.0])
    found = measure_mismatch(ours, theirs, torch.tensor([True, True, False]))
    assert (found.tokens, found.mean, found.max) == (2, 0.75, 1.0)
    assert found.kl_k1 == pytest.approx(0.25)
    expected = ((math.exp(0.5) - 1 - 0.5) + (math.exp(-1.0) - 1 + 1.0)) / 2
    assert found.kl_k3 == pytest.approx(expected)
    assert found.metrics()["mismatch_ratio_p99"] == pytest.approx(math.exp(0.5))
    assert measure_mismatch(ours, theirs, torch.zeros(3)).tokens == 0


def test_a_log_prob_that_is_not_finite_shows() -> None:
    found = measure_mismatch(torch.tensor([-1.0, -math.inf]), torch.tensor([-1.0, -2.0]), torch.ones(2))
    assert found.max == math.inf


def test_kl_estimates_come_close_to_the_true_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    trainer, sampler = torch.randn(2, 50, generator=generator, dtype=torch.float64).mul(0.3).log_softmax(-1)
    tokens = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=generator)
    true = float((sampler.exp() * (sampler - trainer)).sum())
    found = measure_mismatch(trainer[tokens], sampler[tokens], torch.ones(len(tokens)))
    assert found.kl_k1 == pytest.approx(true, rel=0.05)
    assert found.kl_k3 == pytest.approx(true, rel=0.03)


def test_two_bounds_keep_what_lies_between() -> None:
    ours = torch.log(torch.tensor([0.3, 0.5, 0.9, 4.9, 5.1]))
    kept = importance_weights(ours, torch.zeros(5), "masked", 5.0, floor=0.5)  # IcePop's own bounds
    torch.testing.assert_close(kept, torch.tensor([0.0, 0.5, 0.9, 4.9, 0.0]))
    low = importance_weights(ours, torch.zeros(5), "truncated", 0.8)
    torch.testing.assert_close(low, torch.tensor([0.3, 0.5, 0.8, 0.8, 0.8]))
    assert importance_weights(ours, torch.zeros(5), "masked", 0.95, floor=0.8).count_nonzero() == 1


def test_responses_outside_of_the_bounds_are_taken_out_whole() -> None:
    ratios = torch.tensor([4.0, 1.0, 1.0, 1.1, 0.9, 3.0])
    bounds, trained = torch.tensor([0, 3, 5, 6]), torch.tensor([True, True, True, True, True, False])
    found = importance_weights(
        ratios.log(),
        torch.zeros(6),
        "truncated",
        2.0,
        sequence_bounds=(0.9, 1.2),
        trained=trained,
        cu_seqlens=bounds,
    )
    # 4^(1/3) = 1.59 is above the bounds, sqrt(0.99) within.
    torch.testing.assert_close(found[:5], torch.tensor([0.0, 0.0, 0.0, 1.1, 0.9]))
