"""The cost model's traffic and parameters against real ranks: every byte of every collective of a step is counted."""

from collections import Counter
from contextlib import closing
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_run import start as start_run
from tiny_run import write_run
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_klear.config.base import ParallelConfig, SFTConfig
from megatron_klear.config.cost import Layout, stage_parameters_of, traffic
from megatron_klear.config.cost_models import Model
from megatron_klear.data.pack import pack
from megatron_klear.kernels import vocab_parallel
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import NLL
from megatron_klear.types import Sample

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "send": "send",
}
IGNORED = ("recv_", "barrier", "broadcast_")
WHOLE = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 1, "send": 0}
"""Which argument is the whole tensor: what comes out of a gather, what goes into a reduction."""
SMALL = 1024
"""Bytes up to which a collective has no weight: the gradient norm, losses, shapes."""


class Counted(TorchDispatchMode):
    """While entered, bytes of every collective by kind.

    The fused head is one operator to torch, whose inside no mode sees: its collectives are counted at their call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.in_head = False

    def count(self, kind: str, size: int) -> None:
        if size > SMALL:
            self.bytes[kind] += size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("c10d::")
        if func.namespace == "c10d" and not self.in_head:
            assert name in KINDS or name in IGNORED, f"{name} is not counted"
            if name in KINDS:
                kind = KINDS[name]
                leaves = torch.utils._pytree.tree_leaves(args[WHOLE[kind]])
                self.count(kind, sum(leaf.nbytes for leaf in leaves if torch.is_tensor(leaf)))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        vocab_parallel.dist = _OfHead(self)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        vocab_parallel.dist = dist
        super().__exit__(*error)


class _OfHead:
    """torch.distributed as the head calls it, counted."""

    def __init__(self, counted: Counted) -> None:
        self.counted = counted

    def __getattr__(self, name: str):
        function = getattr(dist, name)
        kinds = {"all_reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}
        if name not in kinds:
            return function

        def call(*args, **kwargs):
            self.counted.count(name.removesuffix("_into_tensor").removesuffix("_tensor"), args[kinds[name]].nbytes)
            self.counted.in_head = True
            try:
                return function(*args, **kwargs)
            finally:
                self.counted.in_head = False

        return call


def one_step(config: SFTConfig, layout: Layout, overlap: bool):
    """Bytes that one step of this rank moves, and the parameters that it holds."""
    parallel = ParallelConfig(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        context=layout.context,
        sequence=layout.cuts_sequence,
    )
    optimizer = config.optimizer.model_copy(update={"distributed": layout.distributed, "overlap": overlap})
    recompute = config.recompute.model_copy(update={"granularity": layout.recompute})
    run = config.model_copy(update={"parallel": parallel, "optimizer": optimizer, "recompute": recompute})
    with world(parallel, run.seed) as topology, closing(Engine(run, topology)) as engine:
        length = layout.row_tokens
        tokens = np.arange(length, dtype=np.int32) % 50
        sample = Sample(tokens=tokens, trained=np.ones(length, bool), finish="stop")
        rows = [pack([sample], [1.0 / (length * layout.microbatches * layout.data)])] * layout.microbatches
        with Counted() as counted:
            engine.train_step(rows, NLL())
        held = sum(prod(p.shape) for model in engine.models for p in model.parameters())
        stage = topology.pipeline.rank
        assert dist.get_world_size() == layout.world_size
        return stage, held, dict(counted.bytes)


CASES = {
    "TP2": Layout(tensor=2, sequence=False),
    "TP2 SP": Layout(tensor=2),
    "TP2 SP full recompute": Layout(tensor=2, recompute="full"),
    "TP2 SP selective recompute": Layout(tensor=2, recompute="selective"),
    "CP2": Layout(context=2),
    "PP2": Layout(pipeline=2),
    "PP2 VPP2": Layout(pipeline=2, virtual_pipeline=2),
    "DP2": Layout(data=2),
    "DP2 whole optimizer": Layout(data=2, distributed=False),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_collectives_are_those_counted_on_real_ranks(tmp_path, ranks, name: str):
    layout = replace(CASES[name], row_tokens=128, microbatches=2, width=4)
    start = start_run(write_run(tmp_path))
    model = Model(name="tiny", architecture=start.architecture)
    for stage, held, counted in ranks(layout.world_size, one_step, start.config, layout, False):
        expected: Counter[str] = Counter()
        for part in traffic(model, layout, stage):
            expected[part.kind] += part.payload
        assert held == stage_parameters_of(model, layout, stage)[0]
        assert counted.keys() == expected.keys()
        for kind, size in expected.items():
            assert counted[kind] == pytest.approx(size, rel=0.02), (kind, counted, traffic(model, layout, stage))
