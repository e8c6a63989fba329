"""The fused policy loss beside its plain-torch reference."""

from megatron_klear.kernels.extension import Availability, KernelUnavailable, available
from megatron_klear.kernels.inputs import PolicyLossInputs, Terms, Tokens
from megatron_klear.kernels.policy_loss import LogprobOutput, fused_logprobs, fused_policy_loss
from megatron_klear.kernels.reference import PolicyLossOutput, fused_policy_loss_ref, vocab_parallel_logprobs_ref

__all__ = [
    "Availability",
    "KernelUnavailable",
    "LogprobOutput",
    "PolicyLossInputs",
    "PolicyLossOutput",
    "Terms",
    "Tokens",
    "available",
    "fused_logprobs",
    "fused_policy_loss",
    "fused_policy_loss_ref",
    "vocab_parallel_logprobs_ref",
]
