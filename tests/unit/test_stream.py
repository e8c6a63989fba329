"""Rows and the stream of steps: weights sum to one, every sample once, the same steps in every layout and on resume."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.data.ahead import StepsAhead
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.data.packing import RowSettings, Work
from megatron_klear.data.rows import DataError
from megatron_klear.data.sft import SampleStream, held_out_steps
from megatron_klear.types import PackedBatch, Sample

WORK = Work(per_token=1.0, per_token_squared=0.01)
ROWS = RowSettings(tokens_per_row=64, segment_multiple=4, rows_per_step=8)


class Store:
    """Samples in memory; a sample's first token is its index + 1: a row tells what it holds, and 0 an empty one."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.samples = []
        for index, length in enumerate(lengths):
            tokens = generator.integers(0, 1000, length).astype(np.int32)
            tokens[0] = index + 1
            trained = generator.random(length) < 0.6
            self.samples.append(Sample(tokens=tokens, trained=trained))
        self.lengths = np.array(lengths, dtype=np.int32)
        self.trained_counts = np.array([num_predicted(sample) for sample in self.samples], dtype=np.int32)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def stream(store: Store, rank: int = 0, size: int = 1, **changed: Any) -> SampleStream:
    return SampleStream(store, ROWS, **({"work": WORK, "data_rank": rank, "data_size": size, "seed": 3} | changed))


def members(batches: list[PackedBatch]) -> list[int]:
    """Indices of the samples in a step's rows, empty rows left out."""
    first_tokens = [token for batch in batches for token in batch.tokens[batch.cu_seqlens[:-1].long()].tolist()]
    return [token - 1 for token in first_tokens if token > 0]


def same(a: list[PackedBatch], b: list[PackedBatch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens) and torch.equal(x.targets, y.targets) and torch.equal(x.weights, y.weights)
        for x, y in zip(a, b, strict=True)
    )


LENGTHS = [7, *np.random.default_rng(1).integers(1, 65, 150).tolist(), 1, 1, 64, 64]


def test_pack_shifts_by_one_within_each_sequence() -> None:
    first = Sample(tokens=np.array([5, 6, 7], np.int32), trained=np.array([0, 1, 1], bool))
    second = Sample(tokens=np.array([8, 9], np.int32), trained=np.array([0, 1], bool))
    batch = pack([first, second], [1 / 3, 1 / 3])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9]
    assert batch.targets.tolist() == [6, 7, 0, 9, 0]
    torch.testing.assert_close(batch.weights, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3, 0]))
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert (batch.tokens.dtype, batch.weights.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.float32,
        torch.int32,
    )


def test_pack_aligns_what_reinforcement_learning_adds() -> None:
    sample = Sample(
        tokens=np.array([5, 6, 7, 8], np.int32),
        trained=np.array([0, 0, 1, 1], bool),
        logprobs=np.array([0, 0, -1.5, -2.5], np.float32),
    )
    batch = pack([sample], [0.5], advantages=[-2.0], nll_weights=[0.25])
    assert batch.advantages is not None
    assert batch.advantages.tolist() == [0, -2, -2, 0]
    assert batch.sampler_logprobs is not None
    assert batch.sampler_logprobs.tolist() == [0, -1.5, -2.5, 0]
    assert batch.nll_weights is not None
    assert batch.nll_weights.tolist() == [0, 0.25, 0.25, 0]
    with pytest.raises(ValueError, match="some samples of a row carry log-probs"):
        pack([sample, replace(sample, logprobs=None)], [0.5, 0.5])


def test_first_token_is_never_predicted() -> None:
    sample = Sample(tokens=np.array([5, 6], np.int32), trained=np.array([1, 1], bool))
    assert num_predicted(sample) == 1
    assert pack([sample], [1.0]).num_trained == 1


def test_no_samples_pack_to_one_weightless_token() -> None:
    batch = pack((), ())
    assert (batch.tokens.tolist(), batch.weights.tolist(), batch.cu_seqlens.tolist()) == ([0], [0.0], [0, 1])
    assert batch.advantages is None
    assert pack((), (), advantages=()).advantages is not None


