"""Bytes of a step's rows on one rank: what layers keep for the backward pass, and what comes and goes meanwhile.

Korthikanti et al. (arXiv 2205.05198, section 4) for what this project builds: RMSNorm, no dropout, grouped queries,
SwiGLU, attention that never keeps scores, rotary embedding applied after the norms of queries and keys. On a GPU norms
and SwiGLU are fused: a norm keeps its input, SwiGLU its input and output. On the CPU (`parallel.device = "cpu"`) torch
composes them: a norm keeps its normalised input besides, SwiGLU both factors of its product, attention its output
twice and, under context parallelism, its masks. `tests/distributed/test_memory.py` holds the CPU's form against the
peaks of real steps; the GPU's is held against what autograd keeps of such a layer (`tests/unit/test_estimate.py`), and
has been against no peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_klear.config.base import RunConfig
from megatron_klear.models.architecture import Architecture

CHUNK_BYTES = {"cuda": 5 << 29, "cpu": 1 << 28}
"""Of logits that the fused loss holds at once; the head's own figures (`kernels.gemm`), which a test compares."""
_MASK_BYTES = 5  # of a query and a key, as bool and as the float32 that torch's kernel on the CPU makes of it


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptByLayer:
    """Bytes that a layer keeps of one row, by the part that selective recomputation can let go of."""

    residual: int
    """Inputs of the two norms."""
    norms: int
    """Their outputs as inputs of matrices, and what a norm keeps besides its input."""
    attention: int
    core: int
    """Of attention what is made within it: rotated queries and keys, gathered keys and values, its output."""
    mlp: int

    @property
    def whole(self) -> int:
        """All of it."""
        return self.residual + self.norms + self.attention + self.core + self.mlp


def number_bytes(config: RunConfig) -> int:
    """Width of a weight and of an activation."""
    return 2 if config.model.dtype == "bf16" else 4


def layer_activation_bytes(config: RunConfig, architecture: Architecture, row_tokens: int) -> int:
    """Bytes that one layer keeps for its backward pass of one row, nothing recomputed, on one rank."""
    return kept_by_layer(config, architecture, row_tokens).whole


def kept_by_layer(config: RunConfig, architecture: Architecture, row_tokens: int) -> KeptByLayer:
    """What a layer keeps of a row of `row_tokens` tokens, by part."""
    parallel, width, composed = config.parallel, number_bytes(config), _composed(config)
    tokens = math.ceil(row_tokens / parallel.context)
    heads, kv_heads = architecture.num_heads / parallel.tensor, max(architecture.num_kv_heads / parallel.tensor, 1.0)
    query, kv = heads * architecture.head_dim, kv_heads * architecture.head_dim
    gathered = parallel.context > 1
    # Views of the matrix's output keep all of it: keys for their norm, values for the scores.
    projected = query + 2 * kv if architecture.qk_norm or not gathered else 0.0
    if architecture.qk_norm:
        projected += query + (query + kv if composed else 0.0)  # queries are copied out; the normalised ones
    core = tokens * (query + (0.0 if gathered else kv) + query * (2 if composed else 1))
    core += row_tokens * 2 * kv if gathered else 0.0
    masks = row_tokens**2 * (2 * parallel.context + 1) / (2 * parallel.context) ** 2 if composed and gathered else 0.0
    hidden = _residual_bytes(config, architecture, row_tokens)
    return KeptByLayer(
        residual=2 * hidden,
        norms=(4 if composed else 2) * hidden,
        attention=round(tokens * projected * width),
        core=round(core * width + 4 * heads * tokens + _MASK_BYTES * masks),
        mlp=round(tokens * _kept_by_mlp(architecture, composed) / parallel.tensor * width),
    )


def held_bytes(config: RunConfig, architecture: Architecture, stage: int, row_tokens: int, microbatches: int) -> int:
    """Bytes of kept activations that are on the device: all of them, or a few where the others wait on the host."""
    saved = saved_bytes(config, architecture, stage, row_tokens, microbatches)
    beside = _beside_bytes(config, architecture, stage, row_tokens, microbatches)
    if config.offload.activations:
        # What a row that goes back has at hand: a tensor, the next, and on all stages but the last, which goes back at
        # once, the last that the row before it has saved.
        last = _last_saved(config, architecture, row_tokens)
        ends = stage == config.parallel.pipeline - 1
        saved = min(saved, sum(last[:2]) if ends else sum(last[: config.offload.window]) + sum(last[:3]))
    return saved + beside


