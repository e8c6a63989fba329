"""What a graded response counts as in a majority."""

from __future__ import annotations

from megatron_klear.types import Score, Verdict

from .answers import normalise, read_answer
from .format import split_thinking


def vote_of(text: str, score: Score) -> str:
    """What maj@k counts: all right answers are one, others are told apart by what the reward read of them.

    Where it does not say (`Score.vote`), by their text without dress and spacing.

    `text` is the completed response that was graded. "" is no vote: an answer that cannot be read, and every program,
    as two that differ may do the same.
    """
    if score.program is not None:
        return ""
    if score.verdict is Verdict.RIGHT:
        return "right"
    if score.vote:
        return f"={normalise(score.vote)}"
    answer = read_answer(split_thinking(text).answer or text) if score.verdict is Verdict.WRONG else None
    return f"={normalise(answer.text)}" if answer is not None else ""
