"""Exact values of constants made of whole numbers: fractions, powers, factorials, binomials.

Every step is bounded before it is computed, so that no answer, however large, holds the interpreter.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

MOST_BITS = 1 << 17
"""Size of the largest numerator or denominator that is computed: 2005! and 2^100000 fit."""
_MOST_WORK = 1 << 22  # bits over all steps of one text
_MOST_LETTERS = 1000
_DEEPEST = 60

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<command>\\(?:[dtc]?frac|[dt]?binom|cdot|times|div|left|right)"
    r"(?![A-Za-z]))|(?P<sign>\*\*|[-+*/^!(){}\u00d7\u00b7\u00f7\u2212]))"
)
_SIGNS = {
    "**": "^", "\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-",
    "\\cdot": "*", "\\times": "*", "\\div": "/", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac",
    "\\dbinom": "\\binom", "\\tbinom": "\\binom",
}  # fmt: skip
_BASED = re.compile(r"([0-9A-Z]*\d[0-9A-Z]*)_(?:\{(\d{1,2})\}|(\d{1,2}))")


class TooLargeError(ArithmeticError):
    """A constant that is written as exact, but whose digits no person would write out."""


def exact_value(text: str) -> Fraction | None:
    """The value of a constant of whole numbers and decimals under + - * / ^ ! and binomials; None for all else.

    What can be read in two ways (`1/2(3)`, `2\\frac{1}{3}`, `2^3^2`, `7!!`) is None too. Raises TooLargeError where the
    value needs more than MOST_BITS.
    """
    if len(text) > _MOST_LETTERS:
        return None
    tokens: list[str] = []
    place = 0
    text = text.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            return None
        word = found.group(found.lastgroup or 0)
        if word not in ("\\left", "\\right"):
            tokens.append(_SIGNS.get(word, word))
        place = found.end()
    try:
        reader = _Reader(tokens)
        value = reader.sum()
        return value if reader.next == "" else None
    except _UnreadableError:
        return None


def based_number(text: str) -> tuple[str, int] | None:
    """Digits and base of a number with its base as an index, `120_5` or `1A_{16}`; None for all else."""
    found = _BASED.fullmatch(text)
    if found is None:
        return None
    base = int(found[2] or found[3])
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in found[1]):
        return None
    return found[1].lstrip("0") or "0", base


class _UnreadableError(Exception):
    """Not a constant of the kind, or one that can be read in two ways."""


class _Reader:
    """A descent over the tokens; `next` is the one to read, "" at the end."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._place, self._depth, self._work = [*tokens, ""], 0, 0, 0

    @property
    def next(self) -> str:
        return self._tokens[self._place]

    def sum(self) -> Fraction:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _UnreadableError
        value = self._product()
        while self.next in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value = self._sized(value + sign * self._product())
        self._depth -= 1
        return value

    def _product(self) -> Fraction:
        sign = 1
        while self.next in ("+", "-"):
            sign *= 1 if self._take() == "+" else -1
        value, divided = self._power(), False
        while True:
            if self.next in ("*", "/"):
                divided = divided or self.next == "/"
                dividing = self._take() == "/"
                negative = self.next == "-"
                if negative:
                    self._take()
                factor = -self._power() if negative else self._power()
                if dividing and not factor:
                    raise _UnreadableError
                value = self._sized(value / factor if dividing else value * factor)
            elif self._begins_factor():
                if divided:
                    raise _UnreadableError  # 1/2(3): a half times three, or a sixth
                value = self._sized(value * self._power())
            else:
                return sign * value

    def _begins_factor(self) -> bool:
        """Whether a factor follows without a sign: `20!10!`, `3(4)`; `2\\frac{1}{3}` may be a mixed number."""
        before = self._tokens[self._place - 1]
        if self.next in ("(", "\\binom"):
            return True
        if self.next == "\\frac" or self.next[:1].isdigit():
            if before in ("!", ")"):
                return True
            if before != "":
                raise _UnreadableError
        return False

    def _power(self) -> Fraction:
        base = self._factorial()
        if self.next != "^":
            return base
        self._take()
        negative = self.next == "-"
        if negative:
            self._take()
        exponent = -self._atom() if negative else self._atom()
        if self.next in ("^", "!") or exponent.denominator != 1 or (not base and exponent <= 0):
            raise _UnreadableError
        if base not in (0, 1, -1) and abs(exponent) * _bits(base) > 2 * MOST_BITS:
            raise TooLargeError
        return self._sized(base ** (int(exponent) if base not in (0, 1, -1) else int(exponent) % 2 or 2))

    def _factorial(self) -> Fraction:
        value = self._atom()
        if self.next != "!":
            return value
        self._take()
        if self.next == "!" or value.denominator != 1 or value < 0:
            raise _UnreadableError
        if value * max(1, _bits(value)) > 2 * MOST_BITS:
            raise TooLargeError
        return self._sized(Fraction(math.factorial(int(value))))

    def _atom(self) -> Fraction:
        token = self._take()
        if token[:1].isdigit() or token[:1] == ".":
            if len(token) > MOST_BITS // 4:
                raise TooLargeError
            return Fraction(token.rstrip("."))
        if token in ("(", "{"):
            value = self.sum()
            if self._take() != {"(": ")", "{": "}"}[token]:
                raise _UnreadableError
            return value
        if token == "\\frac":
            top, bottom = self._argument(), self._argument()
            if not bottom:
                raise _UnreadableError
            return self._sized(top / bottom)
        if token == "\\binom":
            return self._binomial(self._argument(), self._argument())
        raise _UnreadableError

    def _argument(self) -> Fraction:
        """What a command takes: a group, or one digit (`\\frac12`)."""
        token = self.next
        if token[:1].isdigit():
            if not token.isdigit():
                raise _UnreadableError
            if len(token) > 1:
                self._tokens[self._place] = token[1:]
            else:
                self._place += 1
            return Fraction(int(token[0]))
        if token != "{":
            raise _UnreadableError
        return self._atom()

    def _binomial(self, of: Fraction, taken: Fraction) -> Fraction:
        if of.denominator != 1 or taken.denominator != 1 or of < 0 or taken < 0:
            raise _UnreadableError
        if min(taken, max(Fraction(0), of - taken)) * _bits(of) > 2 * MOST_BITS:
            raise TooLargeError
        return self._sized(Fraction(math.comb(int(of), int(taken))))

    def _take(self) -> str:
        token = self.next
        if token:
            self._place += 1
        return token

    def _sized(self, value: Fraction) -> Fraction:
        self._work += _bits(value)
        if _bits(value) > 2 * MOST_BITS or self._work > _MOST_WORK:
            raise TooLargeError
        return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
