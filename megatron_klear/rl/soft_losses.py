"""Losses of the fused family with something else than a clip of the ratio: a soft gate, a bound of the divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_klear.rl.ratio import binary_divergence, importance_ratio
from megatron_klear.rl.surrogate import StrictLoss, loss_inputs, surrogate
from megatron_klear.types import LossCoefficients, LossKind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SAPO(StrictLoss):
    """Soft adaptive policy optimisation (arXiv 2511.20347, Eq. 5 to 7): a sigmoid gate in place of the clip.

        loss = -f(r) A,   f(r) = 4 / tau sigma(tau (r - 1)),   tau = tau_pos where A > 0, else tau_neg

    d loss / d logp = -4 p (1 - p) r A with p = sigma(tau (r - 1)): the plain ratio on-policy, fading as r leaves 1 on
    either side. The paper weighs sequences alike: `aggregation = "sequence_mean"`.
    """

    tau_pos: float = 1.0
    """Temperature of tokens of positive advantage; larger fades sooner."""
    tau_neg: float = 1.05
    """Temperature of the others."""
    kind: Literal["sapo"] = field(default="sapo", kw_only=True)

    def __post_init__(self) -> None:
        if not (0 < self.tau_pos < math.inf and 0 < self.tau_neg < math.inf):
            raise ValueError(f"tau_pos {self.tau_pos} and tau_neg {self.tau_neg} must be positive and finite")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None) -> Tensor:
        """Per-token losses [T]."""
        import torch

        old_logprobs, advantages = loss_inputs(self, old_logprobs, advantages)
        ratio = importance_ratio(logprobs, old_logprobs)
        tau = torch.where(advantages > 0, self.tau_pos, self.tau_neg).to(ratio.dtype)
        x = tau * (ratio - 1)
        slope = -4 * advantages * ratio * torch.sigmoid(x) * torch.sigmoid(-x)
        return surrogate(logprobs, -4 * advantages * torch.sigmoid(x) / tau, slope)

    def coefficients(self) -> LossCoefficients:
        """The loss in the fused kernel's terms."""
        return LossCoefficients(kind=LossKind.SAPO, beta_low=self.tau_neg, beta_high=self.tau_pos)


@dataclass(frozen=True)
class DPPO(StrictLoss):
    """Divergence PPO (arXiv 2602.04879; binary divergences of Eq. 13 and 14): a trust region in place of the clip.

        loss = -M min(r, ratio_cap) A,   M = 0 where A > 0, p > mu or A < 0, p < mu, and D > bound;   else 1

    with mu = exp(old_logp), p = exp(logp) and D = |p - mu| ("tv") or mu log(mu / p) + (1 - mu) log((1 - mu) / (1 - p))
    ("kl"). d loss / d logp == loss. Unlike a bound of r, D lets rare tokens move by large factors and stops frequent
    ones. verl writes the same gradient as -M sg(min(r, cap)) A logp.
    """

    divergence: Literal["tv", "kl"] = "tv"
    bound_low: float = 0.2
    """Largest divergence of a token of negative advantage; for "kl", 0.05 is usual."""
    bound_high: float = 0.2
    """Largest divergence of a token of positive advantage."""
    ratio_cap: float = 20.0
    """Largest importance weight; infinity is the paper's form."""
    kind: Literal["dppo"] = field(default="dppo", kw_only=True)

    def __post_init__(self) -> None:
        if self.divergence not in ("tv", "kl"):
            raise ValueError(f"divergence must be 'tv' or 'kl', not {self.divergence!r}")
        if not (self.bound_low >= 0 and self.bound_high >= 0):
            raise ValueError(f"bound_low {self.bound_low} and bound_high {self.bound_high} must not be negative")
        if not self.ratio_cap >= 1:
            raise ValueError(f"ratio_cap {self.ratio_cap} must be at least 1: it is the largest importance weight")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None) -> Tensor:
        """Per-token losses [T]."""
        import torch

        old_logprobs, advantages = loss_inputs(self, old_logprobs, advantages)
        present = logprobs.detach()
        ratio, further = importance_ratio(present, old_logprobs), torch.sign(advantages) * (present - old_logprobs) > 0
        bound = torch.where(advantages < 0, self.bound_low, self.bound_high)
        masked = further & (binary_divergence(present, old_logprobs, self.divergence) > bound)
        value = (-advantages * ratio.clamp(max=self.ratio_cap)).masked_fill(masked, 0)
        return surrogate(logprobs, value, value)

    def coefficients(self) -> LossCoefficients:
        """The loss in the fused kernel's terms."""
        return LossCoefficients(
            kind=LossKind.DPPO_TV if self.divergence == "tv" else LossKind.DPPO_KL,
            ratio_high=self.ratio_cap,
            beta_low=self.bound_low,
            beta_high=self.bound_high,
        )
