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
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.kernels import extension, ops
from megatron_klear.kernels.chunks import Terms
from megatron_klear.kernels.reference import (
    PolicyLossOutput,
    WeightGrad,
    check_weight_grad,
    fused_policy_loss_ref,
    mark_head,
    vocab_parallel_logprobs_ref,
    weighted_rows,
)
from megatron_klear.kernels.vocab_parallel import VocabShard, group_name
from megatron_klear.types import KLEstimator, LossCoefficients, LossKind, TokenLoss

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobOutput:
    """What the forward-only pass gives for each token, [T] float32, 0 where it was not asked for."""

    logprobs: Tensor
    entropy: Tensor  # nats
    lse: Tensor  # log-sum-exp of logits / temperature


def fused_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss: TokenLoss,
    policy_weights: Tensor,
    old_logprobs: Tensor | None = None,
    advantages: Tensor | None = None,
    nll_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_coefficient: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    main_grad: Tensor | None = None,
    weight_grad: WeightGrad = "autograd",
    loss_scale: float = 1.0,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
) -> PolicyLossOutput:
    """Policy loss of T tokens and its gradients, made at once; each argument is described under `PolicyLossCall`.

    The loss is the sum of policy_weights * (loss + kl_coefficient * kl - entropy_coefficient * entropy) - nll_weights
    * logp. Raises ValueError on shapes, types and targets that do not fit, before anything is written.
    """
    return PolicyLossCall(
        hidden=hidden,
        weight=weight,
        targets=targets,
        loss=loss,
        policy_weights=policy_weights,
        old_logprobs=old_logprobs,
        advantages=advantages,
        nll_weights=nll_weights,
        temperature=temperature,
        entropy_coefficient=entropy_coefficient,
        ref_logprobs=ref_logprobs,
        kl_coefficient=kl_coefficient,
        kl_estimator=kl_estimator,
        group=group,
        vocab_size=vocab_size,
        sequence_parallel=sequence_parallel,
        main_grad=main_grad,
        weight_grad=weight_grad,
        loss_scale=loss_scale,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens,
    ).run()


