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

GSPO and GMPO give a response one ratio, Clip-Cov and KL-Cov choose tokens over a whole update: they rewrite what a loss
of the table then reads (`SequenceLoss`, `batch_losses`).

The log-ratio is clamped to +-20 and nothing divides by r, so every loss and slope is finite where the published
`(1 + high) / sg(r) * r` gives NaN. No loss here knows of masks, means or ranks: see `rl.weights`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

from megatron_klear.rl.batch_losses import GMPO, BatchLoss, ClipCov, KLCov
from megatron_klear.rl.clipped import CISPO, GPPO, PPO, CappedCISPO
from megatron_klear.rl.ratio import Region, importance_ratio, regions
from megatron_klear.rl.soft_losses import DPPO, SAPO
from megatron_klear.rl.surrogate import StrictLoss, check_clip, weighted_score
from megatron_klear.types import LossCoefficients, LossKind, TokenLoss

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CISPO",
    "DPPO",
    "GMPO",
    "GPPO",
    "GSPO",
    "LOSSES",
    "NLL",
    "PPO",
    "REINFORCE",
    "SAPO",
    "BatchLoss",
    "CappedCISPO",
    "ClipCov",
    "FunctionLoss",
    "KLCov",
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
        import torch

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


AnyLoss = TokenLoss | SequenceLoss | BatchLoss
LOSSES: dict[str, type[TokenLoss] | type[SequenceLoss] | type[BatchLoss]] = {
    "gppo": GPPO,
    "ppo": PPO,
    "cispo": CISPO,
    "capped_cispo": CappedCISPO,
    "reinforce": REINFORCE,
    "nll": NLL,
    "sapo": SAPO,
    "dppo": DPPO,
    "gspo": GSPO,
    "gmpo": GMPO,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
}


def resolve_loss(name: str, arguments: Mapping[str, Any] | None = None) -> AnyLoss:
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
        return cast(AnyLoss, found)
    return FunctionLoss(found)