def offloaded_bytes(
    config: RunConfig, architecture: Architecture, stage: int, row_tokens: int, microbatches: int
) -> int:
    """Bytes of activations in host memory at once."""
    return saved_bytes(config, architecture, stage, row_tokens, microbatches) if config.offload.activations else 0


def saved_bytes(config: RunConfig, architecture: Architecture, stage: int, row_tokens: int, microbatches: int) -> int:
    """Bytes that all layers and micro-batches that are under way at a stage at once save for their backward pass."""
    kept = kept_by_layer(config, architecture, row_tokens)
    residual = _residual_bytes(config, architecture, row_tokens)
    layers = layers_in_flight(config, architecture, stage, microbatches)
    recompute = config.recompute
    if recompute.granularity == "none":
        total = layers * kept.whole
    elif recompute.granularity == "selective":
        # What goes into the core and comes out of it: normalised queries and keys where there are norms; values, and
        # otherwise keys, are views.
        core = _around_core(config, architecture, row_tokens) if recompute.repeats("core_attn") else kept.core
        norms = 0 if recompute.repeats("layernorm") else kept.norms
        mlp = 0 if recompute.repeats("mlp") else kept.mlp
        total = layers * (kept.residual + norms + kept.attention + core + mlp)
    elif recompute.method == "block":
        chunk_layers = _chunk_layers(config, architecture)
        repeated = min(recompute.layers, chunk_layers)
        total = layers // chunk_layers * (repeated * residual + (chunk_layers - repeated) * kept.whole)
    else:
        total = math.ceil(layers / _block(config, architecture)) * residual
    if stage == config.parallel.pipeline - 1:  # the final norm's input and output
        total += residual * (3 if _composed(config) else 2)
    return total


def _beside_bytes(config: RunConfig, architecture: Architecture, stage: int, row_tokens: int, microbatches: int) -> int:
    """Bytes that micro-batches hold beside what their layers save: angles, and what stages send each other."""
    layers = layers_in_flight(config, architecture, stage, microbatches)
    residual = _residual_bytes(config, architecture, row_tokens)
    under_way = layers / (architecture.num_layers / config.parallel.pipeline)
    total = round(under_way * math.ceil(row_tokens / config.parallel.context) * architecture.head_dim * 8)
    if config.parallel.pipeline > 1:
        total += 2 * residual  # what is being received and sent
    if config.parallel.virtual_pipeline > 1:
        # Outputs, which this schedule cannot let go of as they are sent.
        total += layers // _chunk_layers(config, architecture) * residual
    return total


def working_bytes(config: RunConfig, architecture: Architecture, stage: int, row_tokens: int) -> int:
    """What comes and goes on top of what is kept: the most that is held of it at once."""
    kept = kept_by_layer(config, architecture, row_tokens)
    tokens = math.ceil(row_tokens / config.parallel.context)
    ffn = _ffn(architecture) / config.parallel.tensor
    # Gradients of a layer's output, of SwiGLU's output and of both its inputs.
    backward = round((architecture.hidden_size + 3 * ffn) * tokens * number_bytes(config))
    if config.recompute.granularity == "selective":
        backward += kept.mlp if config.recompute.repeats("mlp") else 0
        backward += kept.norms if config.recompute.repeats("layernorm") else 0
    elif config.recompute.granularity == "full":
        backward += _block(config, architecture) * kept.whole
    loss = loss_bytes(config, architecture, row_tokens) if stage == config.parallel.pipeline - 1 else 0
    return max(backward, loss)


def loss_bytes(config: RunConfig, architecture: Architecture, row_tokens: int) -> int:
    """Buffers of the head and the loss: a chunk of logits, whose gradient is written over them; or whole logits."""
    parallel, width = config.parallel, number_bytes(config)
    tokens = math.ceil(row_tokens / parallel.context)
    vocabulary = architecture.padded_vocab_size(parallel.tensor) // parallel.tensor
    copies = 1  # the gradient of the hidden states
    if parallel.tensor > 1 and parallel.sequence:
        copies += 3 if _composed(config) else 1  # they are gathered; gloo's reduce-scatter takes two more, as measured
    hidden = copies * tokens * architecture.hidden_size * width
    logits_width = 4 if config.model.logits_dtype == "fp32" else width
    if config.model.fused_loss:
        fit = CHUNK_BYTES["cpu" if _composed(config) else "cuda"] // (vocabulary * logits_width)
        return hidden + min(tokens, fit) * vocabulary * logits_width
    # Logits, their fp32 form in the loss, and the gradient.
    return hidden + tokens * vocabulary * (logits_width + 8)


