"""What goes into the fused policy loss: the whole call, and of a chunk of rows its tokens and terms."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.kernels.selection import Chosen, Selection
from megatron_klear.types import KLEstimator, LossCoefficients, TokenLoss

WeightGrad = Literal["autograd", "main_grad", "main_grad_tied"]


@dataclass(frozen=True, kw_only=True)
class PolicyLossInputs:
    """The arguments of `fused_policy_loss` and of its reference, for a row of T tokens.

    Per-token tensors are [T] and the same on all ranks of `group`.
    """

    hidden: Tensor
    """[T, H] float32 or bfloat16; with `sequence_parallel` this rank's [T / ranks, H]. Its gradient comes summed over
    the vocabulary shards: wrap it in no further collective."""
    weight: Tensor
    """[V_local, H] in the type of `hidden`: this rank's rows of the head, padding included."""
    targets: Tensor
    """[T] int64, ids of the whole vocabulary."""
    loss: TokenLoss
    """One without coefficients runs in two phases, on the tokens that carry a weight, in their order."""
    policy_weights: Tensor
    """Tokens that have neither this weight nor an NLL weight take no part; their outputs are 0."""
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    nll_weights: Tensor | None = None
    temperature: float | Tensor = 1.0
    """Divides the logits; one number, or [T]."""
    entropy_coefficient: float = 0.0
    ref_logprobs: Tensor | None = None
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3"
    """Form of the KL term, see `reference.kl_term`."""
    group: dist.ProcessGroup | None = None
    """Ranks that hold the vocabulary's shards, equal in size and in order of rank."""
    vocab_size: int | None = None
    """Size of the whole vocabulary without padding; None where there is no padding."""
    sequence_parallel: bool = False
    main_grad: Tensor | None = None
    """[V_local, H] float32, where the head's gradient is added during this call."""
    weight_grad: WeightGrad = "autograd"
    """"autograd" returns the head's gradient in backward. "main_grad" adds it to `main_grad` and sets Megatron's flag
    `grad_added_to_main_grad`. "main_grad_tied" adds it and leaves the flag alone: for a head tied to an
    embedding of the same stage, whose own gradient is still to be added."""
    loss_scale: float = 1.0
    """With a `main_grad`, the scale that backward will give the loss."""
    logits_dtype: torch.dtype = torch.float32
    """Rounding of logits: float32, or bfloat16, which is faster."""
    chunk_tokens: int | None = None
    """Tokens whose logits exist at a time; None fits them to the device."""
    chosen: Chosen | None = None
    """What `choose_tokens` says of this call, on the device of `hidden`; None finds it there, and waits for it. It is
    not checked: other tokens than it says are silently left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Per-token inputs of T rows, each [T]; `targets` int64, the others float32."""

    targets: Tensor
    policy_weights: Tensor | None = None
    nll_weights: Tensor | None = None
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    ref_logprobs: Tensor | None = None
    temperature: float | Tensor = 1.0

    def take(self, selection: Selection) -> Tokens:
        """The inputs of some tokens, contiguous."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        taken = {
            name: value[selection].contiguous() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return Tokens(**taken)


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What is added up for a token."""

    coefficients: LossCoefficients
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3"
