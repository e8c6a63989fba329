"""K-Center-Greedy: a subset of which no row left out is far (Gonzalez 1985; Sener and Savarese, arXiv 1708.00489)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .features import blocks


def k_center(vectors: NDArray[np.int8], count: int, first: int) -> NDArray[np.int64]:
    """Indices of `count` vectors of [rows, dimensions], sorted: `first`, then each time the one farthest from those.

    Of equally far ones the first is taken. Takes count * rows * dimensions operations, and besides the vectors memory
    for a block of them in fp32 and two numbers a row.
    """
    if count >= len(vectors):
        return np.arange(len(vectors))
    squares = np.concatenate([np.square(vectors[b], dtype=np.float32).sum(axis=1) for b in blocks(len(vectors))])
    nearest = np.full(len(vectors), np.inf, dtype=np.float32)
    chosen: list[int] = []
    newest = first
    for _ in range(count):
        chosen.append(newest)
        centre = vectors[newest].astype(np.float32)
        for block in blocks(len(vectors)):
            distances = squares[block] - 2 * (vectors[block].astype(np.float32) @ centre) + squares[newest]
            np.minimum(nearest[block], distances, out=nearest[block])
        nearest[newest] = -1  # equal vectors, at a distance of 0, come after all others, and none comes twice
        newest = int(np.argmax(nearest))
    return np.sort(np.array(chosen))
