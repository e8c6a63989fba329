"""Samples laid end to end in a row: the one place where targets are shifted by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_klear.types import PackedBatch, Routes, Sample

if TYPE_CHECKING:
    from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean"]
Number = TypeVar("Number", bound=np.generic)


def loss_weights(trained_counts: npt.NDArray[np.integer], aggregation: Aggregation) -> npt.NDArray[np.float64]:
    """Weight of every trained token of each sample [n], given the samples that are averaged over: a whole step's.

    `trained_counts` [n] are the tokens of each sample that are trained and can be predicted, its first token cannot.
    token_mean: 1 / all of them. sequence_mean: 1 / (sequences that have one * its count). Weights times counts sum to
    one, or to zero where no sample has any.
    """
    counts = trained_counts.astype(np.float64)
    if aggregation == "token_mean":
        return np.full(len(counts), 1.0 / max(counts.sum(), 1.0))
    weights: npt.NDArray[np.float64] = (counts > 0) / (np.maximum(counts, 1.0) * max(np.count_nonzero(counts), 1))
    return weights


def num_predicted(sample: Sample) -> int:
    """Trained tokens of a sample that can be predicted: all but its first one."""
    return int(np.count_nonzero(sample.trained[1:]))


def pack(
    samples: Sequence[Sample],
    weights: Sequence[float],
    *,
    advantages: Sequence[float] | None = None,
    nll_weights: Sequence[float] | None = None,
    sample_numbers: Sequence[int] = (),
) -> PackedBatch:
    """Lay samples end to end in one row; each number given per sample applies to every trained token of it.

    Entry t speaks of predicting token t + 1 of its sequence, and is 0 where that one is not trained or not there.
    `sampler_logprobs` are filled where the samples carry log-probs, and `sampler_routes` where they carry routes.
    Without samples the row is one token of weight 0: what a rank runs when a step has fewer rows than micro-batches.
    """
    import torch

    if not samples:
        samples = [Sample(tokens=np.zeros(1, dtype=np.int32), trained=np.zeros(1, dtype=np.bool_))]
        weights = [0.0]
        advantages = None if advantages is None else [0.0]
        nll_weights = None if nll_weights is None else [0.0]
    for index, sample in enumerate(samples):
        if not len(sample.tokens) == len(sample.trained) > 0:
            raise ValueError(
                f"sample {index} of a row has {len(sample.tokens)} tokens and {len(sample.trained)} marks of training"
            )
    # Arrays of a step's rows are many pages that the kernel hands out one by one, which takes longer than filling them:
    # each is made once, in its own type.
    lengths = np.array([len(sample.tokens) for sample in samples])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    unpredicted = ~_shifted([sample.trained for sample in samples], np.bool_)

    def zeroed(values: npt.NDArray[np.float32]) -> Tensor:
        np.putmask(values, unpredicted, 0)
        return torch.from_numpy(values)

    def spread(numbers: Sequence[float]) -> Tensor:
        return zeroed(np.repeat(np.asarray(numbers, dtype=np.float32), lengths))

    logprobs = [sample.logprobs for sample in samples if sample.logprobs is not None]
    if logprobs and len(logprobs) != len(samples):
        raise ValueError("some samples of a row carry log-probs and some do not")
    routes = [sample.routes for sample in samples if sample.routes is not None]
    if routes and len(routes) != len(samples):
        raise ValueError("some samples of a row carry routes and some do not")
    return PackedBatch(
        tokens=torch.from_numpy(
            np.concatenate([sample.tokens for sample in samples], dtype=np.int64, casting="unsafe")
        ),
        targets=torch.from_numpy(_shifted([sample.tokens for sample in samples], np.int64)),
        weights=spread(weights),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        advantages=None if advantages is None else spread(advantages),
        sampler_logprobs=zeroed(_shifted(logprobs, np.float32)) if logprobs else None,
        nll_weights=None if nll_weights is None else spread(nll_weights),
        sampler_routes=torch.from_numpy(_routes(routes, lengths)) if routes else None,
        sample_numbers=tuple(sample_numbers),
    )


def _routes(routes: Sequence[Routes], lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int16]:
    """Routes of samples laid end to end, not shifted: entry t is of reading token t. -1 on each one's last token."""
    laid: npt.NDArray[np.int16] = np.full((int(lengths.sum()), *routes[0].shape[1:]), -1, dtype=np.int16)
    for index, (one, end) in enumerate(zip(routes, np.cumsum(lengths).tolist(), strict=True)):
        if len(one) != lengths[index] - 1:
            raise ValueError(f"sample {index} of a row has {lengths[index]} tokens and routes of {len(one)}")
        laid[end - len(one) - 1 : end - 1] = one
    return laid


def _shifted(arrays: Sequence[npt.NDArray[np.generic]], dtype: type[Number]) -> npt.NDArray[Number]:
    """Each array one place to the left with a zero at its end, all laid end to end."""
    zero = np.zeros(1, dtype)
    return np.concatenate([piece for array in arrays for piece in (array[1:], zero)], dtype=dtype, casting="unsafe")
