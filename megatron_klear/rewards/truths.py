"""Reading the ground truth of a maths problem: it is the answer itself, whatever its form."""

from __future__ import annotations

import math
import numbers
from typing import Any

from .answers import Answer, read_answer
from .dress import is_words, undress

_SHOWN = 80  # characters of a ground truth in a message


class TruthError(ValueError):
    """A ground truth that is no answer."""


def read_truths(ground_truth: Any) -> list[Answer]:
    """The right answers, any of which will do, of a text, a number or a list of them. Raises TruthError for all else.

    Imports no symbolic engine and is cheap, so that every row can be looked at before a run starts.
    """
    if hasattr(ground_truth, "tolist"):  # numpy's scalars and arrays
        ground_truth = ground_truth.tolist()
    entries = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not entries:
        raise TruthError("the ground truth is an empty list")
    return [_read(entry) for entry in entries]


def _read(entry: Any) -> Answer:
    if isinstance(entry, bool) or not isinstance(entry, str | numbers.Real):
        told = f"{entry!r}"[:_SHOWN]
        raise TruthError(
            f"the ground truth {told} is of type {type(entry).__name__}, expected a text, a number or a list of them"
        )
    if not isinstance(entry, str):
        if not math.isfinite(entry):
            raise TruthError(f"the ground truth {entry} is not finite")
        return Answer(str(entry), True)
    text = entry.strip()
    if is_words(text) and "\\boxed" not in text and "####" not in text and "\n" not in text:
        return Answer(text, True)
    found = read_answer(text)
    if found is None or not undress(found.text):
        raise TruthError(f"the ground truth {entry[:_SHOWN]!r} holds no answer")
    return found
