"""Qwen3 with a mixture of experts in every layer: Qwen3-30B-A3B, Qwen3-235B-A22B (arXiv 2505.09388, section 2)."""

from __future__ import annotations

from typing import Any

from megatron_klear.models.family import Family, without_attention_bias


def every_layer_routed(config: dict[str, Any]) -> str | None:
    """Refuse dense layers among those with experts, which no published model has, and attention biases."""
    if config.get("decoder_sparse_step", 1) != 1:
        return f"decoder_sparse_step {config['decoder_sparse_step']} is not supported: every layer must have experts"
    if config.get("mlp_only_layers"):
        return f"mlp_only_layers {config['mlp_only_layers']} is not supported: every layer must have experts"
    return without_attention_bias(config)


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    qk_norm=True,
    experts=True,
    why_refused=every_layer_routed,
)
