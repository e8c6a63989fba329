"""The fused policy loss in plain torch: logits are computed, kept and differentiated.

What the fused op is compared with, and what runs in its place to debug (`model.fused_loss = false`) and where the
extension is not built. Differentiable through autograd alone; under vocabulary shards the few sums over ranks are made
in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.kernels.inputs import PolicyLossInputs, WeightGrad
from megatron_klear.kernels.selection import indices_of
from megatron_klear.kernels.vocab_parallel import VocabShard, enter_shards, gather_shards, sum_shards
from megatron_klear.types import KLEstimator, LossCoefficients, LossKind

MAX_LOG_RATIO = 20.0
MAX_KL = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossOutput:
    """The loss of a row of T tokens, and per token what it was made of.

    Per-token tensors are [T], without gradient, the same on every vocabulary shard, and 0 where a token has neither
    policy nor NLL weight.
    """

    loss: Tensor  # scalar: sum of weighted token losses, differentiable in hidden states and head
    logprobs: Tensor  # float32, of the target at the given temperature
    entropy: Tensor  # float32, nats, of the whole distribution at that temperature
    lse: Tensor  # float32, log-sum-exp of logits / temperature
    ratio: Tensor  # float32, exp(clamp(logp - old_logp)); 1 where there are no old log-probs
    region: Tensor  # uint8, 0 inside the clip; 1 A<0 low, 2 A>=0 high, 3 A>=0 low, 4 A<0 high, 5 past the dual clip


class _HeadWeight(torch.autograd.Function):
    """The head in the precision of the logits, its gradient going where `weight_grad` says."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor | None, mode: WeightGrad, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.main_grad, ctx.mode = main_grad, mode
        return weight.view_as(weight) if weight.dtype == dtype else weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (weight,) = ctx.saved_tensors
        if ctx.mode == "autograd":
            return grad_outputs[0].to(weight.dtype), None, None, None
        ctx.main_grad.add_(grad_outputs[0])
        mark_head(weight, ctx.mode)
        return head_gradient_stub(weight, ctx.mode), None, None, None


def head_gradient_stub(weight: Tensor, mode: WeightGrad) -> Tensor | None:
    """What backward returns for a head whose gradient is in main_grad already, by Megatron's convention.

    Untied: a tensor of no meaning, which makes the parameter's hooks run; they see the flag of `mark_head` and leave
    it. Tied to the embedding in the same stage: nothing, since the embedding's own gradient will make them run.
    """
    if mode == "main_grad_tied":
        return None
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def mark_head(weight: Tensor, mode: WeightGrad) -> None:
    """Set Megatron's flag on a head whose gradient goes to main_grad without autograd."""
    if mode == "main_grad":
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]


def check_weight_grad(weight: Tensor, main_grad: Tensor | None, mode: WeightGrad) -> None:
    """Raise ValueError unless `main_grad` suits `mode` and the head."""
    if mode not in ("autograd", "main_grad", "main_grad_tied"):
        raise ValueError(f"weight_grad {mode!r} must be 'autograd', 'main_grad' or 'main_grad_tied'")
    if (main_grad is None) != (mode == "autograd"):
        raise ValueError(
            f"weight_grad {mode!r} and main_grad do not go together: give main_grad for all but 'autograd'"
        )
    if main_grad is not None and (main_grad.shape != weight.shape or not main_grad.is_contiguous()):
        raise ValueError(
            f"main_grad {tuple(main_grad.shape)} must be contiguous and like the head, {tuple(weight.shape)}"
        )


