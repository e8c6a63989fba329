"""What a run will be, worked out before it starts: batch arithmetic, parameters and memory of the heaviest rank.

Pure arithmetic on the settings, the model's shape and the number of processes; `--dry-run` prints it. Memory is what
the tensors of training take. CUDA, NCCL and fragmentation come on top (allow 3 GB), which is said and not guessed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_klear.config.base import RunConfig, SFTConfig
from megatron_klear.config.checks_fp8 import fp8_lines
from megatron_klear.config.memory import Memory, adapter_parameters, stage_memory, stage_parameters
from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.models.architecture import Architecture
from megatron_klear.types import route_type

if TYPE_CHECKING:
    from megatron_klear.config.rl import GPPOConfig

GIB = 2**30

PROCESS_BYTES = 3 * GIB
"""Allowed for CUDA and NCCL in a process that has a card open."""

CARD_BYTES = round(79.6 * GIB)
"""Of the 80 GB cards that a plan made on a machine without any is for."""

SAMPLE_BYTES_OF_TOKEN = 9
"""Of a sample: its token, whether that is trained, its log-prob."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The arithmetic of a step."""

    world_size: int
    data_parallel: int
    rows_per_step: int
    row_tokens: int
    microbatches: int
    """Of one data-parallel rank in one step."""
    max_tokens_per_step: int
    steps_per_epoch: int | None
    """None until the packed rows of the data are counted."""
    total_steps: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run will be; `to_json` for machines, `describe_plan` for people."""

    batch: BatchPlan
    model_parameters: int
    stage_parameters: tuple[int, ...]
    """Of one tensor rank, by pipeline stage: padded vocabulary rows and the copy of a tied head included."""
    stage_memory: tuple[Memory, ...]
    """By pipeline stage."""

    @property
    def heaviest_stage(self) -> int:
        """Index of the pipeline stage that takes most memory."""
        return max(range(len(self.stage_memory)), key=lambda stage: self.stage_memory[stage].total)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers by name, sizes in bytes."""
        heaviest = self.stage_memory[self.heaviest_stage]
        return asdict(self) | {"heaviest_stage": self.heaviest_stage, "heaviest_total_bytes": heaviest.total}


def plan_run(config: SFTConfig, architecture: Architecture, world_size: int, num_rows: int | None = None) -> Plan:
    """Work out a run that `checks.check_run` found no fault with; `num_rows` are the packed rows of an epoch."""
    batch = plan_batch(config, world_size, num_rows)
    stages = range(config.parallel.pipeline)
    return Plan(
        batch=batch,
        model_parameters=architecture.num_parameters,
        stage_parameters=tuple(stage_parameters(config, architecture, stage) for stage in stages),
        stage_memory=tuple(
            stage_memory(config, architecture, stage, batch.data_parallel, batch.row_tokens, batch.microbatches)
            for stage in stages
        ),
    )