def layers_in_flight(config: RunConfig, architecture: Architecture, stage: int, microbatches: int) -> int:
    """Layers times micro-batches whose activations a stage holds at the worst moment.

    1F1B holds pipeline - stage micro-batches; the interleaved schedule 2 * (pipeline - stage - 1) +
    (chunks - 1) * pipeline + 1 chunks, which on the first stage is the paper's factor 1 + (p - 1) / (p * chunks).
    """
    parallel = config.parallel
    chunks, chunk_layers = parallel.virtual_pipeline, _chunk_layers(config, architecture)
    if chunks == 1:
        return chunk_layers * min(microbatches, parallel.pipeline - stage)
    warmup = 2 * (parallel.pipeline - stage - 1) + (chunks - 1) * parallel.pipeline
    return chunk_layers * min(microbatches * chunks, warmup + 1)


def _last_saved(config: RunConfig, architecture: Architecture, row_tokens: int) -> list[int]:
    """Bytes of the tensors that a layer saves last, the very last first."""
    recompute, residual = config.recompute, _residual_bytes(config, architecture, row_tokens)
    if recompute.granularity == "full" and recompute.method == "uniform":
        return [residual] * config.offload.window
    tokens = math.ceil(row_tokens / config.parallel.context)
    ffn = round(tokens * _ffn(architecture) / config.parallel.tensor * number_bytes(config))
    mlp = [ffn] * 4 if _composed(config) else [ffn, 2 * ffn]
    return [*([] if recompute.repeats("mlp") else mlp), *[residual] * config.offload.window]


def _composed(config: RunConfig) -> bool:
    return config.parallel.device == "cpu"


def _block(config: RunConfig, architecture: Architecture) -> int:
    """Layers that full recomputation holds at once on top of what is kept."""
    chunk_layers = _chunk_layers(config, architecture)
    if config.recompute.method == "block":
        # The layers that are kept come first in the backward pass, and have let go when one is repeated.
        return int(config.recompute.layers >= chunk_layers)
    return min(config.recompute.layers, chunk_layers)


def _chunk_layers(config: RunConfig, architecture: Architecture) -> int:
    """Layers that follow each other on one rank."""
    return architecture.num_layers // (config.parallel.pipeline * config.parallel.virtual_pipeline)


def _residual_bytes(config: RunConfig, architecture: Architecture, row_tokens: int) -> int:
    """One hidden-state tensor of a row as this rank keeps it."""
    parallel = config.parallel
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    return math.ceil(row_tokens / shards) * architecture.hidden_size * number_bytes(config)


def _around_core(config: RunConfig, architecture: Architecture, row_tokens: int) -> int:
    """Bytes of the core attention's output and of its inputs that are no views of what is kept anyhow."""
    tokens = math.ceil(row_tokens / config.parallel.context) / config.parallel.tensor
    query, kv = architecture.num_heads * architecture.head_dim, architecture.num_kv_heads * architecture.head_dim
    inputs = query + kv if architecture.qk_norm else query
    if config.parallel.context > 1 and not architecture.qk_norm:
        inputs += query + 2 * kv
    return round(tokens * (inputs + query) * number_bytes(config))


def _ffn(architecture: Architecture) -> int:
    """Width of what a token meets of an MLP: of experts that of the chosen ones together."""
    experts = architecture.experts
    return architecture.ffn_hidden_size if experts is None else experts.chosen * experts.ffn_hidden_size


def _kept_by_mlp(architecture: Architecture, composed: bool) -> int:
    """Numbers that a token leaves of an MLP, or of its experts, all equally liked: with the copies that they are sent.

    Gate and up together and the product; where SwiGLU is composed also silu(gate) and up once more.
    """
    experts = architecture.experts
    copies = 0 if experts is None else 2 * experts.chosen * architecture.hidden_size
    return (5 if composed else 3) * _ffn(architecture) + copies
