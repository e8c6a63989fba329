"""The CUDA row kernels against the CPU twin and float64. Ready to run where there is a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from row_formula import KINDS, Rows, expected, policy_loss_rows, random_rows, relative_error, take_inputs
from torch import Tensor

from megatron_klear.kernels import available, rows
from megatron_klear.kernels.inputs import Tokens
from megatron_klear.kernels.rows import RowOutputs, bf16_view, combine_stats

CUDA = torch.device("cuda", 0)
NAMES = [field.name for field in fields(RowOutputs)]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not available().cuda_archs, reason=f"no CUDA row kernels: {available().reason}"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
Runner = Callable[[Rows], tuple[RowOutputs, Tensor]]


@pytest.fixture(params=["two_read", "one_read"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two kernels that make the one pass."""
    if request.param == "one_read" and torch.cuda.get_device_capability(CUDA)[0] not in (9, 10):
        pytest.skip("the one-read kernel needs clusters (compute capability 9 or 10)")
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", request.param)
    return str(request.param)


def padded(logits: Tensor) -> Tensor:
    """A copy on the device whose rows start at multiples of 16 bytes."""
    width = -(-logits.shape[1] // 8) * 8
    buffer = torch.full((logits.shape[0], width), 7.0, dtype=logits.dtype, device=CUDA)
    view = buffer[:, : logits.shape[1]]
    view.copy_(logits)
    return view


def on_cuda(chunk: Rows) -> Rows:
    moved = chunk.map(lambda tensor: tensor.to(CUDA))
    return replace(moved, logits=padded(chunk.logits))


def run(chunk: Rows) -> tuple[RowOutputs, Tensor]:
    """One pass in place over a copy."""
    moved = on_cuda(chunk)
    return policy_loss_rows(moved.logits, **moved.arguments()), moved.logits


def run_cpu(chunk: Rows) -> tuple[RowOutputs, Tensor]:
    logits = chunk.logits.clone()
    return policy_loss_rows(logits, **chunk.arguments()), logits


def check_accuracy(chunk: Rows) -> None:
    exact, plain = expected(chunk, torch.float64), expected(chunk, torch.float32)
    out, gradient = run(chunk)
    twin, _ = run_cpu(chunk)
    for name in ("logprobs", "entropy", "lse"):
        value = getattr(out, name).cpu()
        assert (value - getattr(exact, name)).abs().max() < 1e-5, name
        torch.testing.assert_close(value, getattr(twin, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss.cpu(), twin.loss, atol=1e-6, rtol=4e-5)
    torch.testing.assert_close(out.ratio.cpu(), twin.ratio, atol=0, rtol=4e-5)
    assert torch.equal(out.region.cpu(), twin.region)
    assert torch.equal(out.status.cpu(), twin.status)
    own, torchs = relative_error(gradient.cpu(), exact.gradient), relative_error(plain.gradient, exact.gradient)
    assert own <= max(2 * torchs, 1e-6), f"gradient error {own:.2e}, torch's own {torchs:.2e}"
    assert not gradient[:, chunk.vocab_size :].any()


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "token"])
@pytest.mark.parametrize("terms", [{}, {"entropy_coefficient": 0.02}, {"kl_coefficient": 0.05, "nll": True}], ids=str)
def test_small_kinds(kernel: str, dtype: torch.dtype, kind: str, temperature: float | str, terms: dict) -> None:
    check_accuracy(random_rows(64, 997, kind, dtype=dtype, temperature=temperature, padding=3, **terms))


@DTYPES
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 4096, 18992, 37984, 75968, 131072, 151936, 152064, 262144])
@pytest.mark.parametrize("entropy", [0.0, 0.003])
def test_widths(kernel: str, dtype: torch.dtype, columns: int, entropy: float) -> None:
    check_accuracy(random_rows(12, columns, "gppo", dtype=dtype, entropy_coefficient=entropy, seed=columns))


def test_rows_wider_than_a_cluster_fall_back_to_two_reads() -> None:
    check_accuracy(random_rows(2, 600_000, "gppo"))


@pytest.mark.parametrize("columns", [997, 151936])
@pytest.mark.parametrize("entropy", [0.0, 0.003])
def test_small_narrowed_gradients_in_place_and_apart(kernel: str, columns: int, entropy: float) -> None:
    chunk = on_cuda(random_rows(40, columns, "gppo", entropy_coefficient=entropy))
    wide = padded(chunk.logits)
    policy_loss_rows(wide, **chunk.arguments())
    apart = padded(torch.empty(40, columns, dtype=torch.bfloat16))
    policy_loss_rows(chunk.logits, **chunk.arguments(), gradient=apart)
    place = bf16_view(chunk.logits)
    policy_loss_rows(chunk.logits, **chunk.arguments(), gradient=place)
    assert torch.equal(apart, place)
    assert torch.equal(apart, wide.to(torch.bfloat16))


@DTYPES
def test_small_runs_and_chunks_give_the_same_bits(kernel: str, dtype: torch.dtype) -> None:
    chunk = random_rows(33, 40_000, "gppo_dual", dtype=dtype, entropy_coefficient=0.01, padding=100)
    out, gradient = run(chunk)
    for size in (33, 16, 5, 1):
        parts = [run(chunk.map(lambda tensor, i=i, n=size: tensor[i : i + n])) for i in range(0, 33, size)]
        assert torch.equal(torch.cat([part[1] for part in parts]), gradient)
        for name in NAMES:
            assert torch.equal(torch.cat([getattr(part[0], name) for part in parts]), getattr(out, name)), name


