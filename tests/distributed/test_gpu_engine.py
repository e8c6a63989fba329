"""The engine on a CUDA device: its attention against SDPA, its numbers against the CPU's, and 64K tokens in memory."""

import gc
import math

import numpy as np
import pytest
import torch

from megatron_klear.config.base import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeConfig,
    SFTConfig,
)
from megatron_klear.data.pack import pack
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.layers import attention_function, rotate, sdpa_attention
from megatron_klear.mcore.rows import RowParams, _pieces, _runs
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import NLL
from megatron_klear.types import Sample
from megatron_klear.verify.layouts import ONE_PROCESS, compare, measure, ragged_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BOUNDS = [0, 4, 260, 1024, 1028, 1536]
SHAPE = TinyShape(hidden_size=256, ffn_hidden_size=512, num_heads=8, num_kv_heads=2, head_dim=64, tied_embeddings=True)
QWEN3_0_6B = TinyShape(
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151_936,
    max_positions=65_536,
    tied_embeddings=True,
    rope_theta=1e6,
)


def attention_inputs(context_size, rank):
    """A rank's queries and everyone's keys and values of a packed row, on the GPU, and the row."""
    row = RowParams(**_runs(_pieces(BOUNDS, context_size, rank), torch.device("cuda"), gathered=context_size > 1))
    generator = torch.Generator("cuda").manual_seed(0)
    total = BOUNDS[-1]
    shapes = ((total // context_size, 8, 64), (total, 2, 64), (total, 2, 64))
    return [torch.randn(shape, device="cuda", generator=generator) for shape in shapes], row


def attend_and_differentiate(attend, tensors, row):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attend(*leaves, row, 1 / math.sqrt(64))
    slope = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype)
    return [out.detach().float(), *(gradient.float() for gradient in torch.autograd.grad(out, leaves, slope))]


@pytest.mark.parametrize(("context_size", "rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_packed_kernel_is_as_near_to_fp32_as_sdpa_in_bf16(name, context_size, rank):
    if name == "flash":
        pytest.importorskip("flash_attn", reason="flash_attn does not import")
    tensors, row = attention_inputs(context_size, rank)
    half = [tensor.bfloat16() for tensor in tensors]
    exact = attend_and_differentiate(sdpa_attention, [tensor.float() for tensor in half], row)
    ours = attend_and_differentiate(attention_function(name, half=True), half, row)
    theirs = attend_and_differentiate(sdpa_attention, half, row)
    for found, reference, truth in zip(ours, theirs, exact, strict=True):
        assert (found - truth).norm() <= 2 * (reference - truth).norm() + 1e-3 * truth.norm()


def test_rotation_compiled_on_cuda_is_that_of_the_cpu():
    for tokens in (64, 515, 4096):
        x, angles = torch.randn(tokens, 4, 64).bfloat16(), torch.randn(tokens, 64)
        cosine, sine = angles.cos(), torch.cat([angles.sin()[:, :32]] * 2, dim=-1)
        on_gpu = rotate(x.cuda(), cosine.cuda(), sine.cuda()).cpu()
        torch.testing.assert_close(on_gpu, rotate(x, cosine, sine), rtol=1e-2, atol=1e-2)


def settings(folder, shape, *, device, dtype, recompute="none", length=512):
    if not (folder / "model").exists():
        write_tiny_model(folder / "model", "qwen3", shape, weights=False)
    return SFTConfig(
        output=folder / "run",
        model=ModelConfig(path=folder / "model", weights="random", dtype=dtype),
        parallel=ParallelConfig(device=device),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        recompute=RecomputeConfig(granularity=recompute),
        data=DataConfig(train=("unused",), max_length=length, tokens_per_microbatch=length),
        checkpoint=CheckpointConfig(asynchronous=False),
    )


@pytest.mark.parametrize("loss", ["nll", "gppo"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_steps_and_logprobs_are_those_of_the_cpu_in_fp32(tmp_path, ranks, dtype, tolerance, loss):
    samples = ragged_samples(SHAPE.vocab_size, longest=512)
    reference = ranks(1, measure, settings(tmp_path, SHAPE, device="cpu", dtype="fp32"), ONE_PROCESS, samples, 3, loss)
    result = measure(settings(tmp_path, SHAPE, device="cuda", dtype=dtype), ONE_PROCESS, samples, 3, loss)
    found = compare(result, reference[0], samples)
    assert found.logprobs <= 10 * tolerance
    if loss == "nll":  # GPPO's loss is near zero on the first step: nothing to be relative to
        assert found.loss <= tolerance
    assert found.grad_norm <= 5 * tolerance


def test_a_row_of_64k_tokens_trains_in_the_memory_of_one_gpu(tmp_path):
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs a GPU of 80 GB")
    length = 65_536
    config = settings(tmp_path, QWEN3_0_6B, device="cuda", dtype="bf16", recompute="full", length=length)
    generator = np.random.default_rng(0)
    samples = [
        Sample(tokens=generator.integers(0, 150_000, size).astype(np.int32), trained=np.ones(size, dtype=np.bool_))
        for size in (40_000, 20_000, length - 60_000)
    ]
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        torch.cuda.reset_peak_memory_stats()
        stats = engine.train_step([pack(samples, [1 / length] * len(samples))], NLL())
        engine.close()
    assert not stats.skipped
    assert stats.loss == pytest.approx(math.log(QWEN3_0_6B.vocab_size), rel=0.1)
    assert torch.cuda.max_memory_allocated() < 60 * 2**30


def masters(engine):
    """Masters and moments in the order of parameters, wherever they lie."""
    (part,) = engine.optimizer.chained_optimizers
    values = [part._get_main_param_and_optimizer_states(parameter) for parameter in part.model_param_group_index_map]
    return [state[name].clone() for state in values for name in ("param", "exp_avg", "exp_avg_sq", "step")]


def test_offloaded_optimizer_state_leaves_the_card_and_resumes(tmp_path):
    """12 bytes a parameter less on the card; what is loaded is what was saved, bit by bit, and trains on alike."""
    samples = ragged_samples(SHAPE.vocab_size, longest=512)
    weights = [1 / sum(len(sample.tokens) for sample in samples)] * len(samples)
    rows = [pack([sample], [weight]) for sample, weight in zip(samples, weights, strict=True)]
    whole = settings(tmp_path, SHAPE, device="cuda", dtype="bf16", length=2048)
    optimizer = whole.optimizer.model_copy(update={"cpu_offload": 1.0})
    allocated, norms = [], []
    for config in (whole, whole.model_copy(update={"optimizer": optimizer})):
        with world(config.parallel, config.seed) as topology:
            engine = Engine(config, topology)
            norms.append([engine.train_step(rows, NLL()).grad_norm for _ in range(2)])
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
            parameters = engine.architecture.num_parameters
            if config is not whole:
                engine.save(tmp_path / "saved")
                engine.finish_save()
                again = Engine(config, topology)
                again.load(tmp_path / "saved")
                assert all(not ours.is_cuda for ours in masters(again))
                assert all(map(torch.equal, masters(again), masters(engine)))
                # The attention kernel's backward may add in any order.
                following = [one.train_step(rows, NLL()).grad_norm for one in (again, engine)]
                assert following[0] == pytest.approx(following[1], rel=1e-3)
                again.close()
                del again
            engine.close()
            del engine
        gc.collect()
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert allocated[0] - allocated[1] >= 0.95 * 12 * parameters
