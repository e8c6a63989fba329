"""What an answer wears: mark-up, units, labels of choices, words for numbers' sizes. All of it by the text alone."""

from __future__ import annotations

import re

_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|sc)?|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|boldsymbol|bm|operatorname\*?"
    r"|emph|underline)\s*\{([^{}]*)\}"
)
_MOST_WRAPPERS = 4  # one inside another
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x3002: ".", 0x3001: ","}
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-z])|\u00b0")
_CURRENCY = re.compile(r"\\(?:pounds|euro|texteuro|textsterling|yen)(?![a-z])(?:\{\})?|[\u20ac\u00a3\u00a5$]")
_EMPTY_SET = re.compile(r"\\varnothing(?![a-z])|\u2205")
_ENDS = re.compile(r"(?:\\[!,;: ]|\\?~|\\(?=\Z)|[\s,;:.])+\Z")

_WORD = r"[^\W\d_]"
_UNIT = re.compile(rf"(.*?[\d)}}!])(\s*)({_WORD}+)(?:\^\{{?([23])\}}?)?")
_WRAPPED_UNIT = re.compile(
    rf"(.*?[\d)}}!])(?:\s|\\[,;:! ])*\\(?:text|mathrm|mbox|textrm|operatorname)\s*\{{\s*({_WORD}+)\.?\s*\}}"
    r"(?:\^\{?([23])\}?)?"
)
_MULTIPLE = re.compile(r"[-+]?\d+(?:\.\d*)?([A-Za-z]+)")
_SCALES = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
    "\u767e": 2, "\u5343": 3, "\u4e07": 4, "\u4ebf": 8, "\u842c": 4, "\u5104": 8,
}  # fmt: skip
_UNITS = (
    "cm centimeter centimeters centimetre centimetres; mm millimeter millimeters millimetre millimetres; "
    "km kilometer kilometers kilometre kilometres; m meter meters metre metres; in inch inches; ft foot feet; "
    "yd yard yards; mi mile miles; kg kilogram kilograms; g gram grams; mg milligram milligrams; lb lbs pound pounds; "
    "oz ounce ounces; s sec second seconds; min mins minute minutes; h hr hrs hour hours; day days; week weeks; "
    "month months; yr year years; l liter liters litre litres; ml milliliter milliliters millilitre millilitres; "
    "cent cents; dollar dollars usd; euro euros eur; yuan rmb cny; deg degree degrees; mph; kmh; ms millisecond "
    "milliseconds; hz; khz; mhz; nm; n newton newtons; j joule joules; kj; w watt watts; kw; v volt volts; percent"
)
_KNOWN_UNITS = {name: kind.split()[0] for kind in _UNITS.split(";") for name in kind.split()}
_NO_UNIT = frozenset(
    {"or", "and", "if", "when", "where", "mod", "is", "not", "base", "pi", "sin", "cos", "tan", "cot", "sec", "csc"}
    | {"log", "ln", "exp", "sqrt", "am", "pm", "\u6216", "\u548c", "\u4e0e"}
)

_CHOICE = re.compile(r"\(\s*([A-J])\s*\)[.:,]?|([A-J])\s*[.:)](?!\d)|([A-J])(?=\s*\Z)")
_OTHER_CHOICE = re.compile(
    r"\(\s*[A-J]\s*\)|(?<![A-Za-z])[A-J]\s*[.:)](?![A-Za-z])|(?:\b(?:or|and|not)\b|[,/&;\u6216\u548c])\s*\(?[A-J]\b"
)
_HEDGE = re.compile(r"(?<![A-Za-z\\])(?:or|either|maybe|perhaps)(?![A-Za-z])|\u6216|\\(?:lor|vee)(?![A-Za-z])")
_LIST = re.compile(
    r"[,;\u6216\u548c]|\\(?:pm|mp|cup|in|le|ge|leq|geq|lor|vee|infty|begin)(?![A-Za-z])|[<>=]"
    r"|(?<![A-Za-z])(?:and|or|either)(?![A-Za-z])"
)
_JOINING = frozenset({"or", "and", "either"})
_COMMAND = re.compile(r"\\[A-Za-z]+")
_OPERATORS = re.compile(r"[=+^<>_*|/\\$]|\d\s*\(|[({\[]\s*-?\d")
_LATIN = re.compile(r"[A-Za-z]+")
_OTHER_SCRIPT = re.compile(r"[^\W\d_A-Za-z\u0370-\u03ff]")  # Greek letters are variables
_SHORT_WORDS = frozenset({"yes", "no", "odd", "one", "two", "six", "ten", "all", "red", "mon", "sun"})


def undress(text: str) -> str:
    """The text without `\\text{}` and its like, degree signs, currency, full-width forms and loose ends."""
    text = text.translate(_FULL_WIDTH) if not text.isascii() else text
    if "\\" in text:
        text = unwrap(text)
    text = _CURRENCY.sub("", text.replace("\\$", "").replace("**", "") if "*" in text or "\\" in text else text)
    text = _EMPTY_SET.sub(r"\\emptyset ", _DEGREE.sub("", text))
    return _ENDS.sub("", text).strip()


