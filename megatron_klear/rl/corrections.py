"""The sampler is not quite the trainer's policy: how far apart they are, and what is done about it.

With p the trainer's old log-prob of a sampled token and q the sampler's, the importance ratio of the two is exp(p - q).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_klear.types import PackedBatch

Correction = Literal["none", "truncated", "masked"]
Gather = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """How far the sampler's log-probs are from the trainer's, over all trained tokens of a step."""

    mean: float
    """Mean absolute difference in nats."""
    max: float
    ratio_p1: float
    """First percentile of exp(trainer - sampler)."""
    ratio_p99: float
    kl_k1: float
    """Mean of sampler - trainer: the plain estimate of KL(sampler || trainer)."""
    kl_k3: float
    """Mean of exp(d) - d - 1 with d = trainer - sampler: the same, never negative (Schulman, 2020)."""
    clipped_share: float
    """Share of tokens whose ratio the correction touches."""

    @classmethod
    def nothing(cls) -> Mismatch:
        """Of no tokens."""
        return cls(mean=0.0, max=0.0, ratio_p1=1.0, ratio_p99=1.0, kl_k1=0.0, kl_k3=0.0, clipped_share=0.0)

    def metrics(self) -> dict[str, float]:
        """As a step's record names them."""
        return {
            "mismatch_mean": self.mean,
            "mismatch_max": self.max,
            "mismatch_ratio_p1": self.ratio_p1,
            "mismatch_ratio_p99": self.ratio_p99,
            "mismatch_kl_k1": self.kl_k1,
            "mismatch_kl_k3": self.kl_k3,
            "correction_clipped_share": self.clipped_share,
        }


def mismatch(
    old_logprobs: Sequence[Tensor],
    batches: Sequence[PackedBatch],
    gather: Gather,
    *,
    correction: Correction = "none",
    cap: float = 2.0,
) -> Mismatch:
    """Compare the trainer's log-probs [T] with the sampler's on trained tokens; `gather` joins those of all ranks.

    Rows without sampler log-probs are left out.
    """
    differences = [
        (old - batch.sampler_logprobs)[batch.weights != 0].numpy()
        for old, batch in zip(old_logprobs, batches, strict=True)
        if batch.sampler_logprobs is not None
    ]
    own = np.concatenate([*differences, np.zeros(0, dtype=np.float32)]).astype(np.float32)
    every = gather(own).astype(np.float64)
    if not len(every):
        return Mismatch.nothing()
    clamped = np.clip(every, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = np.exp(clamped)
    touched = np.zeros(len(every), dtype=np.bool_)
    if correction != "none":
        touched = (ratio > cap) | ((ratio < 1 / cap) if correction == "masked" else False)
    return Mismatch(
        mean=float(np.abs(every).mean()),
        max=float(np.abs(every).max()),
        ratio_p1=float(np.percentile(ratio, 1)),
        ratio_p99=float(np.percentile(ratio, 99)),
        kl_k1=float(-every.mean()),
        kl_k3=float((np.expm1(clamped) - clamped).mean()),
        clipped_share=float(touched.mean()),
    )


def corrected(batch: PackedBatch, old_logprobs: Tensor, correction: Correction, cap: float) -> PackedBatch:
    """The row with its policy weights multiplied by the importance ratio of trainer to sampler.

    truncated: min(ratio, cap) (TIS). masked: the ratio where it lies in [1 / cap, cap], 0 elsewhere (IcePop's form).
    The NLL term is not a policy gradient and stays as it is.
    """
    if correction == "none" or batch.sampler_logprobs is None:
        return batch
    ratio = (old_logprobs - batch.sampler_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    if correction == "truncated":
        ratio = ratio.clamp(max=cap)
    else:
        ratio = torch.where((ratio >= 1 / cap) & (ratio <= cap), ratio, torch.zeros_like(ratio))
    weights = torch.where(batch.weights != 0, batch.weights * ratio, torch.zeros_like(ratio))
    return dataclasses.replace(batch, weights=weights)
