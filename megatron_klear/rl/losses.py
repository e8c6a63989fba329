"""The policy losses: small frozen settings that map per-token log-probs to per-token losses.

With r = exp(logp - old_logp), A the advantage, low = 1 - clip_low, high = 1 + clip_high and sg(.) the stop-gradient,
a loss is minimised and reaches the network through one number per token, its slope d loss / d logp:

    loss        A >= 0                      A < 0                                       value
    REINFORCE   -A                          -A                                          -A logp
    PPO         -A r, 0 past high           -A r, 0 under low, 0 past dual_clip         clipped surrogate
    GPPO        -A min(r, high)             -A max(r, low), 0 past dual_clip            its slope (but at the dual clip)
    CISPO       -A clip(r, low, high)       -A clip(r, low, high)                       -A sg(clip(r)) logp
    SAPO        -A 4 p (1 - p) r, p = sigma(tau (r - 1))                                -A 4 p / tau
    DPPO        -A min(r, cap), 0 where the token's probability moved too far           its slope
    NLL         -1                          -1                                          -logp

The log-ratio is clamped to +-20 and nothing divides by r, so every loss and slope is finite where the published
`(1 + high) / sg(r) * r` gives NaN. No loss here knows of masks, means or ranks: see `rl.weights`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from megatron_klear.rl.ratio import Region, importance_ratio, regions
from megatron_klear.rl.soft_losses import DPPO, SAPO
from megatron_klear.rl.surrogate import StrictLoss, check_clip, loss_inputs, surrogate, weighted_score
from megatron_klear.types import LossCoefficients, LossKind, TokenLoss

__all__ = [
    "CISPO",
    "DPPO",
    "GPPO",
    "GSPO",
    "LOSSES",
    "NLL",
    "PPO",
    "REINFORCE",
    "SAPO",
    "CappedCISPO",
    "FunctionLoss",
    "Region",
    "SequenceLoss",
    "importance_ratio",
    "regions",
    "resolve_loss",
]


@runtime_checkable
class SequenceLoss(Protocol):
    """A loss whose ratio belongs to the sequence: two phases, log-probs of whole sequences first, gradients second.

    `token_loss()` on the result of `sequence_old_logprobs` in place of the old log-probs is the loss.
    """

    def token_loss(self) -> TokenLoss:
        """The loss of the second phase."""
        ...

    def sequence_old_logprobs(
        self, logprobs: Tensor, old_logprobs: Tensor, trained: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        """Old log-probs [T] against which every trained token of a sequence has the sequence's ratio."""
        ...


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


@dataclass(frozen=True)
class REINFORCE(StrictLoss):
    """The plain policy gradient, on-policy: loss = -A logp. Reads no old log-probs."""

    kind: Literal["reinforce"] = field(default="reinforce", kw_only=True)

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor | None = None, advantages: Tensor | None = None
    ) -> Tensor:
        """Per-token losses [T]."""
        if advantages is None:
            raise ValueError("REINFORCE needs advantages, and the batch carries none")
        return weighted_score(logprobs, advantages.detach())

    def coefficients(self) -> LossCoefficients:
        """The loss in the fused kernel's terms."""
        return LossCoefficients(kind=LossKind.REINFORCE)


@dataclass(frozen=True)
class NLL(StrictLoss):
    """Negative log-likelihood, the loss of supervised fine-tuning (arXiv 2508.07629, Eq. 8): loss = -logp."""

    kind: Literal["nll"] = field(default="nll", kw_only=True)

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor | None = None, advantages: Tensor | None = None
    ) -> Tensor:
        """Per-token losses [T]."""
        return -logprobs

    def coefficients(self) -> LossCoefficients:
        """The loss in the fused kernel's terms."""
        return LossCoefficients(kind=LossKind.NLL)


