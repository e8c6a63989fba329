"""The row kernels' formula in plain torch, straight from the definitions, for any float dtype and by autograd."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_klear.kernels import Terms, Tokens, rows
from megatron_klear.kernels.rows import RowOutputs
from megatron_klear.types import KLEstimator, LossCoefficients, LossKind

KINDS = {
    "nll": LossCoefficients(kind=LossKind.NLL),
    "reinforce": LossCoefficients(kind=LossKind.REINFORCE),
    "ppo": LossCoefficients(kind=LossKind.PPO, ratio_low=0.8, ratio_high=1.28),
    "ppo_dual": LossCoefficients(kind=LossKind.PPO, ratio_low=0.8, ratio_high=1.28, dual_clip=3.0),
    "gppo": LossCoefficients(kind=LossKind.GPPO, ratio_low=0.8, ratio_high=1.28),
    "gppo_beta": LossCoefficients(kind=LossKind.GPPO, ratio_low=0.8, ratio_high=1.2, beta_low=0.5, beta_high=0.75),
    "gppo_dual": LossCoefficients(kind=LossKind.GPPO, ratio_low=0.8, ratio_high=1.28, dual_clip=2.0),
    "cispo": LossCoefficients(kind=LossKind.CISPO, ratio_low=0.5, ratio_high=1.5),
    "sapo": LossCoefficients(kind=LossKind.SAPO, beta_low=1.5, beta_high=0.75),
    "dppo_tv": LossCoefficients(kind=LossKind.DPPO_TV, ratio_high=1.7, beta_low=0.01, beta_high=0.02),
    "dppo_kl": LossCoefficients(kind=LossKind.DPPO_KL, ratio_high=1.7, beta_low=0.002, beta_high=0.001),
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A chunk of C rows and everything that is asked of it."""

    logits: Tensor  # [C, V]
    targets: Tensor
    coefficients: LossCoefficients
    policy_weights: Tensor
    nll_weights: Tensor | None = None
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    ref_logprobs: Tensor | None = None
    temperature: float | Tensor = 1.0
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3"
    vocab_size: int | None = None

    def arguments(self) -> dict[str, object]:
        """Keyword arguments of the row functions, the logits left out."""
        names = [name for name in self.__dataclass_fields__ if name != "logits"]
        return {name: getattr(self, name) for name in names}

    def map(self, change) -> Rows:
        """Each tensor changed: moved, sliced."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})


def take_inputs(arguments: dict[str, Any]) -> tuple[Tokens, Terms]:
    """The tokens and terms among keyword arguments, which are left without them."""
    tokens, terms = (
        {f.name: arguments.pop(f.name) for f in fields(kind) if f.name in arguments} for kind in (Tokens, Terms)
    )
    return Tokens(**tokens), Terms(**terms)


def policy_loss_rows(logits: Tensor, **arguments: Any) -> RowOutputs:
    """The row kernel under test, with the arguments of `Rows`."""
    return rows.policy_loss_rows(logits, *take_inputs(arguments), **arguments)


def random_rows(
    num_rows: int,
    columns: int,
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float | str = 1.0,
    entropy_coefficient: float = 0.0,
    kl_coefficient: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    padding: int = 0,
    nll: bool = False,
    seed: int = 0,
) -> Rows:
    """Rows that visit all regions, no ratio so near a bound that rounding could move it across."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    vocab_size = columns - padding
    logits = (normal(num_rows, columns) * 3).to(dtype)
    logits[:, vocab_size:] = float("nan")
    targets = torch.randint(0, vocab_size, (num_rows,), generator=random)
    scale = 0.7 + torch.rand(num_rows, generator=random) if temperature == "token" else float(temperature)
    divisor = scale[:, None] if isinstance(scale, Tensor) else scale
    exact = torch.log_softmax(logits[:, :vocab_size].double() / divisor, -1).gather(1, targets[:, None])[:, 0]
    log_ratio = (normal(num_rows) * 0.6).double()
    loss = KINDS[kind]
    for bound in (loss.ratio_low, loss.ratio_high, loss.dual_clip):
        log_ratio = torch.where((log_ratio.exp() - bound).abs() < 1e-2, log_ratio + 0.05, log_ratio)
    weights = torch.rand(num_rows, generator=random) / num_rows
    weights[::5] = 0
    return Rows(
        logits=logits,
        targets=targets,
        coefficients=loss,
        policy_weights=weights,
        nll_weights=torch.rand(num_rows, generator=random) / num_rows if nll else None,
        old_logprobs=(exact - log_ratio).float(),
        advantages=normal(num_rows),
        ref_logprobs=(exact + normal(num_rows) * 0.5).float() if kl_coefficient else None,
        temperature=scale,
        entropy_coefficient=entropy_coefficient,
        kl_coefficient=kl_coefficient,
        kl_estimator=kl_estimator,
        vocab_size=vocab_size,
    )


