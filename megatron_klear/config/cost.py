"""What a training step costs on N cards, term by term: computation, traffic of every axis, memory, sampling.

Arithmetic of settings and shapes alone, beside the plan of memory, which it uses; no torch. Counts (parameters, FLOPs,
bytes of collectives, bytes of memory) are held against what is built and counted (`tests/distributed/test_traffic.py`,
`tests/unit/test_cost.py`). Seconds are those counts over a `Device`'s figures, which are inputs: a roofline to compare
layouts by, not a forecast. Experts' traffic is arithmetic only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_klear.config.base import RunConfig, SFTConfig
from megatron_klear.config.cost_models import Device, Model
from megatron_klear.config.memory import Memory, stage_memory, stage_parameters

Axis = Literal["tensor", "context", "pipeline", "data", "expert"]
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "send", "all_to_all"]
BF16, FP32 = 2, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a model lies over cards, and what a step of a data rank is."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    """Ranks that share a layer's experts; they are among those of the data and tensor axes."""
    sequence: bool = True
    """Sequence parallelism, where `tensor` is above 1."""
    row_tokens: int = 32_768
    """Of one micro-batch."""
    microbatches: int = 1
    """Of one data rank in one step."""
    recompute: Literal["none", "selective", "full"] = "none"
    distributed: bool = True
    """Optimizer state sharded over the data and context axes."""
    width: int = BF16
    """Bytes of a weight and of an activation: 2 for bf16, 4 for fp32."""

    @property
    def world_size(self) -> int:
        """Cards."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def local_tokens(self) -> int:
        """Tokens of a row on one context rank."""
        return math.ceil(self.row_tokens / self.context)

    @property
    def cuts_sequence(self) -> bool:
        """Whether norms and residuals are cut over the tensor axis."""
        return self.sequence and self.tensor > 1

    def run(self) -> RunConfig:
        """The settings that `config.memory` reads, with the rest at their defaults."""
        parallel = ("tensor", "pipeline", "virtual_pipeline", "context")
        return SFTConfig.model_validate(
            {
                "output": "plan",
                "model": {"path": "plan", "dtype": "bf16" if self.width == BF16 else "fp32"},
                "data": {"train": ["plan.jsonl"]}
                | dict.fromkeys(("max_length", "tokens_per_microbatch"), self.row_tokens),
                "parallel": {name: getattr(self, name) for name in parallel} | {"sequence": self.cuts_sequence},
                "recompute": {"granularity": self.recompute},
                "optimizer": {"distributed": self.distributed},
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Collectives of one kind on one axis in one step of one rank."""

    axis: Axis
    kind: Kind
    what: str
    payload: int
    """Bytes of the whole tensors: what is reduced, gathered, scattered or sent, over all calls of the step."""
    ranks: int
    span: int
    """Neighbouring cards that the axis reaches over, which says whether it leaves a node."""

    @property
    def sent(self) -> float:
        """Bytes that one card sends, by rings (Thakur et al. 2005; nccl-tests, PERFORMANCE.md).

        2(n-1)/n of what is all-reduced, (n-1)/n of what is gathered, scattered or exchanged, all of what is sent.
        """
        share = {"all_reduce": 2 * (self.ranks - 1) / self.ranks, "send": 1.0}
        return self.payload * share.get(self.kind, (self.ranks - 1) / self.ranks)

    def seconds(self, device: Device) -> float:
        """Time if nothing hides it: bytes over the link; latency is left out."""
        return self.sent / device.link(self.span)


def step_flops(model: Model, layout: Layout, mean_context: float) -> float:
    """Model FLOPs of one step on all cards: 6 a matrix's weight and token, and attention (PaLM, appendix B)."""
    tokens = layout.row_tokens * layout.microbatches * layout.data
    routers = 6.0 * model.architecture.num_layers * model.router_parameters
    return tokens * (model.architecture.flops_per_token(mean_context) + routers)


def hardware_flops(model: Model, layout: Layout, mean_context: float) -> float:
    """With what is recomputed: a forward pass of all layers, or of their MLPs where recomputation is selective.

    A forward pass is a third of the three (Korthikanti et al., arXiv 2205.05198, section 5 and appendix A). Selective
    recomputation repeats attention's scores too, in a kernel that does so anyway; they are not counted again.
    """
    architecture = model.architecture
    tokens = layout.row_tokens * layout.microbatches * layout.data
    forward_mlp = 2.0 * tokens * architecture.num_layers * 3 * architecture.hidden_size * architecture.ffn_hidden_size
    head = 6.0 * tokens * architecture.vocab_size * architecture.hidden_size
    model_flops = step_flops(model, layout, mean_context)
    again = {"none": 0.0, "selective": forward_mlp, "full": (model_flops - head) / 3}
    return model_flops + again[layout.recompute]