@dataclass(frozen=True)
class GSPO(StrictLoss):
    """PPO's surrogate on the sequence's ratio (arXiv 2507.18071, Eq. 5 and 7): a `SequenceLoss`, in two phases.

        s = exp(mean over the sequence of (logp - old_logp)),   loss_t = -min(s A, clip(s, low, high) A)

    with s's gradient spread over its tokens. Weights of a sequence mean (`rl.weights.sequence_mean`) make the paper's
    objective. The second phase is PPO against shifted old log-probs, hence in the fused kernel's family.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    kind: Literal["gspo"] = field(default="gspo", kw_only=True)

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)

    def token_loss(self) -> PPO:
        """The loss of the second phase."""
        return PPO(self.clip_low, self.clip_high)

    def sequence_old_logprobs(
        self, logprobs: Tensor, old_logprobs: Tensor, trained: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        """Old log-probs [T] against which every trained token of a sequence has the sequence's ratio.

        `trained` [T] bool, `cu_seqlens` [S + 1]. Untrained tokens get their own log-prob, a ratio of 1.
        """
        logprobs, old_logprobs = logprobs.detach(), old_logprobs.detach()
        lengths = cu_seqlens.to(logprobs.device).long().diff()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=logprobs.device), lengths)
        log_ratio = torch.where(trained, logprobs - old_logprobs, torch.zeros_like(logprobs))
        sums = logprobs.new_zeros(len(lengths)).index_add_(0, sequence, log_ratio)
        counts = logprobs.new_zeros(len(lengths)).index_add_(0, sequence, trained.to(logprobs.dtype))
        mean = (sums / counts.clamp(min=1))[sequence]
        return torch.where(trained, logprobs - mean, logprobs)

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, trained: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        """Per-token losses [T]: both phases at once, where the log-probs of whole sequences are at hand."""
        shifted = self.sequence_old_logprobs(logprobs, old_logprobs, trained, cu_seqlens)
        return self.token_loss()(logprobs, shifted, advantages)


@dataclass(frozen=True)
class FunctionLoss:
    """A plain function `(logprobs, old_logprobs, advantages) -> [T]` as a loss outside the fused family."""

    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None) -> Tensor:
        """Per-token losses [T]."""
        return self.function(logprobs, old_logprobs, advantages)

    def coefficients(self) -> None:
        """Not of the family: the fused op runs it in two phases."""
        return None


LOSSES: dict[str, type[TokenLoss] | type[SequenceLoss]] = {
    "gppo": GPPO,
    "ppo": PPO,
    "cispo": CISPO,
    "capped_cispo": CappedCISPO,
    "reinforce": REINFORCE,
    "nll": NLL,
    "sapo": SAPO,
    "dppo": DPPO,
    "gspo": GSPO,
}


def resolve_loss(name: str, arguments: Mapping[str, Any] | None = None) -> TokenLoss | SequenceLoss:
    """The loss of that name, or your own by dotted path, `"my.module:MyLoss"`, built with `arguments`.

    The path may name a class, called with `arguments`, or a function of (logprobs, old_logprobs, advantages), which
    takes none. Raises ValueError naming what is wrong with the path, the object or its arguments.
    """
    arguments = dict(arguments or {})
    if ":" not in name:
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}: one of {', '.join(LOSSES)}, or a path like 'my.module:MyLoss'")
        found: Any = LOSSES[name]
    else:
        module_name, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"loss {name!r} cannot be imported: {error}") from error
    if isinstance(found, type):
        try:
            found = found(**arguments)
        except TypeError as error:
            raise ValueError(f"loss {name!r} does not take these arguments: {error}") from error
    elif arguments:
        raise ValueError(f"loss {name!r} is not a class and takes no arguments, but got {', '.join(arguments)}")
    if not (callable(found) or hasattr(found, "token_loss")):
        raise ValueError(f"loss {name!r} is not callable: it must map (logprobs, old_logprobs, advantages) to losses")
    if hasattr(found, "coefficients") or hasattr(found, "token_loss"):
        return cast(TokenLoss | SequenceLoss, found)
    return FunctionLoss(found)