def test_marks_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="sample 0 of a row has 2 tokens and 1 marks"):
        pack([Sample(tokens=np.zeros(2, np.int32), trained=np.ones(1, bool))], [1.0])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).map(np.array))
def test_sequence_mean_counts_every_sequence_alike(counts: np.ndarray) -> None:
    shares = loss_weights(counts, "sequence_mean") * counts
    assert shares[counts == 0].sum() == 0
    np.testing.assert_allclose(shares[counts > 0], 1 / max((counts > 0).sum(), 1))


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=80),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(["token_mean", "sequence_mean"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_an_epoch_over_all_ranks(lengths: list[int], size: int, aggregation: str, packing: bool) -> None:
    """Every sample once, weights of a step sum to one, equally many micro-batches on every rank, the cap kept."""
    store = Store(lengths)
    wanted = replace(ROWS, packing=packing)
    streams = [
        SampleStream(store, wanted, work=WORK, aggregation=aggregation, data_rank=rank, data_size=size)  # type: ignore[arg-type]
        for rank in range(size)
    ]
    seen: list[int] = []
    for _ in range(streams[0].steps_per_epoch):
        by_rank = [one.next_step() for one in streams]
        assert {len(batches) for batches in by_rank} == {8 // size}
        step = [batch for batches in by_rank for batch in batches]
        assert max(batch.num_tokens for batch in step) <= 64
        held = sum(batch.num_trained for batch in step)
        assert held == streams[0].facts.num_trained_tokens
        total = sum(float(batch.weights.double().sum()) for batch in step)
        assert total == pytest.approx(1.0 if held else 0.0, abs=1e-6)
        found = members(step)
        assert len(found) == streams[0].facts.num_sequences
        seen += found
    assert sorted(seen) == list(range(len(lengths)))


def test_a_step_trains_on_the_same_samples_with_the_same_weights_in_every_layout() -> None:
    store = Store(LENGTHS)
    alone = stream(store)
    layouts = {size: [stream(store, rank, size) for rank in range(size)] for size in (2, 4, 8)}
    for _ in range(2 * alone.steps_per_epoch):
        expected = alone.next_step()
        rows = sorted((batch.tokens.tolist(), batch.weights.tolist()) for batch in expected)
        for streams in layouts.values():
            found = [batch for one in streams for batch in one.next_step()]
            assert sorted((batch.tokens.tolist(), batch.weights.tolist()) for batch in found) == rows


@pytest.mark.parametrize("stop", range(0, 40, 3))
def test_resume_continues_exactly_where_it_stopped(stop: int) -> None:
    store = Store(LENGTHS)
    whole = stream(store)
    for _ in range(stop):
        whole.next_step()
    state = whole.state_dict()
    resumed = [stream(store, rank, 2) for rank in range(2)]
    again = stream(store)
    for one in (*resumed, again):
        one.load_state_dict(state)
        assert one.state_dict() == state
    for _ in range(5):
        expected = whole.next_step()
        assert same(again.next_step(), expected)
        parts = [batch for one in resumed for batch in one.next_step()]
        assert sorted(members(parts)) == sorted(members(expected))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"settings": replace(ROWS, rows_per_step=4)}, "rows_per_step was 8 and is 4"),
        ({"store": Store(LENGTHS[:-1])}, "num_samples was 155 and is 154"),
        ({"store": Store([*LENGTHS[:-1], 63])}, "checksum_of_lengths was"),
    ],
)
def test_position_of_another_run_is_refused(changed: dict[str, Any], told: str) -> None:
    state = stream(Store(LENGTHS)).state_dict()
    arguments: dict[str, Any] = {"store": Store(LENGTHS), "settings": ROWS, "seed": 3, "work": WORK} | changed
    other = SampleStream(arguments.pop("store"), arguments.pop("settings"), **arguments)
    with pytest.raises(ValueError, match=told):
        other.load_state_dict(state)


