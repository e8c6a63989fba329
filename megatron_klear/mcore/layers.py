"""The layers Megatron's local specification lacks: a norm that knows sequence parallelism, and packed attention.

`PackedAttention` applies the rotary embedding itself, from positions that restart at every document, and gathers keys
and values over the context-parallel ranks: exact for any mix of document lengths, and one implementation for CPU and
GPU, with transformer-engine's linear layers or without.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore.rows import RowParams

device_shim.install()

from megatron.core import parallel_state  # noqa: E402  (the shim must come first)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

_CPU_KEY_BLOCK = 16
"""On the CPU torch rounds a token's attention in bf16 otherwise where the last block of keys is not whole: it would
depend on what follows the token, and the local sampler's would be another."""
_SDPA_BLOCK = 2048
"""Queries per SDPA call where keys outnumber them and a mask must be written out."""


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked so that Megatron sums its gradient over sequence-parallel shards."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.get_default_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class VarlenAttention(Protocol):
    """Causal attention of query runs, each over its own run of keys, aligned at the end."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, row: RowParams, scale: float) -> Tensor:
        """Queries [T_local, heads, d] over keys and values [T, kv_heads, d] -> [T_local, heads, d]."""
        ...


class PackedAttention(MegatronModule):
    """Core attention of a packed row, in place of DotProductAttention in a layer specification."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        attention: str = "auto",
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.context_group = parallel_state.get_context_parallel_group()
        self.context_size = self.context_group.size()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.attend = attention_function(attention, half=config.params_dtype != torch.float32)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Local queries, keys, values [T_local, heads or kv_heads, d] -> [T_local, heads * d]."""
        if not isinstance(packed_seq_params, RowParams):
            raise TypeError("PackedAttention needs the row's RowParams as packed_seq_params")
        row = packed_seq_params
        assert row.cosine is not None
        assert row.sine is not None
        query, key = rotate(query, row.cosine, row.sine), rotate(key, row.cosine, row.sine)
        if self.context_size > 1:
            assert row.key_order is not None
            # Rank-major after the gather; its backward sums the shares of all ranks' queries (reduce-scatter).
            key, value = (
                gather_from_sequence_parallel_region(t, tensor_parallel_output_grad=True, group=self.context_group)
                for t in (key, value)
            )
            key, value = key[row.key_order], value[row.key_order]
        return self.attend(query, key, value, row, self.scale).flatten(1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding in the half-split form of Hugging Face models, in fp32: x [T, heads, d], angles [T, d]."""
    out: Tensor = _Rotation.apply(x, cosine[:, None], sine[:, None])  # type: ignore[no-untyped-call]
    return out


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the rotation back; it keeps the angles alone and makes no copy of the halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn_fast(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turn_fast(gradients[0], cosine, sine, -1), None, None


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    sine = sine.chunk(2, dim=-1)[0]
    out = x * cosine
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.addcmul_(second, sine, value=-direction)
    out_second.addcmul_(first, sine, value=direction)
    return out.to(x.dtype)


# One pass over memory on a GPU, where the fp32 intermediates would be most of a layer's traffic outside its products.
_turn_fast = torch.compile(_turn, dynamic=True) if torch.cuda.is_available() else _turn


def attention_function(name: str, half: bool) -> VarlenAttention:
    """The packed attention named in `model.attention`; `auto` takes the fastest that this machine has.

    `half` says that activations are bf16; the variable-length kernels take nothing wider.
    Raises RuntimeError, naming what is missing, when the one asked for cannot run here.
    """
    kernels_run = torch.cuda.is_available() and half
    if name == "sdpa" or (name == "auto" and not kernels_run):
        return sdpa_attention
    if not kernels_run:
        raise RuntimeError(f'model.attention = "{name}" needs a CUDA device and bf16; set it to "auto" or "sdpa"')
    flash = _flash_function() if name in ("auto", "flash") else None
    if flash is not None:
        return flash
    if name == "flash":
        raise RuntimeError('model.attention = "flash" but flash_attn does not import; install it or use "auto"')
    return _varlen_function()


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, row: RowParams, scale: float) -> Tensor:
    """One SDPA call per piece: the reference, and the CPU's way."""
    lengths = [q_end - q_start for q_start, q_end, _, _ in row.pieces]
    queries = torch.split(query, lengths)  # one concatenation in the backward pass; a slice each would write whole rows
    if row.key_runs is None:
        return torch.cat(
            [
                _sdpa(q, k, v, scale, None)
                for q, k, v in zip(queries, torch.split(key, lengths), torch.split(value, lengths), strict=True)
            ]
        )
    outputs = []
    for q, (_, _, k_start, k_end) in zip(queries, row.pieces, strict=True):
        k, v = key[k_start:k_end], value[k_start:k_end]
        if len(q) == len(k):
            outputs.append(_sdpa(q, k, v, scale, None))
            continue
        skipped = len(k) - len(q)
        for start in range(0, len(q), _SDPA_BLOCK):
            block = q[start : start + _SDPA_BLOCK]
            seen = skipped + start + len(block)
            mask = torch.ones(len(block), seen, dtype=torch.bool, device=q.device).tril(seen - len(block))
            outputs.append(_sdpa(block, k[:seen], v[:seen], scale, mask))
    return torch.cat(outputs)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    if mask is None and query.dtype != torch.float32 and query.device.type == "cpu" and len(query) % _CPU_KEY_BLOCK:
        q, k, v = (F.pad(t, (0, 0, 0, -len(query) % _CPU_KEY_BLOCK)) for t in (q, k, v))  # behind what is attended to
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out[0, :, : len(query)].transpose(0, 1)


def _flash_function() -> VarlenAttention | None:
    """FlashAttention's variable-length kernel (causal masks align at the end), None where it does not import."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def flash_attention(query: Tensor, key: Tensor, value: Tensor, row: RowParams, scale: float) -> Tensor:
        if row.key_runs is not None:
            key, value = key[row.key_runs], value[row.key_runs]
        runs = (row.cu_query_runs, row.cu_key_runs, row.max_query_run, row.max_key_run)
        out: Tensor = flash_attn_varlen_func(query, key, value, *runs, softmax_scale=scale, causal=True)
        return out

    return flash_attention


def _varlen_function() -> VarlenAttention:
    """torch.nn.attention.varlen, whose causal and grouped-query arguments changed their names between releases."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise RuntimeError(
            f"this torch ({torch.__version__}) has no torch.nn.attention.varlen and flash_attn does not import; "
            'install flash-attn or set model.attention = "sdpa"'
        ) from error
    call, expand = _varlen_arguments(varlen_attn)

    def varlen_attention(query: Tensor, key: Tensor, value: Tensor, row: RowParams, scale: float) -> Tensor:
        if row.key_runs is not None:
            key, value = key[row.key_runs], value[row.key_runs]
        if expand and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        runs = (row.cu_query_runs, row.cu_key_runs, row.max_query_run, row.max_key_run)
        return call(query, key, value, runs, scale)

    return varlen_attention


def _varlen_arguments(varlen_attn: Callable[..., Any]) -> tuple[Callable[..., Tensor], bool]:
    """A call with this release's names, and whether keys must be expanded to the query heads beforehand."""
    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    takes_scale = "scale" in names

    def call(query: Tensor, key: Tensor, value: Tensor, runs: tuple[Any, ...], scale: float) -> Tensor:
        if takes_scale:
            out: Tensor = varlen_attn(query, key, value, *runs, scale=scale, **options)
        else:
            out = varlen_attn(query * (scale * math.sqrt(query.shape[-1])), key, value, *runs, **options)
        return out

    return call, "enable_gqa" not in names
