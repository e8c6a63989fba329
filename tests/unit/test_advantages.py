"""Advantages: what a group's rewards say of each sample, and which groups say nothing."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rl.advantages import (
    RewardValueError,
    advantages,
    group_advantages,
    keep_informative,
    normalised,
    overlong,
    overlong_penalties,
    pass_at_k_advantages,
    penalise_overlong,
    response_lengths,
)
from megatron_klear.types import Group, Prompt, Sample, Score, Verdict

rewards = st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.25, 1.0]), min_size=2, max_size=16)


def group(
    values: list[float], *, name: str = "p", lengths: list[int] | None = None, cut: tuple[int, ...] = ()
) -> Group:
    samples = [
        Sample(
            tokens=np.zeros(length + 2, dtype=np.int32),
            trained=np.arange(length + 2) >= 2,
            finish="length" if index in cut else "stop",
        )
        for index, length in enumerate(lengths or [4] * len(values))
    ]
    prompt = Prompt(id=name, data_source="math", tokens=np.zeros(2, dtype=np.int32), text="", ground_truth="")
    scores = [Score(reward=value, verdict=Verdict.RIGHT) for value in values]
    return Group(prompt=prompt, samples=samples, texts=[""] * len(samples), scores=scores)


@given(rewards)
def test_advantages_sum_to_zero_and_keep_the_order(values: list[float]) -> None:
    for kind in ("mean", "mean_std"):
        found = group_advantages(values, kind)
        assert abs(found.sum()) < 1e-9
        assert (np.argsort(found, kind="stable") == np.argsort(values, kind="stable")).all()
        assert found.any() == (len(set(values)) > 1)


@given(rewards, st.floats(-3, 3), st.floats(0.5, 4))
def test_advantages_ignore_a_shift_and_mean_std_a_scale(values: list[float], shift: float, scale: float) -> None:
    moved = np.array(values) + shift
    np.testing.assert_allclose(group_advantages(moved, "mean"), group_advantages(values, "mean"), atol=1e-9)
    if len(set(moved)) > 1:
        ours, scaled = (group_advantages(factor * np.array(values), "mean_std") for factor in (1.0, scale))
        np.testing.assert_allclose(ours, scaled, atol=1e-5)


def test_values_against_the_formula() -> None:
    spread = math.sqrt(((1 - 0.5) ** 2 * 2 + (0 - 0.5) ** 2 * 2) / 3) + 1e-6
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1], "mean_std"), np.array([0.5, -0.5, -0.5, 0.5]) / spread)
    np.testing.assert_array_equal(group_advantages([1, 0, 0, 1], "mean"), [0.5, -0.5, -0.5, 0.5])


def test_equal_rewards_give_exact_zeros_where_a_mean_would_round() -> None:
    assert not group_advantages([0.1] * 3, "mean_std").any()


def test_single_sample_keeps_its_reward() -> None:
    assert advantages([group([-1.0])], "mean_std")[0].tolist() == [-1.0]
    assert keep_informative([group([-1.0])]) != []


def test_uninformative_groups_are_left_out_in_order() -> None:
    groups = [group([1, 1], name="a"), group([1, -1], name="b"), group([-1, -1], name="c"), group([0.2, 0.3], name="d")]
    assert [kept.prompt.id for kept in keep_informative(groups)] == ["b", "d"]


BAD: dict[str, tuple[Any, str]] = {
    "NaN": (group([1.0, math.nan], name="p7"), r"prompt p7 \(data_source math\): the reward of sample 1 is nan"),
    "infinite": (group([math.inf, 1.0], name="p7"), "p7.*sample 0 is inf"),
    "empty": (group([], name="p7"), "p7.*has no samples"),
    "ungraded": (
        Group(prompt=group([1.0], name="p7").prompt, samples=group([1.0]).samples, texts=[""]),
        "p7.*0 scores",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_groups_are_named(case: str) -> None:
    bad, words = BAD[case]
    for use in (keep_informative, lambda groups: advantages(groups, "mean")):
        with pytest.raises(RewardValueError, match=words):
            use([group([1.0, 0.0]), bad])


def test_overlong_penalty_is_zero_then_linear_then_full() -> None:
    found = overlong_penalties([0, 60, 70, 80, 90, 100, 120], max_tokens=100, buffer_tokens=40, factor=2.0)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1.0, -1.5, -2.0, -2.0])
    with pytest.raises(ValueError, match=r"buffer_tokens 101 must be from 1 to sampling\.max_tokens.*100"):
        overlong_penalties([1], max_tokens=100, buffer_tokens=101)


def test_penalised_group_is_a_copy_and_counts_response_tokens_only() -> None:
    before = group([1.0, 1.0, -1.0], lengths=[10, 5, 8])
    after = penalise_overlong(before, max_tokens=10, buffer_tokens=4)
    assert after.rewards.tolist() == [0.0, 1.0, -1.5]
    assert before.rewards.tolist() == [1.0, 1.0, -1.0]
    assert [score.verdict for score in after.scores or ()] == [Verdict.RIGHT] * 3


def test_overlong_samples_are_those_cut_at_the_cap() -> None:
    assert overlong([group([1, 1], cut=(1,)), group([1], cut=(0,))]).tolist() == [False, True, True]
    assert overlong([]).shape == (0,)


@given(rewards)
def test_leaving_the_sample_out_of_the_mean_scales_it(values: list[float]) -> None:
    count = len(values)
    scaled = group_advantages(values, "mean") * count / (count - 1)
    np.testing.assert_allclose(group_advantages(values, "rloo"), scaled, atol=1e-12)
    others = [np.mean(values[:i] + values[i + 1 :]) for i in range(count)]
    if len(set(values)) > 1:
        np.testing.assert_allclose(group_advantages(values, "rloo"), np.array(values) - others, atol=1e-12)


def test_leave_one_out_divides_by_the_others_deviation() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 0.5]
    others = [np.delete(values, i) for i in range(5)]
    expected = [(v - o.mean()) / (o.std(ddof=1) + 1e-6) for v, o in zip(values, others, strict=True)]
    np.testing.assert_allclose(group_advantages(values, "mean_std_leave_one_out"), expected)


def test_opo_weighs_the_baseline_by_length() -> None:
    of = group([1.0, -1.0, 1.0], lengths=[10, 30, 20])
    baseline = (10 - 30 + 20) / 60
    np.testing.assert_allclose(advantages([of], "opo")[0], np.array([1.0, -1.0, 1.0]) - baseline)
    even = group([1.0, -1.0, 1.0], lengths=[7, 7, 7])
    np.testing.assert_allclose(advantages([even], "opo")[0], group_advantages([1, -1, 1], "mean"))


@pytest.mark.parametrize(("right", "count", "k"), [(1, 8, 4), (3, 8, 4), (6, 8, 2), (2, 5, 1)])
def test_pass_at_k_is_the_mean_over_all_sets_of_k(right: int, count: int, k: int) -> None:
    """Every set of k samples is rewarded by its best, sets are normalised, a sample has the mean over its sets."""
    values = np.array([1.0] * right + [-1.0] * (count - right))
    sets = list(itertools.combinations(range(count), k))
    best = np.array([float(values[list(of)].max() > 0) for of in sets])
    of_sets = (best - best.mean()) / best.std()
    expected = [np.mean([a for a, of in zip(of_sets, sets, strict=True) if i in of]) for i in range(count)]
    np.testing.assert_allclose(pass_at_k_advantages(values, k), expected, atol=1e-12)


def test_pass_at_k_where_every_set_succeeds_or_rewards_are_no_pass() -> None:
    assert not pass_at_k_advantages([1.0] * 6 + [0.0] * 2, 4).any()
    with pytest.raises(RewardValueError, match="two values"):
        pass_at_k_advantages([0.0, 0.5, 1.0], 2)


def test_estimators_over_the_whole_step() -> None:
    groups = [group([1.0, 0.0, 0.0], name="a"), group([1.0, 1.0, 0.0], name="b"), group([0.5, 0.0], name="c")]
    lengths = np.concatenate([response_lengths(of) for of in groups])

    def over_tokens(values: np.ndarray) -> np.ndarray:
        tokens = np.repeat(values, lengths)
        return (values - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)

    whole = np.concatenate(advantages(groups, "reinforce_plus_plus"))
    np.testing.assert_allclose(whole, over_tokens(np.array([1, 0, 0, 1, 1, 0, 0.5, 0])))
    based = advantages(groups, "reinforce_plus_plus_baseline")
    centred = np.concatenate([of.rewards - of.rewards.mean() for of in groups])
    np.testing.assert_allclose(np.concatenate(based), over_tokens(centred), atol=1e-12)
    assert [len(of) for of in based] == [3, 3, 2]
    assert normalised([np.array([2.0])], [np.array([7])])[0].tolist() == [2.0]
