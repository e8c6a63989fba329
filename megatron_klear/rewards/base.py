"""What a reward is, the values it gives, and which one a `data_source` gets."""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megatron_klear.errors import UserError
from megatron_klear.types import Score, Verdict

from .format import Thinking

SchemeName = Literal["paper", "released"]


class RewardError(UserError, ValueError):
    """A reward that cannot be found or used; the message names the setting and the remedy."""


class Reward(Protocol):
    """Judges one response. Runs in a worker process, in its main thread, and imports no torch.

    A reward of your own may return a plain number instead: the verdict is then `right` where it is above 0.
    """

    def __call__(self, response: str, ground_truth: Any) -> Score:
        """The score of a response to a prompt whose row held `ground_truth`.

        `response` begins with what the prompt wrote of its thinking, if anything (`format.complete`).
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """Reward values by outcome."""

    right: float
    wrong: float
    malformed: float
    """No answer can be read."""
    not_opened: float
    """`</think>` is there, but no `<think>` at the start."""
    not_closed: float
    """No `</think>`: in most cases cut off at the length cap."""

    def value(self, verdict: Verdict, thinking: Thinking = Thinking.KEPT) -> float:
        """The reward of a response; a broken thinking format overrides the verdict."""
        if thinking is Thinking.NOT_OPENED:
            return self.not_opened
        if thinking is Thinking.NOT_CLOSED:
            return self.not_closed
        if thinking is Thinking.REPEATED or verdict is Verdict.MALFORMED:
            return self.malformed
        return self.right if verdict is Verdict.RIGHT else self.wrong


SCHEMES: Mapping[SchemeName, Scheme] = {
    "paper": Scheme(right=1.0, wrong=-1.0, malformed=-1.0, not_opened=-1.0, not_closed=-1.0),
    "released": Scheme(right=1.0, wrong=-1.0, malformed=-1.0, not_opened=-2.0, not_closed=-0.5),
}
"""`paper`: binary, with thinking required (arXiv 2508.07629, section 3). `released`: as the published code has it,
where an unfinished response scores above a wrong one."""

BUILT_IN: Mapping[str, str] = {
    "math": "megatron_klear.rewards.math:MathReward",
    "gsm8k": "megatron_klear.rewards.math:MathReward",
    "arithmetic": "megatron_klear.rewards.math:MathReward",
    "aime": "megatron_klear.rewards.math:MathReward",
    "amc": "megatron_klear.rewards.math:MathReward",
    "hmmt": "megatron_klear.rewards.math:MathReward",
    "reasoning_gym": "megatron_klear.rewards.reasoning_gym:ReasoningGymReward",
}
"""Rewards that come with the package, by the start of the `data_source`; classes made with the reward's settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSettings:
    """The part of `[reward]` that rewards themselves read."""

    scheme: SchemeName = "paper"
    require_thinking: bool = True
    functions: Mapping[str, str] | None = None


def find(data_source: str, functions: Mapping[str, str] | None = None) -> tuple[str, bool]:
    """Dotted path of the reward of a `data_source`, and whether it comes with the package.

    A name fits a `data_source` that equals it or goes on with anything but a letter: `math` fits `math_longcot`, not
    `mathematica`. The longest name wins, and yours (`reward.functions`) before a built-in of the same length.
    Raises RewardError where no name fits.
    """
    yours = functions or {}
    names = [(len(name), name in yours, name) for name in {*yours, *BUILT_IN} if _fits(name, data_source)]
    if not names:
        raise RewardError(
            f"no reward for data_source {data_source!r}: built in are {', '.join(BUILT_IN)}; name one of your own in "
            f'[reward.functions], "{data_source}" = "my_module:my_reward"'
        )
    name = max(names)[2]
    return (yours[name], False) if name in yours else (BUILT_IN[name], True)


def check_sources(data_sources: Iterable[str], functions: Mapping[str, str] | None = None) -> None:
    """Raise RewardError where a data source has no reward; imports none of them."""
    for data_source in sorted(set(data_sources)):
        find(data_source, functions)


def resolve(data_source: str, settings: RewardSettings) -> Reward:
    """The reward of a `data_source`, imported and ready. Raises RewardError where it cannot be."""
    path, built_in = find(data_source, settings.functions)
    found = _import(path)
    if built_in:
        reward: Reward = found(SCHEMES[settings.scheme], require_thinking=settings.require_thinking)
        return reward
    return _Yours(found)


@dataclass(frozen=True, slots=True)
class _Yours:
    """A user's function behind the protocol."""

    function: Callable[[str, Any], object]

    def __call__(self, response: str, ground_truth: Any) -> Score:
        result = self.function(response, ground_truth)
        if isinstance(result, Score):
            score = result
        elif isinstance(result, numbers.Real):
            reward = float(result)
            score = Score(reward=reward, verdict=Verdict.RIGHT if reward > 0 else Verdict.WRONG)
        else:
            raise TypeError(f"the reward returned {type(result).__name__}, expected a Score or a number")
        if not math.isfinite(score.reward):
            raise ValueError(f"the reward returned {score.reward}, which is not finite")
        return score


def _fits(name: str, data_source: str) -> bool:
    return data_source.startswith(name) and not data_source[len(name) : len(name) + 1].isalpha()


def _import(path: str) -> Callable[..., Any]:
    module_name, colon, name = path.partition(":")
    if not colon:
        module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise RewardError(f'[reward.functions]: {path!r} must have the form "module:function"')
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(
            f"[reward.functions]: {path!r} cannot be imported ({error}); is its folder on PYTHONPATH?"
        ) from None
    if not callable(found):
        raise RewardError(f"[reward.functions]: {path!r} is not a function")
    function: Callable[..., Any] = found
    return function
