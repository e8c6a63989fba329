"""From rewards to advantages, group by group: pure functions over scored groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import comb
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_klear.errors import UserError
from megatron_klear.types import Group

Advantage = Literal[
    "mean_std",
    "mean",
    "rloo",
    "mean_std_leave_one_out",
    "opo",
    "pass_at_k",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
]
Values = npt.NDArray[np.float64]
_STD_FLOOR = 1e-6
_VARIANCE_FLOOR = 1e-8


class RewardValueError(UserError, ValueError):
    """A group whose rewards cannot be used; the message names the prompt."""


def checked_rewards(group: Group) -> npt.NDArray[np.float64]:
    """The rewards of a group [samples].

    Raises RewardValueError, with the prompt's name, where there are none or one is not finite.
    """
    name = f"prompt {group.prompt.id} (data_source {group.prompt.data_source})"
    if not group.samples:
        raise RewardValueError(f"{name} has no samples: the rollout engine returned an empty group")
    if group.scores is None or len(group.scores) != len(group.samples):
        raise RewardValueError(f"{name} has {len(group.samples)} samples but {len(group.scores or ())} scores")
    rewards = group.rewards
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        raise RewardValueError(
            f"{name}: the reward of sample {int(bad[0])} is {rewards[bad[0]]}; mend the reward of this data_source"
        )
    return rewards


def advantages(groups: Sequence[Group], kind: Advantage, *, pass_k: int = 4) -> list[Values]:
    """Advantages of every group's samples. Raises RewardValueError where a group's rewards cannot be used."""
    return advantages_of(
        [checked_rewards(group) for group in groups],
        [response_lengths(group) for group in groups],
        kind,
        pass_k=pass_k,
    )


def advantages_of(
    rewards: Sequence[Values], lengths: Sequence[npt.NDArray[np.int64]], kind: Advantage, *, pass_k: int = 4
) -> list[Values]:
    """Advantages of every group's samples, from their rewards and the lengths of their responses, one array a group."""
    if kind == "reinforce_plus_plus":
        return normalised(rewards, lengths)
    if kind == "reinforce_plus_plus_baseline":
        return normalised([group_advantages(values, "mean") for values in rewards], lengths)
    return [
        group_advantages(values, kind, lengths=of_group, pass_k=pass_k)
        for values, of_group in zip(rewards, lengths, strict=True)
    ]


def group_advantages(
    rewards: npt.ArrayLike, kind: Advantage, *, lengths: npt.ArrayLike | None = None, pass_k: int = 4
) -> Values:
    """Advantages [n] of one group's rewards [n].

    `mean_std`: (r - mean) / (std + 1e-6) with the unbiased standard deviation (GRPO, arXiv 2402.03300, section 4.1.2).
    `mean`: r - mean (Dr. GRPO, arXiv 2503.20783).
    `rloo`: r less the mean of the others (RLOO, arXiv 2402.14740, Eq. 7); `mean_std_leave_one_out` over their standard
    deviation as well. `opo`: r less the mean weighted by `lengths` [n], the baseline of least variance where gradients
    grow with the length (OPO, arXiv 2505.23585, Eq. 8). `pass_at_k`: see `pass_at_k_advantages`.
    A single sample has nothing to be compared with: its advantage is its reward, as in plain REINFORCE.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if len(values) == 1 or is_uninformative(values):
        return values.copy() if len(values) == 1 else np.zeros(len(values))
    if kind == "pass_at_k":
        return pass_at_k_advantages(values, pass_k)
    if kind == "opo":
        weights = np.asarray(lengths, dtype=np.float64)
        return np.asarray(values - (weights * values).sum() / max(weights.sum(), 1.0))
    if kind in ("rloo", "mean_std_leave_one_out"):
        count = len(values)
        others = (values.sum() - values) / (count - 1)
        if kind == "rloo":
            return np.asarray(values - others)
        spread = np.array([np.delete(values, i).std(ddof=1) if count > 2 else 0.0 for i in range(count)])
        return np.asarray((values - others) / (spread + _STD_FLOOR))
    centred: Values = values - values.mean()
    if kind == "mean_std":
        centred /= values.std(ddof=1) + _STD_FLOOR
    return centred


def pass_at_k_advantages(rewards: npt.ArrayLike, k: int) -> Values:
    """Advantages [n] that raise pass@k, from the rewards [n] of one group: the larger of two values is a success.

    With p = 1 - C(w, k) / C(n, k), the chance that k of the n samples hold a success where w fail, a success has
    (1 - p) / s and a failure (1 - p - C(w - 1, k - 1) / C(n - 1, k - 1)) / s, s = sqrt(p (1 - p)); 0 where s is
    (arXiv 2508.10751, Eq. 14 and 15).
    Raises RewardValueError where there are more than two values.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if len(np.unique(values)) > 2:
        raise RewardValueError(
            f"algorithm.advantage pass_at_k needs rewards of two values, and a group has {np.unique(values).tolist()}"
        )
    right = values == values.max()
    wrong, count = int((~right).sum()), len(values)
    chance = 1 - comb(wrong, k) / comb(count, k)
    spread = np.sqrt(chance * (1 - chance))
    if not spread:
        return np.zeros(count)
    failed = 1 - chance - comb(wrong - 1, k - 1) / comb(count - 1, k - 1)
    return np.asarray(np.where(right, 1 - chance, failed) / spread, dtype=np.float64)


