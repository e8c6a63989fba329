"""Reading the final answer of a text, and comparing answers without a symbolic engine where that is enough.

Everything here is linear in the text and cheap: most answers of a model are decided by it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"[{}]")
_MOST_BOXES = 50
_UNBRACED = re.compile(r"[^\s$.,;]+")
_JOINED_GAP = 9  # characters: `}$, $\boxed{`
_LISTED_GAP = 60
_LISTED = re.compile(r"(?:(?:^|\s)(?:and|or)|[,;])[\s$]*$|\\text\{\s*(?:and|or)\s*\}")
_WORDS_BETWEEN = 3

_MARKER = re.compile(r"(?:####|^\W*A:|^\W*(?:final )?answer(?: is)?:?)\W*?\s*([^\s*].*)$", re.IGNORECASE)
_DOLLARS = re.compile(r"\A(?:\$([^$]+)\$|\$\$([^$]+)\$\$|\\\((.+)\\\)|\\\[(.+)\\\])[.\s]*\Z", re.DOTALL)
_COMMAND_WITH_TEXT = re.compile(r"\\[a-z]+\s*\{[^{}]*\}")
_PROSE = re.compile(r"[A-Za-z]{2,}[\s,]+[A-Za-z]{2,}")
_BARE_LENGTH = 300
_LONGEST, _DEEPEST = 3000, 60
_TAIL = 2000  # characters of a text without a marked answer that are searched for one

_SPACING = re.compile(r"\\(?:[!,;: ]|quad(?![a-z])|qquad(?![a-z])|left(?![a-z])|right(?![a-z]))")
_FRACTION_NAMES = re.compile(r"\\[dtc]frac(?![a-z])")
_AND = re.compile(r"\\text\s*\{\s*and\s*\}|\band\b|;")
_DECIMAL_COMMA = re.compile(r"([+-]?0),(\d{2,60})")
_THOUSANDS = re.compile(r"(?<![\d.])([1-9]\d{0,2})((?:,\d{3})+|(?: \d{3})+)(?![\d,])")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_NUMBER = re.compile(r"[+-]?(?:\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})")
_RATIO = re.compile(r"([+-]?)(?:\\frac\{(-?\d{1,60})\}\{(\d{1,60})\}|(\d{1,60})/(\d{1,60}))")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it was found; `isolated` where the text is the answer and nothing else."""

    text: str
    isolated: bool