def far(loss: LossCoefficients, logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """DPPO's mask [C]: the token's probability has left the old one, and the update would drive it further."""
    p, mu = logprobs.exp(), old.exp()
    divergence = (p - mu).abs()
    if loss.kind == LossKind.DPPO_KL:
        # both logarithms by their arguments; at the probabilities 0 and 1 by their limits
        rest, old_rest = -logprobs.expm1(), (-old.expm1()).clamp(min=0)
        divergence = torch.xlogy(mu, mu) - torch.where(mu > 0, mu * logprobs, 0.0)
        divergence = divergence + torch.xlogy(old_rest, old_rest) - torch.xlogy(old_rest, rest)
    worse = torch.where(advantages < 0, p < mu, p > mu)
    return worse & (divergence > torch.where(advantages < 0, loss.beta_low, loss.beta_high))


def policy_term(loss: LossCoefficients, logprobs: Tensor, ratio: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
    """Unweighted policy losses [C]; `ratio` is differentiable, with derivative itself."""
    low, high = loss.ratio_low, loss.ratio_high
    if loss.kind == LossKind.NLL:
        return -logprobs
    if loss.kind == LossKind.REINFORCE:
        return -advantages * logprobs
    if loss.kind == LossKind.CISPO:
        return -advantages * ratio.detach().clamp(low, high) * logprobs
    if loss.kind == LossKind.SAPO:
        tau = torch.where(advantages > 0, loss.beta_high, loss.beta_low)
        return -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    if loss.kind in (LossKind.DPPO_TV, LossKind.DPPO_KL):
        kept = torch.where(far(loss, logprobs.detach(), old, advantages), 0.0, 1.0)
        return -advantages * kept * ratio.detach().clamp(max=high) * (ratio / ratio.detach())
    one = ratio / ratio.detach() if loss.kind == LossKind.GPPO else torch.ones_like(ratio)
    beta_low, beta_high = (loss.beta_low, loss.beta_high) if loss.kind == LossKind.GPPO else (1.0, 1.0)
    raised = torch.where(ratio < low, beta_low * low * one, ratio)
    lowered = torch.where(ratio > high, beta_high * high * one, ratio)
    value = -advantages * torch.where(advantages < 0, raised, lowered)
    past = (advantages < 0) & (ratio > loss.dual_clip)
    return torch.where(past, -advantages * min(loss.dual_clip, 1e30), value)


@dataclass(frozen=True)
class Expected:
    """What the formula gives."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    ratio: Tensor
    loss: Tensor
    gradient: Tensor  # [C, V], in the dtype of the logits that went in


def expected(rows: Rows, dtype: torch.dtype) -> Expected:
    """Losses and gradient computed in `dtype`; rows of weight zero give 0."""
    leaf = rows.logits.clone() if rows.logits.dtype == torch.bfloat16 else rows.logits.to(dtype, copy=True)
    if dtype == torch.float64:
        leaf = rows.logits.double()
    leaf = leaf.requires_grad_(True)
    temperature = rows.temperature.to(dtype)[:, None] if isinstance(rows.temperature, Tensor) else rows.temperature
    scaled = leaf[:, : rows.vocab_size].to(dtype) / temperature
    distribution = torch.log_softmax(scaled, -1)
    logprobs = distribution.gather(1, rows.targets[:, None])[:, 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    old = logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs.to(dtype)
    ratio = (logprobs.detach() - old).clamp(-20, 20).exp() * (logprobs - logprobs.detach()).exp()
    advantages = torch.zeros_like(logprobs) if rows.advantages is None else rows.advantages.to(dtype)
    weights = rows.policy_weights.to(dtype)
    loss = weights * policy_term(rows.coefficients, logprobs, ratio, advantages, old)
    loss = loss - rows.entropy_coefficient * weights * entropy
    if rows.nll_weights is not None:
        loss = loss - rows.nll_weights.to(dtype) * logprobs
    if rows.ref_logprobs is not None:
        difference = rows.ref_logprobs.to(dtype) - logprobs
        value = (difference.exp() - difference - 1).clamp(max=10)
        if rows.kl_estimator == "k2":
            value = (difference.square() / 2).clamp(max=10)
        if rows.kl_estimator == "k3_unbiased":
            value = ((logprobs - logprobs.detach()).exp() * (difference.exp() - difference - 1)).clamp(max=10)
        if rows.kl_estimator == "k3_weighted":
            value = (ratio * (difference.exp() - difference - 1)).clamp(max=10)
        loss = loss + rows.kl_coefficient * weights * value
    loss.sum().backward()
    used = weights != 0 if rows.nll_weights is None else (weights != 0) | (rows.nll_weights != 0)
    tensors = (logprobs, entropy, torch.logsumexp(scaled, -1), ratio, loss)
    return Expected(*(torch.where(used, tensor.detach(), 0.0) for tensor in tensors), leaf.grad)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((value.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))
