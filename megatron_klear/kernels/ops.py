"""The fused policy loss as torch operators: schema, fake implementation and autograd.

`klear::policy_loss` returns the gradients it made in the forward pass and hands them on in the backward one.
`klear::policy_loss_into` adds the head's gradient to `main_grad` at once. `klear::logprobs` is forward only.
Loss coefficients travel as a list of numbers, process groups by name, groups of tokens as indices and where they start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_klear.kernels.chunks import Head, logprob_chunks, policy_loss_chunks
from megatron_klear.kernels.inputs import Terms, Tokens, WeightGrad
from megatron_klear.kernels.reference import head_gradient_stub
from megatron_klear.kernels.rows import RowOutputs
from megatron_klear.kernels.selection import Chosen, Group, choose_all, choose_tokens
from megatron_klear.kernels.vocab_parallel import VocabShard, group_of
from megatron_klear.types import KLEstimator, LossCoefficients, LossKind

PER_TOKEN = ("logprobs", "entropy", "lse", "ratio", "region")


def pack_terms(terms: Terms) -> list[float]:
    """The terms as numbers, in the order `unpack_terms` reads them."""
    c = terms.coefficients
    bounds = [c.ratio_low, c.ratio_high, c.beta_low, c.beta_high, c.dual_clip]
    estimator = get_args(KLEstimator).index(terms.kl_estimator)
    return [float(int(c.kind)), *bounds, terms.entropy_coefficient, terms.kl_coefficient, float(estimator)]


def unpack_terms(numbers: Sequence[float]) -> Terms:
    """The terms that `pack_terms` made numbers of."""
    kind, low, high, beta_low, beta_high, dual_clip, entropy, kl, estimator = numbers
    coefficients = LossCoefficients(
        kind=LossKind(int(kind)),
        ratio_low=low,
        ratio_high=high,
        beta_low=beta_low,
        beta_high=beta_high,
        dual_clip=dual_clip,
    )
    return Terms(
        coefficients=coefficients,
        entropy_coefficient=entropy,
        kl_coefficient=kl,
        kl_estimator=get_args(KLEstimator)[int(estimator)],
    )


def _head(weight: Tensor, group: str, vocab_size: int, logits_dtype: torch.dtype, chunk_tokens: int) -> Head:
    shard = VocabShard.of(weight, group_of(group), vocab_size)
    return Head(
        weight=weight,
        shard=shard,
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens or None,
    )


def _chosen(
    tokens: Tokens,
    terms: Sequence[float],
    vocab_size: int,
    active: Tensor | None,
    silent: Tensor | None,
    firsts: Sequence[int],
) -> Chosen:
    """The tokens given, or those found here: in the operator, so that a compiled graph is not broken by it."""
    if active is not None and silent is not None:
        return Chosen(active=Group(index=active, first=firsts[0]), silent=Group(index=silent, first=firsts[1]))
    unpacked = unpack_terms(terms)
    assert tokens.policy_weights is not None
    return choose_tokens(
        tokens.targets,
        tokens.policy_weights,
        vocab_size=vocab_size,
        coefficients=unpacked.coefficients,
        advantages=tokens.advantages,
        nll_weights=tokens.nll_weights,
        other_terms=bool(unpacked.entropy_coefficient or unpacked.kl_coefficient),
    )


def _per_token(outputs: RowOutputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return outputs.logprobs, outputs.entropy, outputs.lse, outputs.ratio, outputs.region


@torch.library.custom_op("klear::policy_loss", mutates_args=())
def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    active: Tensor | None,
    silent: Tensor | None,
    firsts: Sequence[int],
    policy_weights: Tensor,
    nll_weights: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    ref_logprobs: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    terms: Sequence[float],
    group: str,
    vocab_size: int,
    sequence_parallel: bool,
    logits_dtype: torch.dtype,
    chunk_tokens: int,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, per-token outputs, gradients of hidden states and head; gradients not wanted are empty tensors."""
    tokens = Tokens(
        targets=targets,
        policy_weights=policy_weights,
        nll_weights=nll_weights,
        old_logprobs=old_logprobs,
        advantages=advantages,
        ref_logprobs=ref_logprobs,
        temperature=temperature if temperatures is None else temperatures,
    )
    total = torch.zeros_like(weight, dtype=torch.float32) if weight_gradient else None
    result = policy_loss_chunks(
        hidden,
        _head(weight, group, vocab_size, logits_dtype, chunk_tokens),
        tokens,
        _chosen(tokens, terms, vocab_size, active, silent, firsts),
        unpack_terms(terms),
        sequence_parallel=sequence_parallel,
        hidden_gradient=hidden_gradient,
        weight_gradient=total,
    )
    hidden_total = hidden.new_empty(0) if result.hidden is None else result.hidden
    weight_total = weight.new_empty(0, dtype=torch.float32) if total is None else total
    return result.outputs.loss.sum(), *_per_token(result.outputs), hidden_total, weight_total


@policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    hidden_gradient, weight_gradient = arguments[-2:]
    return (
        *_fake_outputs(hidden, targets),
        torch.empty_like(hidden) if hidden_gradient else hidden.new_empty(0),
        torch.empty_like(weight, dtype=torch.float32) if weight_gradient else weight.new_empty(0, dtype=torch.float32),
    )


def _fake_outputs(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    count = targets.shape[0]
    values = (hidden.new_empty(count, dtype=torch.float32) for _ in range(4))
    return hidden.new_empty((), dtype=torch.float32), *values, hidden.new_empty(count, dtype=torch.uint8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, hidden_gradient, weight_gradient = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden_gradient, weight_gradient)
    ctx.wanted, ctx.weight_dtype, ctx.num_inputs = inputs[-2:], inputs[1].dtype, len(inputs)


def _backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight = ctx.saved_tensors
    scale = grad_outputs[0]
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    if scale is not None and ctx.wanted[0]:
        gradients[0] = (hidden * scale).to(hidden.dtype)
    if scale is not None and ctx.wanted[1]:
        gradients[1] = (weight * scale).to(ctx.weight_dtype)
    return tuple(gradients)


policy_loss.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("klear::policy_loss_into", mutates_args=("main_grad",))
def policy_loss_into(
    main_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    active: Tensor | None,
    silent: Tensor | None,
    firsts: Sequence[int],
    policy_weights: Tensor,
    nll_weights: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    ref_logprobs: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    terms: Sequence[float],
    group: str,
    vocab_size: int,
    sequence_parallel: bool,
    logits_dtype: torch.dtype,
    chunk_tokens: int,
    hidden_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `policy_loss`, the head's gradient being added to `main_grad`."""
    tokens = Tokens(
        targets=targets,
        policy_weights=policy_weights,
        nll_weights=nll_weights,
        old_logprobs=old_logprobs,
        advantages=advantages,
        ref_logprobs=ref_logprobs,
        temperature=temperature if temperatures is None else temperatures,
    )
    result = policy_loss_chunks(
        hidden,
        _head(weight, group, vocab_size, logits_dtype, chunk_tokens),
        tokens,
        _chosen(tokens, terms, vocab_size, active, silent, firsts),
        unpack_terms(terms),
        sequence_parallel=sequence_parallel,
        hidden_gradient=hidden_gradient,
        weight_gradient=main_grad,
    )
    hidden_total = hidden.new_empty(0) if result.hidden is None else result.hidden
    return result.outputs.loss.sum(), *_per_token(result.outputs), hidden_total


@policy_loss_into.register_fake
def _(main_grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradient = torch.empty_like(hidden) if arguments[-1] else hidden.new_empty(0)
    return (*_fake_outputs(hidden, targets), gradient)


class PolicyLossInto(torch.autograd.Function):
    """`policy_loss_into` under autograd: the head's gradient is in main_grad when forward returns.

    Arguments: those of the operator, then the way of the head's gradient and the scale the loss will be given.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, mode: WeightGrad, scale: float, *rest: Any) -> Any:
        main_grad, *arguments = rest
        wanted = bool(ctx.needs_input_grad[0])
        loss, *per_token, gradient = policy_loss_into(main_grad, hidden, weight, *arguments, wanted)
        ctx.mode, ctx.scale, ctx.wanted, ctx.count = mode, scale, wanted, len(rest)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*per_token)
        ctx.save_for_backward(gradient, weight)
        return (loss / scale, *per_token)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * (4 + ctx.count)
        if grad_outputs[0] is None:
            return tuple(gradients)
        check_scale(grad_outputs[0], ctx.scale)
        if ctx.wanted:
            gradients[0] = gradient
        if ctx.needs_input_grad[1]:
            gradients[1] = head_gradient_stub(weight, ctx.mode)
        return tuple(gradients)


def check_scale(grad_output: Tensor, scale: float) -> None:
    """Raise RuntimeError unless the loss is differentiated with the scale its gradients were made with.

    Asynchronous on CUDA, where a mismatch surfaces as a device-side assertion.
    """
    message = (
        f"the head's gradient was added to main_grad for a loss scaled by {scale}, but backward scales it otherwise: "
        "pass that scale as loss_scale, or use weight_grad='autograd'"
    )
    torch._assert_async((grad_output == scale).all(), message)


@torch.library.custom_op("klear::logprobs", mutates_args=())
def logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    trained: Tensor | None,
    wanted: Tensor | None,
    first: int,
    temperatures: Tensor | None,
    temperature: float,
    group: str,
    vocab_size: int,
    sequence_parallel: bool,
    logits_dtype: torch.dtype,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log-sum-exp of each token, without gradient."""
    given = None if wanted is None else Group(index=wanted, first=first)
    outputs = logprob_chunks(
        hidden,
        _head(weight, group, vocab_size, logits_dtype, chunk_tokens),
        Tokens(targets=targets, temperature=temperature if temperatures is None else temperatures),
        given or choose_all(targets, vocab_size, trained),
        sequence_parallel=sequence_parallel,
    )
    return outputs.logprobs, outputs.entropy, outputs.lse


@logprobs.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    one, two, three = (hidden.new_empty(targets.shape[0], dtype=torch.float32) for _ in range(3))
    return one, two, three