@dataclass(frozen=True, kw_only=True)
class PolicyLossCall:
    """The arguments of `fused_policy_loss`, and what is done with them."""

    hidden: Tensor
    """[T, H] float32 or bfloat16; with `sequence_parallel` this rank's [T / ranks, H]. Its gradient comes summed over
    the vocabulary shards: wrap it in no further collective."""
    weight: Tensor
    """[V_local, H] in the type of `hidden`: this rank's rows of the head, padding included."""
    targets: Tensor
    """[T] int64, ids of the whole vocabulary. This and every other per-token tensor is the same on all ranks."""
    loss: TokenLoss
    """One without coefficients runs in two phases, on the tokens that carry a weight, in their order."""
    policy_weights: Tensor
    """[T]. Tokens that have neither this weight nor an NLL weight take no part; their outputs are 0."""
    old_logprobs: Tensor | None
    advantages: Tensor | None
    nll_weights: Tensor | None
    temperature: float | Tensor
    """Divides the logits; one number, or [T]."""
    entropy_coefficient: float
    ref_logprobs: Tensor | None
    kl_coefficient: float
    kl_estimator: KLEstimator
    """Form of the KL term, see `reference.kl_term`."""
    group: dist.ProcessGroup | None
    """Ranks that hold the vocabulary's shards, equal in size and in order of rank."""
    vocab_size: int | None
    """Size of the whole vocabulary without padding; None where there is no padding."""
    sequence_parallel: bool
    main_grad: Tensor | None
    """[V_local, H] float32, where the head's gradient is added during this call."""
    weight_grad: WeightGrad
    """"autograd" returns the head's gradient in backward. "main_grad" adds it to `main_grad` and sets Megatron's flag
    `grad_added_to_main_grad`. "main_grad_tied" adds it and leaves the flag alone: for a head tied to an
    embedding of the same stage, whose own gradient is still to be added."""
    loss_scale: float
    """With a `main_grad`, the scale that backward will give the loss."""
    logits_dtype: torch.dtype
    """Rounding of logits: float32, or bfloat16, which is faster."""
    chunk_tokens: int | None
    """Tokens whose logits exist at a time; None fits them to the device."""

    def run(self) -> PolicyLossOutput:
        """Check the arguments, then compute."""
        self._check()
        if not kernels_usable(self.hidden.device.type):
            return fused_policy_loss_ref(**{field.name: getattr(self, field.name) for field in fields(self)})
        coefficients = self.loss.coefficients()
        if coefficients is None:
            return self._two_phases()
        name = type(self.loss).__name__
        if coefficients.kind != LossKind.NLL and self.advantages is None:
            raise ValueError(f"{name} needs advantages, and the batch carries none")
        if coefficients.kind not in (LossKind.NLL, LossKind.REINFORCE) and self.old_logprobs is None:
            raise ValueError(f"{name} needs old_logprobs, and the batch carries none: run the log-prob pass first")
        return self._output(coefficients, self.advantages, self.nll_weights)

    def _check(self) -> None:
        if not callable(getattr(self.loss, "coefficients", None)):
            raise TypeError(f"{type(self.loss).__name__} is no token loss; of a sequence loss pass token_loss()")
        check_weight_grad(self.weight, self.main_grad, self.weight_grad)
        check_head(self.hidden, self.weight, self.targets, self.group, self.sequence_parallel, self.logits_dtype)
        check_per_token(self.targets, self.temperature)
        for name in ("policy_weights", "old_logprobs", "advantages", "nll_weights", "ref_logprobs"):
            check_per_token(self.targets, getattr(self, name), name)
        if self.kl_coefficient and self.ref_logprobs is None:
            raise ValueError(f"kl_coefficient {self.kl_coefficient} needs ref_logprobs, and there are none")
        if self.kl_estimator not in get_args(KLEstimator):
            raise ValueError(
                f"kl_estimator must be one of {', '.join(get_args(KLEstimator))}, not {self.kl_estimator!r}"
            )
        if not (math.isfinite(self.loss_scale) and self.loss_scale > 0):
            raise ValueError(f"loss_scale must be positive, not {self.loss_scale}")

    def _output(
        self, coefficients: LossCoefficients, advantages: Tensor | None, nll_weights: Tensor | None
    ) -> PolicyLossOutput:
        scale = 1.0 if self.main_grad is None else self.loss_scale
        terms = Terms(
            coefficients=coefficients,
            entropy_coefficient=self.entropy_coefficient,
            kl_coefficient=self.kl_coefficient,
            kl_estimator=self.kl_estimator,
        )
        shared = (
            self.targets,
            _float(self.policy_weights, scale),
            _float(nll_weights, scale),
            _float(self.old_logprobs),
            _float(advantages),
            _float(self.ref_logprobs),
            *_temperatures(self.temperature),
            ops.pack_terms(terms),
            group_name(self.group),
            whole_vocabulary(self.weight, self.group, self.vocab_size),
            self.sequence_parallel and self.group is not None,
            self.logits_dtype,
            self.chunk_tokens or 0,
        )
        learning = torch.is_grad_enabled()
        if self.main_grad is not None and learning and self.weight.requires_grad:
            results = ops.PolicyLossInto.apply(  # type: ignore[no-untyped-call]
                self.hidden, self.weight, self.weight_grad, self.loss_scale, self.main_grad, *shared
            )
            mark_head(self.weight, self.weight_grad)
        else:
            wanted = (learning and self.hidden.requires_grad, learning and self.weight.requires_grad)
            results = ops.policy_loss(self.hidden, self.weight, *shared, *wanted)
        return PolicyLossOutput(loss=results[0], **dict(zip(ops.PER_TOKEN, results[1:6], strict=True)))

    def _two_phases(self) -> PolicyLossOutput:
        """Log-probs, then the loss and its slopes in torch, then the gradients of -slope * logp: four products."""
        vocab_size = whole_vocabulary(self.weight, self.group, self.vocab_size)
        weighted = self.policy_weights != 0
        if self.nll_weights is not None:
            weighted = weighted | (self.nll_weights != 0)
        rows = weighted_rows(weighted, self.targets, vocab_size)
        first = fused_logprobs(
            self.hidden.detach(),
            self.weight.detach(),
            self.targets,
            trained=weighted,
            temperature=self.temperature,
            group=self.group,
            vocab_size=vocab_size,
            sequence_parallel=self.sequence_parallel,
            logits_dtype=self.logits_dtype,
            chunk_tokens=self.chunk_tokens,
        )
        old, advantages = (None if t is None else t[rows] for t in (self.old_logprobs, self.advantages))
        with torch.enable_grad():
            logprobs = first.logprobs[rows].requires_grad_()
            value = (self.policy_weights[rows] * self.loss(logprobs, old, advantages)).sum()
            (slope,) = torch.autograd.grad(value, logprobs)
        slopes = torch.zeros_like(first.logprobs).index_copy_(0, rows, slope)
        minus = -slopes if self.nll_weights is None else self.nll_weights - slopes
        linear = LossCoefficients(kind=LossKind.REINFORCE)
        output = self._output(linear, torch.zeros_like(first.logprobs), minus)
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
    temperature: float | Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
) -> LogprobOutput:
    """Log-prob of each target, entropy and log-sum-exp, without gradient: one matrix product, no logits kept.

    `trained` [T] bool picks the tokens to compute, the others get 0. Other arguments as in `PolicyLossCall`.
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
        values = (torch.where(mask, value.float(), 0.0) for value in (logprobs, entropy, lse))
        return LogprobOutput(**dict(zip(("logprobs", "entropy", "lse"), values, strict=True)))
    values = ops.logprobs(
        hidden.detach(),
        weight.detach(),
        targets,
        trained,
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