def normalised(values: Sequence[Values], lengths: Sequence[npt.NDArray[np.int64]]) -> list[Values]:
    """Values of all groups less their mean over all tokens, over their deviation (REINFORCE++, arXiv 2501.03262).

    Every token has the value of its response, of `lengths` tokens, as in verl's and OpenRLHF's code. With rewards this
    is REINFORCE++; with rewards less their group's mean its variant with a baseline.
    """
    whole = np.concatenate([*values, np.zeros(0)])
    tokens = np.concatenate([*lengths, np.zeros(0)])
    total = tokens.sum()
    if len(whole) < 2 or total < 2:
        return list(values)
    mean = (tokens * whole).sum() / total
    variance = (tokens * (whole - mean) ** 2).sum() / (total - 1)
    return [(of_group - mean) / np.sqrt(variance + _VARIANCE_FLOOR) for of_group in values]


def is_uninformative(rewards: npt.ArrayLike) -> bool:
    """Whether all of several rewards are equal, so that every advantage is 0."""
    values = np.asarray(rewards)
    return len(values) > 1 and bool((values == values[0]).all())


def keep_informative(groups: Sequence[Group]) -> list[Group]:
    """The groups whose rewards are not all equal; a group of one sample is kept.

    Raises RewardValueError where a group's rewards cannot be used.
    """
    return [group for group in groups if not is_uninformative(checked_rewards(group))]


def response_lengths(group: Group) -> npt.NDArray[np.int64]:
    """Tokens of each response [samples]."""
    return np.array([int(sample.trained.sum()) for sample in group.samples], dtype=np.int64)


def overlong_penalties(
    lengths: npt.ArrayLike, *, max_tokens: int, buffer_tokens: int, factor: float = 1.0
) -> npt.NDArray[np.float64]:
    """What is added to the rewards of long responses [n]: 0 up to `max_tokens - buffer_tokens`, then linearly to
    -factor at `max_tokens` and beyond (DAPO, arXiv 2503.14476, Eq. 13).

    Raises ValueError where the buffer is not between 1 and `max_tokens`.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"algorithm.overlong_penalty.buffer_tokens {buffer_tokens} must be from 1 to sampling.max_tokens, "
            f"which is {max_tokens}"
        )
    excess = np.asarray(lengths, dtype=np.float64) - (max_tokens - buffer_tokens)
    return -factor * np.clip(excess / buffer_tokens, 0.0, 1.0)


def penalise_overlong(group: Group, *, max_tokens: int, buffer_tokens: int, factor: float = 1.0) -> Group:
    """A copy of a scored group with the soft penalty of DAPO added to its rewards; verdicts stay."""
    penalties = overlong_penalties(
        response_lengths(group), max_tokens=max_tokens, buffer_tokens=buffer_tokens, factor=factor
    )
    rewards = checked_rewards(group) + penalties
    scores = [replace(s, reward=float(r)) for s, r in zip(group.scores or (), rewards, strict=True)]
    return replace(group, scores=scores)


def overlong(groups: Sequence[Group]) -> npt.NDArray[np.bool_]:
    """Which samples [all samples of all groups, in order] were cut at the length cap; see `weights.drop_overlong`."""
    return np.array([sample.finish == "length" for group in groups for sample in group.samples], dtype=np.bool_)
