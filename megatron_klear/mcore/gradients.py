"""Gradients over the ranks of data and context parallelism: Megatron's buffers and reductions, which only sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_klear.config.base import RunConfig
from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore.model import PolicyModel
from megatron_klear.mcore.topology import Topology

device_shim.install()

from megatron.core.distributed import (  # noqa: E402  (the shim must come first)
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)


def wrap(models: list[PolicyModel], run: RunConfig, topology: Topology, overlap: bool) -> list[DistributedDataParallel]:
    """The chunks in Megatron's wrappers, which hold the fp32 gradients and sum them over ranks; never an average."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=run.optimizer.distributed,
        overlap_param_gather=overlap and run.optimizer.distributed,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # guarded_step judges the whole step, on every rank alike
    )
    config = models[0].config
    chunks = [
        DistributedDataParallel(config, settings, model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]
    for chunk in chunks:
        chunk.broadcast_params()
        # Nobody to sum with or gather from; gloo would copy all gradients twice and all parameters once a step.
        alone = [] if topology.data_context.size > 1 else list(chunk.bucket_groups)
        if topology.expert_data.size == 1:
            alone += chunk.expert_parallel_bucket_groups
        for group in alone:
            group.start_grad_sync = group.start_param_sync = _nothing
            # Of experts also where the rest overlaps: 0.19.2 would wait for what it never sent to itself.
            group.register_grad_ready = group.finish_grad_sync = group.finish_param_sync = _nothing
    return chunks


def _nothing(*_: Any, **__: Any) -> None:
    pass


def sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Megatron's gradient reductions without its division by a token count: the weights have normalised already."""
    finalize_model_grads(model, None, **options)
