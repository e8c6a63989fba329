"""The fused policy loss beside its plain-torch reference."""

from megatron_klear.kernels.extension import Availability, KernelUnavailable, available
from megatron_klear.kernels.inputs import PolicyLossInputs, Terms, Tokens
from megatron_klear.kernels.policy_loss import LogprobOutput, fused_logprobs, fused_policy_loss
from megatron_klear.kernels.reference import PolicyLossOutput, fused_policy_loss_ref, vocab_parallel_logprobs_ref
from megatron_klear.kernels.selection import Chosen, Group, choose_all, choose_tokens
from megatron_klear.kernels.transfer import send

__all__ = [
    "Availability",
    "Chosen",
    "Group",
    "KernelUnavailable",
    "LogprobOutput",
    "PolicyLossInputs",
    "PolicyLossOutput",
    "Terms",
    "Tokens",
    "available",
    "choose_all",
    "choose_tokens",
    "fused_logprobs",
    "fused_policy_loss",
    "fused_policy_loss_ref",
    "send",
    "vocab_parallel_logprobs_ref",
]
