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
from megatron_klear.orchestrator.step_numbers import StepNumbers, TokenArrays
from megatron_klear.rl.advantages import advantages
from megatron_klear.train.updates import Update, cut_into_updates, pack_rows, plan_update
from megatron_klear.types import Group, PackedBatch, Prompt, Sample

LONGEST = 32


def algorithm(**settings) -> AlgorithmConfig:
    return AlgorithmConfig(prompts_per_step=4, prompts_per_update=2, **settings)


def updates_of(groups: list[Group], prompts_per_update: int = 2) -> list[Update]:
    return cut_into_updates(StepNumbers.of(groups), advantages(groups, "mean_std"), prompts_per_update)


def samples_of(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def rows_of(
    groups: list[Group], update: Update, settings: AlgorithmConfig, data_size: int = 1, tokens: int = 96
) -> list[list[PackedBatch]]:
    """The rows of every data rank, whose samples went the way from rank 0."""
    plan = plan_update(
        update,
        settings,
        RowSettings(tokens_per_row=tokens, segment_multiple=8, rows_per_step=1),
        Work(per_token=1.0, per_token_squared=0.01),
        longest_response=LONGEST,
        data_size=data_size,
    )
    samples = samples_of(groups)
    given = [TokenArrays.of({number: samples[number] for number in plan.numbers_of(rank)}) for rank in range(data_size)]
    return [pack_rows(plan, rank, given[rank].samples()) for rank in range(data_size)]


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
    assert [len(update.lengths) for update in updates] == [6, 6, 3]
    assert [update.first for update in updates] == [0, 6, 12]
    lengths = [int(length) for update in updates for length in update.lengths]
    assert lengths == [len(sample.tokens) for sample in samples_of(groups)]
    assert sum(update.correct.sum() for update in updates) == sum((group.rewards > 0).sum() for group in groups)
    assert [bool(x) for x in updates[0].overlong] == [s.finish == "length" for s in samples_of(groups)[:6]]


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
    rows = rows_of(made, update, algorithm(aggregation=aggregation), data_size, tokens)
    assert len({len(rank) for rank in rows}) == 1, "every rank runs equally many rows"
    assert all(batch.num_tokens <= tokens for rank in rows for batch in rank)
    assert sorted(sequences(rows)) == sorted(tuple(s.tokens.tolist()) for s in samples_of(made))
    assert total(rows, "weights") == pytest.approx(1, rel=1e-5)
    trained = sum(batch.num_trained for rank in rows for batch in rank)
    assert trained == sum(num_predicted(s) for s in samples_of(made))


@given(data_size=st.sampled_from([1, 2, 4]), tokens=st.sampled_from([48, 96, 512]), seed=st.integers(0, 50))
def test_nll_weights_sum_to_alpha_on_correct_samples(data_size, tokens, seed):
    groups = fixed_groups(groups=2, seed=seed)
    (update,) = updates_of(groups)
    rows = rows_of(groups, update, algorithm(nll_coefficient=0.3), data_size, tokens)
    assert total(rows, "nll_weights") == pytest.approx(0.3, rel=1e-5)
    for batch in (batch for rank in rows for batch in rank):
        # A right answer has a positive advantage, a wrong one a negative advantage.
        assert bool((batch.nll_weights[batch.weights != 0] > 0).eq(batch.advantages[batch.weights != 0] > 0).all())
        assert not bool(batch.nll_weights[batch.weights == 0].any())


def test_without_a_correct_sample_there_is_no_nll():
    groups = [Group(prompt=g.prompt, samples=g.samples, texts=g.texts, scores=g.scores) for g in fixed_groups(groups=1)]
    (update,) = updates_of(groups)
    wrong = replace(update, correct=np.zeros_like(update.correct))
    assert total(rows_of(groups, wrong, algorithm()), "nll_weights") == 0
    assert rows_of(groups, wrong, algorithm(nll_coefficient=0.0))[0][0].nll_weights is None


def test_overlong_filter_leaves_cut_samples_out_of_the_means():
    groups = fixed_groups(groups=2)
    (update,) = updates_of(groups)
    assert update.overlong.any()
    assert not update.overlong.all()
    rows = rows_of(groups, update, algorithm(overlong_filter=True))
    assert total(rows, "weights") == pytest.approx(1, rel=1e-5)
    assert total(rows, "nll_weights") == pytest.approx(0.1, rel=1e-5)
    kept = sum(num_predicted(s) for s, cut in zip(samples_of(groups), update.overlong, strict=True) if not cut)
    assert sum(batch.num_trained for rank in rows for batch in rank) == kept


def test_dr_grpo_divides_by_the_longest_response():
    groups = fixed_groups(groups=2)
    (update,) = updates_of(groups)
    rows = rows_of(groups, update, algorithm(aggregation="sequence_mean_token_sum"))
    weights = torch.cat([batch.weights[batch.weights != 0] for rank in rows for batch in rank])
    np.testing.assert_allclose(weights.numpy(), 1 / (len(update.lengths) * LONGEST), rtol=1e-6)


def test_only_as_released_depends_on_the_packing():
    groups = fixed_groups(groups=2)
    (update,) = updates_of(groups)

    def weights(aggregation: str, tokens: int) -> list[tuple[float, ...]]:
        rows = rows_of(groups, update, algorithm(aggregation=aggregation), tokens=tokens)
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
    rows = rows_of([group], update, algorithm(), data_size=4)
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
    groups = fixed_groups(groups=1)
    (update,) = updates_of(groups)
    with pytest.raises(ValueError, match="do not fit in a row of 24 tokens"):
        rows_of(groups, update, algorithm(), tokens=24)


def test_samples_cross_as_a_few_arrays_of_nine_bytes_a_token():
    samples = samples_of(fixed_groups(groups=3))
    arrays = TokenArrays.of({number: samples[number] for number in (4, 1, 7)})
    for number, found in arrays.samples().items():
        for name in ("tokens", "trained", "logprobs"):
            np.testing.assert_array_equal(getattr(found, name), getattr(samples[number], name))
    assert arrays.samples().keys() == {4, 1, 7}
    sent = sum(getattr(arrays, name).nbytes for name in ("tokens", "trained", "logprobs"))
    assert sent == 9 * sum(len(samples[number].tokens) for number in (4, 1, 7))
    assert TokenArrays.of({}).samples() == {}


def test_what_every_rank_plans_with_is_twenty_bytes_a_sample():
    groups = fixed_groups(groups=64, samples=16)
    assert StepNumbers.of(groups).nbytes <= 20 * 64 * 16
