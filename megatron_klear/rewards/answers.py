"""Reading the final answer of a text, and comparing answers without a symbolic engine where that is enough.

Everything here is linear in the text and cheap: most answers of a model are decided by it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from .dress import choice_of, hedges, is_multiple, is_words, kinds_differ, split_unit, undress, units_differ, unwrap
from .exact import TooLargeError, based_number, exact_value

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"[{}]")
_MOST_BOXES = 50
_UNBRACED = re.compile(r"[^\s$.,;]+")
_JOINED_GAP = 9  # characters: `}$, $\boxed{`
_LISTED_GAP = 60
_LISTED = re.compile(r"(?:(?:^|\s)(?:and|or)|[,;]|[\u548c\u6216\u4e0e\u3001])\s*$")
_HEDGED = re.compile(r"(?:^|\s)(?:or|maybe|perhaps|possibly)(?:\s|$)|\u6216")
_SENTENCE_END = re.compile(r"[.!?\u3002](?:\s|$)")
_COMMANDS = re.compile(r"\\(?:[A-Za-z]+|[\[\]()!,;: ])")
_WORDS_BETWEEN, _WORDS_OF_A_HEDGE = 3, 5

_MARKER = re.compile(
    r"(?:####|^\W*A:|^\W*(?:final )?answer(?: is)?:?|\u7b54\u6848\s*(?:\u662f|\u4e3a|\u70ba|[:\uff1a]|(?=\*)))"
    r"\W*?\s*([^\s*:\uff1a].*)$",
    re.IGNORECASE,
)
_SPOKEN = re.compile(r"\banswer(?: is)?\s*:?\s*([^\s:].*)$", re.IGNORECASE)
_TAG_OPEN, _TAG_CLOSE = "<answer>", "</answer>"
_DOLLARS = re.compile(r"\A(?:\$([^$]+)\$|\$\$([^$]+)\$\$|\\\((.+)\\\)|\\\[(.+)\\\])[.\s]*\Z", re.DOTALL)
_COMMAND_WITH_TEXT = re.compile(r"\\[a-z]+\s*\{[^{}]*\}")
_PROSE = re.compile(r"[A-Za-z]{2,}[\s,]+[A-Za-z]{2,}")
_CLOSING = re.compile(r"(?:\\[!,;: ]|\\(?=\Z)|[\s,;:.])+\Z")
_SMALL = Fraction(1, 10_000)
_BARE_LENGTH = 300
_LONGEST, _DEEPEST = 3000, 60
_TAIL = 2000  # characters of a text without a marked answer that are searched for one

_SPACING = re.compile(r"\\(?:[!,;: ]|quad(?![a-z])|qquad(?![a-z])|left(?![a-z])|right(?![a-z]))")
_FRACTION_NAMES = re.compile(r"\\[dtc]frac(?![a-z])")
_AND = re.compile(r"\\text\s*\{\s*and\s*\}|\band\b|;")
_ALTERNATIVE = re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b")
_DECIMAL_COMMA = re.compile(r"([+-]?0),(\d{2,60})")
_THOUSANDS = re.compile(r"(?<![\d.])([1-9]\d{0,2})((?:,\d{3})+|(?: \d{3})+)(?![\d,])")
_SPACING_IN_NUMBERS = re.compile(r"(?<=\d)\\[,!; ](?=\d{3}(?!\d))")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_NUMBER = re.compile(r"[+-]?(?:\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})(?:[eE][+-]?\d{1,3})?")
_RATIO = re.compile(r"([+-]?)(?:\\frac\{(-?\d{1,60})\}\{(\d{1,60})\}|(\d{1,60})/(\d{1,60}))")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it was found; `isolated` where the text is the answer and nothing else."""

    text: str
    isolated: bool


