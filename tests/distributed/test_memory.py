"""The plan's memory against what real steps hold: every allocation of torch's on the CPU, in a dozen layouts."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_klear.config.activations import CHUNK_BYTES
from megatron_klear.config.base import DataConfig, ModelConfig, ParallelConfig, SFTConfig
from megatron_klear.config.memory import stage_memory
from megatron_klear.data.pack import pack
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.kernels import gemm
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import NLL
from megatron_klear.types import Sample
from megatron_klear.verify.layouts import Layout, layouts_named

SHAPE = TinyShape(
    vocab_size=2000,
    hidden_size=128,
    ffn_hidden_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
ROWS, TOKENS = 4, 2048
LAYOUTS = (
    *(
        "one process",
        "full recompute",
        "selective recompute",
        "norms recomputed",
        "TP2",
        "TP2 SP",
        "PP2",
        "PP2 VPP2",
        "CP2",
        "DP2",
    ),
    *("DP2 overlap", "TP2 PP2 SP", "PP2 block recompute"),
)


def allocated_peak(call: Any) -> int:
    """Most bytes that torch held at a time during `call`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def all_tensors() -> list[weakref.ref[torch.Tensor]]:
    """All tensors that there are in this process."""
    gc.collect()
    return [weakref.ref(tensor) for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]


def held_bytes(tensors: list[weakref.ref[torch.Tensor]]) -> int:
    """Bytes of those that are still there."""
    left = [tensor for tensor in (ref() for ref in tensors) if tensor is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in left}
    return sum(storages.values())


def measured_and_planned(folder: Path, layout: Layout) -> tuple[int, int]:
    """The peak of a step on this rank, state included, and what the plan says of its stage."""
    config = SFTConfig(
        output=folder / "run",
        model=ModelConfig(path=folder / "model", weights="random", dtype="fp32"),
        data=DataConfig(train=("unused",), max_length=TOKENS, tokens_per_microbatch=TOKENS),
        parallel=ParallelConfig(device="cpu"),
    )
    return peak_and_plan(layout.apply(config))


def peak_and_plan(laid_out: SFTConfig) -> tuple[int, int]:
    """Both for steps of equal rows of TOKENS tokens by these settings."""
    tokens = np.random.default_rng(0).integers(0, SHAPE.vocab_size, size=TOKENS).astype(np.int32)
    sample = Sample(tokens=tokens, trained=np.ones(TOKENS, dtype=np.bool_))
    batches = [pack([sample], [1.0 / TOKENS / ROWS])] * ROWS
    other = held_bytes(all_tensors())
    with world(laid_out.parallel, laid_out.seed) as topology:
        engine = Engine(laid_out, topology)
        engine.train_step(batches, NLL())  # the optimizer's state is made in the first
        held = all_tensors()
        # How long gloo keeps the buffers of a tensor rank's collectives is a matter of chance: the median of three.
        steps = 3 if topology.tensor.size > 1 else 1
        peak = int(np.median([allocated_peak(lambda: engine.train_step(batches, NLL())) for _ in range(steps)]))
        state = held_bytes(held) - other  # without the last micro-batch's, which the next step lets go of
        stage = topology.pipeline.rank
        plan = stage_memory(laid_out, engine.architecture, stage, topology.data.size, TOKENS, ROWS)
        engine.close()
    return state + peak, plan.total


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("memory")
    write_tiny_model(place / "model", "qwen3", SHAPE, weights=False)
    return place


@pytest.mark.parametrize("name", LAYOUTS)
def test_plan_is_within_a_tenth_of_the_measured_peak(folder: Path, ranks: Any, name: str) -> None:
    (layout,) = layouts_named([name])
    for rank, (measured, planned) in enumerate(ranks(layout.processes, measured_and_planned, folder, layout)):
        assert planned == pytest.approx(measured, rel=0.1), f"rank {rank}: {planned / measured:.3f} of the peak"


def test_the_plan_knows_the_size_of_the_heads_chunks() -> None:
    assert CHUNK_BYTES == {"cuda": gemm.CUDA_CHUNK_BYTES, "cpu": gemm.CPU_CHUNK_BYTES}
