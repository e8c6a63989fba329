"""What keeps a model from being trained with FP8 products as the settings say, told beforehand; imports no torch."""

from __future__ import annotations

from megatron_klear.config.base import FP8_TOKENS, RunConfig, SFTConfig
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.models.architecture import Architecture

_TILE = 16
"""Both sides of every matrix of an FP8 product divide by it."""
_BLOCK = 128
"""Values that share a scale, in blockwise scaling."""


def fp8_problems(config: RunConfig, architecture: Architecture) -> list[str]:
    """Whether the recipe makes log-probs a function of the weights, and the products are of sizes that FP8 takes."""
    model, parallel = config.model, config.parallel
    if model.fp8 == "off" or architecture.experts is not None:  # which are refused by name (`checks_experts`)
        return []
    if model.fp8_recipe not in FP8_TOKENS:
        return [
            f"model.fp8_recipe = {model.fp8_recipe} scales by the largest values of earlier passes, so that the "
            "log-probs of a token would depend on what was computed before it, and no ratio of two of them on the "
            f"weights alone; use {' or '.join(FP8_TOKENS)}"
        ]
    problems = [
        f"model.fp8 = {model.fp8} takes matrices whose sides are multiples of {_TILE}, and a rank's {name} is {size}; "
        "lower parallel.tensor or set model.fp8 to off"
        for name, size in _sides(architecture, parallel.tensor)
        if size % _TILE
    ]
    gathers = parallel.tensor > 1 and parallel.sequence and model.fp8_recipe == "blockwise"
    if gathers and architecture.hidden_size % _BLOCK:
        problems.append(
            f"model.fp8_recipe = blockwise gathers whole blocks of {_BLOCK} over sequence-parallel ranks, and the "
            f"model's hidden_size is {architecture.hidden_size}; use tensorwise, or set parallel.sequence to false"
        )
    key, capacity = _capacity(config)
    if capacity % config.row_multiple:
        problems.append(
            f"{key} {capacity} is not a multiple of {config.row_multiple}, to which rows are padded for FP8 products "
            f"({model.fp8_recipe}) in this layout: full rows would grow beyond it; use "
            f"{-(-capacity // config.row_multiple) * config.row_multiple}"
        )
    return problems


def fp8_lines(config: RunConfig) -> list[tuple[str, str]]:
    """What the plan says of FP8, as names and values; nothing where it is off."""
    model = config.model
    if model.fp8 == "off":
        return []
    scales = {
        "blockwise": ("128 values of a token", "the weights and of its sequence"),
        "tensorwise": ("a rank's share of a row", "the weights and of the row, what is packed with it included"),
    }
    scale, function = scales.get(model.fp8_recipe, ("earlier passes", "the weights and of what came before"))
    return [
        (f"FP8 products ({model.fp8})", f"{model.fp8_recipe} scaling, by {scale}"),
        ("a log-prob is a function of", function),
        ("rows are padded to multiples of", f"{config.row_multiple} tokens"),
        ("FP8 copies of weights", "2 bytes for each of a layer's, on top of the memory below"),
    ]


def _sides(architecture: Architecture, tensor: int) -> list[tuple[str, int]]:
    queries, kv = architecture.num_heads * architecture.head_dim, architecture.num_kv_heads * architecture.head_dim
    return [
        ("hidden_size", architecture.hidden_size),
        ("queries, num_attention_heads x head_dim", queries // tensor),
        ("queries, keys and values", (queries + 2 * kv) // tensor),
        ("intermediate_size", architecture.ffn_hidden_size // tensor),
    ]


def _capacity(config: RunConfig) -> tuple[str, int]:
    if isinstance(config, SFTConfig):
        return "data.tokens_per_microbatch", config.data.tokens_per_microbatch
    if isinstance(config, GPPOConfig):
        return "train.tokens_per_microbatch", config.train.tokens_per_microbatch
    return "", 0
