"""The three matrix products of the fused loss, and the chunk of logits between them.

Products are torch's own. On CUDA a bf16 product leaves in float32 directly; on the CPU, which has no such product, bf16
operands are widened block by block of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_klear.kernels.rows import bf16_view

CUDA_CHUNK_BYTES = 5 << 29  # 2.5 GiB: 4,096 tokens of a 152K vocabulary in float32
CUDA_MIN_TOKENS = 2048  # below this the weight-gradient product is bound by memory
CPU_CHUNK_BYTES = 1 << 28
CPU_MIN_TOKENS = 128
TOKEN_MULTIPLE = 128
VOCAB_BLOCK = 8192


def chunk_size(num_tokens: int, columns: int, logits_dtype: torch.dtype, device: torch.device) -> int:
    """Tokens in a chunk: as many as fit the byte budget of the device, even chunks of a multiple of 128."""
    cuda = device.type == "cuda"
    budget = CUDA_CHUNK_BYTES if cuda else CPU_CHUNK_BYTES
    fit = budget // max(1, columns * logits_dtype.itemsize)
    fit = max(fit // TOKEN_MULTIPLE * TOKEN_MULTIPLE, CUDA_MIN_TOKENS if cuda else CPU_MIN_TOKENS)
    chunks = max(1, -(-num_tokens // fit))
    even = -(-num_tokens // chunks)
    return min(fit, -(-even // TOKEN_MULTIPLE) * TOKEN_MULTIPLE)


def logits_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for a chunk of logits [rows, columns], its rows 16-byte aligned."""
    return torch.empty((rows, -(-columns // 8) * 8), dtype=dtype, device=device)[:, :columns]


def logits_into(logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """logits [n, V] = hidden [n, H] weight [V, H]^T, rounded once, to the type of `logits`."""
    if logits.dtype == weight.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    elif logits.device.type == "cuda":
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), logits.dtype, out=logits)
    else:
        wide = hidden.to(logits.dtype)
        for start in range(0, weight.shape[0], VOCAB_BLOCK):
            block = weight[start : start + VOCAB_BLOCK].to(logits.dtype)
            torch.mm(wide, block.t(), out=logits[:, start : start + VOCAB_BLOCK])


def gradient_memory(logits: Tensor, weight: Tensor) -> Tensor:
    """The memory of the logits in which their gradient is written, in the type the products take."""
    return logits if logits.dtype == weight.dtype else bf16_view(logits)


def add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [V, H] += gradient [n, V]^T hidden [n, H], accumulated in the type of `total`."""
    if total.dtype == hidden.dtype:
        total.addmm_(gradient.t(), hidden)
    elif total.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, gradient.t(), hidden, total.dtype, out=total)
    else:
        wide = hidden.to(total.dtype)
        for start in range(0, total.shape[0], VOCAB_BLOCK):
            block = gradient[:, start : start + VOCAB_BLOCK].to(total.dtype)
            total[start : start + VOCAB_BLOCK].addmm_(block.t(), wide)
