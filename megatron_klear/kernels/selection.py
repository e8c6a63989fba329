"""Which tokens of a row are computed: those with a gradient, and those that are only looked at.

Finding them on a GPU makes the host wait for it, once a micro-batch. Who has the row's weights on the host chooses
there and sends the indices along.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klear.kernels.transfer import send
from megatron_klear.types import LossCoefficients, LossKind

Selection = slice | Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Indices [n] int64 of tokens, rising; `first` is that of a run of adjacent tokens, -1 where they are scattered."""

    index: Tensor
    first: int = -1

    @classmethod
    def of(cls, index: Tensor) -> Group:
        """The group of these tokens; waits for the device that they are on."""
        first, last = index[[0, -1]].tolist() if len(index) else (0, -1)
        return cls(index=index, first=first if last - first + 1 == len(index) else -1)

    def to(self, device: torch.device) -> Group:
        """The same tokens on a device, on their way there when this returns."""
        return Group(index=send(self.index, device), first=self.first)

    def pieces(self, size: int) -> Iterator[tuple[Selection, int]]:
        """At most `size` tokens at a time and their number: a slice where they are adjacent, which copies nothing."""
        for start in range(0, len(self.index), size):
            stop = min(start + size, len(self.index))
            adjacent = slice(self.first + start, self.first + stop)
            yield adjacent if self.first >= 0 else self.index[start:stop], stop - start


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The tokens of a row that take part. The others have outputs of 0."""

    active: Group
    """They have a gradient: three matrix products."""
    silent: Group
    """They have a weight but no gradient, for advantage 0 and no other term: one product."""

    def to(self, device: torch.device) -> Chosen:
        """The same tokens on a device, on their way there when this returns."""
        return Chosen(active=self.active.to(device), silent=self.silent.to(device))

    def __iter__(self) -> Iterator[Group]:
        """Both groups."""
        yield self.active
        yield self.silent


def choose_tokens(
    targets: Tensor,
    policy_weights: Tensor,
    *,
    vocab_size: int,
    coefficients: LossCoefficients | None,
    advantages: Tensor | None = None,
    nll_weights: Tensor | None = None,
    other_terms: bool = False,
) -> Chosen:
    """The tokens with a weight, all arguments being [T] on one device.

    Those of advantage 0 are silent where nothing but `coefficients` makes a gradient: `other_terms` says that the step
    has an entropy or KL term. Without coefficients (a loss outside the family) every token with a weight is active.
    Raises ValueError where one of them has a target outside the vocabulary of `vocab_size`.
    """
    weighted = active = policy_weights != 0
    local = coefficients is not None and coefficients.kind != LossKind.NLL
    if local and advantages is not None and not other_terms:
        active = weighted & (advantages != 0)
    if nll_weights is not None:
        weighted = weighted | (nll_weights != 0)
        active = active | (nll_weights != 0)
    return Chosen(
        active=Group.of(indices_of(active, targets, vocab_size)),
        silent=Group.of(indices_of(weighted & ~active, targets, vocab_size)),
    )


def choose_all(targets: Tensor, vocab_size: int, wanted: Tensor | None = None) -> Group:
    """All tokens [T], or those where `wanted` [T] is true. Raises ValueError as `choose_tokens` does."""
    mask = torch.ones_like(targets, dtype=torch.bool) if wanted is None else wanted
    return Group.of(indices_of(mask, targets, vocab_size))


def indices_of(weighted: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Indices where `weighted` [T] is true; ValueError where one of them has a target outside the vocabulary."""
    index = weighted.nonzero().squeeze(-1)
    chosen = targets[index]
    outside = (chosen < 0) | (chosen >= vocab_size)
    if bool(outside.any()):
        bad = int(index[outside][0])
        raise ValueError(
            f"target {int(targets[bad])} of token {bad} lies outside the vocabulary of {vocab_size}: "
            "give untrained tokens weight 0, and check that tokenizer and model belong together"
        )
    return index
