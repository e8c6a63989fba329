"""What keeps a model with experts from being trained as the settings say; no torch, no Megatron is imported.

Megatron-Core fails on some combinations late, or with a message about something else; they are refused here, by name.
"""

from __future__ import annotations

from megatron_klear.config.base import RunConfig
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.models.architecture import Architecture


def check_experts(config: RunConfig, architecture: Architecture, world_size: int) -> list[str]:
    """Whether experts divide over the layout, and the layout is one that is computed rightly."""
    parallel, experts = config.parallel, architecture.experts
    if experts is None:
        return _without_experts(config, architecture)
    errors = []
    shared, inner = parallel.expert, parallel.expert_tensor_size
    if experts.count % shared:
        errors.append(
            f"parallel.expert {shared} does not divide the model's num_experts {experts.count}; use "
            f"{divisors(experts.count, shared)}"
        )
    if experts.ffn_hidden_size % inner:
        errors.append(
            f"parallel.expert_tensor {inner} does not divide the model's moe_intermediate_size "
            f"{experts.ffn_hidden_size}; use {divisors(experts.ffn_hidden_size, inner)}"
        )
    replica = parallel.pipeline * shared * inner
    if world_size % parallel.model_size == 0 and world_size % replica:
        errors.append(
            f"{world_size} processes do not divide into replicas of the experts, parallel.pipeline "
            f"{parallel.pipeline} x parallel.expert {shared} x parallel.expert_tensor {inner} = {replica}; start a "
            f"multiple of {parallel.smallest_world} with torchrun or change the layout"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        errors.append(
            "parallel.tensor above 1 needs parallel.sequence = true with a model that has experts: Megatron trains "
            "them in no other way"
        )
    if shared > 1 and inner > 1:
        errors.append(
            f"parallel.expert {shared} together with parallel.expert_tensor {inner} is not supported; set "
            "parallel.expert_tensor = 1, and more parallel.expert where an expert is too large"
        )
    if config.model.fp8 != "off":
        errors.append(f"model.fp8 = {config.model.fp8} is not supported for models with experts; set it to off")
    return errors


def _without_experts(config: RunConfig, architecture: Architecture) -> list[str]:
    parallel, model = config.parallel, config.model
    asked = {
        "parallel.expert": parallel.expert > 1,
        "parallel.expert_tensor": parallel.expert_tensor is not None,
        "model.moe_aux_loss": model.moe_aux_loss > 0,
        "model.moe_z_loss": model.moe_z_loss > 0,
        "algorithm.router_replay": isinstance(config, GPPOConfig) and config.algorithm.router_replay != "none",
    }
    return [
        f"{key} is set, and the {architecture.family} model has no experts; leave it out"
        for key, is_set in asked.items()
        if is_set
    ]


def divisors(size: int, near: int) -> str:
    """The divisors of `size` up to a little above `near`, for a message."""
    return ", ".join(str(n) for n in range(1, min(size, 2 * near) + 1) if size % n == 0)
