"""Names and shapes of weights on both sides, and how one becomes the other: one table serves both directions.

Megatron fuses q, k, v (rows interleaved per key-value head: its queries, its key, its value) and gate, up (each tensor
rank's gate above its up), cuts matrices over tensor ranks, and pads the vocabulary with zero rows. An entry of the
table says which of these a parameter undergoes; the entry's mapping does it and undoes it. No process is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_klear.models.architecture import Architecture
from megatron_klear.models.safetensors_io import TensorSpec

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Mapping(Protocol):
    """How Hugging Face tensors become one Megatron parameter. Sources may be tensors or safetensors slices."""

    def to_megatron(self, tensors: Sequence[Any], rank: int, size: int) -> Tensor:
        """The shard of tensor rank `rank` of `size`, reading nothing else."""
        ...

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The whole tensors, from the shards of all tensor ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Replicated:
    """The same on every tensor rank: norms."""

    def to_megatron(self, tensors: Sequence[Any], rank: int, size: int) -> Tensor:
        """The whole tensor."""
        whole: Tensor = tensors[0][:]
        return whole

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Any shard: the first."""
        return [shards[0]]


@dataclass(frozen=True, slots=True)
class Columns:
    """A row-parallel matrix: the input dimension is cut over tensor ranks."""

    features: int

    def to_megatron(self, tensors: Sequence[Any], rank: int, size: int) -> Tensor:
        """This rank's columns."""
        start, stop = _range(self.features, rank, size)
        part: Tensor = tensors[0][:, start:stop]
        return part

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Shards side by side."""
        return [torch.cat(list(shards), dim=1)]


@dataclass(frozen=True, slots=True)
class Gated:
    """gate and up of a gated MLP: each tensor rank holds its rows of gate above its rows of up."""

    features: int

    def to_megatron(self, tensors: Sequence[Any], rank: int, size: int) -> Tensor:
        """[gate rows of the rank; up rows of the rank]."""
        start, stop = _range(self.features, rank, size)
        return torch.cat([tensors[0][start:stop], tensors[1][start:stop]])

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Whole gate, whole up."""
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])]


