"""Maths answers: exact comparison where it decides, math-verify's symbolic equivalence where it does not."""

from __future__ import annotations

import logging
from typing import Any

from megatron_klear.types import Score, Verdict

from .answers import Answer, compare, read_answer, too_complex
from .base import Scheme
from .format import Thinking, split_thinking

_SHOWN = 80  # characters of an answer in a note


class MathReward:
    """Right where the final answer equals the ground truth, with the scheme's values for that and for the format.

    `ground_truth` is a text or a number; of a list, any entry will do. With `require_thinking` only what follows
    `</think>` is read, and a response that does not keep to the format is malformed.
    """

    def __init__(self, scheme: Scheme, *, require_thinking: bool = True) -> None:
        self.scheme, self.require_thinking = scheme, require_thinking
        warm_up()

    def __call__(self, response: str, ground_truth: Any) -> Score:
        """Judge one response; may take as long as it likes: the caller holds the clock."""
        parts = split_thinking(response)
        if self.require_thinking and parts.thinking is not Thinking.KEPT:
            reward = self.scheme.value(Verdict.MALFORMED, parts.thinking)
            return Score(reward=reward, verdict=Verdict.MALFORMED, note=parts.thinking.value)
        golds = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
        verdict, note = grade_any([str(gold) for gold in golds], response if parts.answer is None else parts.answer)
        return Score(reward=self.scheme.value(verdict), verdict=verdict, note=note)


def grade_any(golds: list[str], text: str) -> tuple[Verdict, str]:
    """The verdict on a text against several right answers, and why."""
    verdict, note = Verdict.ERROR, "the ground truth is empty"
    for gold in golds:
        verdict, note = grade(gold, text)
        if verdict is Verdict.RIGHT:
            break
    return verdict, note


def grade(gold: str, text: str) -> tuple[Verdict, str]:
    """The verdict on the final answer of a text, and why: what was read, what was expected.

    `error` means that the ground truth itself cannot be read.
    """
    expected = read_answer(gold)
    if expected is None:
        return Verdict.ERROR, f"the ground truth {gold[:_SHOWN]!r} holds no answer"
    answer = read_answer(text)
    if answer is None:
        return Verdict.MALFORMED, "no answer"
    same = compare(expected.text, answer.text) if expected.isolated and answer.isolated else None
    if same is None:
        gold_forms = _parse(expected)
        if not gold_forms:
            return Verdict.ERROR, f"the ground truth {gold[:_SHOWN]!r} holds no answer"
        if too_complex(answer.text):
            return Verdict.MALFORMED, f"an answer of {len(answer.text)} characters, too long or too deeply nested"
        forms = _parse(answer)
        if not forms:
            return Verdict.MALFORMED, "no answer"
        same = _verify(gold_forms, forms)
    if same:
        return Verdict.RIGHT, ""
    read = _shown(answer) if answer.isolated else "the end of the text"
    return Verdict.WRONG, f"read {read}, expected {_shown(expected)}"


def warm_up() -> None:
    """Import the symbolic engine, which takes a second or two, before any clock runs."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeout is off, as it must be
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)
    _verify(_parse(Answer("\\frac{1}{2}", True)), _parse(Answer("0.25 + x", True)))


def _parse(answer: Answer) -> list[Any]:
    """What math-verify makes of an answer: symbolic forms and, last, the text itself."""
    from math_verify import parse

    if not answer.isolated:
        return list(parse(answer.text, parsing_timeout=None))
    return list(parse(f"\\boxed{{{answer.text}}}", parsing_timeout=None))


def _verify(gold_forms: list[Any], forms: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(gold_forms, forms, timeout_seconds=None))


def _shown(answer: Answer) -> str:
    return answer.text if len(answer.text) <= _SHOWN else answer.text[:_SHOWN] + "..."
