"""The normal form in which curation compares texts, and the words that overlaps are counted in."""

import hashlib
import re
import unicodedata

_WORD = re.compile(r"[^\W_]+")
_ASCII_WORD = re.compile(r"[a-z0-9]+")
"""The same words of a lower-case ASCII text, found in less time."""
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200c\u200d\u2060\ufeff"))
"""Soft hyphens, joiners and byte order marks, which stand inside words that look like others."""


def normalise(text: str) -> str:
    """Return `text` in NFKC without invisible characters, lower case, white space collapsed, none at the ends."""
    return " ".join(_folded(text).split())


def exact_key(text: str) -> bytes:
    """Return 16 bytes that are equal for texts of one normal form.

    A lone surrogate, which JSON can carry, counts as itself.
    """
    normal = normalise(text).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(normal, digest_size=16).digest()


def problem_id(text: str) -> str:
    """The name of a problem in files of verdicts: 32 hexadecimal digits, equal for texts of one normal form."""
    return hashlib.sha256(exact_key(text)).digest()[:16].hex()


def words(text: str) -> list[str]:
    """Return the runs of letters and digits of `text` after NFKC, without invisible characters, in lower case."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(_folded(text))


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).lower()