def read_answer(text: str) -> Answer | None:
    """The final answer of a text, None where there is nothing to read.

    In this order: the last `\\boxed{}` (or the last list of them, "\\boxed{2} and \\boxed{3}"); what follows a last
    line's `####`, `A:` or `Answer:`; the whole text where it is one formula; else the end of the text, not isolated.
    A text whose only box is empty or never closed has no answer.
    """
    boxed = last_boxed(text)
    if boxed:
        return Answer(boxed, True)
    text = text.strip()
    if not text or _BOX.search(text):
        return None
    marked = _MARKER.search(text[text.rfind("\n") + 1 :][-_TAIL:])
    for candidate in (marked.group(1) if marked else None, text):
        formula = candidate and _lone_formula(candidate.strip())
        if formula:
            return Answer(formula, True)
    return Answer(text[-_TAIL:], False)


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{}` or `\\fbox{}`, joined by commas with those that it makes a list with.

    None where there is none that is closed and not empty.
    """
    found: list[str] = []
    end, start_of_next = len(text), 0
    closings: dict[int, int] | None = None
    while len(found) < _MOST_BOXES:
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            break
        closings = _closing_braces(text) if closings is None else closings
        content, stop = _box_content(text, start, closings)
        end = start
        if not content:
            continue
        if found and not _is_list_gap(text[stop:start_of_next]):
            break
        if content not in found:
            found.append(content)
        start_of_next = start
    return ", ".join(reversed(found)) or None


def normalise(answer: str) -> str:
    """An answer without what does not change its meaning: spacing, thousands separators, currency, outer dollars."""
    text = _outer_formula(answer.strip()).rstrip(".").strip()
    text = text.replace("\\$", "").replace("$", "").replace("{,}", ",").replace("\\%", "%").replace("\u2212", "-")
    text = _FRACTION_NAMES.sub(r"\\frac", _SPACING.sub(" ", text))
    text = _THOUSANDS.sub(lambda match: match.group(1) + re.sub("[ ,]", "", match.group(2)), text)
    return _DECIMAL_COMMA.sub(r"\1.\2", text) if _DECIMAL_COMMA.fullmatch(text) else _SPACE.sub("", _AND.sub(",", text))


def as_number(normalised: str) -> Fraction | None:
    """The value of a plain number, decimal or fraction of integers; None for all else."""
    if _NUMBER.fullmatch(normalised):
        return Fraction(normalised.rstrip(".") if normalised.endswith(".") else normalised)
    ratio = _RATIO.fullmatch(normalised)
    if ratio:
        sign, top, bottom, left, right = ratio.groups()
        denominator = int(bottom or right)
        return Fraction(int(sign + "1") * int(top or left), denominator) if denominator else None
    return None


def too_complex(answer: str) -> bool:
    """Whether a text is too long or too deeply nested to be an answer that a person would write."""
    if len(answer) > _LONGEST:
        return True
    depth = 0
    for letter in answer:
        depth += (letter in "({[") - (letter in ")}]")
        if depth > _DEEPEST:
            return True
    return False


def compare(gold: str, answer: str) -> bool | None:
    """Whether two isolated answers are the same, None where only a symbolic engine can tell.

    Equal texts are the same. Of two plain numbers, integers are decided exactly, others where they are equal or
    differ by more than a hundredth of their size: what lies between is a matter of rounding.
    """
    left, right = normalise(gold), normalise(answer)
    if left == right:
        return bool(left) or None
    first, second = as_number(left), as_number(right)
    if first is None or second is None:
        return None
    if first == second:
        return True
    both_whole = first.denominator == second.denominator == 1
    return False if both_whole or abs(first - second) * 100 > max(abs(first), abs(second)) else None


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed at all is closed."""
    closings, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif opened:
            closings[opened.pop()] = brace.start()
    return closings


def _box_content(text: str, start: int, closings: dict[int, int]) -> tuple[str, int]:
    """What the box at `start` holds and where it ends; empty where it is not closed."""
    command = _BOX.match(text, start)
    if command is None or command.end() >= len(text):
        return "", start
    opening = command.end()
    if text[opening] != "{":
        word = _UNBRACED.match(text, opening)
        return (word.group(), word.end()) if word else ("", start)
    closing = closings.get(opening)
    return ("", start) if closing is None else (text[opening + 1 : closing].strip(), closing + 1)


def _is_list_gap(gap: str) -> bool:
    """Whether two boxes with this text between them are parts of one answer."""
    if len(gap) > _LISTED_GAP or "\n\n" in gap:
        return False
    words = re.findall(r"(?<!\\)\b[A-Za-z]{2,}", gap)
    if len(gap) <= _JOINED_GAP and not words and "." not in gap:
        return True
    return len(words) <= _WORDS_BETWEEN and _LISTED.search(gap.strip(" $\\()[]")) is not None


def _outer_formula(text: str) -> str:
    match = _DOLLARS.match(text)
    return next(group for group in match.groups() if group is not None).strip() if match else text


def _lone_formula(text: str) -> str | None:
    """The formula that the text is, without dollars; None where it is prose or holds formulas among words."""
    if _DOLLARS.match(text):
        return _outer_formula(text)
    if len(text) > _BARE_LENGTH or "\n" in text or any(mark in text.replace("\\$", "") for mark in ("$", "\\(", "\\[")):
        return None
    return None if _PROSE.search(_COMMAND_WITH_TEXT.sub(" ", text)) else text
