"""Parameters and bytes of one rank in training, by what they hold: pure arithmetic on settings and the model's shape.

The terms are held against the built model and against what autograd keeps, in `tests/unit/test_estimate.py` and
`tests/unit/test_cost.py`. CUDA, NCCL and fragmentation come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_klear.config.base import RunConfig
from megatron_klear.config.checks_lora import adapted_matrices
from megatron_klear.models.architecture import Architecture
from megatron_klear.models.projections import projections

LOSS_CHUNK_TOKENS = 4096
"""Tokens whose logits the fused loss holds at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank, by what they hold: on its card, but for `host`."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """Buffers of the head and loss: a chunk of logits, or whole logits where the fused loss is off."""
    host: int = 0
    """In host memory, for the offloaded share of the optimizer."""

    @property
    def total(self) -> int:
        """Sum of all parts on the card, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.loss


def stage_parameters(config: RunConfig, architecture: Architecture, stage: int) -> int:
    """Parameters that one tensor rank of a pipeline stage holds.

    Matrices and their biases are split over tensor ranks; norms are whole on each. A tied head is a copy of the
    embedding where first and last stage differ.
    """
    parallel = config.parallel
    tensor, last = parallel.tensor, parallel.pipeline - 1
    norms = 2 * architecture.hidden_size + (2 * architecture.head_dim if architecture.qk_norm else 0)
    layer = norms + (architecture.layer_parameters - norms) // tensor
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
    width = _width(config)
    parameters = stage_parameters(config, architecture, stage)
    adapters = adapter_parameters(config, architecture)
    trained = parameters if config.lora is None else adapters
    shards = data_parallel * config.parallel.context if config.optimizer.distributed else 1
    # bf16 weights have fp32 masters; fp32 weights are their own. Both have two fp32 moments.
    state = math.ceil(4 * trained * (3 if width == 2 else 2) / shards)
    offloaded = config.optimizer.cpu_offload
    return Memory(
        parameters=width * (parameters + adapters),
        gradients=4 * trained,
        # Whole parameters are offloaded until the share is reached, so that this is the most that stays.
        optimizer=round(state * (1.0 - offloaded)),
        activations=_activations(config, architecture, stage, row_tokens, microbatches),
        loss=_loss_bytes(config, architecture, row_tokens) if stage == config.parallel.pipeline - 1 else 0,
        # Master, two moments, and a copy of the gradient, all fp32 (mcore.host_optimizer).
        host=round(16 * math.ceil(trained / shards) * offloaded),
    )


def layer_activation_bytes(config: RunConfig, architecture: Architecture, row_tokens: int) -> int:
    """Bytes that one layer keeps for its backward pass of one row, nothing recomputed, on one rank.

    Korthikanti et al. (arXiv 2205.05198, section 4) adapted: RMSNorm and no dropout (inputs only), grouped
    query attention, SwiGLU (gate, up, silu(gate), product), and attention that keeps its inputs, output and
    log-sum-exp, never the scores. Under context parallelism keys and values are gathered over the row.
    """
    kept = _kept_by_layer(config, architecture, row_tokens)
    return kept.residual + kept.attention + kept.mlp


@dataclass(frozen=True, slots=True)
class _Kept:
    residual: int
    attention: int
    mlp: int


def _width(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bf16" else 4


def _residual_bytes(config: RunConfig, architecture: Architecture, row_tokens: int) -> int:
    """One hidden-state tensor of a row as this rank keeps it."""
    parallel = config.parallel
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    return math.ceil(row_tokens / shards) * architecture.hidden_size * _width(config)


def _kept_by_layer(config: RunConfig, architecture: Architecture, row_tokens: int) -> _Kept:
    parallel, width = config.parallel, _width(config)
    tokens = math.ceil(row_tokens / parallel.context)
    heads, kv_heads = architecture.num_heads / parallel.tensor, max(architecture.num_kv_heads / parallel.tensor, 1.0)
    query, kv = heads * architecture.head_dim, kv_heads * architecture.head_dim
    attention = tokens * (2 * query * width + 4 * heads) + row_tokens * 2 * kv * width
    if architecture.qk_norm:
        attention += tokens * (query + kv) * width
    return _Kept(
        # Inputs of two norms and, as their outputs, of the QKV and first MLP matrices.
        residual=4 * _residual_bytes(config, architecture, row_tokens),
        attention=round(attention),
        mlp=round(tokens * 4 * architecture.ffn_hidden_size / parallel.tensor * width),
    )


def _activations(config: RunConfig, architecture: Architecture, stage: int, row_tokens: int, microbatches: int) -> int:
    """Bytes kept for all layers and micro-batches that are under way at a stage at once."""
    kept = _kept_by_layer(config, architecture, row_tokens)
    residual = _residual_bytes(config, architecture, row_tokens)
    layers = layers_in_flight(config, architecture, stage, microbatches)
    whole = kept.residual + kept.attention + kept.mlp
    recompute = config.recompute
    if recompute.granularity == "none":
        total = layers * whole
    elif recompute.granularity == "selective":
        total = layers * (kept.residual + kept.attention) + kept.mlp
    else:
        block = min(recompute.layers, architecture.num_layers // config.parallel.pipeline)
        total = math.ceil(layers / block) * residual + block * whole
    return total


def layers_in_flight(config: RunConfig, architecture: Architecture, stage: int, microbatches: int) -> int:
    """Layers times micro-batches whose activations a stage holds at the worst moment.

    1F1B holds pipeline - stage micro-batches; the interleaved schedule 2 * (pipeline - stage - 1) +
    (chunks - 1) * pipeline + 1 chunks, which on the first stage is the paper's factor 1 + (p - 1) / (p * chunks).
    """
    parallel = config.parallel
    chunks = parallel.virtual_pipeline
    chunk_layers = architecture.num_layers // (parallel.pipeline * chunks)
    if chunks == 1:
        return chunk_layers * min(microbatches, parallel.pipeline - stage)
    warmup = 2 * (parallel.pipeline - stage - 1) + (chunks - 1) * parallel.pipeline
    return chunk_layers * min(microbatches * chunks, warmup + 1)


def _loss_bytes(config: RunConfig, architecture: Architecture, row_tokens: int) -> int:
    parallel, width = config.parallel, _width(config)
    tokens = math.ceil(row_tokens / parallel.context)
    vocabulary = architecture.padded_vocab_size(parallel.tensor) // parallel.tensor
    hidden = 2 * tokens * architecture.hidden_size * width  # the gathered hidden states and their gradient
    logits_width = 4 if config.model.logits_dtype == "fp32" else width
    if config.model.fused_loss:
        return hidden + min(tokens, LOSS_CHUNK_TOKENS) * vocabulary * (logits_width + width)
    # Logits, their fp32 form in the loss, and the gradient.
    return hidden + tokens * vocabulary * (logits_width + 8)
