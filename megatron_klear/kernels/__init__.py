"""The fused policy loss beside its plain-torch reference."""

from megatron_klear.kernels.reference import PolicyLossOutput, fused_policy_loss_ref, vocab_parallel_logprobs_ref

__all__ = ["PolicyLossOutput", "fused_policy_loss_ref", "vocab_parallel_logprobs_ref"]
