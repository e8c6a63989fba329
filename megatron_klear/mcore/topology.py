"""Where this process stands: torchrun's environment turned into Megatron's groups, read once into a frozen object.

`world(parallel)` starts torch.distributed (a single process without torchrun is a world of one), lays tensor, context,
data and pipeline axes over the ranks in Megatron's order, and takes everything down again.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear.config.base import ParallelConfig
from megatron_klear.distributed import exchange
from megatron_klear.errors import UserError
from megatron_klear.mcore import device as device_shim

device_shim.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (the shim must come first)

Value = TypeVar("Value")


class TopologyError(UserError, ValueError):
    """The processes that were started cannot hold the layout that was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One direction of the grid of processes: this rank's place in it and the group to talk to."""

    rank: int
    size: int
    group: dist.ProcessGroup

    @property
    def first(self) -> bool:
        """True on the first rank of the axis."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """True on the last rank of the axis."""
        return self.rank == self.size - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """This process's place along every axis. `data_context` is where gradients are summed."""

    rank: int
    size: int
    device: torch.device
    parallel: ParallelConfig
    tensor: Axis
    pipeline: Axis
    context: Axis
    data: Axis
    data_context: Axis
    expert: Axis
    """Ranks that share out a layer's experts."""
    expert_tensor: Axis
    expert_data: Axis
    """Ranks that hold the same experts, where their gradients are summed."""
    replicas: tuple[tuple[int, ...], ...]
    """The ranks of every data rank, in order: those that train the same rows."""

    @property
    def sequence_parallel(self) -> bool:
        """True where norms and residuals are cut along the sequence over the tensor axis."""
        return self.parallel.sequence and self.tensor.size > 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank, in this rank's pipeline, of the stage that holds the head."""
        return int(dist.get_process_group_ranks(self.pipeline.group)[-1])

    def all_reduce(
        self, values: list[float], axis: Axis | None = None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> list[float]:
        """Reduce a few Python numbers in float64 over an axis, or over the world."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if (axis.size if axis else self.size) > 1:
            dist.all_reduce(tensor, op=op, group=axis.group if axis else None)
        return [float(value) for value in tensor.tolist()]

    def gather(self, value: Value) -> list[Value]:
        """The values of all data-parallel ranks, in rank order."""
        return exchange.gather_all(value, self.data.group)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(parallel: ParallelConfig, seed: int = 1234) -> Iterator[Topology]:
    """Start the process groups of a layout and yield this process's place in it.

    Uses the process group that exists, if one does, and then leaves it standing.
    Raises TopologyError when the number of processes does not fit, naming the numbers.
    """
    with process_group(parallel) as target:
        _check_size(parallel, dist.get_world_size())
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor,
                pipeline_model_parallel_size=parallel.pipeline,
                virtual_pipeline_model_parallel_size=parallel.virtual_pipeline
                if parallel.virtual_pipeline > 1
                else None,
                context_parallel_size=parallel.context,
                expert_model_parallel_size=parallel.expert,
                expert_tensor_parallel_size=parallel.expert_tensor_size,
                distributed_timeout_minutes=max(1, round(parallel.timeout_minutes)),
                create_gloo_process_groups=False,
            )
            seed_everything(seed)
            yield _read(parallel, target)
        finally:
            parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def process_group(parallel: ParallelConfig) -> Iterator[torch.device]:
    """Start torch.distributed unless it is, and yield this process's device; what was started is taken down again.

    After an error on one of several ranks it is left standing: `errors.exit_on_error` ends the process.

    For tools that go through several worlds, one after the other, in the same processes.
    """
    target = _device(parallel)
    started = not dist.is_initialized()
    if started:
        _start(target, parallel)
    try:
        yield target
    except BaseException:
        # NCCL's groups cannot be taken down while other ranks wait in a collective: the process ends without it.
        if started and dist.get_world_size() == 1:
            exchange.use_group(None)
            dist.destroy_process_group()
        raise
    if started:
        exchange.use_group(None)
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed every generator of the process, Megatron's per-rank ones among them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def world_size() -> int:
    """Processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """True on the process that speaks for the run."""
    return int(os.environ.get("RANK", "0")) == 0


def _device(parallel: ParallelConfig) -> torch.device:
    kind = parallel.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        if torch.cuda.is_available():
            raise TopologyError(
                'parallel.device = "cpu" on a machine with a GPU: start it with CUDA_VISIBLE_DEVICES="" so that '
                "Megatron-Core sees no GPU either"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TopologyError('parallel.device = "cuda" but torch sees no CUDA device; set it to "auto" or "cpu"')
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise TopologyError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; start as many processes "
            "on each node as it has GPUs (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _start(target: torch.device, parallel: ParallelConfig) -> None:
    on_gpu = target.type == "cuda"
    settings: dict[str, Any] = {"backend": "nccl" if on_gpu else "gloo", "timeout": timeout_of(parallel)}
    if on_gpu:
        settings["device_id"] = target
    if not ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group(**settings)
    if on_gpu:
        # A backend for both kinds of tensors would be inherited by each of Megatron's groups, and gloo connects every
        # pair of a group's ranks: thousands of sockets a rank at a thousand GPUs. One group of gloo is enough.
        # And that one connects a pair when it first talks: collectives need few pairs, so that ranks other than the
        # first stay far below the 1,024 open files that most nodes allow. A user's own value stands.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        exchange.use_group(dist.new_group(backend="gloo", timeout=timeout_of(parallel)))


def timeout_of(parallel: ParallelConfig) -> timedelta:
    """How long a collective may take."""
    return timedelta(minutes=parallel.timeout_minutes)


def _check_size(parallel: ParallelConfig, size: int) -> None:
    experts = parallel.pipeline * parallel.expert * parallel.expert_tensor_size
    if size % parallel.model_size == 0 and size % experts:
        raise TopologyError(
            f"{size} processes cannot hold pipeline {parallel.pipeline} x expert {parallel.expert} x expert_tensor "
            f"{parallel.expert_tensor_size} = {experts} per replica of the experts; start a multiple of "
            f"{parallel.smallest_world} (torchrun --nproc-per-node), or change [parallel]"
        )
    if size % parallel.model_size:
        raise TopologyError(
            f"{size} processes cannot hold tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} = {parallel.model_size} per replica; start a multiple of {parallel.model_size} "
            "(torchrun --nproc-per-node), or change [parallel]"
        )


def _read(parallel: ParallelConfig, target: torch.device) -> Topology:
    def axis(group: dist.ProcessGroup) -> Axis:
        return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)

    data = axis(parallel_state.get_data_parallel_group())
    replicas: list[list[int]] = [[] for _ in range(data.size)]
    for rank, data_rank in enumerate(exchange.gather_all(data.rank)):
        replicas[data_rank].append(rank)
    return Topology(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=target,
        parallel=parallel,
        tensor=axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=axis(parallel_state.get_pipeline_model_parallel_group()),
        context=axis(parallel_state.get_context_parallel_group()),
        data=data,
        data_context=axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        expert=axis(parallel_state.get_expert_model_parallel_group()),
        expert_tensor=axis(parallel_state.get_expert_tensor_parallel_group()),
        expert_data=axis(parallel_state.get_expert_data_parallel_group()),
        replicas=tuple(map(tuple, replicas)),
    )
