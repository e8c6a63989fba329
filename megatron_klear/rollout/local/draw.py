"""Drawing tokens: the distribution after temperature, top-k and top-p, and one uniform number a token.

A sample's numbers come from a generator of its own, seeded by run, prompt and sample, so it does not matter which
other sequences are decoded beside it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class UniformStream:
    """The uniform numbers of one sample, in order."""

    def __init__(self, seed: int, prompt_id: str, number: int) -> None:
        digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{number}".encode()).digest()
        self._generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))

    def take(self, count: int) -> npt.NDArray[np.float64]:
        """The next numbers in [0, 1)."""
        return self._generator.random(count)


def log_distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities [B, V] of the distribution sampled from; tokens cut off by top-k or top-p are -inf.

    Temperature 0 puts everything on the most likely token.
    """
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / temperature
    if top_k and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits.log_softmax(dim=-1)


def draw(log_probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token [B] a row by inverting the cumulative distribution at `uniform` [B] (float64), never one of mass 0."""
    cumulative = log_probabilities.exp().double().cumsum(dim=-1)
    whole = cumulative[:, -1:]
    # Below the whole even where the product rounds up to it: the token found is the one that takes the sum above it.
    threshold = torch.minimum(uniform[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return token.clamp(max=cumulative.shape[-1] - 1)  # of NaNs too
