"""A checksum of a tensor's bits that is the same on every device: proof that weights arrived."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 22
_MODULUS = 65521


def checksum(tensor: Tensor) -> str:
    """Checksum of dtype, shape and every bit, sensitive to the order of elements.

    Two sums in 64-bit integers, which wrap alike everywhere: of the elements' bits, and of the bits times the place.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    plain = weighted = 0
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start : start + _BLOCK].to(torch.int64)
        places = (torch.arange(start, start + block.numel(), device=block.device) % _MODULUS) + 1
        plain += int(block.sum())
        weighted += int((block * places).sum())
    mask = (1 << 64) - 1
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}:{shape}:{plain & mask:016x}{weighted & mask:016x}"
