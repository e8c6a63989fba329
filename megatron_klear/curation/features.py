"""Vectors of problems for choosing a spread-out subset: hashed n-grams by TF-IDF, or the user's own embeddings.

All vectors are scaled to a length of 127 and rounded to whole numbers. Their products are then exact in fp32, in any
order of summation, so that what is chosen depends on no number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from megatron_klear.data.rows import DataError

from .text import words

DIMENSIONS = 128
TERM_BITS = 18
LENGTH = 127
_MOST_WORDS = 1024
"""Of a problem; what comes later says little more of what it is about."""
_BLOCK = 1 << 14


def terms(text: str) -> NDArray[np.int64]:
    """Hashes of the words and pairs of words of a text, below 2^18."""
    tokens = [word.encode() for word in words(text)[:_MOST_WORDS]]
    hashes = [crc32(token) for token in tokens]
    hashes += [crc32(second, first) for first, second in zip(hashes, tokens[1:], strict=False)]
    return np.array(hashes, dtype=np.int64) & ((1 << TERM_BITS) - 1)


def vector(term_hashes: NDArray[np.int64], rarity: NDArray[np.float64]) -> NDArray[np.int8]:
    """TF-IDF of a text, [128]: each term adds its weight to one entry, with a sign (Weinberger et al., 0902.2206).

    `rarity` is the IDF of each term hash, [2^18].
    """
    distinct, counts = np.unique(term_hashes, return_counts=True)
    signs = 1 - 2 * ((distinct >> 7) & 1)
    weights = (1 + np.log(counts)) * rarity[distinct] * signs
    found: NDArray[np.int8] = rounded(np.bincount(distinct % DIMENSIONS, weights, DIMENSIONS)[None])[0]
    return found


def rounded(vectors: NDArray[Any]) -> NDArray[np.int8]:
    """Vectors [rows, dimensions] at a length of 127 as whole numbers; zeros stay zeros."""
    whole = np.empty(vectors.shape, dtype=np.int8)
    for block in blocks(len(vectors)):
        part = np.asarray(vectors[block], dtype=np.float64)
        lengths = np.linalg.norm(part, axis=1, keepdims=True)
        whole[block] = np.rint(part * (LENGTH / np.where(lengths > 0, lengths, 1)))
    return whole


def rarity_of(document_counts: NDArray[np.int64], documents: int) -> NDArray[np.float64]:
    """IDF, ln((1 + n) / (1 + n_t)) + 1, of terms that `n_t` of `n` documents have."""
    return np.log((1 + documents) / (1 + document_counts)) + 1


def read_embeddings(path: Path) -> NDArray[Any]:
    """The user's array [rows, dimensions], mapped and not read. Raises DataError where it is none."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"--features {path} is no .npy array: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"--features {path}: expected an array of floats [rows, dimensions]")
    for block in blocks(len(array)):
        if not np.isfinite(array[block]).all():
            raise DataError(f"--features {path}: rows {block.start} to {block.stop - 1} hold a NaN or an infinity")
    return array


def blocks(rows: int) -> Iterator[slice]:
    """Consecutive slices of `rows`."""
    return (slice(begin, min(begin + _BLOCK, rows)) for begin in range(0, rows, _BLOCK))
