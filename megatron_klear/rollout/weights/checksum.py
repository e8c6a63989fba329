"""A checksum of a tensor's bits that is the same on every device: proof that weights arrived."""

from __future__ import annotations

import torch
from torch import Tensor

_MODULUS = 65521


def checksum(tensor: Tensor) -> str:
    """Checksum of dtype, shape and every bit, sensitive to the order of elements.

    Two sums in 64-bit integers, which wrap alike everywhere: of the tensor's 16-bit words (bytes, where elements have
    one), and of each word times its place modulo 65521. One pass over the tensor, without a copy of it.
    """
    word = torch.uint8 if tensor.element_size() == 1 else torch.int16  # wider ones are summed several times slower
    bits = tensor.detach().contiguous().reshape(-1).view(word)
    rest = bits[len(bits) // _MODULUS * _MODULUS :]
    columns = rest.to(torch.int64)  # the sum of all words at equal places
    if len(rest) < len(bits):
        columns = bits[: len(bits) - len(rest)].view(-1, _MODULUS).sum(dim=0, dtype=torch.int64)
        columns[: len(rest)] += rest
    places = torch.arange(1, len(columns) + 1, device=columns.device)
    mask = (1 << 64) - 1
    plain, weighted = int(columns.sum()) & mask, int((columns * places).sum()) & mask
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}:{shape}:{plain:016x}{weighted:016x}"
