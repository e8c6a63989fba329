"""Rewards of reasoning-gym tasks: the task's own score of the answer, right from a threshold on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_klear.types import Score, Verdict

from .answers import last_boxed
from .base import RewardError, Scheme
from .format import Thinking, split_thinking


class ReasoningGymReward:
    """Right where the task's score of the last `\\boxed{}` reaches the threshold of the problem's row.

    `ground_truth` holds `task`, `threshold` and the task's `entry`. Raises RewardError where the package is absent.
    """

    def __init__(self, scheme: Scheme, *, require_thinking: bool = True) -> None:
        try:
            from reasoning_gym import get_score_answer_fn
        except ImportError:
            raise RewardError("rewards of reasoning_gym tasks need that package: pip install reasoning-gym") from None
        self._score_function: Callable[[str], Callable[[str, dict[str, Any]], float]] = get_score_answer_fn
        self.scheme, self.require_thinking = scheme, require_thinking

    def __call__(self, response: str, ground_truth: Any) -> Score:
        """Judge one response."""
        parts = split_thinking(response)
        if self.require_thinking and parts.thinking is not Thinking.KEPT:
            reward = self.scheme.value(Verdict.MALFORMED, parts.thinking)
            return Score(reward=reward, verdict=Verdict.MALFORMED, note=parts.thinking.value)
        answer = last_boxed(response if parts.answer is None else parts.answer)
        if answer is None:
            return Score(reward=self.scheme.malformed, verdict=Verdict.MALFORMED, note="no boxed answer")
        score = float(self._score_function(ground_truth["task"])(answer, ground_truth["entry"]))
        verdict = Verdict.RIGHT if score >= float(ground_truth["threshold"]) else Verdict.WRONG
        return Score(reward=self.scheme.value(verdict), verdict=verdict, note=f"score {score:g} for {answer[:80]}")
