"""Packed attention and the rotary embedding on the CPU, against the plain formula."""

import math

import pytest
import torch

from megatron_klear.mcore.layers import _turn, _varlen_arguments, rotate, sdpa_attention
from megatron_klear.mcore.rows import RowParams, _pieces, _runs

BOUNDS = [0, 4, 20, 24, 64]
HEADS, KV_HEADS, SIZE = 4, 2, 8


def dense(query, key, value, pieces, scale):
    """Softmax attention in float64 with every mask written out."""
    key, value = (t.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (key, value))
    outputs = []
    for q_start, q_end, k_start, k_end in pieces:
        scores = torch.einsum("qhd,khd->hqk", query[q_start:q_end].double(), key[k_start:k_end]) * scale
        places = torch.arange(k_end - k_start)[None] - (k_end - k_start) + (q_end - q_start)
        scores = scores.masked_fill(places > torch.arange(q_end - q_start)[:, None], -math.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k_start:k_end]))
    return torch.cat(outputs)


@pytest.mark.parametrize(("context_size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_sdpa_over_the_pieces_of_a_row_is_the_plain_formula(context_size, rank):
    pieces = _pieces(BOUNDS, context_size, rank)
    row = RowParams(**_runs(pieces, gathered=context_size > 1))
    generator = torch.Generator().manual_seed(0)
    counts = ((BOUNDS[-1] // context_size, HEADS), (BOUNDS[-1], KV_HEADS), (BOUNDS[-1], KV_HEADS))
    leaves = [torch.randn(*count, SIZE, generator=generator, requires_grad=True) for count in counts]
    found, expected = sdpa_attention(*leaves, row, 0.3), dense(*leaves, pieces, 0.3)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    slope = torch.randn(found.shape, generator=generator)
    gradients = torch.autograd.grad(found, leaves, slope), torch.autograd.grad(expected, leaves, slope.double())
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_runs_say_the_same_as_pieces(rank):
    pieces = _pieces(BOUNDS, 2, rank)
    runs = _runs(pieces, gathered=True)
    for index, (q_start, q_end, k_start, k_end) in enumerate(pieces):
        assert runs["cu_query_runs"][index : index + 2].tolist() == [q_start, q_end]
        first, last = runs["cu_key_runs"][index : index + 2].tolist()
        assert runs["key_runs"][first:last].tolist() == list(range(k_start, k_end))
    assert runs["max_query_run"] == max(piece[1] - piece[0] for piece in pieces)
    assert runs["max_key_run"] == max(piece[3] - piece[2] for piece in pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_turns_pairs_and_its_gradient_turns_them_back(dtype):
    x = torch.randn(7, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    angles = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    cosine, sine = (torch.cat([t, t], dim=-1) for t in (angles.cos(), angles.sin()))
    pairs = torch.complex(*(half.detach().double() for half in x.chunk(2, dim=-1)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    out = rotate(x, cosine, sine)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.double(), torch.cat([turned.real, turned.imag], dim=-1), **tolerance)
    (back,) = torch.autograd.grad(out, x, out.detach())
    torch.testing.assert_close(back, x.detach(), **tolerance)


def test_varlen_arguments_of_every_release():
    """torch 2.10 has `is_causal` and no scale, 2.11 a window and a scale, 2.13 grouped queries as well."""
    calls = []

    def v2_10(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
        calls.append((query, {"is_causal": is_causal}))

    def v2_11(query, key, value, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        calls.append((query, {"scale": scale, "window_size": window_size}))

    def v2_13(
        query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False, seqused=None
    ):
        calls.append((query, {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}))

    query, runs = torch.ones(2, 1, 4), (None, None, 2, 2)
    expanded = []
    for function in (v2_10, v2_11, v2_13):
        call, expand = _varlen_arguments(function)
        call(query, query, query, runs, 0.25)
        expanded.append(expand)
    assert expanded == [True, True, False]
    assert [options for _, options in calls] == [
        {"is_causal": True},
        {"scale": 0.25, "window_size": (-1, 0)},
        {"scale": 0.25, "window_size": (-1, 0), "enable_gqa": True},
    ]
    assert torch.equal(calls[0][0], query * 0.5)  # the kernel divides by sqrt(4) itself
    assert torch.equal(calls[1][0], query)


@pytest.mark.slow
def test_rotation_compiles_to_the_same_numbers_for_any_length():
    compiled = torch.compile(_turn, dynamic=True)
    for tokens in (5, 64, 129):
        x, angles = torch.randn(tokens, 3, 8).bfloat16(), torch.randn(tokens, 1, 8)
        for direction in (1, -1):
            expected = _turn(x, angles.cos(), angles.sin(), direction)
            torch.testing.assert_close(compiled(x, angles.cos(), angles.sin(), direction), expected)


def test_rotary_tables_live_with_a_micro_batch_and_not_with_its_row():
    """The row keeps 4 bytes a token for them; what attention gets is made of positions, bit by bit."""
    positions = torch.cat([torch.arange(7), torch.arange(5)])
    frequencies = 1e4 ** -(torch.arange(4) / 4)
    row = RowParams(positions=positions.int())
    made = row.on(torch.device("cpu"), frequencies)
    angles = torch.cat([positions.float()[:, None] * frequencies[None]] * 2, dim=-1)
    assert torch.equal(made.cosine, angles.cos())
    assert torch.equal(made.sine, angles.sin())
    assert row.cosine is None
    assert row.sine is None
