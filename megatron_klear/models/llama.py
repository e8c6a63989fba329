"""Llama, and what has its layers: SmolLM2, the R1 distillations (arXiv 2307.09288, section 2.2)."""

from megatron_klear.models.family import Family, without_attention_bias

LLAMA = Family(model_type="llama", causal_lm="LlamaForCausalLM", why_refused=without_attention_bias)