@DTYPES
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("narrow", [False, True])
def test_small_vocabulary_shards(dtype: torch.dtype, ranks: int, narrow: bool) -> None:
    chunk = random_rows(24, 4096, "gppo_dual", dtype=dtype, entropy_coefficient=0.01, padding=1100, temperature=0.8)
    whole, gradient = run_cpu(chunk)
    moved = chunk.map(lambda tensor: tensor.to(CUDA))
    width = 4096 // ranks
    shards = [moved.logits[:, i * width : (i + 1) * width].contiguous() for i in range(ranks)]
    tokens, terms = take_inputs(arguments := moved.arguments())
    stats = torch.stack(
        [rows.stats_rows(shard, tokens, vocab_start=i * width, **arguments) for i, shard in enumerate(shards)]
    )
    merged = combine_stats(stats)
    assert torch.equal(merged.cpu(), combine_stats(stats.cpu()))  # bitwise
    narrow = narrow and dtype == torch.float32
    parts = [bf16_view(shard) if narrow else shard for shard in shards]
    for i, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        out = rows.finish_rows(shard, merged, tokens, terms, vocab_start=i * width, gradient=part, **arguments)
        for name in NAMES:
            torch.testing.assert_close(getattr(out, name).cpu(), getattr(whole, name), atol=1e-5, rtol=4e-5)
    tolerance = 1e-6 if parts[0].dtype == torch.float32 else 4e-3
    assert relative_error(torch.cat(parts, 1).cpu(), gradient) < tolerance
    used = chunk.policy_weights != 0
    assert torch.equal(rows.logprobs_from_stats(merged).logprobs.cpu()[used], out.logprobs.cpu()[used])


def test_small_logprob_rows_agree_and_only_read() -> None:
    chunk = random_rows(12, 5003, "nll", padding=3, temperature=0.7)
    moved = on_cuda(chunk)
    before = moved.logits.clone()
    out = rows.logprob_rows(moved.logits, Tokens(targets=moved.targets, temperature=0.7), vocab_size=chunk.vocab_size)
    twin = rows.logprob_rows(chunk.logits, Tokens(targets=chunk.targets, temperature=0.7), vocab_size=chunk.vocab_size)
    assert torch.equal(moved.logits.nan_to_num(), before.nan_to_num())
    for name in NAMES:
        torch.testing.assert_close(getattr(out, name).cpu(), getattr(twin, name), atol=1e-5, rtol=1e-5)


@DTYPES
def test_small_extremes_match_the_twin(kernel: str, dtype: torch.dtype) -> None:
    chunk = random_rows(12, 997, "gppo", dtype=dtype, entropy_coefficient=0.01, padding=5)
    logits, targets = chunk.logits.clone(), chunk.targets.clone()
    old, weights = chunk.old_logprobs.clone(), torch.ones(12)
    logits[1, 50] = float("nan")
    logits[2, 51] = float("inf")
    logits[3] = -float("inf")
    logits[4, int(targets[4])] = -float("inf")
    targets[5], targets[6] = 992, -1
    old[7], old[8] = 1e4, -1e4
    weights[9], logits[9], targets[9] = 0, float("nan"), 10**12
    logits[10, ::3] = -float("inf")
    targets[10] = 1
    chunk = replace(chunk, logits=logits, targets=targets, old_logprobs=old, policy_weights=weights)
    out, gradient = run(chunk)
    twin, other = run_cpu(chunk)
    assert out.status.tolist() == twin.status.tolist() == [0, 4, 4, 4, 2, 1, 1, 0, 0, 0, 0, 0]
    for name in NAMES:
        value, wanted = getattr(out, name).cpu(), getattr(twin, name)
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=4e-5, equal_nan=True)
    fine = torch.tensor([0, 4, 7, 8, 9, 10, 11])
    assert relative_error(gradient.cpu()[fine], other[fine]) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert not gradient[10, ::3].any()
    assert gradient[1].isnan().any()


def test_offsets_past_two_billion_elements(kernel: str) -> None:
    columns, num_rows = 151936, 16384  # 2.5e9 elements, 5 GB
    if torch.cuda.mem_get_info(CUDA)[0] < 12 << 30:
        pytest.skip("needs 12 GB of free device memory")
    chunk = random_rows(16, columns, "gppo", dtype=torch.bfloat16)
    chunk = replace(chunk, policy_weights=torch.ones(16))
    out, gradient = run(chunk)
    moved = chunk.map(lambda tensor: tensor.to(CUDA).repeat(num_rows // 16, *[1] * (tensor.dim() - 1)))
    many = policy_loss_rows(moved.logits, **moved.arguments())
    assert torch.equal(moved.logits[-16:], gradient)
    assert torch.equal(many.loss[-16:], out.loss)


def test_small_launches_follow_the_current_stream(kernel: str) -> None:
    chunk = random_rows(64, 32768, "gppo")
    out, gradient = run(chunk)
    stream = torch.cuda.Stream(CUDA)
    with torch.cuda.stream(stream):
        again, other = run(chunk)
    stream.synchronize()
    assert torch.equal(gradient, other)
    assert torch.equal(out.loss, again.loss)


def test_unaligned_rows_are_refused() -> None:
    logits = torch.zeros(4, 997, device=CUDA)
    with pytest.raises(ValueError, match="16 bytes"):
        rows.logprob_rows(logits, Tokens(targets=torch.zeros(4, dtype=torch.int64, device=CUDA)))
    tight = torch.zeros(4, 1000, device=CUDA)[:, 3:]
    with pytest.raises(ValueError, match="16 bytes"):
        rows.logprob_rows(tight, Tokens(targets=torch.zeros(4, dtype=torch.int64, device=CUDA)))