def _scaled_logits(
    hidden: Tensor, weight: Tensor, temperature: float | Tensor, shard: VocabShard, dtype: torch.dtype
) -> Tensor:
    """Logits / temperature [T, V_local] in at least float32, rounded to `dtype` on the way; padded columns -inf."""
    logits = hidden.to(dtype) @ weight.t()
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    logits = logits / (temperature.to(logits.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    if shard.valid < logits.shape[1]:
        columns = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.masked_fill(columns >= shard.valid, -torch.inf)
    return logits


def _row_terms(logits: Tensor, targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of the target, entropy and log-sum-exp of each row, [T], over all shards."""
    top = gather_shards(logits.detach().amax(dim=-1), shard).amax(dim=0)
    shifted = logits - top.unsqueeze(-1)
    exponentials = shifted.exp()
    total = sum_shards(exponentials.sum(dim=-1), shard)
    local = targets - shard.start
    here = (local >= 0) & (local < shard.valid)
    picked = shifted.gather(-1, local.clamp(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
    target = sum_shards(torch.where(here, picked, torch.zeros_like(picked)), shard)
    log_total = total.log()
    finite = shifted.masked_fill(shifted.isneginf(), 0)  # 0 * -inf is NaN, in the entropy and in its gradient
    entropy = log_total - sum_shards((exponentials * finite).sum(dim=-1), shard) / total
    return target - log_total, entropy, top + log_total.detach()


def ratio_and_region(
    coefficients: LossCoefficients | None, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The importance ratio and the clip region (see `PolicyLossOutput`) of each token, [T]."""
    region = torch.zeros_like(logprobs, dtype=torch.uint8)
    if old_logprobs is None:
        return torch.ones_like(logprobs), region
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if coefficients is None or advantages is None:
        return ratio, region
    if coefficients.kind in (LossKind.DPPO_TV, LossKind.DPPO_KL):
        return ratio, _past_divergence(coefficients, logprobs, old_logprobs, advantages)
    low, high, negative = ratio < coefficients.ratio_low, ratio > coefficients.ratio_high, advantages < 0
    region = region.masked_fill(low, 3).masked_fill(low & negative, 1)
    region = region.masked_fill(high, 2).masked_fill(high & negative, 4)
    return ratio, region.masked_fill(negative & (ratio > coefficients.dual_clip), 5)


def _past_divergence(loss: LossCoefficients, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """DPPO's region [T]: 1 (A < 0) or 2 where the divergence is past its bound and the token moves further away."""
    present, old = logprobs.exp(), old_logprobs.exp()
    if loss.kind == LossKind.DPPO_TV:
        divergence = (present - old).abs()
    else:
        rest, old_rest = -logprobs.expm1(), -old_logprobs.expm1()
        divergence = torch.where(old > 0, old * (old_logprobs - logprobs), 0.0)
        divergence = divergence + torch.where(old_rest > 0, old_rest * (old_rest.log() - rest.log()), 0.0)
    low = (advantages < 0) & (logprobs < old_logprobs) & (divergence > loss.beta_low)
    high = (advantages >= 0) & (logprobs > old_logprobs) & (divergence > loss.beta_high)
    return torch.zeros_like(logprobs, dtype=torch.uint8).masked_fill(low, 1).masked_fill(high, 2)


class _KL(torch.autograd.Function):
    """Values whose derivative in the log-probs is given."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad_outputs[0] * slope, None, None


def kl_term(logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate of the KL divergence to a reference (Schulman, 2020), [T], differentiable in `logprobs`.

    With d = ref - logp, `ratio` r = exp(logp - old) [T] and k3 = exp(d) - d - 1:

        estimator     value     d value / d logp
        k3            k3        1 - exp(d)     GRPO's; verl's `low_var_kl`. Its mean is no gradient of the KL
        k2            d^2 / 2   -d             unbiased on-policy
        k3_unbiased   k3        -d             NeMo-RL's default (k3 through exp(logp - sg(logp))), verl's `k3+`
        k3_weighted   r k3      -r d           unbiased off-policy (DeepSeek-V3.2, arXiv 2512.02556); TRL's
                                               `use_bias_correction_kl`, slime's `use_unbiased_kl`

    The last two are the derivative of r k3 in logp, r (k3 + 1 - exp(d)) = -r d, with r = 1 or as it is.

    A value above 10 is 10 and has no gradient, nor has |d| above 20: the two clamps of NeMo-RL's `calculate_kl` and of
    verl's `low_var_kl`. One outlier would otherwise outweigh a batch by exp(d).
    """
    difference = (ref_logprobs - logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weight = ratio.detach() if estimator == "k3_weighted" else torch.ones_like(difference)
    value = weight * (difference.square() / 2 if estimator == "k2" else difference.expm1() - difference)
    slope = -weight * (difference.expm1() if estimator == "k3" else difference)
    slope = slope.masked_fill((value > MAX_KL) | (difference.abs() >= MAX_LOG_RATIO), 0.0)
    return cast(Tensor, _KL.apply(logprobs, value.clamp(max=MAX_KL), slope))  # type: ignore[no-untyped-call]


def _rows_of(value: Any, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() else value


def _scatter(values: Tensor, rows: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(num_tokens, dtype=dtype, device=values.device).index_copy_(0, rows, values.detach().to(dtype))


def fused_policy_loss_ref(inputs: PolicyLossInputs) -> PolicyLossOutput:
    """`fused_policy_loss` in plain torch: same inputs, same result.

    `chunk_tokens` and `loss_scale` change nothing here. `loss` sees the tokens that carry a weight, in their order.
    """
    weight, targets = inputs.weight, inputs.targets
    check_weight_grad(weight, inputs.main_grad, inputs.weight_grad)
    shard = VocabShard.of(weight, inputs.group, inputs.vocab_size)
    hidden = enter_shards(inputs.hidden, shard, inputs.sequence_parallel)
    rows = indices_of(_weighted(inputs), targets, inputs.vocab_size or weight.shape[0] * shard.size)
    head = cast(
        Tensor,
        _HeadWeight.apply(weight, inputs.main_grad, inputs.weight_grad, inputs.logits_dtype),  # type: ignore[no-untyped-call]
    )
    logits = _scaled_logits(hidden[rows], head, _rows_of(inputs.temperature, rows), shard, inputs.logits_dtype)
    logprobs, entropy, lse = _row_terms(logits, targets[rows], shard)
    old, advantage = (_rows_of(value, rows) for value in (inputs.old_logprobs, inputs.advantages))
    ratio, region = ratio_and_region(inputs.loss.coefficients(), logprobs.detach(), old, advantage)
    per_token = inputs.loss(logprobs, old, advantage) + _regularisers(inputs, rows, logprobs, entropy, ratio)
    total = inputs.policy_weights[rows] * per_token
    if inputs.nll_weights is not None:
        total = total - inputs.nll_weights[rows] * logprobs
    values = (logprobs, entropy, lse, ratio)
    outputs = (_scatter(value, rows, len(targets), torch.promote_types(value.dtype, torch.float32)) for value in values)
    return PolicyLossOutput(
        loss=total.sum(),
        **dict(zip(("logprobs", "entropy", "lse", "ratio"), outputs, strict=True)),
        region=_scatter(region, rows, len(targets), torch.uint8),
    )


def _weighted(inputs: PolicyLossInputs) -> Tensor:
    weighted = inputs.policy_weights != 0
    return weighted if inputs.nll_weights is None else weighted | (inputs.nll_weights != 0)


def _regularisers(
    inputs: PolicyLossInputs, rows: Tensor, logprobs: Tensor, entropy: Tensor, ratio: Tensor
) -> Tensor | float:
    """What entropy and KL add to each token's loss."""
    added: Tensor | float = 0.0
    if inputs.entropy_coefficient:
        added = added - inputs.entropy_coefficient * entropy
    if inputs.kl_coefficient:
        ref = _rows_of(inputs.ref_logprobs, rows)
        if ref is None:
            raise ValueError(f"kl_coefficient {inputs.kl_coefficient} needs ref_logprobs, and there are none")
        added = added + inputs.kl_coefficient * kl_term(logprobs, ref, ratio, inputs.kl_estimator)
    return added


def vocab_parallel_logprobs_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each target, entropy and log-sum-exp of each row, [T] float32, in plain torch.

    The first two are differentiable.

    Targets outside the vocabulary are read as 0: mask what comes of them.
    """
    shard = VocabShard.of(weight, group, vocab_size)
    hidden = enter_shards(hidden, shard, sequence_parallel)
    total_vocab = weight.shape[0] * shard.size if vocab_size is None else vocab_size
    known = torch.where((targets >= 0) & (targets < total_vocab), targets, torch.zeros_like(targets))
    logits = _scaled_logits(hidden, weight.to(logits_dtype), temperature, shard, logits_dtype)
    return _row_terms(logits, known, shard)
