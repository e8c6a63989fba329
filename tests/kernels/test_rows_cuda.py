"""The CUDA row kernels against the CPU twin and float64: on a CUDA device where there is one, and emulated."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from row_devices import RowDevice, check_accuracy, cuda_device, emulated_device, run_cpu
from row_formula import KINDS, policy_loss_rows, random_rows, relative_error, take_inputs

from megatron_klear.kernels import available, rows
from megatron_klear.kernels.inputs import Tokens
from megatron_klear.kernels.rows import RowOutputs, bf16_view, combine_stats

NAMES = [field.name for field in fields(RowOutputs)]
pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ON_CUDA = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "emulated"])
def device(request: pytest.FixtureRequest) -> RowDevice:
    """Each device that can run the CUDA row kernels here."""
    if request.param == "emulated":
        return emulated_device(request.getfixturevalue("emulated"))
    if not available().cuda_archs:
        pytest.skip(f"no CUDA row kernels: {available().reason}")
    return cuda_device()


@pytest.fixture(params=["two_read", "one_read"])
def kernel(request: pytest.FixtureRequest, device: RowDevice, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two kernels that make the one pass."""
    if request.param == "one_read" and device.major not in (9, 10):
        pytest.skip("the one-read kernel needs clusters (compute capability 9 or 10)")
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", request.param)
    return str(request.param)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.6, marks=pytest.mark.slow), "token"])
@pytest.mark.parametrize("terms", [{}, {"entropy_coefficient": 0.02}, {"kl_coefficient": 0.05, "nll": True}], ids=str)
def test_small_kinds(
    device: RowDevice, kernel: str, dtype: torch.dtype, kind: str, temperature: float | str, terms: dict
) -> None:
    count = device.count(64, emulated=6)
    check_accuracy(device, random_rows(count, 997, kind, dtype=dtype, temperature=temperature, padding=3, **terms))


@DTYPES
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 4096, 18992, 37984, 75968, 131072, 151936, 152064, 262144])
@pytest.mark.parametrize("entropy", [0.0, 0.003])
def test_widths(device: RowDevice, kernel: str, dtype: torch.dtype, columns: int, entropy: float) -> None:
    count = device.count(12, emulated=2)
    check_accuracy(device, random_rows(count, columns, "gppo", dtype=dtype, entropy_coefficient=entropy, seed=columns))


def test_rows_wider_than_a_cluster_fall_back_to_two_reads(device: RowDevice) -> None:
    check_accuracy(device, random_rows(2, 600_000, "gppo"))


@pytest.mark.parametrize("columns", [997, 151936])
@pytest.mark.parametrize("entropy", [0.0, 0.003])
def test_small_narrowed_gradients_in_place_and_apart(
    device: RowDevice, kernel: str, columns: int, entropy: float
) -> None:
    count = device.count(40, emulated=6 if columns < 1000 else 3)
    chunk = device.place(random_rows(count, columns, "gppo", entropy_coefficient=entropy))
    wide, apart = device.padded(chunk.logits), device.padded(torch.empty(count, columns, dtype=torch.bfloat16))
    place = bf16_view(chunk.logits)
    with device.active():
        policy_loss_rows(wide, **chunk.arguments())
        policy_loss_rows(chunk.logits, **chunk.arguments(), gradient=apart)
        policy_loss_rows(chunk.logits, **chunk.arguments(), gradient=place)
    assert torch.equal(apart, place)
    assert torch.equal(apart, wide.to(torch.bfloat16))


