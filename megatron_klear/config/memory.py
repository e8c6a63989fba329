"""Parameters and bytes of one rank in training, by what they hold: pure arithmetic on settings and the model's shape.

Held against the built model in `tests/unit/test_estimate.py` and against the peaks of real steps on the CPU in
`tests/distributed/test_memory.py`. CUDA, NCCL and fragmentation come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_klear.config.activations import held_bytes, number_bytes, offloaded_bytes, working_bytes
from megatron_klear.config.base import RunConfig
from megatron_klear.config.checks_lora import adapted_matrices
from megatron_klear.models.architecture import Architecture
from megatron_klear.models.projections import projections


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank, by what they hold: on its card, but for `host`."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept between forward and backward, of all layers and micro-batches that are under way at once."""
    working: int
    """What comes and goes on top: the head's and the loss's buffers, or what the backward pass of a layer (of a
    recomputed block) holds at once, whichever is more."""
    host: int = 0
    """In host memory, for the offloaded share of the optimizer and for offloaded activations."""

    @property
    def total(self) -> int:
        """Sum of all parts on the card, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working


def stage_experts(config: RunConfig, architecture: Architecture, stage: int) -> int:
    """Parameters of the experts that one rank of a pipeline stage holds, 0 where there are none."""
    if architecture.experts is None:
        return 0
    parallel = config.parallel
    layers = architecture.num_layers // parallel.pipeline
    held = architecture.experts.count // parallel.expert
    return layers * held * architecture.expert_parameters // parallel.expert_tensor_size


def stage_parameters(config: RunConfig, architecture: Architecture, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds.

    Matrices and their biases are split over tensor ranks; norms and routers are whole on each. A tied head is a copy of
    the embedding where first and last stage differ. Experts are shared out.
    """
    return _dense_parameters(config, architecture, stage) + stage_experts(config, architecture, stage)


def _dense_parameters(config: RunConfig, architecture: Architecture, stage: int) -> int:
    parallel = config.parallel
    tensor, last = parallel.tensor, parallel.pipeline - 1
    whole = 2 * architecture.hidden_size + (2 * architecture.head_dim if architecture.qk_norm else 0)
    whole += architecture.router_parameters
    experts = architecture.experts.count * architecture.expert_parameters if architecture.experts else 0
    layer = whole + (architecture.layer_parameters - experts - whole) // tensor
    count = layer * (architecture.num_layers // parallel.pipeline)
    vocabulary = architecture.padded_vocab_size(tensor) // tensor * architecture.hidden_size
    if stage == 0:
        count += vocabulary
    if stage == last:
        count += architecture.hidden_size
        if not architecture.tied_embeddings or last > 0:
            count += vocabulary
    return count


def adapter_parameters(config: RunConfig, architecture: Architecture) -> int:
    """Parameters of the adapters that one tensor rank of a pipeline stage holds, 0 where all weights are trained."""
    if config.lora is None:
        return 0
    every = projections(architecture)
    tensor = config.parallel.tensor
    layer = sum(
        every[name].adapter_parameters(config.lora.rank, tensor) for name in adapted_matrices(config.lora, architecture)
    )
    return layer * (architecture.num_layers // config.parallel.pipeline)


def stage_memory(
    config: RunConfig, architecture: Architecture, stage: int, data_parallel: int, row_tokens: int, microbatches: int
) -> Memory:
    """Bytes on one rank of a pipeline stage while it trains on rows of `row_tokens` tokens."""
    width = number_bytes(config)
    parameters = stage_parameters(config, architecture, stage)
    adapters = adapter_parameters(config, architecture)
    trained = parameters if config.lora is None else adapters
    experts = stage_experts(config, architecture, stage) if config.lora is None else 0
    copies = _replicas(config, data_parallel) if config.optimizer.distributed else (1, 1)
    parts = list(zip((trained - experts, experts), copies, strict=True))
    # bf16 weights have fp32 masters; fp32 weights are their own. Both have two fp32 moments.
    each = 12 if width == 2 else 8
    state = sum(math.ceil(each * count / ranks) for count, ranks in parts)
    offloaded = config.optimizer.cpu_offload
    return Memory(
        parameters=width * (parameters + adapters),
        gradients=4 * trained,
        # Whole parameters are offloaded until the share is reached, so that this is the most that stays.
        optimizer=round(state * (1.0 - offloaded)),
        activations=held_bytes(config, architecture, stage, row_tokens, microbatches),
        working=working_bytes(config, architecture, stage, row_tokens),
        # Master, two moments, and a copy of the gradient, all fp32 (mcore.host_optimizer).
        host=round(16 * sum(math.ceil(count / ranks) for count, ranks in parts) * offloaded)
        + offloaded_bytes(config, architecture, stage, row_tokens, microbatches),
    )


def _replicas(config: RunConfig, data_parallel: int) -> tuple[int, int]:
    """Ranks over which optimizer state is sharded: (of what every data rank has, of experts)."""
    parallel = config.parallel
    ranks = data_parallel * parallel.context
    return ranks, ranks * parallel.tensor // (parallel.expert * parallel.expert_tensor_size)
