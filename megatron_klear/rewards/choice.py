"""Multiple choice: the letter that a response settles on."""

from __future__ import annotations

import re
from typing import Any

from megatron_klear.types import Score, Verdict

from .base import Scheme
from .format import Thinking, split_thinking

# Bounded: responses repeat anything a thousand times, and each time would be read to the end.
_DRESS = r"(?:[\s:*_\"'`$({\[]|\\[(\[]|\\(?:boxed|fbox|text|textbf|mathrm|mathbf|boldsymbol)\b){0,40}"
# A capital: "the answer is a guess" names no choice. Nothing may follow that makes it a word or a formula.
# "I think" and "A metal rod" begin a sentence or an option's words; "A because" and "I is right" are letters: what
# follows them goes with no article or pronoun.
_GOES_ON = (
    r"is|was|because|since|as|for|and|or|but|due|given|by|which|that|while|so|not|only|alone|the|from|in|on|at|if|with"
    r"|over|after|although|though|before|between|among|according|based|per|than|rather\s+than|instead|of|to|under"
    r"|unless|until|when|where|whereas|whose|without|within|through|via|whether"
)
_GOES_ON_FROM_A = rf"{_GOES_ON}|are|has|does|can|could|would|will|must|should|then|here|there|again|too|also|hence|thus"
_WORD = rf"(?:(?<=A)[ \t]+(?!(?:{_GOES_ON_FROM_A})\b)[a-z]|(?<=I)[ \t]+(?!(?:{_GOES_ON})\b)[a-z]|(?<=I)['\u2019][a-z])"
_CAPITAL = rf"([A-Z])(?![\w+\-^/]|\s*=|{_WORD})"
_AND = r"(?:,|;|&|\\text\{|\s(?i:and|or)\b)+[\s({*]*(?:(?i:and|or)\b[\s({}*]*)?"
# "A or C" names none; "A, C is wrong" and "A, I think" do.
_ALONE_OF_CHOICES = rf"(?![)}}*\s]*{_AND}[A-Z](?!\w|'|{_WORD}|\s+(?:is|are|was|has|does|cannot|would)\b))"
_LETTER = rf"{_DRESS}(?:(?i:option|choice)\b{_DRESS})?{_CAPITAL}{_ALONE_OF_CHOICES}"
_NAMED = (
    re.compile(r"(?i:\b(?:final\s+)?answer\b\s{0,9}\**\s{0,9}:)" + _LETTER),
    re.compile(r"\\boxed\s*\{" + _LETTER),
    re.compile(r"(?i:\banswer\s+is\b(?:\s+(?:definitely|clearly|therefore)\b)*)" + _LETTER),
    re.compile(r"(?i:\b(?:correct|right|best)\s+(?:option|choice)\s+is\b)" + _LETTER),
)
_ALONE = re.compile(r"[\s(\[*$\"']*([A-Z])[\s)\]*$\"'.]*")
_TRUTH = re.compile(r"\(?([A-Z])\)?\.?")


class ChoiceReward:
    """Right where the response's letter is the ground truth's, a capital as in lighteval's `Answer: B`.

    The last `Answer: X` counts, else the last `\\boxed{X}`, else the last "the answer is X", else "the correct option
    is X", else a text that is a letter alone; "A or C" is no choice. With `require_thinking` only what follows
    `</think>` is read.
    """

    def __init__(self, scheme: Scheme, *, require_thinking: bool = True) -> None:
        self.scheme, self.require_thinking = scheme, require_thinking

    def __call__(self, response: str, ground_truth: Any) -> Score:
        """Judge one response; a ground truth that is no letter is an error."""
        parts = split_thinking(response)
        if self.require_thinking and parts.thinking is not Thinking.KEPT:
            reward = self.scheme.value(Verdict.MALFORMED, parts.thinking)
            return Score(reward=reward, verdict=Verdict.MALFORMED, note=parts.thinking.value)
        truth = _TRUTH.fullmatch(str(ground_truth).strip())
        if truth is None:
            verdict, note = Verdict.ERROR, f"the ground truth {str(ground_truth)[:40]!r} is no capital letter"
        elif (letter := read_choice(response if parts.answer is None else parts.answer)) is None:
            verdict, note = Verdict.MALFORMED, "no choice"
        else:
            if letter == truth[1]:
                return Score(reward=self.scheme.value(Verdict.RIGHT), verdict=Verdict.RIGHT)
            note = f"read {letter}, expected {truth[1]}"
            return Score(reward=self.scheme.value(Verdict.WRONG), verdict=Verdict.WRONG, note=note, vote=letter)
        return Score(reward=self.scheme.value(verdict), verdict=verdict, note=note)


def read_choice(text: str) -> str | None:
    """The letter that a text settles on, None where it names none."""
    for pattern in _NAMED:
        if found := pattern.findall(text):
            return str(found[-1])
    alone = _ALONE.fullmatch(text)
    return alone[1] if alone else None
