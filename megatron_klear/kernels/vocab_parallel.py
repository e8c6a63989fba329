"""Collectives over the shards of a vocabulary: every rank holds some rows of the head and all tokens.

Sums over shards are made of one all-gather added up in rank order, so that they are the same bits on every rank and in
every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabShard:
    """The rows of the head this rank holds: global ids `start` to `start + rows`, of which `valid` are real."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    start: int
    valid: int

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup | None, vocab_size: int | None) -> VocabShard:
        """The shard that `weight` [V_local, H] is, all shards being alike in size; `vocab_size` is global, unpadded."""
        size = 1 if group is None else dist.get_world_size(group)
        rank = 0 if size == 1 else dist.get_rank(group)
        rows = int(weight.shape[0])
        total = rows * size if vocab_size is None else vocab_size
        if not 0 < total <= rows * size:
            raise ValueError(f"vocab_size {total} must lie in [1, {rows * size}], the rows of the head over all shards")
        start = rank * rows
        return cls(
            group=None if size == 1 else group,
            rank=rank,
            size=size,
            start=start,
            valid=min(max(total - start, 0), rows),
        )


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name under which an operator can carry a process group; empty for none."""
    return "" if group is None else str(group.group_name)


def group_of(name: str) -> dist.ProcessGroup | None:
    """The process group of that name."""
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]


def gather_shards(values: Tensor, shard: VocabShard) -> Tensor:
    """Every rank's `values`, stacked in rank order: [ranks, ...]."""
    if shard.group is None:
        return values.unsqueeze(0)
    gathered = values.new_empty((shard.size, *values.shape))
    dist.all_gather_into_tensor(gathered.view(-1), values.contiguous().view(-1), group=shard.group)
    return gathered


def gather_sequence(hidden: Tensor, shard: VocabShard) -> Tensor:
    """The ranks' token slices [T / ranks, H] put end to end, [T, H]."""
    return gather_shards(hidden, shard).flatten(0, 1)


def scatter_sequence(gradient: Tensor, shard: VocabShard) -> Tensor:
    """The sum over ranks of `gradient` [T, H], this rank's slice [T / ranks, H] of it."""
    if shard.group is None:
        return gradient
    piece = gradient.new_empty((gradient.shape[0] // shard.size, *gradient.shape[1:]))
    dist.reduce_scatter_tensor(piece, gradient.contiguous(), group=shard.group)
    return piece


def reduce_hidden_gradient(gradient: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    """Sum each shard's part of the gradient of the hidden states; may overwrite `gradient`."""
    if shard.group is None:
        return gradient
    if sequence_parallel:
        return scatter_sequence(gradient, shard)
    dist.all_reduce(gradient, group=shard.group)
    return gradient


class _SumShards(torch.autograd.Function):
    """Sum over shards of what every rank then uses in the same way: the gradient comes back as it is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: VocabShard) -> Tensor:
        return gather_shards(values, shard).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _EnterShards(torch.autograd.Function):
    """Hidden states as every shard reads them, [T, H]; backward sums the shards' gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
        ctx.shard, ctx.sequence_parallel = shard, sequence_parallel
        return gather_sequence(hidden, shard) if sequence_parallel else hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        gradient = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        return reduce_hidden_gradient(gradient, ctx.shard, ctx.sequence_parallel), None, None


def sum_shards(values: Tensor, shard: VocabShard) -> Tensor:
    """Differentiable sum over shards, for values that every rank uses alike."""
    if shard.group is None:
        return values
    return cast(Tensor, _SumShards.apply(values, shard))  # type: ignore[no-untyped-call]


def enter_shards(hidden: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    """Differentiable: the hidden states of all tokens, [T, H], ready for a product with this shard's rows."""
    if shard.group is None:
        return hidden
    return cast(Tensor, _EnterShards.apply(hidden, shard, sequence_parallel))  # type: ignore[no-untyped-call]
