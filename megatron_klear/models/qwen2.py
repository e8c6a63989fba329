"""Qwen2 and Qwen2.5, dense: biases on queries, keys and values (arXiv 2407.10671, section 2.2.1)."""

from megatron_klear.models.family import Family

QWEN2 = Family(model_type="qwen2", causal_lm="Qwen2ForCausalLM", qkv_bias=True, own_head_dim=False)
