"""The checksum of a tensor: the sums it says it is, and no change of bits, shape or order passes unseen."""

import numpy as np
import pytest
import torch

from megatron_klear.rollout.weights.checksum import checksum

SIZES = [0, 1, 1000, 32760, 32761, 65520, 65521, 65522, 2 * 65521 + 5]


def by_definition(tensor: torch.Tensor) -> str:
    """Both sums with Python's own integers."""
    words = tensor.contiguous().view(-1).view(torch.uint8 if tensor.element_size() == 1 else torch.int16).tolist()
    plain = sum(words) % 2**64
    weighted = sum(word * (place % 65521 + 1) for place, word in enumerate(words)) % 2**64
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}:{shape}:{plain:016x}{weighted:016x}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_of_the_definition(dtype: torch.dtype, size: int):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).mul(3).to(dtype)
    assert checksum(tensor) == by_definition(tensor)


def test_every_bit_shape_and_order_counts():
    tensor = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 700)).astype(np.float32))
    same = checksum(tensor)
    assert checksum(tensor.T.contiguous().T) == same
    for place in (0, 65521, 209_999):
        flipped = tensor.clone()
        flipped.view(-1).view(torch.int32)[place] ^= 1
        assert checksum(flipped) != same
    swapped = tensor.clone()
    swapped[[3, 4]] = tensor[[4, 3]]
    assert checksum(swapped) != same
    assert checksum(tensor.reshape(700, 300)) != same
    assert checksum(tensor.to(torch.bfloat16)).startswith("bfloat16:300x700:")
