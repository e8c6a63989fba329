"""Aggregation weights against the means they stand for, computed the long way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rl import weights as w

counts_lists = st.lists(st.integers(0, 5000), min_size=1, max_size=40)


@given(counts_lists)
def test_means_sum_to_one_and_untrained_sequences_weigh_nothing(counts):
    for weights in (w.token_mean(counts), w.sequence_mean(counts)):
        assert weights.shape == (len(counts),)
        assert np.isclose((weights * counts).sum(), 1.0 if any(counts) else 0.0)
        assert (weights[np.array(counts) == 0] == 0).all()


@given(counts_lists, st.randoms())
def test_weights_do_not_depend_on_order_or_on_untrained_sequences(counts, random):
    order = list(range(len(counts)))
    random.shuffle(order)
    for mean in (w.token_mean, w.sequence_mean, lambda c: w.sequence_mean_token_sum(c, 100)):
        whole = mean(counts)
        np.testing.assert_array_equal(mean([counts[i] for i in order]), whole[order])
        trained = [c for c in counts if c]
        np.testing.assert_array_equal(mean(trained), whole[np.array(counts) > 0])


def test_weights_are_the_means_they_stand_for():
    generator = np.random.default_rng(0)
    counts = [3, 7, 1, 0, 12]
    losses = [generator.normal(size=n) for n in counts]
    total = lambda weights: sum(weight * loss.sum() for weight, loss in zip(weights, losses, strict=True))  # noqa: E731
    trained = [loss for loss in losses if loss.size]
    assert np.isclose(total(w.token_mean(counts)), np.concatenate(losses).mean())
    assert np.isclose(total(w.sequence_mean(counts)), np.mean([loss.mean() for loss in trained]))
    assert np.isclose(total(w.sequence_mean_token_sum(counts, 16)), np.mean([loss.sum() / 16 for loss in trained]))


def test_as_released_is_the_token_mean_of_each_microbatch_by_its_share_of_sequences():
    counts, batches = [10, 30, 5, 5, 50], [0, 0, 1, 1, 1]
    weights = w.as_released(counts, batches)
    np.testing.assert_allclose(weights, [2 / 5 / 40] * 2 + [3 / 5 / 60] * 3)
    assert np.isclose((weights * counts).sum(), 1.0)
    np.testing.assert_allclose(w.as_released(counts, [4] * 5), w.token_mean(counts))


def test_as_released_counts_unselected_sequences_in_the_shares():
    weights = w.as_released([10, 0, 0, 0], [0, 0, 1, 1])
    np.testing.assert_allclose(weights, [2 / 4 / 10, 0, 0, 0])


def test_overlong_sequences_leave_the_denominator_too():
    counts = w.drop_overlong([4, 100, 6], [False, True, False])
    np.testing.assert_allclose(w.token_mean(counts), [0.1, 0, 0.1])
    np.testing.assert_allclose(w.sequence_mean(counts), [1 / 8, 0, 1 / 12])
    assert (w.token_mean(w.drop_overlong([4, 5], [True, True])) == 0).all()


def test_nll_term_is_normalised_by_its_own_tokens():
    weights = w.nll_weights([4, 100, 6], [True, False, True], 0.1)
    np.testing.assert_allclose(weights, [0.01, 0, 0.01])
    assert (w.nll_weights([4, 5], [False, False], 0.1) == 0).all()


def test_spread_lays_weights_on_trained_tokens():
    masks = [np.array([False, True, True]), np.array([True])]
    spread = w.spread(w.token_mean([2, 1]), masks)
    assert [list(array) for array in spread] == [[0, np.float32(1 / 3), np.float32(1 / 3)], [np.float32(1 / 3)]]
    assert all(array.dtype == np.float32 for array in spread)


def test_aggregate_names_every_mean():
    counts = [2, 3]
    np.testing.assert_array_equal(w.aggregate("token_mean", counts), w.token_mean(counts))
    np.testing.assert_array_equal(w.aggregate("sequence_mean", counts), w.sequence_mean(counts))
    fixed = w.aggregate("sequence_mean_token_sum", counts, length=9)
    np.testing.assert_array_equal(fixed, w.sequence_mean_token_sum(counts, 9))
    np.testing.assert_array_equal(w.aggregate("as_released", counts, microbatches=[0, 1]), [0.25, 1 / 6])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: w.token_mean([-1]), "non-negative integers"),
        (lambda: w.token_mean([0.5]), "non-negative integers"),
        (lambda: w.sequence_mean_token_sum([1], 0), "fixed length 0"),
        (lambda: w.as_released([1, 2], [0]), "2 sequences but 1 micro-batch"),
        (lambda: w.drop_overlong([1, 2], [True]), "one entry a sequence"),
        (lambda: w.aggregate("sequence_mean_token_sum", [1]), "needs the fixed length"),
        (lambda: w.aggregate("as_released", [1]), "micro-batch"),
        (lambda: w.aggregate("mean", [1]), "unknown aggregation 'mean'"),
        (lambda: w.spread(np.ones(2), []), "2 weights for 0 sequences"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_released_nll_term_is_a_mean_inside_each_microbatch():
    counts, correct, rows = [4, 2, 6, 3], [True, False, True, True], [0, 0, 1, 1]
    found = w.nll_weights(counts, correct, 0.1, rows)
    # Micro-batches of half the sequences each: 4 right tokens in the first, 9 in the second.
    np.testing.assert_allclose(found, 0.1 * np.array([0.5 / 4, 0, 0.5 / 9, 0.5 / 9]))
    assert w.nll_weights(counts, [False, False, True, False], 0.1, rows).sum() * 6 == pytest.approx(0.1 * 0.5)
