"""Group-relative advantages, and what of the sampled groups there is to learn from. Pure functions over rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_klear.types import Group

_EPSILON = 1e-6


class RewardNotFinite(ValueError):
    """A reward that is NaN or infinite; the message names the prompt."""


def group_advantages(rewards: npt.ArrayLike, kind: Literal["mean_std", "mean"]) -> npt.NDArray[np.float64]:
    """Advantages [n] of one group's rewards [n].

    mean_std: (R - mean) / (std + 1e-6) with the unbiased deviation, as GRPO's published code has it (arXiv 2402.03300;
    arXiv 2508.07629 section 2.1). mean: R - mean (Dr. GRPO, arXiv 2503.20783). A group of one has advantage 0.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(values).all():
        raise RewardNotFinite(f"rewards {values.tolist()} are not all finite")
    if len(values) < 2:
        return np.zeros(len(values))
    centred: npt.NDArray[np.float64] = values - values.mean()
    if kind == "mean":
        return centred
    scaled: npt.NDArray[np.float64] = centred / (values.std(ddof=1) + _EPSILON)
    return scaled


def keep_informative(groups: Sequence[Group]) -> list[Group]:
    """Groups whose rewards differ; where all are equal every advantage is 0 and there is no gradient.

    Raises RewardNotFinite naming the prompt of a reward that is not a number, ValueError for a group without samples.
    """
    kept = []
    for group in groups:
        if not group.samples:
            raise ValueError(f"the group of prompt {group.prompt.id} ({group.prompt.data_source}) has no samples")
        rewards = group.rewards
        if not np.isfinite(rewards).all():
            raise RewardNotFinite(
                f"prompt {group.prompt.id} ({group.prompt.data_source}) has rewards {rewards.tolist()}; "
                "a reward function must return finite numbers"
            )
        if rewards.max() > rewards.min():
            kept.append(group)
    return kept


def overlong_penalty(
    lengths: npt.ArrayLike, max_tokens: int, *, buffer_tokens: int, factor: float
) -> npt.NDArray[np.float64]:
    """What is added to the rewards of responses of `lengths` [n] tokens: 0 down to -factor at the cap.

    The soft punishment of DAPO (arXiv 2503.14476, Eq. 13): linear over the last `buffer_tokens` before `max_tokens`.
    """
    over = np.asarray(lengths, dtype=np.float64) - (max_tokens - buffer_tokens)
    penalty: npt.NDArray[np.float64] = -factor * np.clip(over / buffer_tokens, 0.0, 1.0)
    return penalty
