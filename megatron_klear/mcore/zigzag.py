"""Zig-zag slices of packed rows for context parallelism: every segment is cut in 2 * cp chunks, rank r keeps two.

Rank r owns chunks r and 2 * cp - 1 - r of every segment, so that causal attention costs every rank the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt


def zigzag_indices(cu_seqlens: Sequence[int], size: int, rank: int) -> npt.NDArray[np.int64]:
    """Positions of the padded row that `rank` of `size` keeps, in the order it keeps them.

    Every segment's length must divide by 2 * size. Example: bounds [0, 4, 8], size 2, rank 0 -> [0 3 4 7].
    """
    kept = []
    for start, end in pairwise(cu_seqlens):
        if (end - start) % (2 * size):
            raise ValueError(f"segment [{start}, {end}) does not divide into {2 * size} chunks; pad it first")
        chunk = (end - start) // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            kept.append(np.arange(start + index * chunk, start + (index + 1) * chunk, dtype=np.int64))
    return np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)


def zigzag_order(cu_seqlens: Sequence[int], size: int) -> npt.NDArray[np.int64]:
    """Where every position of the padded row lies once the ranks' slices are laid end to end in rank order.

    The inverse of the slices: `gathered[zigzag_order(bounds, size)]` is the row in document order again.
    """
    gathered = np.concatenate([zigzag_indices(cu_seqlens, size, rank) for rank in range(size)])
    order = np.empty_like(gathered)
    order[gathered] = np.arange(len(gathered))
    return order
