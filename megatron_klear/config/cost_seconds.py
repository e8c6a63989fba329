"""Seconds of a step and of its rollout on a `Device`: the counts of `cost` over its figures.

Lower bounds put together, to tell layouts apart and to see which term is in the way; latency, kernels that are no
matrix product, stragglers and the host are left out. Nothing of it has been held against a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klear.config.cost import BF16, Layout, Traffic, bubble, hardware_flops, memory, traffic
from megatron_klear.config.cost_models import Device, Model
from megatron_klear.config.memory import Memory
from megatron_klear.config.plan import PROCESS_BYTES

HIDDEN = {"data"}
"""Axes whose traffic the computation of the same step hides, as far as it lasts (`optimizer.overlap`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """One training step of the heaviest stage."""

    compute: float
    """Seconds of matrix products: hardware FLOPs of a card over the share of its peak that is reckoned with."""
    traffic: tuple[Traffic, ...]
    seconds_of_axis: dict[str, float]
    """If nothing hides it."""
    bubble: float
    """Seconds that a card waits for the pipeline to fill and drain."""
    seconds: float
    """compute + bubble + traffic that is not hidden."""
    memory: Memory
    fits: bool
    """With what CUDA and NCCL take."""


def step_cost(model: Model, layout: Layout, device: Device, mean_context: float) -> StepCost:
    """A step whose heaviest stage is the first or the last, in traffic as in memory."""
    stages = {0, layout.pipeline - 1}
    compute = (
        hardware_flops(model, layout, mean_context) / layout.world_size / (device.peak_flops * device.matrix_share)
    )
    by_stage = {stage: traffic(model, layout, stage) for stage in stages}
    heaviest = max(stages, key=lambda stage: sum(part.seconds(device) for part in by_stage[stage]))
    seconds: dict[str, float] = {}
    for part in by_stage[heaviest]:
        seconds[part.axis] = seconds.get(part.axis, 0.0) + part.seconds(device)
    open_seconds = sum(s if axis not in HIDDEN else max(s - compute, 0.0) for axis, s in seconds.items())
    # A micro-batch that waits, waits for the traffic between its matrix products too.
    waiting = bubble(layout) * (compute + sum(s for axis, s in seconds.items() if axis not in HIDDEN | {"pipeline"}))
    held = max((memory(model, layout, stage) for stage in stages), key=lambda held: held.total)
    return StepCost(
        compute=compute,
        traffic=tuple(by_stage[heaviest]),
        seconds_of_axis=seconds,
        bubble=waiting,
        seconds=compute + waiting + open_seconds,
        memory=held,
        fits=held.total + PROCESS_BYTES < device.memory_bytes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Responses that are drawn for one step, and the servers that draw them."""

    sequences: int
    prompt_tokens: int
    mean_tokens: int
    """Of a response."""
    longest_tokens: int
    tensor: int
    """Cards of a server."""
    servers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutCost:
    """Seconds of one rollout step on the servers, and what bounds it."""

    concurrent: int
    """Sequences that one server holds at once, by its cache or by what there is to do."""
    prefill: float
    decode: float
    """While servers are full."""
    tail: float
    """The longest response after the mean one, alone on its server."""
    sync: float
    """Weights to the servers."""

    @property
    def seconds(self) -> float:
        """Sum of all parts."""
        return self.prefill + self.decode + self.tail + self.sync


def cache_bytes_of_token(model: Model) -> int:
    """Keys and values in bf16 of one token: 2 x layers x KV heads x head size x 2 bytes."""
    shape = model.architecture
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * BF16


def decode_seconds(model: Model, rollout: Rollout, device: Device, concurrent: int, context: float) -> float:
    """One token for `concurrent` sequences of a server: the slower of reading memory and of computing.

    Read are all weights that any of the tokens meets, and every sequence's keys and values; computed are 2 FLOPs a
    weight met and 4 x layers x query width x context of attention a token (Pope et al., arXiv 2211.05102, section 2;
    Williams et al. 2009 for the roofline). An expert is read where one of the tokens chose it, all equally liked.
    """
    shape, read = model.architecture, model.active_parameters
    if model.experts is not None:
        missed = (1 - model.experts.chosen / model.experts.count) ** concurrent
        met = model.experts.count * (1 - missed)
        read += shape.num_layers * model.expert_parameters(met - model.experts.chosen)
    moved = BF16 * read + concurrent * context * cache_bytes_of_token(model)
    attention = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * context
    flops = concurrent * (2.0 * model.active_parameters + attention)
    reading = moved / (device.memory_bandwidth * device.memory_share * rollout.tensor)
    return max(reading, flops / (device.peak_flops * device.matrix_share * rollout.tensor))


def rollout_cost(model: Model, rollout: Rollout, device: Device, share: float = 0.9) -> RolloutCost:
    """A rollout step; servers take `share` of their cards' memory and have room for sequences of mean length.

    Raises ValueError where the weights alone do not fit.
    """
    room = share * device.memory_bytes * rollout.tensor - BF16 * model.num_parameters
    per_server = -(-rollout.sequences // rollout.servers)
    length = rollout.prompt_tokens + rollout.mean_tokens
    concurrent = min(int(room // (length * cache_bytes_of_token(model))), per_server)
    if concurrent < 1:
        raise ValueError(f"{model.name} and one response of it do not fit on {rollout.tensor} cards of {device.name}")
    context = rollout.prompt_tokens + rollout.mean_tokens / 2
    waves = per_server / concurrent
    full = rollout.mean_tokens * waves * decode_seconds(model, rollout, device, concurrent, context)
    last = rollout.prompt_tokens + (rollout.mean_tokens + rollout.longest_tokens) / 2
    tail = (rollout.longest_tokens - rollout.mean_tokens) * decode_seconds(model, rollout, device, 1, last)
    prompts = 2.0 * model.active_parameters * rollout.prompt_tokens * per_server
    return RolloutCost(
        concurrent=concurrent,
        prefill=prompts / (device.peak_flops * device.matrix_share * rollout.tensor),
        decode=full,
        tail=tail,
        # Each server's cards receive its own share of the weights, all at once, over the network.
        sync=BF16 * model.num_parameters / rollout.tensor / (device.network_bandwidth * device.link_share),
    )