def read_answer(text: str) -> Answer | None:
    """The final answer of a text, None where there is nothing to read.

    In this order: what stands between `<answer>` tags that no box follows; the last `\\boxed{}` (or the last list of
    them, "\\boxed{2} and \\boxed{3}"); what follows a last line's `####`, `A:`, `Answer:` or its Chinese; the whole
    text where it is one formula; else the end of the text, not isolated. A text whose only box is empty or never closed
    has no answer.
    """
    tagged = _in_tags(text)
    if tagged is not None:
        boxed = last_boxed(tagged) or (None if _BOX.search(tagged) or len(tagged) > _BARE_LENGTH else tagged)
        return Answer(_outer_formula(boxed), True) if boxed else None
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


def read_words(text: str) -> str | None:
    """The final answer of a text where words are expected: a box, a tag, what a last line says is the answer."""
    answer = read_answer(text)
    if answer is None or answer.isolated:
        return None if answer is None else answer.text
    text = text.strip()
    spoken = _SPOKEN.search(text[text.rfind("\n") + 1 :][-_TAIL:])
    if spoken:
        return _outer_formula(spoken.group(1))
    return text if len(text) <= _BARE_LENGTH and "\n" not in text else None


def normalise(answer: str) -> str:
    """An answer without what does not change its meaning: spacing, thousands separators, currency, mark-up, dollars."""
    text = undress(_outer_formula(answer.strip()))
    text = text.replace("{,}", ",").replace("\\%", "%").replace("\u2212", "-")
    text = group_digits(_FRACTION_NAMES.sub(r"\\frac", _SPACING.sub(" ", text)))
    return _DECIMAL_COMMA.sub(r"\1.\2", text) if _DECIMAL_COMMA.fullmatch(text) else _SPACE.sub("", _AND.sub(",", text))


def group_digits(text: str) -> str:
    """The text without separators of thousands."""
    return _THOUSANDS.sub(lambda match: match.group(1) + re.sub("[ ,]", "", match.group(2)), text)