def bubble(layout: Layout) -> float:
    """Idle over busy time of the pipeline: (p - 1) / (v m) (Narayanan et al., arXiv 2104.04473, section 2.2)."""
    return (layout.pipeline - 1) / (layout.virtual_pipeline * layout.microbatches)


def traffic(model: Model, layout: Layout, stage: int = 0) -> list[Traffic]:
    """All collectives of payload weight in one step of one rank of a pipeline stage, parts of zero bytes left out.

    The gradient norm, losses and exchanged shapes are left out: they are of no size.
    """
    found = [
        *_tensor_traffic(model, layout, stage),
        *_context_traffic(model, layout),
        *_pipeline_traffic(model, layout, stage),
        *_data_traffic(model, layout, stage),
        *_expert_traffic(model, layout),
    ]
    return [one for one in found if one.payload and one.ranks > 1]


def _tensor_traffic(model: Model, layout: Layout, stage: int) -> list[Traffic]:
    """Hidden states that tensor ranks reduce or gather.

    A layer all-reduces twice in its forward pass and twice in its backward (Shoeybi et al., arXiv 1909.08053, section
    3). With the sequence cut, each is a reduce-scatter and an all-gather, and the inputs of both blocks are gathered
    once more for the weights' gradients (Korthikanti et al., section 4.2.2). The embedding's output is reduced once.
    The head gathers its input once, as it makes its gradients in its forward pass, and the input's gradient is reduced.
    Recomputation repeats the forward part of what is recomputed.
    """
    layers = model.architecture.num_layers // layout.pipeline * layout.microbatches
    tensor = layout.local_tokens * model.architecture.hidden_size * layout.width
    first, last = stage == 0, stage == layout.pipeline - 1
    ends = layout.microbatches * tensor
    rows = 4 * FP32 * layout.tensor * layout.local_tokens * layout.microbatches
    again = {"none": 0, "selective": 1, "full": 2}[layout.recompute]

    def part(kind: Kind, what: str, payload: int) -> Traffic:
        return Traffic(axis="tensor", kind=kind, what=what, payload=payload, ranks=layout.tensor, span=layout.tensor)

    # Four fp32 numbers a row and shard: maximum, sum, entropy's part and the target's logit.
    statistics = part("all_gather", "statistics of the head's rows", rows * last)
    if not layout.cuts_sequence:
        return [
            statistics,
            part("all_reduce", "outputs of blocks, and their inputs' gradients", layers * tensor * (4 + again)),
            part("all_reduce", "embedding's output", ends * first),
            part("all_reduce", "gradient of the head's input", ends * last),
        ]
    return [
        statistics,
        part("all_gather", "inputs of blocks, twice, and their outputs' gradients", layers * tensor * (6 + again)),
        part("reduce_scatter", "outputs of blocks, and their inputs' gradients", layers * tensor * (4 + again)),
        part("reduce_scatter", "embedding's output", ends * first),
        part("all_gather", "embedding's gradient", ends * first),
        part("all_gather", "head's input", ends * last),
        part("reduce_scatter", "gradient of the head's input", ends * last),
        part("all_reduce", "gradients of norms", FP32 * _norms(model, layout, last)),
    ]


def _norms(model: Model, layout: Layout, last: bool) -> int:
    """Weights of a stage's norms: every tensor rank has them whole, and a part of the sequence."""
    architecture = model.architecture
    layer = 2 * architecture.hidden_size + (2 * architecture.head_dim if architecture.qk_norm else 0)
    return architecture.num_layers // layout.pipeline * layer + architecture.hidden_size * last


def _context_traffic(model: Model, layout: Layout) -> list[Traffic]:
    """Keys and values of the whole row are gathered in every layer, and their gradients scattered (`mcore.layers`)."""
    architecture = model.architecture
    layers = architecture.num_layers // layout.pipeline * layout.microbatches
    kv = 2 * layout.row_tokens * architecture.num_kv_heads // layout.tensor * architecture.head_dim * layout.width
    forwards = 2 if layout.recompute != "none" else 1  # selective recomputation repeats the core attention too
    span = layout.tensor * layout.context

    def part(kind: Kind, what: str, payload: int) -> Traffic:
        return Traffic(axis="context", kind=kind, what=what, payload=payload, ranks=layout.context, span=span)

    return [
        part("all_gather", "keys and values", layers * kv * forwards),
        part("reduce_scatter", "their gradients", layers * kv),
    ]


