"""Losses over a whole update choose the same tokens however they lie in rows and ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_klear.rl import losses as L
from megatron_klear.rl.batch_losses import Alone
from megatron_klear.types import PackedBatch

LENGTHS = [5, 9, 3, 12, 7, 4]


def pieces(seed: int = 0) -> list[PackedBatch]:
    """One row a sample."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(LENGTHS):
        weights = torch.ones(length)
        weights[:2] = 0
        rows.append(
            PackedBatch(
                tokens=torch.zeros(length, dtype=torch.int64),
                targets=torch.zeros(length, dtype=torch.int64),
                weights=weights,
                cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
                advantages=torch.full((length,), 1.0 if number % 2 else -1.0),
                old_logprobs=-torch.rand(length, generator=generator) * 3,
                sample_numbers=(number,),
            )
        )
    return rows


def joined(rows: list[PackedBatch]) -> PackedBatch:
    ends = np.cumsum([0, *(row.num_tokens for row in rows)])
    tensors = {
        name: torch.cat([getattr(row, name) for row in rows])
        for name in ("tokens", "targets", "weights", "advantages", "old_logprobs")
    }
    numbers = tuple(row.sample_numbers[0] for row in rows)
    return PackedBatch(**tensors, cu_seqlens=torch.tensor(ends, dtype=torch.int32), sample_numbers=numbers)


class Two:
    """The other of two ranks has `rows`, seen through a loss that calls both alike."""

    def __init__(self) -> None:
        self.sums: list[list[float]] = []
        self.arrays: list[np.ndarray] = []
        self.recording = True

    def sum(self, values: list[float]) -> list[float]:
        if self.recording:
            self.sums.append(values)
            return values
        return [a + b for a, b in zip(values, self.sums.pop(0), strict=True)]

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        if self.recording:
            self.arrays.append(values)
            return [values]
        return [self.arrays.pop(0), values]


def present(rows: list[PackedBatch]) -> list[torch.Tensor]:
    return [row.old_logprobs + 0.3 * torch.sin(torch.arange(row.num_tokens) + row.sample_numbers[0]) for row in rows]


def by_sample(rows: list[PackedBatch]) -> dict[int, tuple[list[float], list[float]]]:
    found = {}
    for row in rows:
        bounds = row.cu_seqlens.tolist()
        for number, start, end in zip(row.sample_numbers, bounds, bounds[1:], strict=False):
            found[number] = (row.advantages[start:end].tolist(), row.old_logprobs[start:end].tolist())
    return found


LOSSES = [L.GMPO(0.1, 0.2), L.ClipCov(share=0.2, cov_low=0.0, cov_high=9.0), L.KLCov(share=0.2)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_packing_changes_no_choice(loss):
    rows = pieces()
    apart = by_sample(loss.rewrite(rows, present(rows), Alone(), salt=3))
    order = [4, 0, 5, 2, 1, 3]
    packed, logprobs = joined([rows[i] for i in order]), torch.cat([present(rows)[i] for i in order])
    together = by_sample(loss.rewrite([packed], [logprobs], Alone(), salt=3))
    for number in apart:
        np.testing.assert_allclose(together[number], apart[number], rtol=1e-6)
    before = by_sample(rows)
    assert any(apart[number] != before[number] for number in before)


@pytest.mark.parametrize("loss", [L.ClipCov(share=0.2, cov_low=0.0, cov_high=9.0), L.KLCov(share=0.2)])
def test_ranks_choose_together(loss):
    """With means and gathered keys of both, a rank takes out what one process with all rows would."""
    rows = pieces()
    alone = by_sample(loss.rewrite(rows, present(rows), Alone(), salt=3))
    trained = sum(int((row.weights != 0).sum()) for row in rows)
    changed = {n for n, (advantages, _) in alone.items() if advantages != rows[n].advantages.tolist()}
    count = sum(int((torch.tensor(alone[n][0]) != rows[n].advantages).sum()) for n in changed)
    assert 0 < count <= int(0.2 * trained)


def test_untrained_tokens_are_never_chosen():
    rows = pieces()
    for loss in LOSSES[1:]:
        for before, after in zip(rows, loss.rewrite(rows, present(rows), Alone(), salt=1), strict=True):
            assert torch.equal(before.advantages[:2], after.advantages[:2])


def test_another_update_takes_out_others():
    rows, loss = pieces(), L.ClipCov(share=0.1, cov_low=0.0, cov_high=9.0)
    first, second = (by_sample(loss.rewrite(rows, present(rows), Alone(), salt=salt)) for salt in (1, 2))
    assert first != second


def test_no_candidate_takes_out_nothing():
    rows, loss = pieces(), L.ClipCov(cov_low=100.0, cov_high=200.0)
    assert by_sample(loss.rewrite(rows, present(rows), Alone(), salt=1)) == by_sample(rows)


def test_a_row_without_old_logprobs_is_refused():
    row = replace(pieces()[0], old_logprobs=None)
    with pytest.raises(ValueError, match="needs old_logprobs"):
        L.GMPO().rewrite([row], [torch.zeros(5)], Alone(), salt=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.GMPO(clip_low=0.0),
        lambda: L.ClipCov(share=0.0),
        lambda: L.ClipCov(cov_low=2.0, cov_high=1.0),
        lambda: L.KLCov(share=2.0),
        lambda: L.KLCov(kl_coefficient=-1.0),
    ],
)
def test_constants_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match=r"share|clip_low|cov_low|kl_coefficient"):
        make()