def for_engine(answer: str) -> str:
    """An answer for the symbolic engine: mark-up that it does not know put aside, formulas left as they are."""
    text = split_unit(_outer_formula(answer.strip()))[0]
    text = re.sub(r"\\(?:textbf|textit|mathbf|boldsymbol|bm|emph|underline)(?=\s*\{)", r"\\text", text)
    text = undress(text) if not text.isascii() or "circ" in text or "varnothing" in text else text
    text = _ALTERNATIVE.sub(",", text)
    text = _SPACING_IN_NUMBERS.sub(",", text.replace("{,}", ","))
    return text if text[:1] in "([" or text[:2] == "\\{" or ", " in text else group_digits(text)


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

    Equal texts are the same. Constants of whole numbers are decided exactly, decimals where they are equal or differ
    by more than a hundredth of their size: what lies between is a matter of rounding. Of choices the letters decide.
    """
    left, right = normalise(gold), normalise(answer)
    if kinds_differ(gold, answer):
        return False
    if left == right:
        return bool(left) or None
    first, second = as_number(left), as_number(right)
    if first is not None and second is not None:
        return _same_value(first, second, exact="." not in left + right)
    if "_" in left or "_" in right:
        based = based_number(left), based_number(right)
        if based[0] or based[1]:
            whole = [
                number or ((text, 10) if text.isdigit() else None)
                for number, text in zip(based, (left, right), strict=True)
            ]
            return whole[0] == whole[1]
    chosen = _same_choice(gold, answer)
    if chosen is not None:
        return chosen
    if hedges(unwrap(gold), unwrap(answer)) or _contradicts_itself(right):
        return False
    return _same_quantity(gold, answer)


def _same_choice(gold: str, answer: str) -> bool | None:
    """Whether the letters of two choices are the same (and their texts, where both have one)."""
    wanted = choice_of(_for_choice(gold))
    if wanted is None:
        return None
    taken = choice_of(_for_choice(answer))
    if taken is None:
        return False if len(answer) > 1 and answer[:1] in "(ABCDEFGHIJ" and is_words(answer) else None
    texts = normalise(wanted[1]), normalise(taken[1])
    return wanted[0] == taken[0] and (not all(texts) or texts[0] == texts[1])


def _for_choice(text: str) -> str:
    return undress(_SPACING.sub(" ", _outer_formula(text.strip())))


def _contradicts_itself(normalised: str) -> bool:
    """Whether the text equates constants that are not equal, `3=4` or `x=3=4`."""
    if "=" not in normalised or "." in normalised:
        return False
    try:
        values = {exact_value(side) for side in normalised.split("=")} - {None}
    except TooLargeError:
        return True
    return len(values) > 1


def _same_quantity(gold: str, answer: str) -> bool | None:
    """Whether two quantities are the same, as far as exact constants and units of one word go."""
    gold, answer = _strip_ends(gold), _strip_ends(answer)
    parts = [split_unit(gold), split_unit(answer)]
    lettered = [split_unit(gold, letters=True), split_unit(answer, letters=True)]
    if units_differ(lettered[0][1], lettered[1][1]):
        return False
    if any(unit for _, unit in parts):  # a single letter beside a unit is one too
        parts = lettered
    texts = [normalise(quantity) for quantity, _ in parts]
    if texts[0] == texts[1]:
        return bool(texts[0]) or None
    values = []
    for text in texts:
        number = as_number(text)
        try:
            values.append(exact_value(text) if number is None else number)
        except TooLargeError:
            values.append(None)
            if number is None and all(value is not None for value in values[:-1]) and text is texts[1]:
                return False  # a number that nobody writes out is not the one of the ground truth
    if values[0] is not None and values[1] is None and is_multiple(texts[1]):
        return False  # the engine would take the letters of `5x` for a unit
    if values[0] is None or values[1] is None:
        return None
    return _same_value(values[0], values[1], exact="." not in texts[0] + texts[1])


def _same_value(first: Fraction, second: Fraction, *, exact: bool) -> bool | None:
    if first == second:
        return True
    size, difference = max(abs(first), abs(second)), abs(first - second)
    if exact or difference * 100 > size or first.denominator == second.denominator == 1:
        return False
    return False if size < _SMALL and difference * 10_000 > size else None


def _strip_ends(text: str) -> str:
    """The text without outer dollars, closing spaces, backslashes and stops; its mark-up stays."""
    return _CLOSING.sub("", _outer_formula(text.strip())).strip()


def _in_tags(text: str) -> str | None:
    """What the last `<answer>` tags hold (or the last list of them), None where a box follows or there are none."""
    found: list[str] = []
    end, start_of_next = len(text), 0
    last_box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    while len(found) < _MOST_BOXES:
        close = text.rfind(_TAG_CLOSE, 0, end)
        start = text.rfind(_TAG_OPEN, 0, max(close, 0))
        if start < 0 or (not found and close < last_box):
            break
        if found and not _is_list_gap(text[close + len(_TAG_CLOSE) : start_of_next]):
            break
        found.append(text[start + len(_TAG_OPEN) : close].strip())
        end = start_of_next = start
    return ", ".join(reversed(list(dict.fromkeys(found)))) if found else None


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
    """Whether two boxes with this text between them are parts of one answer, or alternatives that hedge it."""
    if len(gap) > _LISTED_GAP or "\n\n" in gap:
        return False
    plain = _COMMANDS.sub(" ", unwrap(gap)).strip(" $\\()[]{}\n\t")
    words = re.findall(r"(?<!\\)\b[A-Za-z]{2,}", plain)
    if len(plain) <= _JOINED_GAP and not words and "." not in plain and "\u3002" not in plain:
        return True
    if _SENTENCE_END.search(plain):
        return False
    if len(words) <= _WORDS_OF_A_HEDGE and _HEDGED.search(plain):
        return True
    return len(words) <= _WORDS_BETWEEN and _LISTED.search(plain) is not None


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
