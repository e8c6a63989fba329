"""The normal form in which curation compares texts."""

import hashlib
import unicodedata


def normalise(text: str) -> str:
    """Return `text` in NFKC, lower case, each run of white space one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def exact_key(text: str) -> bytes:
    """Return 16 bytes that are equal for texts of one normal form.

    A lone surrogate, which JSON can carry, counts as itself.
    """
    normal = normalise(text).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(normal, digest_size=16).digest()
