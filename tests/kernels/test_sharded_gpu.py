"""The kernel that reads a sharded vocabulary once, on two CUDA devices that reach each other's memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from fused_cases import differentiate, problem, relative

from megatron_klear.kernels import available, fused_policy_loss
from megatron_klear.kernels.mailboxes import VARIABLE
from megatron_klear.rl.losses import GPPO

pytestmark = pytest.mark.gpu
if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices that reach each other's memory", allow_module_level=True)
if not available().cuda_archs:
    pytest.skip(f"the extension has no CUDA part: {available().reason}", allow_module_level=True)
if any(torch.cuda.get_device_capability(i)[0] not in (9, 10) for i in range(2)):
    pytest.skip("the kernel needs clusters (compute capability 9 or 10)", allow_module_level=True)


def run_rank(rank: int, folder: str, arguments: dict[str, Any]) -> None:
    """One of two processes: the loss of its shard, in two reads and in one, several times."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    mine |= {"weight": mine["weight"].chunk(2)[rank].contiguous(), "group": dist.group.WORLD}
    results = []
    for kernel in ("two_read", "one_read", "one_read", "one_read"):
        os.environ[VARIABLE] = kernel
        output, hidden, weight = differentiate(fused_policy_loss, mine)
        per_token = {n: getattr(output, n).cpu() for n in ("logprobs", "entropy", "lse", "ratio", "region")}
        results.append((output.loss.detach().cpu(), per_token, hidden.cpu(), weight.cpu()))
    torch.save(results, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("vocab", [512, 32_000, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_read_of_two_shards_gives_what_two_reads_give(tmp_path: Path, vocab: int, dtype: torch.dtype) -> None:
    arguments = problem(tokens=600, hidden=64, vocab=vocab, valid=vocab - 13, dtype=dtype)
    arguments |= {"loss": GPPO(dual_clip=2.0), "chunk_tokens": 200, "entropy_coefficient": 0.1}
    multiprocessing.spawn(run_rank, (str(tmp_path), arguments), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=False) for rank in range(2))
    for rank_results in (first, second):
        twice, once, *again = rank_results
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert relative(once[0], twice[0]) < tolerance
        assert max(relative(a, b) for a, b in zip(once[2:], twice[2:], strict=True)) < tolerance
        for other in again:
            assert torch.equal(once[0], other[0])
            assert all(torch.equal(a, b) for a, b in zip(once[2:], other[2:], strict=True))
    for name, value in first[1][1].items():
        assert torch.equal(value, second[1][1][name]), f"{name} differs between ranks"
