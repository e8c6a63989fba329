"""Qwen3, dense: norms on queries and keys, no biases (arXiv 2505.09388, section 2)."""

from megatron_klear.models.family import Family, without_attention_bias

QWEN3 = Family(model_type="qwen3", causal_lm="Qwen3ForCausalLM", qk_norm=True, why_refused=without_attention_bias)
