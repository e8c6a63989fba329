"""Maths answers: exact comparison where it decides, math-verify's symbolic equivalence where it does not."""

from __future__ import annotations

from typing import Any

from megatron_klear.types import Score, Verdict

from .answers import Answer, compare, for_engine, normalise, read_answer, read_words, too_complex
from .base import Scheme
from .dress import is_words, same_words
from .engine import parse, verify, warm_up
from .format import Thinking, split_thinking
from .truths import TruthError, read_truths

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
        verdict, note = grade(ground_truth, response if parts.answer is None else parts.answer)
        return Score(reward=self.scheme.value(verdict), verdict=verdict, note=note)


def grade(ground_truth: Any, text: str) -> tuple[Verdict, str]:
    """The verdict on the final answer of a text, and why: what was read, what was expected.

    `error` means that the ground truth itself is no answer.
    """
    try:
        truths = read_truths(ground_truth)
    except TruthError as error:
        return Verdict.ERROR, str(error)
    verdict, note = Verdict.ERROR, ""
    for truth in truths:
        verdict, note = _grade_words(truth, text) if is_words(truth.text) else _grade_formula(truth, text)
        if verdict is Verdict.RIGHT:
            break
    return verdict, note


def _grade_words(expected: Answer, text: str) -> tuple[Verdict, str]:
    """Words are compared as words: no engine reads "4" out of "July 4"."""
    read = read_words(text)
    if read is None:
        return Verdict.MALFORMED, "no answer"
    if same_words(expected.text, read) or compare(expected.text, read):
        return Verdict.RIGHT, ""
    return Verdict.WRONG, f"read {_shown(read)}, expected {_shown(expected.text)}"


def _grade_formula(expected: Answer, text: str) -> tuple[Verdict, str]:
    answer = read_answer(text)
    if answer is None:
        return Verdict.MALFORMED, "no answer"
    same = compare(expected.text, answer.text) if expected.isolated and answer.isolated else None
    if same is None and answer.isolated and normalise(expected.text) == normalise(answer.text) != "":
        same = True
    if same is None:
        if too_complex(answer.text):
            return Verdict.MALFORMED, f"an answer of {len(answer.text)} characters, too long or too deeply nested"
        gold_forms, forms = _forms(expected), _forms(answer)
        if not forms:
            return Verdict.MALFORMED, "no answer"
        same = bool(gold_forms) and verify(gold_forms, forms, inequalities=_is_interval(expected.text))
    if same:
        return Verdict.RIGHT, ""
    read = _shown(answer.text) if answer.isolated else "the end of the text"
    return Verdict.WRONG, f"read {read}, expected {_shown(expected.text)}"


def _forms(answer: Answer) -> list[Any]:
    """An answer as the engine reads it."""
    return parse(f"\\boxed{{{for_engine(answer.text)}}}" if answer.isolated else answer.text)


def _is_interval(text: str) -> bool:
    return text.removeprefix("\\left")[:1] in ("(", "[") and "\\in " not in text


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
