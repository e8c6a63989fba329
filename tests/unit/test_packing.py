"""The plan: every sample once, the cap never exceeded, the same for the same arguments, work even over ranks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.data.packing import (
    NO_ROW,
    RowSettings,
    Work,
    assign_rows,
    plan_epoch,
    sequence_work,
    work_imbalance,
)
from megatron_klear.models.architecture import Architecture, Rope

ROOT = Path(__file__).resolve().parents[2]
WORK = Work(per_token=1.0, per_token_squared=1e-3)


def row_settings(**changed: object) -> RowSettings:
    return RowSettings(**({"tokens_per_row": 64, "segment_multiple": 4, "rows_per_step": 8} | changed))  # type: ignore[arg-type]


def long_lengths(count: int, seed: int = 0) -> np.ndarray:
    lengths = np.random.default_rng(seed).lognormal(np.log(6144), 0.8, 2 * count).astype(np.int64) + 1
    return lengths[lengths <= 32768][:count]


ragged = st.lists(st.integers(1, 64), min_size=1, max_size=200).map(np.array)


@given(ragged, st.sampled_from([1, 4, 64]), st.booleans(), st.integers(0, 3))
@settings(deadline=None)
def test_every_sample_once_and_cap_never_exceeded(
    lengths: np.ndarray, multiple: int, packing: bool, epoch: int
) -> None:
    wanted = row_settings(segment_multiple=multiple, packing=packing)
    plan = plan_epoch(lengths, wanted, seed=5, epoch=epoch)
    assert sorted(plan.samples.tolist()) == list(range(len(lengths)))
    rows = [plan.row(row) for row in range(plan.num_rows)]
    assert np.concatenate(rows).tolist() == plan.samples.tolist()
    padded = -(-lengths // multiple) * multiple
    for row in rows:
        assert len(row) > 0
        assert padded[row].sum() <= 64
        assert packing or len(row) == 1
    steps = np.concatenate([plan.step_samples(step) for step in range(plan.num_steps)])
    assert steps.tolist() == plan.samples.tolist()


@given(ragged)
@settings(deadline=None)
def test_best_fit_leaves_no_two_rows_that_fit_in_one(lengths: np.ndarray) -> None:
    plan = plan_epoch(lengths, row_settings(), seed=0, epoch=0)
    filled = sorted((-(-lengths[plan.row(row)] // 4) * 4).sum() for row in range(plan.num_rows))
    assert len(filled) < 2 or filled[0] + filled[1] > 64


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    lengths = long_lengths(3000)
    wanted = row_settings(tokens_per_row=32768, segment_multiple=64)
    plans = {key: plan_epoch(lengths, wanted, seed=key[0], epoch=key[1]) for key in [(1, 0), (1, 1), (2, 0)]}
    again = plan_epoch(lengths.copy(), wanted, seed=1, epoch=0)
    assert np.array_equal(plans[1, 0].samples, again.samples)
    assert np.array_equal(plans[1, 0].bounds, again.bounds)
    assert not np.array_equal(plans[1, 0].samples, plans[1, 1].samples)
    assert not np.array_equal(plans[1, 0].samples, plans[2, 0].samples)


def test_samples_meet_other_samples_in_the_next_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 33, 2000)
    together = []
    for epoch in range(2):
        plan = plan_epoch(lengths, row_settings(), seed=0, epoch=epoch)
        rows = [sorted(plan.row(row).tolist()) for row in range(plan.num_rows)]
        together.append({(a, b) for row in rows for i, a in enumerate(row) for b in row[i + 1 :]})
    assert len(together[0] & together[1]) < 0.05 * len(together[0])


def test_samples_of_the_longest_length_fill_rows_alone() -> None:
    plan = plan_epoch(np.array([64, 1, 64, 1]), row_settings(), seed=0, epoch=0)
    assert sorted(sorted(plan.row(row).tolist()) for row in range(plan.num_rows)) == [[0], [1, 3], [2]]


def test_no_samples_make_no_steps() -> None:
    plan = plan_epoch(np.array([], dtype=np.int64), row_settings(), seed=0, epoch=0)
    assert (plan.num_rows, plan.num_steps) == (0, 0)


def test_long_chains_of_thought_fill_rows_and_ranks_evenly() -> None:
    lengths, wanted = long_lengths(20_000), RowSettings(tokens_per_row=32768, segment_multiple=64, rows_per_step=512)
    plan = plan_epoch(lengths, wanted, seed=0, epoch=0)
    assert lengths.sum() / (plan.num_rows * 32768) > 0.98
    work = WORK.of(lengths)
    for step in range(plan.num_rows // 512):
        rows = plan.row_sums(work, plan.step_rows(step))
        assert work_imbalance(rows[assign_rows(rows, 512, 64)].sum(axis=1)) < 0.03


@given(
    st.lists(st.floats(0.1, 100), min_size=1, max_size=48),
    st.sampled_from([(48, 1), (48, 2), (48, 8), (48, 48), (60, 5)]),
)
@settings(deadline=None)
def test_every_row_runs_once_and_ranks_run_equally_many(works: list[float], shape: tuple[int, int]) -> None:
    rows_per_step, data_size = shape
    work = np.array(works)
    assigned = assign_rows(work, rows_per_step, data_size)
    assert assigned.shape == (data_size, rows_per_step // data_size)
    assert sorted(assigned[assigned != NO_ROW].tolist()) == list(range(len(works)))
    loads = np.append(work, 0.0)[assigned].sum(axis=1)
    assert loads.max() - loads.min() <= work.max() + 1e-9
    for rank in np.append(work, 0.0)[assigned]:
        peak = int(rank.argmax())
        assert (np.diff(rank[: peak + 1]) >= 0).all()
        assert (np.diff(rank[peak:]) <= 0).all()


def test_exchanging_rows_mends_what_dealing_leaves_uneven() -> None:
    """Dealing gives 9 + 6 + 5 and 8 + 7 + 1; exchanging 9 for 7 makes them equal."""
    work = np.array([9.0, 8.0, 7.0, 6.0, 5.0, 1.0])
    assert work_imbalance(work[assign_rows(work, 6, 2)].sum(axis=1)) == 0


def test_ranks_must_divide_rows() -> None:
    with pytest.raises(ValueError, match=r"train\.rows_per_step 8 must be a multiple of .* 3"):
        assign_rows(np.ones(8), 8, 3)


@pytest.mark.parametrize(
    ("lengths", "changed", "message"),
    [
        ([5, 65, 70], {}, "2 samples do not fit .* sample 1 with 65; raise data.tokens_per_microbatch"),
        ([5, 0], {}, "sample 1 has no tokens"),
        ([5], {"segment_multiple": 5}, "must be a multiple of segment_multiple"),
        ([5], {"rows_per_step": 0}, "rows_per_step is 0"),
    ],
)
def test_bad_input_is_named(lengths: list[int], changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_epoch(np.array(lengths), row_settings(**changed), seed=0, epoch=0)


def test_work_is_that_of_every_token_and_what_it_reads() -> None:
    architecture = Architecture(
        family="qwen3",
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=32,
        max_positions=64,
        norm_eps=1e-6,
        rope=Rope(theta=1e4),
        tied_embeddings=True,
        qk_norm=True,
        qkv_bias=False,
    )
    lengths = np.array([1, 2, 1000])
    by_token = [sum(architecture.flops_per_token(read + 0.5) for read in range(length)) for length in lengths]
    np.testing.assert_allclose(sequence_work(architecture).of(lengths), by_token, rtol=1e-12)


def test_planner_and_stream_import_without_torch() -> None:
    program = "import sys, megatron_klear.data.sft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
