"""Corrections of samples that another policy drew than the one that is trained, and how far the two are apart.

r = exp(logprobs - sampler_logprobs) is the importance ratio of a token, trainer over sampler. Of the same weights it is
near 1, since the two only compute differently; where rollouts overlap with training it holds the staleness too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


Correction = Literal["none", "truncated", "masked"]
CorrectionLevel = Literal["token", "sequence", "sequence_geometric"]
PERCENTILES = (1, 50, 99)


def importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    correction: Correction,
    cap: float = 2.0,
    *,
    floor: float | None = None,
    sequence_bounds: tuple[float, float] | None = None,
    level: CorrectionLevel = "token",
    trained: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What each token's loss is multiplied by [T], without a gradient.

    `truncated`: min(r, cap), truncated importance sampling (F. Yao et al., "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training", 2025). `masked`: r where floor <= r <= cap, else 0 (IcePop, arXiv 2510.18855, whose
    lower and upper bounds these are); without a `floor` it is 1/cap. `none`: 1. At the levels of the sequence r is that
    of `log_ratios`, the same for all trained tokens of a response, which is kept or masked as a whole.
    `sequence_bounds` take whole responses out besides, the geometric mean of whose tokens' ratios is outside of them
    (masked importance sampling at the level of sequences: J. Liu et al., "When Speed Kills Stability", 2025).
    Raises ValueError where shapes differ, bounds are not positive and in order, or a log-prob is NaN or positive
    infinity.
    """
    import torch

    lowest = (1 / cap if correction == "masked" else 0.0) if floor is None else floor
    for low, high in ((lowest, cap), sequence_bounds or (0.0, cap)):
        if not 0 <= low < high:
            raise ValueError(f"a ratio cannot be kept between {low} and {high}: the lower bound must be the smaller")
    log_ratio = log_ratios(logprobs, sampler_logprobs, level, trained=trained, cu_seqlens=cu_seqlens)
    if correction == "none":
        return torch.ones_like(logprobs)
    if torch.isnan(log_ratio).any():
        wrong = torch.isnan(logprobs - sampler_logprobs)
        token = int((wrong if trained is None else wrong & trained).nonzero()[0, 0])
        raise ValueError(
            f"token {token}: log-probs {float(logprobs[token])} of the trainer and {float(sampler_logprobs[token])} of "
            "the sampler have no ratio"
        )
    bound = math.log(cap)
    factors = log_ratio.clamp(max=bound).exp()  # clamped before exp: a ratio must not overflow
    if correction == "masked":
        kept = (log_ratio <= bound) & (log_ratio >= (math.log(lowest) if lowest > 0 else -math.inf))
        factors = torch.where(kept, factors, 0.0)
    elif correction != "truncated":
        raise ValueError(f"unknown correction {correction!r}: none, truncated or masked")
    if sequence_bounds is not None:
        whole = log_ratios(
            logprobs, sampler_logprobs, "sequence_geometric", trained=trained, cu_seqlens=cu_seqlens
        ).exp()
        factors = torch.where((whole >= sequence_bounds[0]) & (whole <= sequence_bounds[1]), factors, 0.0)
    return factors


def log_ratios(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    level: CorrectionLevel = "token",
    *,
    trained: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """log r [T], fp32, without a gradient; 0 where `trained` [T] is false, if it is given.

    `token`: of each token. `sequence`: the sum over the trained tokens of a response, so that r is the ratio of the
    whole response's probabilities, the unbiased weight, whose variance grows with the length. `sequence_geometric`:
    their mean (GSPO, arXiv 2507.18071, Eq. 7). Both need `trained` and `cu_seqlens` [S + 1], the responses' bounds.
    """
    import torch

    if logprobs.shape != sampler_logprobs.shape:
        raise ValueError(f"log-probs of shapes {tuple(logprobs.shape)} and {tuple(sampler_logprobs.shape)}")
    of_token = (logprobs - sampler_logprobs).detach().float()
    if trained is not None:
        of_token = torch.where(trained, of_token, 0.0)
    if level == "token":
        return of_token
    if level not in ("sequence", "sequence_geometric"):
        raise ValueError(f"unknown level {level!r} of a correction: token, sequence or sequence_geometric")
    if trained is None or cu_seqlens is None:
        raise ValueError(f"a correction at the level {level} needs the responses' bounds and trained tokens")
    lengths = cu_seqlens.to(of_token.device).long().diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=of_token.device), lengths)
    # In float64, so that a response's ratio does not depend on where in its row it lies.
    of_sequence = of_token.new_zeros(len(lengths), dtype=torch.float64).index_add_(0, sequence, of_token.double())
    if level == "sequence_geometric":
        counts = torch.zeros_like(of_sequence).index_add_(0, sequence, trained.double())
        of_sequence = of_sequence / counts.clamp(min=1)
    return torch.where(trained, of_sequence.float()[sequence], 0.0)


def correction_metrics(factors: Tensor, log_ratio: Tensor, correction: Correction) -> dict[str, float]:
    """How much a correction touched, over trained tokens: `factors` [T] it made of `log_ratio` [T].

    `correction_clipped_share` of the tokens have another weight than their ratio, either truncated to the cap
    (`correction_truncated_share`) or masked (`correction_masked_share`); `correction_weight_mean` is the mean weight.
    """
    import torch

    touched = (factors - log_ratio.exp()).abs() > 1e-6
    if correction == "none":
        touched = torch.zeros_like(touched)
    masked = touched & (factors == 0)

    def share(of: Tensor) -> float:
        return float(of.float().mean()) if len(of) else 0.0

    return {
        "correction_clipped_share": share(touched),
        "correction_truncated_share": share(touched & ~masked),
        "correction_masked_share": share(masked),
        "correction_weight_mean": float(factors.double().mean()) if len(factors) else 1.0,
    }


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

    Of tokens that lie in one process; training adds up `mismatch.MismatchSums` over ranks, which is tested against it.

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
