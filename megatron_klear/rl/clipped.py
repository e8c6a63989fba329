"""Losses of the fused family that bound the importance ratio: GPPO, PPO, CISPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_klear.rl.ratio import importance_ratio
from megatron_klear.rl.surrogate import StrictLoss, check_clip, loss_inputs, surrogate, weighted_score
from megatron_klear.types import LossCoefficients, LossKind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GPPO(StrictLoss):
    """Gradient-preserving clipping (arXiv 2508.07629, Eq. 11; with betas Eq. 17, which is CE-GPPO's form).

        loss = -min(r A, clip(r, low / sg(r) * r, high / sg(r) * r) A)

    The value is that of PPO's clipped surrogate; a token past the clip keeps the gradient of the bound where PPO has
    none. Without dual clip d loss / d logp == loss. In the clipped regions value and gradient are scaled by
    `beta_low` (A < 0) and `beta_high` (A > 0); at 0 they have none, as in PPO.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    beta_low: float = 1.0
    beta_high: float = 1.0
    dual_clip: float | None = None
    """Past this ratio a token of negative advantage has no gradient. Not in the paper; the released code has 10."""
    kind: Literal["gppo"] = field(default="gppo", kw_only=True)

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        if not (self.beta_low >= 0 and self.beta_high >= 0):
            raise ValueError(f"beta_low {self.beta_low} and beta_high {self.beta_high} must not be negative")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None) -> Tensor:
        """Per-token losses [T]."""
        import torch

        old_logprobs, advantages = loss_inputs(self, old_logprobs, advantages)
        ratio = importance_ratio(logprobs, old_logprobs)
        low, high = 1 - self.clip_low, 1 + self.clip_high
        weight = torch.where(
            advantages >= 0,
            torch.where(ratio > high, self.beta_high * high, ratio),
            torch.where(ratio < low, self.beta_low * low, ratio),
        )
        value = slope = -advantages * weight
        if self.dual_clip is not None:
            stopped = (advantages < 0) & (ratio > self.dual_clip)
            value = torch.where(stopped, -advantages * self.dual_clip, value)
            slope = slope.masked_fill(stopped, 0)
        return surrogate(logprobs, value, slope)

    def coefficients(self) -> LossCoefficients:
        """The loss in the fused kernel's terms."""
        return LossCoefficients(
            kind=LossKind.GPPO,
            ratio_low=1 - self.clip_low,
            ratio_high=1 + self.clip_high,
            beta_low=self.beta_low,
            beta_high=self.beta_high,
            dual_clip=float("inf") if self.dual_clip is None else self.dual_clip,
        )


@dataclass(frozen=True)
class PPO(StrictLoss):
    """The clipped surrogate of PPO and GRPO (arXiv 1707.06347, Eq. 7); DAPO's clip-higher is `clip_high` > `clip_low`.

        loss = -min(r A, clip(r, low, high) A),   and with dual clip c at most c |A| where A < 0 (arXiv 1912.09729)

    A clipped token has no gradient.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    """Past this ratio a token of negative advantage has no gradient."""
    kind: Literal["ppo"] = field(default="ppo", kw_only=True)

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high, self.dual_clip)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None) -> Tensor:
        """Per-token losses [T]."""
        import torch

        old_logprobs, advantages = loss_inputs(self, old_logprobs, advantages)
        ratio = importance_ratio(logprobs, old_logprobs)
        positive, low, high = advantages >= 0, 1 - self.clip_low, 1 + self.clip_high
        dual = float("inf") if self.dual_clip is None else self.dual_clip
        weight = torch.where(positive, ratio.clamp(max=high), ratio.clamp(min=low, max=dual))
        stopped = torch.where(positive, ratio > high, (ratio < low) | (ratio > dual))
        value = -advantages * weight
        return surrogate(logprobs, value, value.masked_fill(stopped, 0))

    def coefficients(self) -> LossCoefficients:
        """The loss in the fused kernel's terms."""
        return LossCoefficients(
            kind=LossKind.PPO,
            ratio_low=1 - self.clip_low,
            ratio_high=1 + self.clip_high,
            dual_clip=float("inf") if self.dual_clip is None else self.dual_clip,
        )


@dataclass(frozen=True)
class CISPO(StrictLoss):
    """Clipped importance weights (arXiv 2506.13585; two-sided as in arXiv 2508.07629, Eq. 16).

        loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp

    `clip_low = 1` leaves the low side open. `CappedCISPO` is what other projects call by the same name.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kind: Literal["cispo"] = field(default="cispo", kw_only=True)

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None) -> Tensor:
        """Per-token losses [T]."""
        old_logprobs, advantages = loss_inputs(self, old_logprobs, advantages)
        ratio = importance_ratio(logprobs, old_logprobs)
        return weighted_score(logprobs, advantages * ratio.clamp(1 - self.clip_low, 1 + self.clip_high))

    def coefficients(self) -> LossCoefficients:
        """The loss in the fused kernel's terms."""
        return LossCoefficients(kind=LossKind.CISPO, ratio_low=1 - self.clip_low, ratio_high=1 + self.clip_high)


@dataclass(frozen=True)
class CappedCISPO(StrictLoss):
    """CISPO with one absolute bound, the loss that TRL and Liger call CISPO.

    loss = -sg(min(r, cap)) A logp
    """

    cap: float = 5.0
    """Largest importance weight; a ratio, not a distance from 1."""
    kind: Literal["capped_cispo"] = field(default="capped_cispo", kw_only=True)

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"cap {self.cap} must be positive: it is the largest importance weight")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None) -> Tensor:
        """Per-token losses [T]."""
        old_logprobs, advantages = loss_inputs(self, old_logprobs, advantages)
        return weighted_score(logprobs, advantages * importance_ratio(logprobs, old_logprobs).clamp(max=self.cap))

    def coefficients(self) -> LossCoefficients:
        """The loss in the fused kernel's terms."""
        return LossCoefficients(kind=LossKind.CISPO, ratio_low=0.0, ratio_high=self.cap)
