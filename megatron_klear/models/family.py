"""What a decoder family is: what sets its layers apart, and what of its config.json is refused.

A family is one file that makes a `Family`, and a line in `families.py`. Its layers are put together from the features
named here, which names of weights, parameter counts, Megatron's layers, the local decoder and tiny models all read from
the `Architecture`; a family with a feature that none of them has is a change of those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def nothing_more(config: dict[str, Any]) -> str | None:
    """No config of the family is refused beyond what all families refuse."""
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One `model_type` of Hugging Face configs."""

    model_type: str
    causal_lm: str
    """transformers' class, as `architectures` in config.json names it."""
    qk_norm: bool = False
    """RMS norms over each head's query and key."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections."""
    experts: bool = False
    """A mixture of experts in place of every layer's MLP."""
    own_head_dim: bool = True
    """Whether config.json may set head_dim apart from hidden_size / num_attention_heads."""
    why_refused: Callable[[dict[str, Any]], str | None] = nothing_more
    """What of a config.json this project does not compute, in words; None where all of it is."""


def without_attention_bias(config: dict[str, Any]) -> str | None:
    """Refuse biases on attention's projections where the family has none."""
    if config.get("attention_bias"):
        return f"attention_bias true is not supported for {config.get('model_type')}"
    return None