def test_total_steps_are_those_of_all_epochs_or_as_many_as_asked() -> None:
    counted, walked = stream(Store(LENGTHS)), stream(Store(LENGTHS))
    total = counted.total_steps(epochs=3)
    for _ in range(total):
        walked.next_step()
    assert (walked.facts.epoch, walked.facts.step_in_epoch) == (2, walked.steps_per_epoch - 1)
    assert counted.total_steps(epochs=3, steps=5) == 5
    assert counted.state_dict() == stream(Store(LENGTHS)).state_dict()


def test_facts_are_those_of_the_step() -> None:
    store = Store([64, 64, 32, 28, 60])
    one = SampleStream(store, replace(ROWS, rows_per_step=4), work=WORK, data_size=2)
    one.next_step()
    facts = one.facts
    assert (facts.num_rows, facts.num_sequences, facts.num_tokens) == (4, 5, 248)
    assert facts.packing_efficiency == pytest.approx(248 / 256)
    assert 0 <= facts.work_imbalance < 0.2


@given(st.lists(st.integers(1, 64), max_size=60), st.sampled_from([1, 4]))
@settings(deadline=None, max_examples=20)
def test_held_out_samples_come_once_and_weigh_one_in_all(lengths: list[int], size: int) -> None:
    store = Store(lengths)
    ranks = [list(held_out_steps(store, ROWS, work=WORK, data_rank=rank, data_size=size)) for rank in range(size)]
    assert len({len(steps) for steps in ranks}) == 1
    batches = [batch for steps in ranks for step in steps for batch in step]
    assert sorted(members(batches)) == list(range(len(lengths)))
    total = sum(float(batch.weights.double().sum()) for batch in batches)
    assert total == pytest.approx(1.0 if store.trained_counts.sum() else 0.0, abs=1e-6)


def test_empty_training_data_is_refused_and_empty_validation_is_not() -> None:
    with pytest.raises(ValueError, match="no samples to train on"):
        stream(Store([]))
    assert list(held_out_steps(Store([]), ROWS, work=WORK)) == []


def test_ranks_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows_per_step 8 must be a multiple of .* 3"):
        stream(Store([5]), 0, 3)
    with pytest.raises(ValueError, match="data rank 2 of 2"):
        stream(Store([5]), 2, 2)


def test_sample_that_differs_from_its_store_is_refused() -> None:
    store = Store([9])
    store.trained_counts = store.trained_counts + 1
    with pytest.raises(ValueError, match=r"sample 0 has 9 tokens.*data\.cache"):
        stream(store).next_step()


def test_steps_made_ahead_are_the_streams_own_and_go_on_from_what_was_given() -> None:
    store = Store(LENGTHS)
    alone = stream(store)
    with StepsAhead(stream(store)) as ahead:
        assert ahead.state_dict() == alone.state_dict()
        for _ in range(alone.steps_per_epoch + 2):
            assert same(ahead.next_step(), alone.next_step())
            assert ahead.state_dict() == alone.state_dict(), "what is made ahead has not been given"
        state = ahead.state_dict()
    resumed = stream(store)
    resumed.load_state_dict(state)
    with StepsAhead(resumed) as ahead:
        assert same(ahead.next_step(), alone.next_step())


def test_a_step_is_made_while_the_one_before_trains_and_fails_in_its_turn() -> None:
    one = stream(Store(LENGTHS))
    made = [threading.Event() for _ in range(3)]
    make, count = one.next_step, iter(range(3))

    def watched() -> list[PackedBatch]:
        number = next(count)
        made[number].set()
        if number == 1:
            raise DataError("the token cache is damaged")
        return make()

    one.next_step = watched  # type: ignore[method-assign]
    with StepsAhead(one) as ahead:
        ahead.next_step()
        assert made[1].wait(10), "nobody asked for it yet"
        ahead.state_dict()
        with pytest.raises(DataError, match="damaged"):
            ahead.next_step()
    one = stream(Store(LENGTHS))
    with StepsAhead(one) as ahead:
        ahead.next_step(last=True)
        assert one.state_dict() == ahead.state_dict(), "nothing is made after the last"