def unwrap(text: str) -> str:
    """The text with what `\\text{}`, `\\mathbf{}` and their like hold, without the command."""
    for _ in range(_MOST_WRAPPERS):
        inner = _WRAPPER.sub(r"\1", text)
        if inner == text:
            break
        text = inner
    return text


def split_unit(text: str, *, letters: bool = False) -> tuple[str, str]:
    """A quantity and its unit of one word, both as texts; the unit is "" where there is none.

    A word that could be a product of variables is a unit only inside `\\text{}`, where it is a well-known one, or
    where it stands apart and is long; with `letters` a single one that names a unit, too. `5 million` is a quantity.
    """
    found = _WRAPPED_UNIT.fullmatch(text)
    if found:
        quantity, word, power = found.groups()
        apart = len(word) > 1 or word in _KNOWN_UNITS or not word.isascii()
    else:
        plain = _UNIT.fullmatch(text)
        if plain is None:
            return text, ""
        quantity, space, word, power = plain.groups()
        product = "".join(sorted(set(word))) == word  # abcd
        apart = bool(space) and len(word) >= 4 and re.search("[aeiou]", word) is not None and not product
        apart = apart or (word.lower() in _KNOWN_UNITS and (len(word) > 1 or (letters and bool(space))))
        apart = apart or _OTHER_SCRIPT.fullmatch(word[0]) is not None
    lower = word.lower()
    if lower in _SCALES:
        return f"({quantity})*10^{{{_SCALES[lower]}}}", ""
    if not apart or lower in _NO_UNIT:
        return text, ""
    return quantity, _KNOWN_UNITS.get(lower, lower) + (power or "")


def is_multiple(normalised: str) -> bool:
    """Whether a text is a number times letters that name no unit, `5x`."""
    found = _MULTIPLE.fullmatch(normalised)
    return found is not None and found[1].lower() not in _KNOWN_UNITS


def kinds_differ(first: str, second: str) -> bool:
    """Whether one of two texts is in degrees and the other in percent."""
    signs = [("%" in text, _DEGREE.search(text) is not None) for text in (first, second)]
    return (True, False) in signs and (False, True) in signs


def units_differ(first: str, second: str) -> bool:
    """Whether two units are known and not the same."""
    known = {unit.rstrip("23") for unit in (first, second)} <= set(_KNOWN_UNITS.values())
    return bool(first and second) and first != second and known


def choice_of(text: str) -> tuple[str, str] | None:
    """Letter and text of a choice, "(B) 12" or "B. 12"; None where it is none, or names another choice as well."""
    found = _CHOICE.match(text)
    if found is None:
        return None
    rest = text[found.end() :].strip()
    if _OTHER_CHOICE.search(rest) or re.fullmatch(r"\W*[A-J]\W*", rest):
        return None
    return next(letter for letter in found.groups() if letter), rest


def hedges(gold: str, answer: str) -> bool:
    """Whether an answer names alternatives where the ground truth is no list."""
    return _HEDGE.search(answer) is not None and _LIST.search(gold) is None


def is_words(text: str) -> bool:
    """Whether a text (as it stands, with its mark-up) is words rather than a formula, a quantity or a letter."""
    wrapped = _WRAPPER.search(text) is not None
    plain = undress(text)
    if _COMMAND.search(plain) or _OPERATORS.search(plain) or choice_of(plain) is not None:
        return False
    if _OTHER_SCRIPT.search(plain):
        return not plain[:1].isdigit()
    runs = [run for run in _LATIN.findall(plain) if run.lower() not in _JOINING]
    if not any(len(run) >= 2 for run in runs):
        return False
    if plain[:1].isdigit() or plain[:1] in "+-.":  # a quantity with a unit, unless figures go on behind words
        return (re.search(rf"{runs[0]}.*\d", plain) is not None and split_unit(plain)[1] == "") or (
            runs[-1].lower() in ("am", "pm")
        )
    lower = [run.lower() for run in runs]
    if wrapped and _LATIN.fullmatch(plain):
        return True
    known = [word in _SHORT_WORDS or len(word) >= 4 for word in lower]
    return any(known) or (len(runs) >= 2 and any(len(run) >= 3 for run in runs))


def same_words(first: str, second: str) -> bool:
    """Whether two texts are the same words, spacing, case, mark-up and quotation marks aside."""
    return _bare(first) == _bare(second)


def _bare(text: str) -> str:
    words = re.sub(r"[\"'`\u2018\u2019\u201c\u201d]", "", undress(text)).replace("\\", " ")
    return " ".join(re.sub(r"\s*([-,.:;])\s*", r"\1", words).split()).casefold()