def plan_batch(config: SFTConfig, world_size: int, num_rows: int | None = None) -> BatchPlan:
    """Batch arithmetic; an epoch's last step may have fewer rows than the others."""
    data_parallel = max(world_size // config.parallel.model_size, 1)
    rows = config.train.rows_per_step
    steps_per_epoch = None if num_rows is None else math.ceil(num_rows / rows)
    total = None if steps_per_epoch is None else steps_per_epoch * config.train.epochs
    if config.train.steps is not None:
        total = config.train.steps if total is None else min(total, config.train.steps)
    return BatchPlan(
        world_size=world_size,
        data_parallel=data_parallel,
        rows_per_step=rows,
        row_tokens=config.data.tokens_per_microbatch,
        microbatches=rows // data_parallel,
        max_tokens_per_step=rows * config.data.tokens_per_microbatch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
    )


def describe_plan(
    config: SFTConfig,
    architecture: Architecture,
    world_size: int,
    *,
    num_rows: int | None = None,
    device_memory_bytes: int | None = None,
) -> str:
    """The plan of a run as `--dry-run` prints it; `device_memory_bytes` adds whether it fits."""
    plan = plan_run(config, architecture, world_size, num_rows)
    lines = [*_model_lines(config, architecture, plan), "", *_batch_lines(plan.batch), "", *_memory_lines(config, plan)]
    if device_memory_bytes is not None:
        total = plan.stage_memory[plan.heaviest_stage].total
        verdict = "fits" if total < device_memory_bytes else "DOES NOT FIT"
        lines.append(_row(f"of the device's ({verdict})", f"{device_memory_bytes / GIB:.2f} GiB"))
        if total >= device_memory_bytes:
            lines.append(
                "Remedies: recompute.granularity = selective or full, offload.activations, smaller "
                "data.tokens_per_microbatch, more parallel.tensor, context or pipeline, optimizer.distributed, and "
                "with it in bf16 on GPUs optimizer.cpu_offload (12 bytes less for every parameter of the share, 16 in "
                "host memory)."
            )
    return "\n".join(lines)


def describe_rl_plan(
    config: GPPOConfig, architecture: Architecture, world_size: int, *, device_memory_bytes: int | None = None
) -> str:
    """The plan of a reinforcement-learning run as `--dry-run` prints it; sampling's own memory comes on top."""
    algorithm, sampling, row_tokens = config.algorithm, config.sampling, config.train.tokens_per_microbatch
    data_parallel = max(world_size // config.parallel.model_size, 1)
    updates = algorithm.prompts_per_step // algorithm.prompts_per_update
    sequences = algorithm.prompts_per_update * sampling.samples_per_prompt
    longest = config.prompts.max_tokens + sampling.max_tokens
    batch = BatchPlan(
        world_size=world_size,
        data_parallel=data_parallel,
        rows_per_step=max(-(-sequences * longest // row_tokens), data_parallel),
        row_tokens=row_tokens,
        microbatches=max(-(-sequences * longest // (row_tokens * data_parallel)), 1),
        max_tokens_per_step=sequences * longest,
        steps_per_epoch=None,
        total_steps=config.train.steps * updates,
    )
    stages = range(config.parallel.pipeline)
    plan = Plan(
        batch=batch,
        model_parameters=architecture.num_parameters,
        stage_parameters=tuple(stage_parameters(config, architecture, stage) for stage in stages),
        stage_memory=tuple(
            stage_memory(config, architecture, stage, data_parallel, row_tokens, batch.microbatches) for stage in stages
        ),
    )
    generated = algorithm.generated_prompts or algorithm.prompts_per_step
    lines = [
        "Rollout step",
        _row("prompts generated, trained on", f"{generated} at a time, {algorithm.prompts_per_step}"),
        _row("responses per prompt", f"{sampling.samples_per_prompt} of up to {sampling.max_tokens:,} tokens"),
        _row("optimizer steps", f"{updates} of {algorithm.prompts_per_update} prompts, {sequences} responses"),
        _row("tokens per optimizer step, at most", f"{batch.max_tokens_per_step:,}"),
        _row("rollout steps", f"{config.train.steps:,}"),
        *_samples_lines(config, architecture, longest),
    ]
    whole = [*_model_lines(config, architecture, plan), "", *lines, "", *_memory_lines(config, plan)]
    whole += _turns_lines(config, plan, device_memory_bytes)
    if device_memory_bytes is not None:
        whole.append(_row("the device has", f"{device_memory_bytes / GIB:.2f} GiB"))
    return "\n".join(whole)


def most_groups(config: GPPOConfig) -> int:
    """Groups whose arrays lie on the host of rank 0 at once, at most: the orchestrator's, and copies given out.

    A step looks at `max_generation_rounds` rounds, and what the next steps draw meanwhile is there too. What it trains
    on is there twice more as it is given out: laid end to end, and with rank 0.
    """
    algorithm, rollout = config.algorithm, config.rollout
    drawn = algorithm.generated_prompts or algorithm.prompts_per_step
    looked_at = algorithm.max_generation_rounds * drawn
    ahead = 0
    if isinstance(rollout, VLLMRolloutConfig) and rollout.mode != "synchronous":
        asynchronous = rollout.mode == "asynchronous"
        ahead = rollout.max_staleness * algorithm.prompts_per_step if asynchronous else drawn
    return looked_at + ahead + 2 * algorithm.prompts_per_step


def _samples_lines(config: GPPOConfig, architecture: Architecture, longest: int) -> list[str]:
    """What samples of `longest` tokens take, at most, on the host of rank 0, whose orchestrator holds them."""
    experts, layers = architecture.experts, architecture.num_layers
    routes = 0
    if experts is not None and config.algorithm.router_replay == "sampler":
        routes = layers * experts.chosen * route_type(experts.count)(0).itemsize
    of_token, groups = SAMPLE_BYTES_OF_TOKEN + routes, most_groups(config)
    size = groups * config.sampling.samples_per_prompt * longest * of_token
    parts = f"{of_token} bytes a token" + (f", {routes} of them routes" if routes else "")
    return [
        _row("samples on rank 0's host, at most", f"{size / GIB:.2f} GiB ({groups} groups, {parts}) and their texts")
    ]


def turns_bytes(config: GPPOConfig, plan: Plan, device_memory_bytes: int) -> tuple[int, int] | None:
    """Bytes reserved on the heaviest card that trainer and server share: (while training, while sampling).

    None where they share no card. Each process has `PROCESS_BYTES` for CUDA and NCCL, asleep or not. A trainer asleep
    keeps its weights; a server asleep keeps nothing else, and one awake takes its share of the card, CUDA included.
    """
    rollout = config.rollout
    if rollout.kind != "vllm" or rollout.transfer != "cuda_ipc" or rollout.server is None:
        return None
    server = round(rollout.server.memory_share * device_memory_bytes)
    training = max(memory.total for memory in plan.stage_memory) + 2 * PROCESS_BYTES
    sampling = max(memory.parameters for memory in plan.stage_memory) + PROCESS_BYTES + server
    return training, sampling


def _turns_lines(config: GPPOConfig, plan: Plan, device_memory_bytes: int | None) -> list[str]:
    assumed = device_memory_bytes or CARD_BYTES
    turns = turns_bytes(config, plan, assumed)
    if turns is None:
        return []
    of = "" if device_memory_bytes else f", a card of {CARD_BYTES / GIB:.1f} GiB assumed"
    lines = ["", f"Reserved on a card in turns, CUDA and NCCL of both processes included{of}"]
    for name, size in zip(("trainer awake, server asleep", "trainer asleep, server awake"), turns, strict=True):
        verdict = "fits" if size < assumed else "DOES NOT FIT"
        lines.append(_row(name, f"{size / GIB:.2f} GiB ({verdict})"))
    return lines


def _model_lines(config: RunConfig, architecture: Architecture, plan: Plan) -> list[str]:
    parallel = config.parallel
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    layout += f" x data {plan.batch.data_parallel}"
    if parallel.virtual_pipeline > 1:
        layout += f", {parallel.virtual_pipeline} chunks a stage"
    if architecture.experts is not None:
        layout += f"; experts over {parallel.expert} x tensor {parallel.expert_tensor_size}"
    adapters = adapter_parameters(config, architecture)
    padded = architecture.padded_vocab_size(parallel.tensor)
    met = plan.model_parameters - architecture.unused_parameters
    parameters = f"{plan.model_parameters:,}" + (f", {met:,} met by a token" if architecture.experts else "")
    return [
        "Model",
        _row("family, layers, hidden", f"{architecture.family}, {architecture.num_layers}, {architecture.hidden_size}"),
        _row("parameters", parameters),
        _row("vocabulary (padded)", f"{architecture.vocab_size:,} ({padded:,})"),
        _row("layout", layout),
        _row("parameters of the largest rank", f"{max(plan.stage_parameters):,}"),
        *([] if config.lora is None else [_row("trained, in adapters", f"{adapters:,} a rank")]),
        *(_row(name, value) for name, value in fp8_lines(config)),
    ]


def _batch_lines(batch: BatchPlan) -> list[str]:
    lines = [
        "Batch",
        _row("processes", f"{batch.world_size}"),
        _row("rows per step", f"{batch.rows_per_step} of up to {batch.row_tokens:,} tokens"),
        _row("micro-batches per rank and step", f"{batch.microbatches}"),
        _row("tokens per step, at most", f"{batch.max_tokens_per_step:,}"),
    ]
    if batch.steps_per_epoch is not None:
        lines.append(_row("steps per epoch", f"{batch.steps_per_epoch:,}"))
    return [
        *lines,
        _row("steps", "known when the data is packed" if batch.total_steps is None else f"{batch.total_steps:,}"),
    ]


def _memory_lines(config: RunConfig, plan: Plan) -> list[str]:
    memory = plan.stage_memory[plan.heaviest_stage]
    sharded = "sharded" if config.optimizer.distributed else "whole"
    parts = {
        f"parameters ({config.model.dtype})": memory.parameters,
        "gradients (fp32)": memory.gradients,
        f"optimizer state (fp32, {sharded})": memory.optimizer,
        f"activations (recompute: {config.recompute.granularity})": memory.activations,
        "at work (loss, or a backward pass)": memory.working,
        "total": memory.total,
    }
    if memory.host:
        parts["host memory of what is offloaded"] = memory.host
    stage = f", pipeline stage {plan.heaviest_stage}" if len(plan.stage_memory) > 1 else ""
    head = f"Memory of the heaviest rank{stage}, estimated; CUDA, NCCL and fragmentation come on top (allow 3 GiB)"
    return [head, *(_row(name, f"{size / GIB:.2f} GiB") for name, size in parts.items())]


def _row(name: str, value: str) -> str:
    return f"  {name:<36} {value}"
