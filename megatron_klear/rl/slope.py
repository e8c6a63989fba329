"""The autograd function behind `surrogate`, apart because its class needs torch to be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GivenSlope(torch.autograd.Function):
    """Per-token values whose derivative in the log-probs is given; exact where log-probs are infinite too."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """`value`, whatever the log-probs are."""
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """`slope` for the log-probs."""
        (slope,) = ctx.saved_tensors
        return grad_outputs[0] * slope, None, None
