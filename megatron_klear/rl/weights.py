"""Aggregation as weights: which mean a step's loss is, decided before any kernel runs.

A step's loss is the plain sum of weight * token loss over all ranks and micro-batches: a mean is a choice of weights.
Every function here takes the number of trained tokens of each sequence of the *whole* step (all ranks, all
micro-batches) and returns the weight that each trained token of that sequence carries, [S] float64; `spread` lays it
over the tokens. Sequences without trained tokens get weight 0 and count for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Aggregation = Literal["token_mean", "sequence_mean", "sequence_mean_token_sum", "as_released"]
Counts = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]


def _counts(counts: npt.ArrayLike) -> Counts:
    values = np.asarray(counts)
    if values.size == 0:
        return np.zeros(0, dtype=np.int64)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer) or (values < 0).any():
        raise ValueError(f"trained-token counts must be non-negative integers, one a sequence; got {values!r}")
    return values.astype(np.int64)


def token_mean(counts: npt.ArrayLike) -> Weights:
    """Mean over all trained tokens of the step: each weighs 1 / N_tokens (arXiv 2508.07629, Eq. 7)."""
    values = _counts(counts)
    total = int(values.sum())
    return np.where(values > 0, 1.0 / total if total else 0.0, 0.0)


def sequence_mean(counts: npt.ArrayLike) -> Weights:
    """Mean over sequences of each one's token mean: 1 / (N_sequences * n_i) (GRPO, arXiv 2402.03300, Eq. 3)."""
    values = _counts(counts)
    trained = int(np.count_nonzero(values))
    weights: Weights = np.divide(1.0, values * trained, out=np.zeros(len(values)), where=values > 0)
    return weights


def sequence_mean_token_sum(counts: npt.ArrayLike, length: int) -> Weights:
    """Mean over sequences of token sums over a fixed length: 1 / (N_sequences * length) (Dr. GRPO, arXiv 2503.20783).

    The weights do not sum to one: short answers weigh less, and a token weighs the same in every answer.
    """
    if length < 1:
        raise ValueError(f"the fixed length {length} must be positive: the longest response allowed, in tokens")
    values = _counts(counts)
    trained = int(np.count_nonzero(values))
    return np.where(values > 0, 1.0 / (max(trained, 1) * length), 0.0)


def as_released(counts: npt.ArrayLike, microbatches: npt.ArrayLike) -> Weights:
    """The token mean inside each micro-batch, weighted by its share of the sequences, as Klear's released code has it.

    `microbatches` [S] names each sequence's micro-batch. The weights depend on how sequences were put together, which
    is why this is not the default. For a term over some sequences only, set the others' counts to 0: they still count
    in the shares, as they do there; a micro-batch left without tokens contributes nothing.
    """
    values, batches = _counts(counts), np.asarray(microbatches)
    if batches.shape != values.shape:
        raise ValueError(f"{len(values)} sequences but {batches.size} micro-batch numbers: give one for each sequence")
    if not len(values):
        return np.zeros(0)
    _, index = np.unique(batches, return_inverse=True)
    tokens = np.bincount(index, weights=values)[index]
    share = np.bincount(index)[index] / len(values)
    weights: Weights = np.divide(share, tokens, out=np.zeros(len(values)), where=values > 0)
    return weights


def aggregate(
    aggregation: Aggregation,
    counts: npt.ArrayLike,
    *,
    length: int | None = None,
    microbatches: npt.ArrayLike | None = None,
) -> Weights:
    """The weights of that name; `length` is for `sequence_mean_token_sum`, `microbatches` for `as_released`."""
    if aggregation == "token_mean":
        return token_mean(counts)
    if aggregation == "sequence_mean":
        return sequence_mean(counts)
    if aggregation == "sequence_mean_token_sum":
        if length is None:
            raise ValueError("aggregation 'sequence_mean_token_sum' needs the fixed length it divides by")
        return sequence_mean_token_sum(counts, length)
    if aggregation == "as_released":
        if microbatches is None:
            raise ValueError("aggregation 'as_released' needs to know each sequence's micro-batch")
        return as_released(counts, microbatches)
    raise ValueError(
        f"unknown aggregation {aggregation!r}: token_mean, sequence_mean, sequence_mean_token_sum or as_released"
    )


def drop_overlong(counts: npt.ArrayLike, overlong: npt.ArrayLike) -> Counts:
    """Counts with those of overlong sequences set to 0: they take no part, not even in a mean's denominator.

    `overlong` [S] is true where a response was cut off at the length limit (DAPO, arXiv 2503.14476, section 3.4).
    """
    return np.where(_mask(counts, overlong), 0, _counts(counts))


def nll_weights(
    counts: npt.ArrayLike, correct: npt.ArrayLike, coefficient: float, microbatches: npt.ArrayLike | None = None
) -> Weights:
    """Weights of the added -logp term on correct rollouts: coefficient / their number of tokens (Eq. 13-14).

    The term is normalised by its own tokens over the whole step, whatever the policy term's aggregation is; with
    `microbatches` inside each micro-batch, weighted by its share of all sequences, as the released code has it. All
    zero where no rollout is correct.
    """
    of_correct = np.where(_mask(counts, correct), _counts(counts), 0)
    return coefficient * (token_mean(of_correct) if microbatches is None else as_released(of_correct, microbatches))


def spread(weights: Weights, trained: Sequence[npt.NDArray[np.bool_]]) -> list[npt.NDArray[np.float32]]:
    """Each sequence's weight on its trained tokens, 0 on the others: one float32 array [n] a sequence."""
    if len(weights) != len(trained):
        raise ValueError(f"{len(weights)} weights for {len(trained)} sequences")
    return [np.where(mask, np.float32(weight), np.float32(0)) for weight, mask in zip(weights, trained, strict=True)]


def _mask(counts: npt.ArrayLike, mask: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    values = np.asarray(mask, dtype=np.bool_)
    if values.shape != _counts(counts).shape:
        raise ValueError(f"{len(_counts(counts))} sequences but a mask of shape {values.shape}: one entry a sequence")
    return values
