"""What the losses are made of: values with a given slope, and the checks of their settings and inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StrictLoss", "check_clip", "loss_inputs", "surrogate", "weighted_score"]


def surrogate(logprobs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """`value` [T] with the derivative `slope` [T] in `logprobs` [T]."""
    from megatron_klear.rl.slope import GivenSlope

    given: Tensor = GivenSlope.apply(logprobs, value, slope)  # type: ignore[no-untyped-call]
    return given


def loss_inputs(loss: object, old_logprobs: Tensor | None, advantages: Tensor | None) -> tuple[Tensor, Tensor]:
    """Old log-probs and advantages [T] without gradient; ValueError naming what the batch lacks."""
    name = type(loss).__name__
    if advantages is None:
        raise ValueError(f"{name} needs advantages, and the batch carries none")
    if old_logprobs is None:
        raise ValueError(f"{name} needs old_logprobs, and the batch carries none: run the log-prob pass first")
    return old_logprobs.detach(), advantages.detach()


def check_clip(clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    """ValueError unless the settings are distances of ratio bounds from 1, and the dual clip a ratio above 1."""
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low {clip_low} must lie in [0, 1]: the low bound of the ratio is 1 - clip_low")
    if not clip_high >= 0:
        raise ValueError(f"clip_high {clip_high} must not be negative: the high bound of the ratio is 1 + clip_high")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip {dual_clip} must be above 1: it is a bound of the ratio; leave it out for none")


class StrictLoss:
    """Unknown keys of a configuration table are errors (read by pydantic)."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "use_attribute_docstrings": True}


def weighted_score(logprobs: Tensor, weight: Tensor) -> Tensor:
    """-weight * logp, where a log-prob of -inf under weight 0 is 0 instead of NaN."""
    import torch

    lowest = torch.finfo(logprobs.dtype).min
    return surrogate(logprobs, -weight * logprobs.detach().clamp(min=lowest), -weight)
