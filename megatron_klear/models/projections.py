"""The matrices of a decoder layer that adapters can be put on, by their Hugging Face names. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_klear.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One matrix [out_features, in_features] of a layer, and the direction in which tensor ranks cut it."""

    module: Literal["self_attn", "mlp"]
    out_features: int
    in_features: int
    cut: Literal["rows", "columns"]
    """`rows` of a column-parallel layer, `columns` of a row-parallel one, in Megatron's terms."""

    def adapter_parameters(self, rank: int, tensor: int = 1) -> int:
        """Of A [rank, in] and B [out, rank] on one of `tensor` ranks: the factor on the cut side is cut with it."""
        outputs, inputs = self.out_features, self.in_features
        return rank * (outputs // tensor + inputs if self.cut == "rows" else outputs + inputs // tensor)


def projections(architecture: Architecture) -> dict[str, Projection]:
    """The matrices of a layer in the order of its forward pass: seven, or the attention's four where it has experts."""
    a = architecture
    hidden, ffn, q, kv = a.hidden_size, a.ffn_hidden_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    attention = {
        "q_proj": Projection(module="self_attn", out_features=q, in_features=hidden, cut="rows"),
        "k_proj": Projection(module="self_attn", out_features=kv, in_features=hidden, cut="rows"),
        "v_proj": Projection(module="self_attn", out_features=kv, in_features=hidden, cut="rows"),
        "o_proj": Projection(module="self_attn", out_features=hidden, in_features=q, cut="columns"),
    }
    if a.experts is not None:
        return attention
    return attention | {
        "gate_proj": Projection(module="mlp", out_features=ffn, in_features=hidden, cut="rows"),
        "up_proj": Projection(module="mlp", out_features=ffn, in_features=hidden, cut="rows"),
        "down_proj": Projection(module="mlp", out_features=hidden, in_features=ffn, cut="columns"),
    }
