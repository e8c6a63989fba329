"""Problems that are nearly the same: MinHash and LSH find candidates, shared shingles decide."""

from __future__ import annotations

import math
from typing import Any

from megatron_klear.data.rows import DataError

from .text import normalise

SHINGLE_WORDS = 5
BANDS = 16
_SEED = 42
_RECALL = 0.95
"""Of pairs that are just similar enough; it is higher for all others."""
_MOST_ROWS = 8


def shingles(text: str) -> set[str]:
    """All runs of five words of a text in normal form, words being what spaces separate; of a shorter one all of it."""
    tokens = normalise(text).split()
    return {" ".join(tokens[k : k + SHINGLE_WORDS]) for k in range(max(1, len(tokens) - SHINGLE_WORDS + 1))}


def rows_of_band(min_jaccard: float) -> int:
    """The most hashes of a band with which pairs at `min_jaccard` become candidates with a probability of 0.95.

    That is 1 - (1 - s^r)^b for r rows and b bands (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4.2).
    """
    if min_jaccard == 1:
        return _MOST_ROWS
    needed = 1 - (1 - _RECALL) ** (1 / BANDS)
    return min(_MOST_ROWS, max(1, math.floor(math.log(needed) / math.log(min_jaccard))))


def require_rensa() -> Any:
    """The package. Raises DataError where it is not installed."""
    try:
        import rensa
    except ImportError:
        raise DataError("near duplicates need the package rensa: pip install 'megatron-klear[curation]'") from None
    return rensa


def sketches(texts: list[str], min_jaccard: float) -> list[Any]:
    """A MinHash of each text's shingles."""
    hashes = BANDS * rows_of_band(min_jaccard)
    found: list[Any] = require_rensa().RMinHash.from_token_sets(
        [sorted(shingles(text)) for text in texts], hashes, _SEED
    )
    return found


class NearIndex:
    """Texts that were kept, to find the one that a further text is nearly the same as."""

    def __init__(self, min_jaccard: float) -> None:
        self._min_jaccard = min_jaccard
        hashes = BANDS * rows_of_band(min_jaccard)
        self._candidates = require_rensa().RMinHashLSH(min_jaccard, hashes, BANDS)
        self._texts: list[str] = []

    def nearest(self, text: str, sketch: Any) -> tuple[int, float] | None:
        """The text added as the k-th that is most similar, the first of several, and its Jaccard similarity.

        None where none reaches the bound.
        """
        own = shingles(text)
        best: tuple[int, float] | None = None
        for k in sorted(self._candidates.query(sketch)):
            other = shingles(self._texts[k])
            shared = len(own & other)
            similarity = shared / (len(own) + len(other) - shared)
            if similarity >= self._min_jaccard and (best is None or similarity > best[1]):
                best = k, similarity
        return best

    def add(self, text: str, sketch: Any) -> None:
        """Add a text that is kept."""
        self._candidates.insert(len(self._texts), sketch)
        self._texts.append(text)
