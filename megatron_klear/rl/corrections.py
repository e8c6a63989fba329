"""Train/sampler mismatch: the two compute the same log-probs differently, so samples are slightly off-policy.

r = exp(logprobs - sampler_logprobs) is the importance ratio of a token, trainer over sampler, both of the same weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Correction = Literal["none", "truncated", "masked"]
PERCENTILES = (1, 50, 99)


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, correction: Correction, cap: float = 2.0) -> Tensor:
    """What each token's loss is multiplied by [T], without a gradient.

    `truncated`: min(r, cap). `masked`: r where 1/cap <= r <= cap, else 0. `none`: 1.
    Raises ValueError where shapes differ, `cap` is not above 1, or a log-prob is NaN or positive infinity.
    """
    if logprobs.shape != sampler_logprobs.shape:
        raise ValueError(f"log-probs of shapes {tuple(logprobs.shape)} and {tuple(sampler_logprobs.shape)}")
    if not cap > 1:
        raise ValueError(f"the cap {cap} must be above 1")
    if correction == "none":
        return torch.ones_like(logprobs)
    log_ratio = (logprobs - sampler_logprobs).detach().float()
    if torch.isnan(log_ratio).any():
        token = int(torch.isnan(log_ratio).nonzero()[0, 0])
        raise ValueError(
            f"token {token}: log-probs {float(logprobs[token])} of the trainer and {float(sampler_logprobs[token])} of "
            "the sampler have no ratio"
        )
    bound = math.log(cap)
    ratio = log_ratio.clamp(max=bound).exp()  # clamped before exp: a ratio must not overflow
    if correction == "truncated":
        return ratio
    if correction == "masked":
        return torch.where(log_ratio.abs() <= bound, ratio, 0.0)
    raise ValueError(f"unknown correction {correction!r}: none, truncated or masked")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """How far the trainer's log-probs lie from the sampler's, over trained tokens."""

    tokens: int
    mean: float
    """Mean |difference| of log-probs."""
    max: float
    """Largest |difference|."""
    ratio_percentiles: dict[int, float]
    """Percentiles of r: 1, 50, 99."""
    kl_k1: float
    """KL(sampler || trainer), estimated by the mean of -log r: unbiased, of either sign."""
    kl_k3: float
    """The same KL by the mean of r - 1 - log r: unbiased, never negative, of lower variance (J. Schulman, 2020)."""

    def metrics(self) -> dict[str, float]:
        """Flat names and values for a log."""
        percentiles = {f"mismatch_ratio_p{name:02d}": value for name, value in self.ratio_percentiles.items()}
        return {
            "mismatch_mean": self.mean,
            "mismatch_max": self.max,
            "mismatch_kl_k1": self.kl_k1,
            "mismatch_kl_k3": self.kl_k3,
            **percentiles,
        }


def measure_mismatch(logprobs: Tensor, sampler_logprobs: Tensor, trained: Tensor) -> Mismatch:
    """Statistics over the tokens where `trained` [T] is true; all zero (ratios one) where there are none.

    A log-prob that is not finite shows as an infinite or NaN statistic: nothing is left out.
    """
    if not logprobs.shape == sampler_logprobs.shape == trained.shape:
        shapes = [tuple(tensor.shape) for tensor in (logprobs, sampler_logprobs, trained)]
        raise ValueError(f"trainer's log-probs, sampler's log-probs and mask have the shapes {shapes}")
    keep = trained.bool()
    difference = (logprobs.detach()[keep].double() - sampler_logprobs.detach()[keep].double()).cpu()
    if not len(difference):
        ones = dict.fromkeys(PERCENTILES, 1.0)
        return Mismatch(tokens=0, mean=0.0, max=0.0, ratio_percentiles=ones, kl_k1=0.0, kl_k3=0.0)
    ratio, size = difference.exp(), difference.abs()
    ordered = ratio.sort().values
    nearest = {p: max(0, math.ceil(p / 100 * len(ordered)) - 1) for p in PERCENTILES}  # torch.quantile has a size limit
    return Mismatch(
        tokens=len(difference),
        mean=float(size.mean()),
        max=float(size.max()),
        ratio_percentiles={p: float(ordered[place]) for p, place in nearest.items()},
        kl_k1=float(-difference.mean()),
        kl_k3=float((difference.expm1() - difference).mean()),
    )
