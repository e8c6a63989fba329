"""A chunk of rows cut into vocabulary shards, each on a device of its own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from emulator.world import World
from row_formula import Rows, random_rows, take_inputs
from torch import Tensor

from megatron_klear.kernels import rows
from megatron_klear.kernels.rows import RowOutputs

NAMES = [field.name for field in fields(RowOutputs)]


def cut(chunk: Rows, ranks: int) -> list[Rows]:
    """The shards of a chunk, alike in width; what is behind the last column is NaN, and padding."""
    count, columns = chunk.logits.shape
    width = -(-columns // ranks)
    whole = torch.full((count, width * ranks), float("nan"), dtype=chunk.logits.dtype)
    whole[:, :columns] = chunk.logits
    vocab_size = columns if chunk.vocab_size is None else chunk.vocab_size
    return [
        replace(chunk.map(lambda tensor: tensor.clone()), logits=part, vocab_size=vocab_size)
        for part in whole.split(width, dim=1)
    ]


@dataclass(frozen=True, slots=True)
class Launched:
    """Memory of one rank's launch, filled when the world has run."""

    part: Rows
    """What the kernel was given; kept, for it reads that memory."""
    out: RowOutputs
    gradient: Tensor
    """[C, V_local]"""
    behind: Tensor
    """What lies between the shard's columns and the next multiple of 8."""


def place(logits: Tensor, placement: str) -> tuple[Tensor, Tensor]:
    """A copy [C, V] of rows that start at multiples of 16 bytes, and memory [C, V up to 8] for their gradient."""
    count, columns = logits.shape
    width = -(-columns // 8) * 8
    buffer = torch.full((count, width), float("nan"), dtype=logits.dtype)
    buffer[:, :columns] = logits
    gradient = buffer
    if placement == "narrow":
        gradient = buffer.view(torch.bfloat16)[:, :width]
    elif placement == "apart":
        gradient = torch.full((count, width), 77.0, dtype=logits.dtype)
    return buffer[:, :columns], gradient


def launch(world: World, chunk: Rows, placement: str = "in place", absent: tuple[int, ...] = ()) -> list[Launched]:
    """Queues the launch of every rank that is not `absent`."""
    done = []
    for rank, part in enumerate(cut(chunk, world.ranks)):
        if rank in absent:
            continue
        logits, gradient = place(part.logits, placement)
        columns = logits.shape[1]
        placed = replace(part, logits=logits)
        arguments: dict[str, Any] = placed.arguments()
        tokens, terms = take_inputs(arguments)
        with world.rank(rank) as peers:
            out = rows.sharded_rows(
                logits,
                tokens,
                terms,
                peers,
                vocab_start=rank * columns,
                gradient=gradient[:, :columns],
                **arguments,
            )
        done.append(Launched(placed, out, gradient[:, :columns], gradient[:, columns:]))
    return done


def together(launched: list[Launched], columns: int) -> tuple[RowOutputs, Tensor]:
    """The outputs, of which every rank must have the same bits, and the whole gradient [C, columns]."""
    for other in launched[1:]:
        for name in NAMES:
            a, b = (getattr(one.out, name) for one in (launched[0], other))
            assert torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7)), f"{name} differs between ranks"
    whole = torch.cat([one.gradient for one in launched], dim=1)
    assert not whole[:, columns:].any(), "padding has a gradient"
    assert not any(one.behind.any() for one in launched), "what is behind a shard is not 0"
    return launched[0].out, whole[:, :columns]


def sharded_case(columns: int, dtype: torch.dtype = torch.float32, count: int = 5, **more: Any) -> Rows:
    """Rows of which the first and every fifth have no weight; the targets of those are the ids of nothing."""
    chunk = random_rows(count, columns, "gppo_dual", dtype=dtype, entropy_coefficient=0.01, **more)
    targets = torch.where(chunk.policy_weights == 0, -100, chunk.targets)
    return replace(chunk, targets=targets)
