"""Zig-zag slices: a partition of the row, and its inverse."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.mcore.zigzag import zigzag_indices, zigzag_order


@given(st.integers(1, 8), st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_slices_partition_the_row_and_the_order_undoes_them(size: int, chunks: list[int]) -> None:
    bounds = np.cumsum([0, *(2 * size * chunk for chunk in chunks)]).tolist()
    slices = [zigzag_indices(bounds, size, rank) for rank in range(size)]
    assert {len(kept) for kept in slices} == {bounds[-1] // size}
    row = np.arange(bounds[-1]) * 7 + 1
    gathered = np.concatenate([row[kept] for kept in slices])
    assert np.array_equal(gathered[zigzag_order(bounds, size)], row)


@given(st.integers(1, 8), st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_causal_attention_costs_every_rank_the_same(size: int, chunks: list[int]) -> None:
    bounds = np.cumsum([0, *(2 * size * chunk for chunk in chunks)]).tolist()
    keys_read = np.concatenate([np.arange(1, end - start + 1) for start, end in pairwise(bounds)])
    assert len({int(keys_read[zigzag_indices(bounds, size, rank)].sum()) for rank in range(size)}) == 1


def test_rank_keeps_its_chunk_from_either_end() -> None:
    assert zigzag_indices([0, 4, 12], 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert zigzag_indices([0, 4, 12], 2, 1).tolist() == [1, 2, 6, 7, 8, 9]


def test_segment_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"segment \[4, 10\) does not divide into 4 chunks"):
        zigzag_indices([0, 4, 10], 2, 0)
