"""From graded groups to the rows of an optimizer step: every sample once, weights as the aggregation says."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rl_groups import fixed_groups, sample, score

from megatron_klear.config.rl import AlgorithmConfig
from megatron_klear.data.pack import num_predicted
from megatron_klear.data.packing import RowSettings, Work
from megatron_klear.rl.advantages import advantages
from megatron_klear.train.updates import Update, cut_into_updates, pack_update
from megatron_klear.types import Group, PackedBatch, Prompt

LONGEST = 32


def algorithm(**settings) -> AlgorithmConfig:
    return AlgorithmConfig(prompts_per_step=4, prompts_per_update=2, **settings)


def updates_of(groups: list[Group], prompts_per_update: int = 2) -> list[Update]:
    return cut_into_updates(groups, advantages(groups, "mean_std"), prompts_per_update)


def rows_of(update: Update, settings: AlgorithmConfig, data_size: int = 1, tokens: int = 96) -> list[list[PackedBatch]]:
    """The rows of every data rank."""
    return [
        pack_update(
            update,
            settings,
            RowSettings(tokens_per_row=tokens, segment_multiple=8, rows_per_step=1),
            Work(per_token=1.0, per_token_squared=0.01),
            longest_response=LONGEST,
            data_rank=rank,
            data_size=data_size,
        )
        for rank in range(data_size)
    ]


def total(rows: list[list[PackedBatch]], name: str) -> float:
    return sum(float(getattr(batch, name).double().sum()) for rank in rows for batch in rank)


def sequences(rows: list[list[PackedBatch]]) -> list[tuple[int, ...]]:
    """Token ids of every sequence in the rows, fillers left out."""
    found = []
    for batch in (batch for rank in rows for batch in rank):
        bounds = batch.cu_seqlens.tolist()
        for start, end in itertools.pairwise(bounds):
            if end - start > 1:
                found.append(tuple(batch.tokens[start:end].tolist()))
    return found


def test_updates_hold_every_group_in_order():
    groups = fixed_groups(groups=5, samples=3)
    updates = updates_of(groups)
    assert [len(update.samples) for update in updates] == [6, 6, 3]
    assert [id(s) for update in updates for s in update.samples] == [id(s) for group in groups for s in group.samples]
    assert sum(update.correct.sum() for update in updates) == sum((group.rewards > 0).sum() for group in groups)
    assert [bool(x) for x in updates[0].overlong] == [s.finish == "length" for s in updates[0].samples]


def test_no_groups_make_no_updates():
    assert updates_of([]) == []


@given(
    groups=st.integers(1, 3),
    samples=st.integers(2, 6),
    seed=st.integers(0, 99),
    data_size=st.sampled_from([1, 2, 4]),
    tokens=st.sampled_from([48, 96, 512]),
    aggregation=st.sampled_from(["token_mean", "sequence_mean", "as_released"]),
)
def test_every_sample_once_and_weights_sum_to_one(groups, samples, seed, data_size, tokens, aggregation):
    made = fixed_groups(groups=groups, samples=samples, seed=seed)
    (update,) = updates_of(made, prompts_per_update=groups)
    rows = rows_of(update, algorithm(aggregation=aggregation), data_size, tokens)
    assert len({len(rank) for rank in rows}) == 1, "every rank runs equally many rows"
    assert all(batch.num_tokens <= tokens for rank in rows for batch in rank)
    assert sorted(sequences(rows)) == sorted(tuple(s.tokens.tolist()) for s in update.samples)
    assert total(rows, "weights") == pytest.approx(1, rel=1e-5)
    trained = sum(batch.num_trained for rank in rows for batch in rank)
    assert trained == sum(num_predicted(s) for s in update.samples)


@given(data_size=st.sampled_from([1, 2, 4]), tokens=st.sampled_from([48, 96, 512]), seed=st.integers(0, 50))
def test_nll_weights_sum_to_alpha_on_correct_samples(data_size, tokens, seed):
    (update,) = updates_of(fixed_groups(groups=2, seed=seed))
    rows = rows_of(update, algorithm(nll_coefficient=0.3), data_size, tokens)
    assert total(rows, "nll_weights") == pytest.approx(0.3, rel=1e-5)
    for batch in (batch for rank in rows for batch in rank):
        # A right answer has a positive advantage, a wrong one a negative advantage.
        assert bool((batch.nll_weights[batch.weights != 0] > 0).eq(batch.advantages[batch.weights != 0] > 0).all())
        assert not bool(batch.nll_weights[batch.weights == 0].any())


def test_without_a_correct_sample_there_is_no_nll():
    groups = [Group(prompt=g.prompt, samples=g.samples, texts=g.texts, scores=g.scores) for g in fixed_groups(groups=1)]
    (update,) = updates_of(groups)
    wrong = replace(update, correct=np.zeros_like(update.correct))
    assert total(rows_of(wrong, algorithm()), "nll_weights") == 0
    assert rows_of(wrong, algorithm(nll_coefficient=0.0))[0][0].nll_weights is None


def test_overlong_filter_leaves_cut_samples_out_of_the_means():
    (update,) = updates_of(fixed_groups(groups=2))
    assert update.overlong.any()
    assert not update.overlong.all()
    rows = rows_of(update, algorithm(overlong_filter=True))
    assert total(rows, "weights") == pytest.approx(1, rel=1e-5)
    assert total(rows, "nll_weights") == pytest.approx(0.1, rel=1e-5)
    kept = sum(num_predicted(s) for s, cut in zip(update.samples, update.overlong, strict=True) if not cut)
    assert sum(batch.num_trained for rank in rows for batch in rank) == kept


def test_dr_grpo_divides_by_the_longest_response():
    (update,) = updates_of(fixed_groups(groups=2))
    rows = rows_of(update, algorithm(aggregation="sequence_mean_token_sum"))
    weights = torch.cat([batch.weights[batch.weights != 0] for rank in rows for batch in rank])
    np.testing.assert_allclose(weights.numpy(), 1 / (len(update.samples) * LONGEST), rtol=1e-6)


def test_only_as_released_depends_on_the_packing():
    (update,) = updates_of(fixed_groups(groups=2))

    def weights(aggregation: str, tokens: int) -> list[tuple[float, ...]]:
        rows = rows_of(update, algorithm(aggregation=aggregation), tokens=tokens)
        return sorted(float(value) for rank in rows for batch in rank for value in batch.weights[batch.weights != 0])

    for aggregation in ("token_mean", "sequence_mean", "sequence_mean_token_sum"):
        assert weights(aggregation, 48) == weights(aggregation, 512)
    assert weights("as_released", 48) != weights("as_released", 512)
    assert weights("as_released", 512) == weights("token_mean", 512), "one row: the token mean"


def test_ranks_without_a_row_run_an_empty_one():
    prompt = Prompt(id="p", data_source="d", tokens=np.array([5], dtype=np.int32), text="", ground_truth="")
    samples = [sample(prompt, [7, 8]), sample(prompt, [9])]
    group = Group(prompt=prompt, samples=samples, texts=["", ""], scores=[score(1.0), score(-1.0)])
    (update,) = updates_of([group])
    rows = rows_of(update, algorithm(), data_size=4)
    assert [len(rank) for rank in rows] == [1] * 4
    empty = [batch for rank in rows for batch in rank if not batch.num_trained]
    assert len(empty) == 3
    for batch in empty:
        assert batch.num_tokens == 1
        assert batch.nll_weights is not None
        assert batch.advantages is not None
        assert not bool(batch.nll_weights.any())
    assert total(rows, "weights") == pytest.approx(1, rel=1e-6)


def test_a_sample_longer_than_a_row_is_refused():
    (update,) = updates_of(fixed_groups(groups=1))
    with pytest.raises(ValueError, match="do not fit in a row of 24 tokens"):
        rows_of(update, algorithm(), tokens=24)
