"""The importance ratio of a token, and the region of the clip it falls in."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Literal

from megatron_klear.types import LossCoefficients

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound of |logp - old_logp|; a ratio of 5e8 or 2e-9 is past any clip already."""


class Region(IntEnum):
    """Where a token's ratio lies with respect to the clip bounds and the sign of its advantage."""

    INSIDE = 0
    NEGATIVE_LOW = 1
    """A < 0 and r under the low bound: PPO stops the gradient, GPPO keeps that of the bound."""
    POSITIVE_HIGH = 2
    """A >= 0 and r over the high bound: PPO stops the gradient, GPPO keeps that of the bound."""
    POSITIVE_LOW = 3
    """A >= 0 and r under the low bound: plain gradient, CISPO raises it to the bound."""
    NEGATIVE_HIGH = 4
    """A < 0 and r over the high bound: plain gradient, CISPO lowers it to the bound."""
    DUAL_CLIP = 5
    """A < 0 and r over the dual clip: no gradient."""


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """r = exp(logp - old_logp) [T], finite and without gradient."""
    return (logprobs.detach() - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def binary_divergence(logprobs: Tensor, old_logprobs: Tensor, form: Literal["tv", "kl"]) -> Tensor:
    """Divergence [T] of the old policy from the present one, each seen as "this token or another".

    "tv" is |p - mu|, "kl" mu log(mu / p) + (1 - mu) log((1 - mu) / (1 - p)) (arXiv 2602.04879, Eq. 13 and 14).
    """
    import torch

    present, old = logprobs.exp(), old_logprobs.exp()
    if form == "tv":
        return (present - old).abs()
    # 1 - p by expm1: in float32 p rounds to 1 where 1 - p still has all its digits
    rest, old_rest = -logprobs.expm1(), -old_logprobs.expm1()
    here = torch.where(old > 0, old * (old_logprobs - logprobs), 0.0)
    return here + torch.where(old_rest > 0, old_rest * (old_rest.log() - rest.log()), 0.0)


def regions(ratio: Tensor, advantages: Tensor, coefficients: LossCoefficients) -> Tensor:
    """Each token's `Region`, [T] uint8.

    The share of 1 and 2 together is what is usually reported as the clip fraction, that of 5 as the dual one.
    """
    import torch

    low, high = ratio < coefficients.ratio_low, ratio > coefficients.ratio_high
    positive, negative = advantages >= 0, advantages < 0
    region = torch.zeros_like(ratio, dtype=torch.uint8)
    for code, where in (
        (Region.NEGATIVE_LOW, negative & low),
        (Region.POSITIVE_HIGH, positive & high),
        (Region.POSITIVE_LOW, positive & low),
        (Region.NEGATIVE_HIGH, negative & high),
        (Region.DUAL_CLIP, negative & (ratio > coefficients.dual_clip)),
    ):
        region.masked_fill_(where, int(code))
    return region