def _pipeline_traffic(model: Model, layout: Layout, stage: int) -> list[Traffic]:
    """Hidden states forward and gradients back at every boundary of a chunk, once a micro-batch.

    The first chunk of all sends nothing back, the last nothing on (Narayanan et al., section 3.2).
    """
    shards = layout.tensor if layout.cuts_sequence else 1
    hidden = math.ceil(layout.local_tokens / shards) * model.architecture.hidden_size * layout.width
    chunks, last = layout.virtual_pipeline, layout.pipeline - 1
    forward, backward = chunks - (stage == last), chunks - (stage == 0)
    return [
        Traffic(
            axis="pipeline",
            kind="send",
            what="hidden states and their gradients",
            payload=(forward + backward) * layout.microbatches * hidden,
            ranks=layout.pipeline,
            span=layout.world_size,
        )
    ]


def _data_traffic(model: Model, layout: Layout, stage: int) -> list[Traffic]:
    """Gradients in fp32 and weights, once a step, over the ranks of data and context together.

    Gradients are reduce-scattered and weights gathered where optimizer state is sharded, else gradients are all-reduced
    (Rajbhandari et al., arXiv 1910.02054, section 7). The padding of Megatron's buffers is left out.
    """
    dense, expert = stage_parameters_of(model, layout, stage)
    sizes = [("data", dense, layout.data * layout.context)]
    if expert:
        sizes.append(("expert", expert, expert_replicas(layout)))
    found = []
    for name, parameters, ranks in sizes:
        gradients: Kind = "reduce_scatter" if layout.distributed else "all_reduce"
        kinds: list[tuple[Kind, str, int]] = [(gradients, "gradients", FP32)]
        if layout.distributed:
            kinds.append(("all_gather", "weights", layout.width))
        found += [
            Traffic(
                axis="data",
                kind=kind,
                what=what if name == "data" else f"{what} of experts",
                payload=parameters * width,
                ranks=ranks,
                span=layout.world_size // layout.pipeline,
            )
            for kind, what, width in kinds
        ]
    return found


def _expert_traffic(model: Model, layout: Layout) -> list[Traffic]:
    """Every token goes to its experts and comes back, and its gradient too (GShard, arXiv 2006.16668, section 3.2).

    All experts are equally liked here, and a token is sent once for each of its experts.
    """
    if model.experts is None:
        return []
    tokens = layout.local_tokens / (layout.tensor if layout.cuts_sequence else 1)
    payload = tokens * model.experts.chosen * model.architecture.hidden_size * layout.width
    layers = model.architecture.num_layers // layout.pipeline * layout.microbatches
    passes = 4 + (2 if layout.recompute != "none" else 0)
    return [
        Traffic(
            axis="expert",
            kind="all_to_all",
            what="tokens to experts and back",
            payload=round(payload * layers * passes),
            ranks=layout.expert,
            span=layout.expert,
        )
    ]


def expert_replicas(layout: Layout) -> int:
    """Ranks that hold the same experts: expert parallelism takes its ranks of data, context and tensor together."""
    return layout.world_size // layout.pipeline // layout.expert


def stage_parameters_of(model: Model, layout: Layout, stage: int) -> tuple[int, int]:
    """Parameters on one rank of a pipeline stage: (what all data ranks hold, experts)."""
    whole = stage_parameters(layout.run(), model.architecture, stage)
    if model.experts is None:
        return whole, 0
    layers = model.architecture.num_layers // layout.pipeline
    dense = whole - layers * model.expert_parameters(model.experts.chosen) // layout.tensor
    experts = layers * model.expert_parameters(model.experts.count / layout.expert)
    return dense + layers * model.router_parameters, experts


def memory(model: Model, layout: Layout, stage: int = 0) -> Memory:
    """Bytes on one rank of a stage, by `config.memory`.

    Experts are whole on their rank, their optimizer state is sharded over the ranks that hold the same ones; what an
    MLP keeps for its backward pass is what the chosen experts keep, without the copies of their inputs.
    """
    run, architecture = layout.run(), model.architecture
    plain = stage_memory(run, architecture, stage, layout.data, layout.row_tokens, layout.microbatches)
    if model.experts is None:
        return plain
    dense, experts = stage_parameters_of(model, layout, stage)
    state = FP32 * (3 if layout.width == BF16 else 2)
    shards = (layout.data * layout.context, expert_replicas(layout)) if layout.distributed else (1, 1)
    return Memory(
        parameters=layout.width * (dense + experts),
        gradients=FP32 * (dense + experts),
        optimizer=math.ceil(state * dense / shards[0]) + math.ceil(state * experts / shards[1]),
        activations=plain.activations,
        working=plain.working,
    )
