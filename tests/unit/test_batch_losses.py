"""Losses over a whole update choose the same tokens however they lie in rows and ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
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


class Rank:
    """DataRanks of one of several threads, which meet at every call."""

    def __init__(self, number: int, met: threading.Barrier, said: list) -> None:
        self._number, self._met, self._said = number, met, said

    def sum(self, values: list[float]) -> list[float]:
        return np.sum(self._all(values), axis=0).tolist()

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        return self._all(values)

    def _all(self, values) -> list:
        self._said[self._number] = values
        self._met.wait(60)
        found = list(self._said)
        self._met.wait(60)
        return found


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


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_ranks_choose_together(loss):
    """Three ranks with some of the rows each, one of them none, rewrite them as one process with all rows does."""
    rows = pieces()
    alone = by_sample(loss.rewrite(rows, present(rows), Alone(), salt=3))
    shares = [[rows[0], rows[3], rows[4]], [rows[1], rows[2], rows[5]], []]
    met, said = threading.Barrier(len(shares)), [None] * len(shares)

    def rewritten(number: int) -> list[PackedBatch]:
        mine = shares[number]
        return loss.rewrite(mine, present(mine), Rank(number, met, said), salt=3)

    with ThreadPoolExecutor(len(shares)) as threads:
        together = [row for of_rank in threads.map(rewritten, range(len(shares))) for row in of_rank]
    for number, (advantages, old) in by_sample(together).items():
        np.testing.assert_allclose(advantages, alone[number][0], rtol=1e-6)
        np.testing.assert_allclose(old, alone[number][1], rtol=1e-6)
    assert len(together) == len(rows)


def test_the_share_is_of_all_trained_tokens():
    rows, loss = pieces(), L.ClipCov(share=0.2, cov_low=0.0, cov_high=9.0)
    taken = sum(
        int((before.advantages != after.advantages).sum())
        for before, after in zip(rows, loss.rewrite(rows, present(rows), Alone(), salt=3), strict=True)
    )
    assert taken == int(0.2 * sum(int((row.weights != 0).sum()) for row in rows))


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