@dataclass(frozen=True, slots=True)
class QKV:
    """Weights or biases of q, k, v: per key-value head its group of query heads, the key, the value."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def to_megatron(self, tensors: Sequence[Any], rank: int, size: int) -> Tensor:
        """The rank's groups, interleaved: [groups * (queries + 2) * head_dim, ...]."""
        start, stop = _range(self.num_kv_heads, rank, size)
        rows = (self.num_heads // self.num_kv_heads * self.head_dim, self.head_dim, self.head_dim)
        parts = [source[start * n : stop * n] for source, n in zip(tensors, rows, strict=True)]
        grouped = [part.reshape(stop - start, n, *part.shape[1:]) for part, n in zip(parts, rows, strict=True)]
        return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Whole q, k, v."""
        queries = self.num_heads // self.num_kv_heads * self.head_dim
        rest = shards[0].shape[1:]
        grouped = torch.cat([shard.reshape(-1, queries + 2 * self.head_dim, *rest) for shard in shards])
        parts = torch.split_with_sizes(grouped, [queries, self.head_dim, self.head_dim], dim=1)
        return [part.reshape(-1, *rest) for part in parts]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Embedding or head: rows cut over tensor ranks and padded with zero rows, which never leave Megatron."""

    architecture: Architecture

    def to_megatron(self, tensors: Sequence[Any], rank: int, size: int) -> Tensor:
        """The rank's rows, zero beyond the vocabulary."""
        vocab_size = self.architecture.vocab_size
        start, stop = _range(self.architecture.padded_vocab_size(size), rank, size)
        rows: Tensor = tensors[0][min(start, vocab_size) : min(stop, vocab_size)]
        return torch.nn.functional.pad(rows, (0, 0, 0, stop - start - len(rows)))

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The rows of real tokens."""
        return [torch.cat(list(shards))[: self.architecture.vocab_size]]


def _range(total: int, rank: int, size: int) -> tuple[int, int]:
    return total // size * rank, total // size * (rank + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One Megatron parameter of the table: its spellings, the Hugging Face tensors it is made of, and how.

    `{layer}` stands for the layer: the chunk's own count in Megatron's names, the model's in Hugging Face's.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    mapping: Mapping
    expert: int | None = None
    """Number of the expert it belongs to, one rank of the expert axis holds it, cut over the expert-tensor axis."""


def name_table(architecture: Architecture) -> list[Entry]:
    """The table of an architecture, in the order in which weights are exported."""
    a = architecture
    hidden, q, kv = a.hidden_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    qkv = QKV(a.num_heads, a.num_kv_heads, a.head_dim)
    layer, hf_layer = "decoder.layers.{layer}.", "model.layers.{layer}."

    def entry(megatron: str, hf: str, shapes: Sequence[tuple[int, ...]], mapping: Mapping) -> Entry:
        return Entry(
            megatron=tuple(layer + name for name in megatron.split()),
            hf=tuple(hf_layer + name for name in hf.split()),
            shapes=tuple(shapes),
            mapping=mapping,
        )

    def qkv_names(suffix: str) -> str:
        return " ".join(f"self_attn.{part}_proj.{suffix}" for part in "qkv")

    replicated, vocabulary, matrix = Replicated(), Vocabulary(a), [(a.vocab_size, hidden)]
    table = [
        Entry(megatron=("embedding.word_embeddings.weight",), hf=(EMBEDDING,), shapes=(*matrix,), mapping=vocabulary),
        entry(
            "input_layernorm.weight self_attention.linear_qkv.layer_norm_weight",
            "input_layernorm.weight",
            [(hidden,)],
            replicated,
        ),
        entry("self_attention.linear_qkv.weight", qkv_names("weight"), [(q, hidden), (kv, hidden), (kv, hidden)], qkv),
    ]
    if a.qkv_bias:
        table.append(entry("self_attention.linear_qkv.bias", qkv_names("bias"), [(q,), (kv,), (kv,)], qkv))
    if a.qk_norm:
        for part in "qk":
            name = f"self_attn.{part}_norm.weight"
            table.append(entry(f"self_attention.{part}_layernorm.weight", name, [(a.head_dim,)], replicated))
    table += [
        entry("self_attention.linear_proj.weight", "self_attn.o_proj.weight", [(hidden, q)], Columns(q)),
        entry(
            "pre_mlp_layernorm.weight mlp.linear_fc1.layer_norm_weight",
            "post_attention_layernorm.weight",
            [(hidden,)],
            replicated,
        ),
        *_mlp_entries(a, entry),
        Entry(
            megatron=("decoder.final_layernorm.weight",),
            hf=("model.norm.weight",),
            shapes=((hidden,),),
            mapping=replicated,
        ),
        Entry(megatron=("output_layer.weight",), hf=(HEAD,), shapes=(*matrix,), mapping=vocabulary),
    ]
    return table


def _mlp_entries(a: Architecture, entry: Callable[..., Entry]) -> list[Entry]:
    """A layer's MLP, or its router and experts: those of Megatron's sequence of MLPs and of its grouped matrices."""
    if a.experts is None:
        return _gated_mlp("mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "mlp.", a, a.ffn_hidden_size, entry)
    router = entry("mlp.router.weight", "mlp.gate.weight", [(a.experts.count, a.hidden_size)], Replicated())
    table = [router]
    for number in range(a.experts.count):
        fc1, fc2 = (
            f"mlp.experts.local_experts.{number}.{name}.weight mlp.experts.{name}.weight{number}"
            for name in ("linear_fc1", "linear_fc2")
        )
        own = _gated_mlp(fc1, fc2, f"mlp.experts.{number}.", a, a.experts.ffn_hidden_size, entry)
        table += [replace(one, expert=number) for one in own]
    return table


def _gated_mlp(fc1: str, fc2: str, prefix: str, a: Architecture, ffn: int, entry: Callable[..., Entry]) -> list[Entry]:
    up = (ffn, a.hidden_size)
    return [
        entry(fc1, f"{prefix}gate_proj.weight {prefix}up_proj.weight", [up, up], Gated(ffn)),
        entry(fc2, f"{prefix}down_proj.weight", [(a.hidden_size, ffn)], Columns(ffn)),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """An entry of the table at one layer of the model (`layer` is -1 outside the layers)."""

    entry: Entry
    layer: int

    @property
    def hf(self) -> list[str]:
        """Hugging Face names."""
        return [name.format(layer=self.layer) for name in self.entry.hf]

    @property
    def key(self) -> tuple[str, int]:
        """What identifies it on any rank."""
        return self.entry.megatron[0], self.layer


def placed_entries(architecture: Architecture) -> list[Placed]:
    """The table over all layers, in export order; a tied head is left out."""
    table = name_table(architecture)
    layered = [entry for entry in table if "{layer}" in entry.megatron[0]]
    tail = table[-2:-1] if architecture.tied_embeddings else table[-2:]
    return [
        Placed(entry=table[0], layer=-1),
        *(Placed(entry=entry, layer=layer) for layer in range(architecture.num_layers) for entry in layered),
        *(Placed(entry=entry, layer=-1) for entry in tail),
    ]


def expected_tensors(architecture: Architecture, dtype: torch.dtype = torch.float32) -> list[TensorSpec]:
    """Names and shapes of the Hugging Face tensors of an architecture, in export order."""
    return [
        TensorSpec(name=name, shape=shape, dtype=dtype)
        for placed in placed_entries(architecture)
        for name, shape in zip(placed.hf, placed.entry.shapes, strict=True)
    ]
