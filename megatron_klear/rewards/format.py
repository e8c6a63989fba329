"""The thinking format: `<think>...</think>` and then an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

OPEN, CLOSE = "<think>", "</think>"
_PROMPT_END = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


class Thinking(Enum):
    """How a response keeps to the thinking format; the value says what is wrong, in words."""

    KEPT = ""
    NOT_OPENED = f"no {OPEN} at its start"
    NOT_CLOSED = f"no {CLOSE}"
    REPEATED = "thinking tags after the thinking"


@dataclass(frozen=True, slots=True)
class Parts:
    """A response in its two parts; without `</think>` there is no answer part."""

    thinking: Thinking
    answer: str | None


def complete(prompt: str, response: str) -> str:
    """The response together with what the prompt wrote of its thinking.

    Many chat templates end the prompt with `<think>`, or with an empty `<think></think>` where thinking is off: the
    model then has no tag to write, or none at all.
    """
    opened = _PROMPT_END.search(prompt)
    return opened.group() + response if opened else response


def split_thinking(response: str) -> Parts:
    """Check the format of a response and cut off its answer: what follows the last `</think>`.

    It is kept where the response starts with `<think>` (white space aside) and closes it once, with the answer after.
    """
    thought, closed, answer = response.rpartition(CLOSE)
    if not closed:
        return Parts(Thinking.NOT_CLOSED, None)
    if OPEN not in thought or not thought.lstrip().startswith(OPEN):
        return Parts(Thinking.NOT_OPENED, answer)
    if OPEN in answer or CLOSE in thought:
        return Parts(Thinking.REPEATED, answer)
    return Parts(Thinking.KEPT, answer)
