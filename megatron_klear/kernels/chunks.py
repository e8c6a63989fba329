"""The fused policy loss without autograd: a loop over chunks of tokens, three matrix products a chunk.

A chunk's logits are computed into one buffer, the row kernel writes their gradient over them, and two products turn
that into the gradients of hidden states and head; nothing else of size T x V ever exists. Tokens without weight are in
no chunk. Tokens whose gradient is zero (advantage 0 and no other term) only go through the first product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_klear.kernels import gemm, mailboxes, rows
from megatron_klear.kernels.inputs import Terms, Tokens
from megatron_klear.kernels.rows import RowOutputs
from megatron_klear.kernels.selection import Chosen, Group, Selection
from megatron_klear.kernels.vocab_parallel import VocabShard, gather_sequence, gather_shards, reduce_hidden_gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The output layer of this rank, and how its logits are made."""

    weight: Tensor  # [V_local, H]
    shard: VocabShard
    vocab_size: int  # global, unpadded
    logits_dtype: torch.dtype
    chunk_tokens: int | None = None

    def chunks(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Selection, Tensor]]:
        """Chunk by chunk the tokens of each group: the group, the tokens, and room for their logits.

        One buffer serves all chunks.
        """
        groups = tuple(groups)
        columns, device = self.weight.shape[0], self.weight.device
        longest = max(1, *(len(group.index) for group in groups))
        size = self.chunk_tokens or gemm.chunk_size(longest, columns, self.logits_dtype, device)
        buffer = gemm.logits_buffer(min(size, longest), columns, self.logits_dtype, device)
        for group in groups:
            for selection, count in group.pieces(size):
                yield group, selection, buffer[:count]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """Outputs [T] and, where wanted, the gradient of the hidden states."""

    outputs: RowOutputs
    hidden: Tensor | None


def _zeros(num_tokens: int, device: torch.device) -> RowOutputs:
    outputs = RowOutputs.empty(num_tokens, device)
    for field in fields(outputs):
        getattr(outputs, field.name).zero_()
    return outputs


def _store(outputs: RowOutputs, selection: Selection, chunk: RowOutputs) -> None:
    for field in fields(outputs):
        getattr(outputs, field.name)[selection] = getattr(chunk, field.name)


def _row_losses(head: Head, logits: Tensor, tokens: Tokens, terms: Terms, gradient: Tensor) -> RowOutputs:
    """Losses of a chunk, and the gradient of its logits over the logits."""
    if head.shard.group is None:
        return rows.policy_loss_rows(logits, tokens, terms, vocab_size=head.vocab_size, gradient=gradient)
    start, size = head.shard.start, head.vocab_size
    peers = mailboxes.group_mailboxes(head.shard.group, logits, gradient)
    if peers is not None:
        return rows.sharded_rows(logits, tokens, terms, peers, vocab_start=start, vocab_size=size, gradient=gradient)
    stats = rows.combine_stats(
        gather_shards(rows.stats_rows(logits, tokens, vocab_start=start, vocab_size=size), head.shard)
    )
    return rows.finish_rows(logits, stats, tokens, terms, vocab_start=start, vocab_size=size, gradient=gradient)


def policy_loss_chunks(
    hidden: Tensor,
    head: Head,
    tokens: Tokens,
    chosen: Chosen,
    terms: Terms,
    *,
    sequence_parallel: bool,
    hidden_gradient: bool,
    weight_gradient: Tensor | None,
) -> Gradients:
    """Per-token outputs and the gradient of their summed loss; that of the head is added to `weight_gradient`.

    `hidden` is [T, H], or this rank's [T / ranks, H] under sequence parallelism; its gradient is alike, summed over
    the vocabulary shards.
    """
    shard = head.shard
    if sequence_parallel:
        hidden = gather_sequence(hidden, shard)
    outputs = _zeros(len(tokens.targets), hidden.device)
    total = torch.zeros_like(hidden) if hidden_gradient else None
    for group, selection, logits in head.chunks(chosen):
        chunk = hidden[selection]
        gemm.logits_into(logits, chunk, head.weight)
        gradient = gemm.gradient_memory(logits, head.weight)
        _store(outputs, selection, _row_losses(head, logits, tokens.take(selection), terms, gradient))
        if group is chosen.silent:
            continue
        if total is not None and isinstance(selection, slice):
            torch.mm(gradient, head.weight, out=total[selection])
        elif total is not None:
            total[selection] = gradient @ head.weight
        if weight_gradient is not None:
            gemm.add_weight_gradient(weight_gradient, gradient, chunk)
    if total is not None:
        total = reduce_hidden_gradient(total, shard, sequence_parallel)
    return Gradients(outputs=outputs, hidden=total)


def logprob_chunks(
    hidden: Tensor,
    head: Head,
    tokens: Tokens,
    wanted: Group,
    *,
    sequence_parallel: bool,
) -> RowOutputs:
    """Log-prob, entropy and log-sum-exp of the `wanted` tokens, 0 for the others: one product a chunk."""
    shard, targets = head.shard, tokens.targets
    if sequence_parallel:
        hidden = gather_sequence(hidden, shard)
    outputs = _zeros(len(targets), hidden.device)
    for _, selection, logits in head.chunks([wanted]):
        gemm.logits_into(logits, hidden[selection], head.weight)
        taken = tokens.take(selection)
        if shard.group is None:
            chunk = rows.logprob_rows(logits, taken, vocab_size=head.vocab_size)
        else:
            stats = rows.stats_rows(logits, taken, vocab_start=shard.start, vocab_size=head.vocab_size)
            chunk = rows.logprobs_from_stats(rows.combine_stats(gather_shards(stats, shard)))
        _store(outputs, selection, chunk)
    return outputs
