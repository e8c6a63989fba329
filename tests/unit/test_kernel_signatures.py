"""FlashAttention's and torch's variable-length functions, called as they document it, give the numbers of SDPA.

Stand-ins have the arguments of the real functions and compute what those document; torch's own is bound and traced too.
"""

import inspect
import math
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_klear.mcore.layers import attention_function, sdpa_attention
from megatron_klear.mcore.rows import RowParams, _pieces, _runs

varlen = pytest.importorskip("torch.nn.attention.varlen")
REAL_VARLEN = varlen.varlen_attn
BOUNDS = [0, 4, 20, 24, 64]
HEADS, KV_HEADS, SIZE = 4, 2, 16
SCALE = 0.3


def causal(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    """Attention of each sequence, masks aligned at the bottom right corner, and what both functions ask of theirs."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert isinstance(max_q, int)
    assert isinstance(max_k, int)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert q.shape[1] % k.shape[1] == 0
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    outputs = []
    for n in range(len(cu_q) - 1):
        qs, ks = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        length, seen = int(cu_q[n + 1] - cu_q[n]), int(cu_k[n + 1] - cu_k[n])
        assert length <= max_q
        assert seen <= max_k
        keys, values = (t[ks].repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[qs].float(), keys) * scale
        mask = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -math.inf).softmax(-1), values))
    assert int(cu_q[-1]) == len(q)
    assert int(cu_k[-1]) == len(k)
    return torch.cat(outputs).to(q.dtype)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """FlashAttention 2's, `flash_attn/flash_attn_interface.py`."""
    plain = (dropout_p, window_size, softcap, alibi_slopes, return_attn_probs, block_table)
    assert plain == (0.0, (-1, -1), 0.0, None, False, None)
    assert causal
    return globals()["causal"](q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)


def varlen_attn(*args, **kwargs):
    """torch's of this release: its own signature takes the arguments, its documentation says what they mean."""
    bound = inspect.signature(REAL_VARLEN).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    assert given["window_size"] == (-1, 0)  # what it calls causal
    assert given["enable_gqa"] or given["query"].shape[1] == given["key"].shape[1]
    assert given["return_aux"] is None
    return causal(*(given[name] for name in list(given)[:7]), given["scale"])


varlen_attn.__signature__ = inspect.signature(REAL_VARLEN)


def row_and_leaves(context_size, rank):
    pieces = _pieces(BOUNDS, context_size, rank)
    row = RowParams(**_runs(pieces, gathered=context_size > 1))
    generator = torch.Generator().manual_seed(0)
    counts = ((BOUNDS[-1] // context_size, HEADS), (BOUNDS[-1], KV_HEADS), (BOUNDS[-1], KV_HEADS))
    leaves = [torch.randn(*count, SIZE, generator=generator).bfloat16().requires_grad_() for count in counts]
    return row, leaves


@pytest.fixture
def card(monkeypatch):
    """The choice of attention thinks that there is a GPU; `flash_attn` is the stand-in, torch's function too."""
    flash = types.ModuleType("flash_attn")
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    return monkeypatch


@pytest.mark.parametrize("name", ["flash", "varlen"])
@pytest.mark.parametrize(("context_size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_kernels_are_called_for_what_sdpa_computes(card, name, context_size, rank):
    row, leaves = row_and_leaves(context_size, rank)
    attend = attention_function(name, half=True)
    assert attend is not sdpa_attention
    found, expected = attend(*leaves, row, SCALE), sdpa_attention(*leaves, row, SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = (torch.autograd.grad(out, leaves, slope) for out in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


def test_auto_takes_flash_attention_and_without_it_torchs(card):
    assert "flash_attention" in attention_function("auto", half=True).__qualname__
    card.setitem(sys.modules, "flash_attn", None)
    assert "varlen_attention" in attention_function("auto", half=True).__qualname__
    assert attention_function("auto", half=False) is sdpa_attention
    with pytest.raises(RuntimeError, match="flash_attn does not import"):
        attention_function("flash", half=True)


@pytest.mark.parametrize("context_size", [1, 2])
def test_torchs_own_function_takes_the_call(monkeypatch, context_size):
    """Traced through torch's own operator, with tensors that have shapes and no values."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    attend = attention_function("varlen", half=True)
    row, leaves = row_and_leaves(context_size, 0)
    values = [leaf.detach() for leaf in leaves]
    with FakeTensorMode() as mode:
        for name, value in vars(row).items():
            if isinstance(value, torch.Tensor):
                setattr(row, name, mode.from_tensor(value))
        out = attend(*map(mode.from_tensor, values), row, SCALE)
    assert out.shape == (BOUNDS[-1] // context_size, HEADS, SIZE)
    assert out.dtype == torch.bfloat16