@DTYPES
def test_small_runs_and_chunks_give_the_same_bits(device: RowDevice, kernel: str, dtype: torch.dtype) -> None:
    count = device.count(33, emulated=6)
    chunk = random_rows(count, 40_000, "gppo_dual", dtype=dtype, entropy_coefficient=0.01, padding=100)
    out, gradient = device.run(chunk)
    for size in sorted({count, count // 2, 5, 1}):
        parts = [device.run(chunk.map(lambda tensor, i=i, n=size: tensor[i : i + n])) for i in range(0, count, size)]
        assert torch.equal(torch.cat([part[1] for part in parts]), gradient)
        for name in NAMES:
            assert torch.equal(torch.cat([getattr(part[0], name) for part in parts]), getattr(out, name)), name


@DTYPES
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("narrow", [False, True])
def test_small_vocabulary_shards(device: RowDevice, dtype: torch.dtype, ranks: int, narrow: bool) -> None:
    chunk = random_rows(24, 4096, "gppo_dual", dtype=dtype, entropy_coefficient=0.01, padding=1100, temperature=0.8)
    whole, gradient = run_cpu(chunk)
    moved = chunk.map(lambda tensor: tensor.to(device.torch))
    width = 4096 // ranks
    shards = [moved.logits[:, i * width : (i + 1) * width].contiguous() for i in range(ranks)]
    tokens, terms = take_inputs(arguments := moved.arguments())
    with device.active():
        stats = torch.stack(
            [rows.stats_rows(shard, tokens, vocab_start=i * width, **arguments) for i, shard in enumerate(shards)]
        )
        merged = combine_stats(stats)
    assert torch.equal(merged.cpu(), combine_stats(stats.cpu()))  # bitwise
    narrow = narrow and dtype == torch.float32
    parts = [bf16_view(shard) if narrow else shard for shard in shards]
    for i, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        with device.active():
            out = rows.finish_rows(shard, merged, tokens, terms, vocab_start=i * width, gradient=part, **arguments)
        for name in NAMES:
            torch.testing.assert_close(getattr(out, name).cpu(), getattr(whole, name), atol=1e-5, rtol=4e-5)
    tolerance = 1e-6 if parts[0].dtype == torch.float32 else 4e-3
    assert relative_error(torch.cat(parts, 1).cpu(), gradient) < tolerance
    used = chunk.policy_weights != 0
    with device.active():
        alone = rows.logprobs_from_stats(merged)
    assert torch.equal(alone.logprobs.cpu()[used], out.logprobs.cpu()[used])


@pytest.mark.parametrize("named", ["", "two_read", "one_read"])
def test_small_logprob_rows_agree_and_only_read(device: RowDevice, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", named)  # without a gradient the logits are read once at any rate
    chunk = random_rows(12, 5003, "nll", padding=3, temperature=0.7)
    moved = device.place(chunk)
    before = moved.logits.clone()
    tokens = Tokens(targets=moved.targets, temperature=0.7)
    with device.active():
        out = rows.logprob_rows(moved.logits, tokens, vocab_size=chunk.vocab_size)
    twin = rows.logprob_rows(chunk.logits, Tokens(targets=chunk.targets, temperature=0.7), vocab_size=chunk.vocab_size)
    assert torch.equal(moved.logits.nan_to_num(), before.nan_to_num())
    for name in NAMES:
        torch.testing.assert_close(getattr(out, name).cpu(), getattr(twin, name), atol=1e-5, rtol=1e-5)


@DTYPES
def test_small_extremes_match_the_twin(device: RowDevice, kernel: str, dtype: torch.dtype) -> None:
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
    out, gradient = device.run(chunk)
    twin, other = run_cpu(chunk)
    assert out.status.tolist() == twin.status.tolist() == [0, 4, 4, 4, 2, 1, 1, 0, 0, 0, 0, 0]
    for name in NAMES:
        value, wanted = getattr(out, name).cpu(), getattr(twin, name)
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=4e-5, equal_nan=True)
    fine = torch.tensor([0, 4, 7, 8, 9, 10, 11])
    assert relative_error(gradient.cpu()[fine], other[fine]) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert not gradient[10, ::3].any()
    broken = gradient[torch.tensor([1, 2, 3, 5, 6])]
    assert broken[:, : chunk.vocab_size].isnan().all()
    assert not broken[:, chunk.vocab_size :].any()


@ON_CUDA
def test_offsets_past_two_billion_elements(device: RowDevice, kernel: str) -> None:
    columns, num_rows = 151936, 16384  # 2.5e9 elements, 5 GB
    if torch.cuda.mem_get_info(device.torch)[0] < 12 << 30:
        pytest.skip("needs 12 GB of free device memory")
    chunk = random_rows(16, columns, "gppo", dtype=torch.bfloat16)
    chunk = replace(chunk, policy_weights=torch.ones(16))
    out, gradient = device.run(chunk)
    moved = chunk.map(lambda tensor: tensor.to(device.torch).repeat(num_rows // 16, *[1] * (tensor.dim() - 1)))
    many = policy_loss_rows(moved.logits, **moved.arguments())
    assert torch.equal(moved.logits[-16:], gradient)
    assert torch.equal(many.loss[-16:], out.loss)


@ON_CUDA
def test_small_launches_follow_the_current_stream(device: RowDevice, kernel: str) -> None:
    chunk = random_rows(64, 32768, "gppo")
    out, gradient = device.run(chunk)
    stream = torch.cuda.Stream(device.torch)
    with torch.cuda.stream(stream):
        again, other = device.run(chunk)
    stream.synchronize()
    assert torch.equal(gradient, other)
    assert torch.equal(out.loss, again.loss)


@pytest.mark.parametrize("width", [997, 1000])
def test_unaligned_rows_are_refused(device: RowDevice, width: int) -> None:
    logits = torch.zeros(4, width, device=device.torch)[:, 3 * (width == 1000) :]
    targets = torch.zeros(4, dtype=torch.int64, device=device.torch)
    with device.active(), pytest.raises(ValueError, match="16 bytes"):
        rows.logprob_rows(logits, Tokens(targets=targets))
