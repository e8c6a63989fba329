"""A packed row in this rank's layout: padded, sliced for context parallelism, with what attention must know of it.

Rows are laid out on the host and sent as the schedule asks for them, without waiting for the device.

`PackedBatch` is layout-free. Here every segment is padded to two zig-zag chunks per context rank and the row to whole
sequence-parallel shards, of as many tokens as FP8 products come in where they are on (by a last segment of padding);
padding has weight 0 and attends only to itself. Segment bounds travel with the row, so every pipeline stage has them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_klear.kernels import send
from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore.zigzag import zigzag_indices, zigzag_order
from megatron_klear.types import PackedBatch

device_shim.install()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402  (the shim must come first)

if TYPE_CHECKING:
    from megatron_klear.mcore.topology import Topology

PER_TOKEN = (
    "targets",
    "weights",
    "advantages",
    "old_logprobs",
    "sampler_logprobs",
    "ref_logprobs",
    "nll_weights",
)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which sequence each local token is of, and what the sequences are; the last one stands for all padding."""

    of_token: Tensor  # [T_local] int64
    lengths: Tensor  # [S + 1] float32, unpadded; 1 for padding
    weights: Tensor  # [S + 1] float32, the sums of their tokens' weights; 0 for padding

    def on(self, device: torch.device) -> Sequences:
        """The same on the device, on its way there when this returns."""
        return Sequences(*(send(one, device) for one in (self.of_token, self.lengths, self.weights)))

    def shard(self, rank: int, size: int) -> Sequences:
        """The tokens of one sequence-parallel shard."""
        return Sequences(self.of_token.chunk(size)[rank], self.lengths, self.weights)


@dataclass
class RowParams(PackedSeqParams):
    """What Megatron hands to every attention layer of a row, with what ours needs besides.

    `pieces` are the runs of this rank's queries, each with the keys it reads: queries [q_start, q_end) of the local row
    are the last ones of keys [k_start, k_end) of the whole row in document order, and see those before them. The other
    run fields say the same in the form of the variable-length kernels.
    """

    positions: Tensor | None = None  # [T_local] int32, of each token in its sequence
    cosine: Tensor | None = None  # [T_local, head_dim] float32; only in what `on` returns
    sine: Tensor | None = None
    pieces: tuple[tuple[int, int, int, int], ...] = ()
    key_order: Tensor | None = None  # [T] place of each document position in the rank-major gather; None for cp 1
    key_runs: Tensor | None = None  # keys of all pieces laid end to end, as positions of the row; None for cp 1
    cu_query_runs: Tensor | None = None  # [pieces + 1] int32
    cu_key_runs: Tensor | None = None  # [pieces + 1] int32
    max_query_run: int = 0
    max_key_run: int = 0
    sequences: Sequences | None = None
    routes: dict[int, Tensor] | None = None  # by layer [T_local / shards, chosen] int16; see PackedBatch
    sampler_routes: Tensor | None = None  # [T_local, layers, chosen] int16, -1 where the token chooses for itself

    def on(self, device: torch.device, inverse_frequencies: Tensor) -> RowParams:
        """A copy on the device, with the rotary tables of this row.

        `inverse_frequencies` [head_dim / 2] are those of the rotary embedding, scaling included, on the device. The
        tables take 30 times the rest of a row, so they live with the micro-batch that is under way and not with the
        row: all rows of a rollout step are laid out at once.
        """
        params = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(params, name, send(value, device))
        assert params.positions is not None
        params.sequences = None if self.sequences is None else self.sequences.on(device)
        angles = params.positions.float()[:, None] * inverse_frequencies[None]
        angles = torch.cat([angles, angles], dim=-1)
        params.cosine, params.sine = angles.cos(), angles.sin()
        return params


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRow:
    """One micro-batch as this rank's stage sees it: T_local = padded T / context size tokens."""

    tokens: Tensor  # [1, T_local]
    params: RowParams
    per_token: dict[str, Tensor]  # each [T_local]
    host: dict[str, Tensor]  # the same on the host, where they are looked at without waiting for the device
    source: Tensor  # [T_local] position in the unpadded row, -1 on padding; on the host
    num_tokens: int  # T, unpadded

    def on(self, device: torch.device, inverse_frequencies: Tensor) -> LocalRow:
        """This row on the device, on its way there when this returns; `inverse_frequencies` as in `RowParams.on`."""
        return replace(
            self,
            tokens=send(self.tokens, device),
            params=self.params.on(device, inverse_frequencies),
            per_token={name: send(values, device) for name, values in self.host.items()},
        )


