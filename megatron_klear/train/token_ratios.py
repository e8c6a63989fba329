"""The ratio of present to old policy of every trained token, by sample, for a person who reads the responses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_klear.types import PackedBatch

_NONE = np.zeros(0, np.float32)
SampleRatios = dict[int, npt.NDArray[np.float32]]
"""By the number of a sample of n tokens: [n], entry t of token t, NaN where the policy loss does not read it."""

LaidOut = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Numbers of samples [S], their tokens [S], and the ratios of all of them end to end: three arrays to send."""


def laid_out(ratios: SampleRatios) -> LaidOut:
    """The ratios of samples end to end."""
    lengths = [len(values) for values in ratios.values()]
    return np.array(list(ratios), np.int64), np.array(lengths, np.int64), np.concatenate([*ratios.values(), _NONE])


def taken_apart(laid: LaidOut) -> SampleRatios:
    """What was laid out."""
    numbers, lengths, values = laid
    return dict(zip(numbers.tolist(), np.split(values, np.cumsum(lengths)[:-1]), strict=True)) if len(numbers) else {}


def ratios_by_sample(batches: Sequence[PackedBatch], ratios: Sequence[Tensor]) -> SampleRatios:
    """Take the rows' ratios [T], as `Engine.train_step` gives them, apart into their samples."""
    found: SampleRatios = {}
    for batch, of_row in zip(batches, ratios, strict=True):
        values = np.where(batch.weights.numpy() != 0, of_row.numpy(), np.float32("nan"))
        bounds = list(pairwise(batch.cu_seqlens.tolist())) if batch.sample_numbers else []  # a filler has no sample
        for number, (start, end) in zip(batch.sample_numbers, bounds, strict=True):
            # Entry t of a row speaks of token t + 1, and a sample's last entry of nothing.
            found[number] = np.concatenate([np.full(1, np.nan, np.float32), values[start : end - 1]])
    return found
