"""From hidden states to the policy loss and its gradients, without keeping logits.

Three matrix products where torch's autograd of a recomputed head takes four: the slope of every loss of the family is
known as soon as a token's log-prob is, so the gradient of the logits is written in the forward pass, over the logits,
chunk by chunk. A loss outside the family (your own, or one that is not local to a token) runs in two phases, log-probs
first and gradients second, which is four products.

Where the row kernels are not built for a device, the plain-torch reference runs instead and says so once.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.kernels import extension, ops
from megatron_klear.kernels.inputs import PolicyLossInputs, Terms
from megatron_klear.kernels.reference import (
    PolicyLossOutput,
    check_weight_grad,
    fused_policy_loss_ref,
    mark_head,
    vocab_parallel_logprobs_ref,
)
from megatron_klear.kernels.selection import Chosen, Group, choose_tokens
from megatron_klear.kernels.vocab_parallel import VocabShard, group_name
from megatron_klear.types import KLEstimator, LossCoefficients, LossKind

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobOutput:
    """What the forward-only pass gives for each token, [T] float32, 0 where it was not asked for."""

    logprobs: Tensor
    entropy: Tensor  # nats
    lse: Tensor  # log-sum-exp of logits / temperature


def fused_policy_loss(inputs: PolicyLossInputs) -> PolicyLossOutput:
    """Policy loss of T tokens and its gradients, made at once.

    The loss is the sum of policy_weights * (loss + kl_coefficient * kl - entropy_coefficient * entropy) - nll_weights
    * logp. Raises ValueError on shapes, types and targets that do not fit, before anything is written.
    """
    _check(inputs)
    if not kernels_usable(inputs.hidden.device.type):
        return fused_policy_loss_ref(inputs)
    coefficients = inputs.loss.coefficients()
    if coefficients is None:
        return _two_phases(inputs)
    name = type(inputs.loss).__name__
    if coefficients.kind != LossKind.NLL and inputs.advantages is None:
        raise ValueError(f"{name} needs advantages, and the batch carries none")
    if coefficients.kind not in (LossKind.NLL, LossKind.REINFORCE) and inputs.old_logprobs is None:
        raise ValueError(f"{name} needs old_logprobs, and the batch carries none: run the log-prob pass first")
    return _output(inputs, coefficients, inputs.advantages, inputs.nll_weights, inputs.chosen)


def _check(inputs: PolicyLossInputs) -> None:
    if not callable(getattr(inputs.loss, "coefficients", None)):
        raise TypeError(f"{type(inputs.loss).__name__} is no token loss; of a sequence loss pass token_loss()")
    check_weight_grad(inputs.weight, inputs.main_grad, inputs.weight_grad)
    check_head(
        inputs.hidden, inputs.weight, inputs.targets, inputs.group, inputs.sequence_parallel, inputs.logits_dtype
    )
    check_per_token(inputs.targets, inputs.temperature)
    for name in ("policy_weights", "old_logprobs", "advantages", "nll_weights", "ref_logprobs"):
        check_per_token(inputs.targets, getattr(inputs, name), name)
    if inputs.kl_coefficient and inputs.ref_logprobs is None:
        raise ValueError(f"kl_coefficient {inputs.kl_coefficient} needs ref_logprobs, and there are none")
    if inputs.kl_estimator not in get_args(KLEstimator):
        raise ValueError(f"kl_estimator must be one of {', '.join(get_args(KLEstimator))}, not {inputs.kl_estimator!r}")
    if not (math.isfinite(inputs.loss_scale) and inputs.loss_scale > 0):
        raise ValueError(f"loss_scale must be positive, not {inputs.loss_scale}")


def _output(
    inputs: PolicyLossInputs,
    coefficients: LossCoefficients,
    advantages: Tensor | None,
    nll_weights: Tensor | None,
    chosen: Chosen | None,
) -> PolicyLossOutput:
    scale = 1.0 if inputs.main_grad is None else inputs.loss_scale
    terms = Terms(
        coefficients=coefficients,
        entropy_coefficient=inputs.entropy_coefficient,
        kl_coefficient=inputs.kl_coefficient,
        kl_estimator=inputs.kl_estimator,
    )
    shared = (
        inputs.targets,
        *_indices(chosen),
        _float(inputs.policy_weights, scale),
        _float(nll_weights, scale),
        _float(inputs.old_logprobs),
        _float(advantages),
        _float(inputs.ref_logprobs),
        *_temperatures(inputs.temperature),
        ops.pack_terms(terms),
        group_name(inputs.group),
        whole_vocabulary(inputs.weight, inputs.group, inputs.vocab_size),
        inputs.sequence_parallel and inputs.group is not None,
        inputs.logits_dtype,
        inputs.chunk_tokens or 0,
    )
    learning = torch.is_grad_enabled()
    if inputs.main_grad is not None and learning and inputs.weight.requires_grad:
        results = ops.PolicyLossInto.apply(  # type: ignore[no-untyped-call]
            inputs.hidden, inputs.weight, inputs.weight_grad, inputs.loss_scale, inputs.main_grad, *shared
        )
        mark_head(inputs.weight, inputs.weight_grad)
    else:
        wanted = (learning and inputs.hidden.requires_grad, learning and inputs.weight.requires_grad)
        results = ops.policy_loss(inputs.hidden, inputs.weight, *shared, *wanted)
    return PolicyLossOutput(loss=results[0], **dict(zip(ops.PER_TOKEN, results[1:6], strict=True)))


def _indices(chosen: Chosen | None) -> tuple[Tensor | None, Tensor | None, list[int]]:
    if chosen is None:
        return None, None, []
    return chosen.active.index, chosen.silent.index, [chosen.active.first, chosen.silent.first]


def _two_phases(inputs: PolicyLossInputs) -> PolicyLossOutput:
    """Log-probs, then the loss and its slopes in torch, then the gradients of -slope * logp: four products."""
    vocab_size = whole_vocabulary(inputs.weight, inputs.group, inputs.vocab_size)
    chosen = inputs.chosen or choose_tokens(
        inputs.targets,
        inputs.policy_weights,
        vocab_size=vocab_size,
        coefficients=None,
        nll_weights=inputs.nll_weights,
    )
    rows = chosen.active.index
    first = fused_logprobs(
        inputs.hidden.detach(),
        inputs.weight.detach(),
        inputs.targets,
        chosen=chosen.active,
        temperature=inputs.temperature,
        group=inputs.group,
        vocab_size=vocab_size,
        sequence_parallel=inputs.sequence_parallel,
        logits_dtype=inputs.logits_dtype,
        chunk_tokens=inputs.chunk_tokens,
    )
    old, advantages = (None if t is None else t[rows] for t in (inputs.old_logprobs, inputs.advantages))
    with torch.enable_grad():
        logprobs = first.logprobs[rows].requires_grad_()
        value = (inputs.policy_weights[rows] * inputs.loss(logprobs, old, advantages)).sum()
        (slope,) = torch.autograd.grad(value, logprobs)
    slopes = torch.zeros_like(first.logprobs).index_copy_(0, rows, slope)
    minus = -slopes if inputs.nll_weights is None else inputs.nll_weights - slopes
    linear = LossCoefficients(kind=LossKind.REINFORCE)
    output = _output(inputs, linear, torch.zeros_like(first.logprobs), minus, chosen)
    correction = value.detach() - (slope * logprobs.detach()).sum()
    return PolicyLossOutput(
        loss=output.loss + correction,
        **{name: getattr(output, name) for name in ops.PER_TOKEN},
    )


def fused_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    trained: Tensor | None = None,
    chosen: Group | None = None,
    temperature: float | Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
) -> LogprobOutput:
    """Log-prob of each target, entropy and log-sum-exp, without gradient: one matrix product, no logits kept.

    `trained` [T] bool picks the tokens to compute, the others get 0; or `chosen` does, found on the host by
    `choose_all`, and nothing waits for the device. Other arguments as in `PolicyLossInputs`.
    """
    check_head(hidden, weight, targets, group, sequence_parallel, logits_dtype)
    check_per_token(targets, temperature)
    check_per_token(targets, trained, "trained")
    total = whole_vocabulary(weight, group, vocab_size)
    sequence_parallel = sequence_parallel and group is not None
    if not kernels_usable(hidden.device.type):
        with torch.no_grad():
            logprobs, entropy, lse = vocab_parallel_logprobs_ref(
                hidden,
                weight,
                targets,
                temperature=temperature,
                group=group,
                vocab_size=total,
                sequence_parallel=sequence_parallel,
                logits_dtype=logits_dtype,
            )
        mask = torch.ones_like(targets, dtype=torch.bool) if trained is None else trained
        if chosen is not None:
            mask = torch.zeros_like(mask).index_fill_(0, chosen.index, True)
        values = (torch.where(mask, value.float(), 0.0) for value in (logprobs, entropy, lse))
        return LogprobOutput(**dict(zip(("logprobs", "entropy", "lse"), values, strict=True)))
    values = ops.logprobs(
        hidden.detach(),
        weight.detach(),
        targets,
        trained,
        None if chosen is None else chosen.index,
        -1 if chosen is None else chosen.first,
        *_temperatures(temperature),
        group_name(group),
        total,
        sequence_parallel,
        logits_dtype,
        chunk_tokens or 0,
    )
    return LogprobOutput(**dict(zip(("logprobs", "entropy", "lse"), values, strict=True)))


def _float(values: Tensor | None, scale: float = 1.0) -> Tensor | None:
    if values is None:
        return None
    values = values.detach().to(torch.float32)
    return values if scale == 1.0 else values * scale


def _temperatures(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    return (_float(temperature), 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))


def whole_vocabulary(weight: Tensor, group: dist.ProcessGroup | None, vocab_size: int | None) -> int:
    """Size of the vocabulary over all shards, without padding."""
    shard = VocabShard.of(weight, group, vocab_size)
    return int(weight.shape[0]) * shard.size if vocab_size is None else vocab_size


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernels_usable(device_type: str) -> bool:
    """Whether the row kernels run on this kind of device; says so once where they do not."""
    return _kernels_usable(device_type)


@functools.cache
def _kernels_usable(device_type: str) -> bool:
    usable = extension.usable(torch.device(device_type))
    if not usable:
        reason = extension.available().reason or f"the row kernels have no part for {device_type}"
        _log.warning("the fused policy loss runs as plain torch, slower and with all logits in memory: %s", reason)
    return usable


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    logits_dtype: torch.dtype,
) -> None:
    """Raise ValueError unless hidden states, head and targets belong together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, H] and weight [V, H], not {list(hidden.shape)} and {list(weight.shape)}")
    ranks = dist.get_world_size(group) if sequence_parallel and group is not None else 1
    if targets.dtype != torch.int64 or targets.shape != (hidden.shape[0] * ranks,):
        raise ValueError(
            f"targets must be int64 [{hidden.shape[0] * ranks}], not {targets.dtype} {list(targets.shape)}: hidden has "
            f"{hidden.shape[0]} tokens on each of {ranks} sequence-parallel ranks"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"hidden and weight must both be float32 or bfloat16, not {hidden.dtype} and {weight.dtype}")
    if logits_dtype not in (torch.float32, weight.dtype):
        raise ValueError(f"logits_dtype must be float32 or the head's {weight.dtype}, not {logits_dtype}")


def check_per_token(targets: Tensor, values: Any, name: str = "temperature") -> None:
    """Raise ValueError unless `values` is absent, a number or one value a token."""
    if isinstance(values, Tensor) and (values.shape != targets.shape or values.device != targets.device):
        raise ValueError(
            f"{name} must be {list(targets.shape)} on {targets.device}, one value a token, "
            f"not {list(values.shape)} on {values.device}"
        )