def local_row(batch: PackedBatch, topology: Topology, row_multiple: int | None = None) -> LocalRow:
    """Pad a row and take this context rank's slice, on the host.

    `row_multiple` is what the padded length divides by (`RunConfig.row_multiple`); by default the layout's own.
    """
    cp, rank = topology.context.size, topology.context.rank
    multiple = row_multiple or topology.parallel.row_multiple
    source, bounds = _pad(batch.cu_seqlens.tolist(), topology.parallel.segment_multiple, multiple)
    mine = torch.from_numpy(zigzag_indices(bounds, cp, rank)) if cp > 1 else torch.arange(bounds[-1])
    positions = _positions(bounds)[mine]
    local_source = source[mine]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    longest = max(b - a for a, b in pairwise(bounds))
    params = RowParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions=positions.to(torch.int32),
        sequences=_sequences(batch, local_source),
        routes=batch.routes,
        sampler_routes=_take_routes(batch.sampler_routes, local_source),
        key_order=torch.from_numpy(zigzag_order(bounds, cp)) if cp > 1 else None,
        **_runs(_pieces(bounds, cp, rank), gathered=cp > 1),
    )
    per_token = {
        name: _take(getattr(batch, name), local_source) for name in PER_TOKEN if getattr(batch, name) is not None
    }
    return LocalRow(
        tokens=_take(batch.tokens, local_source)[None],
        params=params,
        per_token=per_token,
        host=per_token,
        source=local_source,
        num_tokens=batch.num_tokens,
    )


def empty_batch(like: PackedBatch | None) -> PackedBatch:
    """A row of one token and no weight: what a rank runs to keep step with others that still have rows."""
    optional: dict[str, Any] = {
        name: torch.zeros(1)
        for name in PER_TOKEN
        if name not in ("targets", "weights") and like is not None and getattr(like, name) is not None
    }
    return PackedBatch(
        tokens=torch.zeros(1, dtype=torch.int64),
        targets=torch.zeros(1, dtype=torch.int64),
        weights=torch.zeros(1),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        **optional,
    )


def _pad(bounds: list[int], segment_multiple: int, row_multiple: int) -> tuple[Tensor, list[int]]:
    """Unpadded position of every entry of the padded row (-1 on padding), and the padded bounds."""
    source: list[Tensor] = []
    padded = [0]
    for start, end in pairwise(bounds):
        if end <= start:
            raise ValueError(f"cu_seqlens must rise: a segment runs from {start} to {end}")
        extra = -(end - start) % segment_multiple
        source += [torch.arange(start, end), torch.full((extra,), -1)]
        padded.append(padded[-1] + end - start + extra)
    extra = -padded[-1] % row_multiple
    if extra:
        source.append(torch.full((extra,), -1))
        padded.append(padded[-1] + extra)
    return torch.cat(source), padded


def _sequences(batch: PackedBatch, local_source: Tensor) -> Sequences:
    bounds = batch.cu_seqlens.long()
    lengths = bounds.diff()
    of_token = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    weights = torch.zeros(len(lengths) + 1, dtype=torch.float64).index_add_(0, of_token, batch.weights.cpu().double())
    local = torch.where(local_source >= 0, of_token[local_source.clamp(min=0)], len(lengths))
    return Sequences(
        of_token=local,
        lengths=torch.nn.functional.pad(lengths, (0, 1), value=1).float(),
        weights=weights.float(),
    )


def _positions(bounds: list[int]) -> Tensor:
    return torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])


def _take(values: Tensor, source: Tensor) -> Tensor:
    """Entries of an unpadded per-token tensor in padded order, zero on padding."""
    values = values.cpu()
    taken = values[source.clamp(min=0)]
    return torch.where(source >= 0, taken, torch.zeros((), dtype=values.dtype))


def _take_routes(routes: Tensor | None, source: Tensor) -> Tensor | None:
    """Routes of an unpadded row in padded order, -1 on padding."""
    if routes is None:
        return None
    return routes[source.clamp(min=0)].masked_fill_((source < 0)[:, None, None], -1)


def _pieces(bounds: list[int], cp: int, rank: int) -> tuple[tuple[int, int, int, int], ...]:
    pieces, offset = [], 0
    for start, end in pairwise(bounds):
        if cp == 1:
            pieces.append((start, end, start, end))
            continue
        chunk = (end - start) // (2 * cp)
        for index in (rank, 2 * cp - 1 - rank):
            pieces.append((offset, offset + chunk, start, start + (index + 1) * chunk))
            offset += chunk
    return tuple(pieces)


def _runs(pieces: tuple[tuple[int, int, int, int], ...], gathered: bool) -> dict[str, Any]:
    """The run fields of RowParams."""
    query_lengths = torch.tensor([piece[1] - piece[0] for piece in pieces], dtype=torch.int32)
    key_lengths = torch.tensor([piece[3] - piece[2] for piece in pieces], dtype=torch.int32)
    key_runs = torch.cat([torch.arange(piece[2], piece[3]) for piece in pieces]) if gathered else None
    return {
        "pieces": pieces,
        "key_runs": key_runs,
        "cu_query_runs": _cumulative(query_lengths),
        "cu_key_runs": _cumulative(key_lengths),
        "max_query_run": int(query_lengths.max()),
        "max_key_run": int(key_lengths.max()),
    }


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
