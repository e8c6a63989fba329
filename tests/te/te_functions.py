"""The functions of transformer-engine's CUDA extension that a step of these models calls, in plain torch.

Names, arguments and results are those that transformer-engine's Python passes to `transformer_engine_torch`
(csrc/extensions/pybind.cpp, versions 2.4 to 2.20), products and norms are in fp32 as the kernels accumulate. What no
step calls is not here, and is refused by name when called (`te_process`). Quantizers are not emulated: FP8 is looked at
as far as shapes go.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]


class DType(enum.IntEnum):
    """Types as the extension numbers them."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TORCH_TYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


def _product(a: Tensor, transa: bool, b: Tensor, transb: bool) -> Tensor:
    """`op(B) op(A)` of row-major matrices, as cuBLAS computes it in column-major order, in fp32."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    return (b.t() if transb else b).float() @ (a.t() if transa else a).float()


def generic_gemm(
    A: Tensor,
    transA: bool,
    B: Tensor,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: int | None,
    bias: Tensor | None,
    bias_type: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """D, or beta * D, plus alpha op(B) op(A), with the leading axes of B where it is not transposed.

    With `grad` a bias asks for its gradient, the sum of B's rows, instead of being added.
    """
    assert quantizer is None, "quantized products are not emulated"
    assert not gelu, "products with GeLU are not emulated"
    assert comm_overlap is None, "overlapped products are not emulated"
    assert accumulate or not beta, "beta without accumulation"
    out = alpha * _product(A, transA, B, transB)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = B.flatten(0, -2).float().sum(0).to(TORCH_TYPES[int(output_dtype)] if output_dtype else A.dtype)
    elif bias is not None:
        out = out + bias.float()
    if not transB:
        out = out.reshape(*B.shape[:-1], out.shape[-1])
    if D is None:
        return (
            out.to(TORCH_TYPES[int(output_dtype)] if output_dtype is not None else A.dtype),
            bias_gradient,
            None,
            None,
        )
    assert D.shape == out.shape, f"GEMM output has invalid dims (expected {list(out.shape)}, got {list(D.shape)})"
    D.copy_(out + (1.0 if beta is None else beta) * D.float() if accumulate else out)
    return D, bias_gradient, None, None


def te_general_grouped_gemm(
    A: Sequence[Tensor],
    transa: bool,
    B: Sequence[Tensor],
    transb: bool,
    D: Sequence[Tensor],
    D_type: int,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_type: int,
    single_output: bool,
    pre_gelu_out: Sequence[Tensor],
    grad: bool,
    workspaces: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Sequence[Tensor]:
    """A product for each expert, into its own tensor or one after the other into `D[0]`; returns `bias`."""
    outputs = list(torch.split(D[0], list(m_splits))) if single_output else D
    for a, b, out in zip(A, B, outputs, strict=True):
        if out.numel():
            product = _product(a, transa, b, transb).reshape(out.shape)
            out.copy_(product + out.float() if accumulate else product)
    assert not any(one.numel() for one in bias), "biases of grouped products are not emulated"
    return bias


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """x / rms(x) * gamma in `otype`, None where LayerNorm has its mean, and 1 / rms(x) in fp32."""
    assert quantizer is None, "quantized norms are not emulated"
    x = input.float()
    inverse = torch.rsqrt(x.square().mean(-1) + eps)
    out = (x * inverse[..., None] * (weight.float() + zero_centered_gamma)).to(TORCH_TYPES[int(otype)])
    if ln_out is not None:
        out = ln_out.copy_(out)
    return out, None, inverse


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of gamma."""
    inverse = rsigma.view(*x.shape[:-1], 1)
    normed, outer = x.float() * inverse, dz.float().view(x.shape)
    inner = outer * (gamma.float() + zero_centered_gamma)
    dx = inverse * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (outer * normed).flatten(0, -2).sum(0).to(gamma.dtype)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The norm [1] of all tensors together, in fp32, and of each where asked."""
    norms = torch.stack([one.float().norm() for one in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.empty(0)


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float) -> None:
    """Out = in * scale; the flag is set where an input is not finite."""
    for source, out in zip(*tensor_lists, strict=True):
        if not bool(source.isfinite().all()):
            noop_flag.fill_(1)
        out.copy_(source.float() * scale)


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam (mode 0: decay added to the gradient) or AdamW (mode 1) over lists of gradients, parameters, m, v.

    A fifth list has fp32 masters: those step, and parameters are rounded from them.
    """
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    masters = tensor_lists[4] if len(tensor_lists) == 5 else tensor_lists[1]
    for g, p, m, v, master in zip(*tensor_lists[:4], masters, strict=True):
        gradient, value = g.float(), master.float()
        if mode == 0:
            gradient = gradient + weight_decay * value
        m.copy_(beta1 * m.float() + (1 - beta1) * gradient)
        v.copy_(beta2 * v.float() + (1 - beta2) * gradient.square())
        update = (m.float() / first) / ((v.float() / second).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * value
        value = value - lr * update
        master.copy_(value)
        p.copy_(value)


FUNCTIONS = (
    generic_gemm,
    te_general_grouped_gemm,
    rmsnorm_fwd,
    rmsnorm_bwd,
    multi_tensor_l2norm,
    multi_tensor_scale,
    multi_tensor_adam,
)
