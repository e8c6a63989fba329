"""The CPU twin of the row kernels: invariances first, then accuracy against float64 autograd."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from row_formula import KINDS, Rows, expected, far, policy_loss_rows, random_rows, relative_error, take_inputs
from torch import Tensor

from megatron_klear.kernels import available, rows
from megatron_klear.kernels.inputs import Tokens
from megatron_klear.kernels.rows import RowOutputs, bf16_view, combine_stats, logprob_rows
from megatron_klear.types import KLEstimator

pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)
VALUES = [field.name for field in fields(RowOutputs)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def run(chunk: Rows, **changes: object) -> tuple[RowOutputs, Tensor]:
    """One pass in place over a copy of the logits."""
    logits = chunk.logits.clone()
    return policy_loss_rows(logits, **{**chunk.arguments(), **changes}), logits


def assert_same(first: tuple[RowOutputs, Tensor], second: tuple[RowOutputs, Tensor]) -> None:
    for name in VALUES:
        assert torch.equal(getattr(first[0], name), getattr(second[0], name)), name
    assert torch.equal(first[1], second[1])


@DTYPES
@pytest.mark.parametrize("entropy", [0.0, 0.01])
def test_threads_chunks_and_addresses_do_not_change_a_bit(dtype: torch.dtype, entropy: float) -> None:
    chunk = random_rows(37, 10007, "gppo_dual", dtype=dtype, entropy_coefficient=entropy, padding=7, nll=True)
    whole = run(chunk, threads=1)
    assert_same(whole, run(chunk, threads=2))
    for size in (1, 5, 16):
        out = RowOutputs.empty(37, torch.device("cpu"))
        wide = torch.zeros(37, 10009, dtype=dtype)[:, 2:]  # another stride, another alignment
        wide.copy_(chunk.logits)
        for start in range(0, 37, size):
            stop = min(37, start + size)
            part = chunk.map(lambda tensor, start=start, stop=stop: tensor[start:stop])
            policy_loss_rows(wide[start:stop], **part.arguments(), out=out.chunk(start, stop), threads=2)
        assert_same(whole, (out, wide.clone()))


def test_weights_scale_loss_and_gradient_and_signs_flip() -> None:
    chunk = random_rows(16, 501, "gppo", entropy_coefficient=0.01)
    out, gradient = run(chunk)
    twice, doubled = run(replace(chunk, policy_weights=chunk.policy_weights * 2))
    assert torch.equal(twice.loss, out.loss * 2)
    assert torch.equal(doubled, gradient * 2)
    assert torch.equal(twice.logprobs, out.logprobs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_shift_of_the_logits_changes_nothing_but_the_lse(kind: str) -> None:
    chunk = random_rows(16, 1003, kind, seed=3)
    chunk = replace(chunk, logits=(chunk.logits * 16).round() / 16)  # so that the shift is exact
    out, gradient = run(chunk)
    shifted, same = run(replace(chunk, logits=chunk.logits + 64))
    used = chunk.policy_weights != 0
    torch.testing.assert_close(shifted.logprobs, out.logprobs, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close((shifted.lse - out.lse)[used], torch.full((int(used.sum()),), 64.0), atol=2e-5, rtol=0)
    assert relative_error(same, gradient) < 1e-5


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "token"])
@pytest.mark.parametrize("terms", [{}, {"entropy_coefficient": 0.02}, {"kl_coefficient": 0.05, "nll": True}], ids=str)
def test_against_float64(dtype: torch.dtype, kind: str, temperature: float | str, terms: dict[str, float]) -> None:
    check_accuracy(random_rows(64, 997, kind, dtype=dtype, temperature=temperature, padding=3, **terms))


@pytest.mark.parametrize("estimator", get_args(KLEstimator))
@pytest.mark.parametrize("kind", ["reinforce", "gppo"])
def test_kl_estimators_against_float64(estimator: KLEstimator, kind: str) -> None:
    check_accuracy(random_rows(64, 997, kind, kl_coefficient=0.05, kl_estimator=estimator, nll=True))


@DTYPES
@pytest.mark.parametrize("columns", [1, 15, 17, 4096, 4097, 32768, 151936])
@pytest.mark.parametrize("entropy", [0.0, 0.003])
def test_widths_against_float64(dtype: torch.dtype, columns: int, entropy: float) -> None:
    check_accuracy(random_rows(6, columns, "gppo", dtype=dtype, entropy_coefficient=entropy, seed=columns))


def check_accuracy(chunk: Rows) -> None:
    exact, plain = expected(chunk, torch.float64), expected(chunk, torch.float32)
    out, gradient = run(chunk)
    assert (out.logprobs - exact.logprobs).abs().max() < 1e-5
    assert (out.entropy - exact.entropy).abs().max() < 1e-5
    assert (out.lse - exact.lse).abs().max() < 1e-5
    torch.testing.assert_close(out.ratio.double(), exact.ratio, atol=0, rtol=2e-5)
    torch.testing.assert_close(out.loss.double(), exact.loss, atol=1e-6, rtol=2e-5)
    assert not out.status.any()
    own, torchs = relative_error(gradient, exact.gradient), relative_error(plain.gradient, exact.gradient)
    assert own <= max(1.1 * torchs, 1e-6), f"gradient error {own:.2e}, torch's own {torchs:.2e}"


@pytest.mark.parametrize("kind", KINDS)
def test_regions(kind: str) -> None:
    chunk = random_rows(400, 11, kind, seed=5)
    out, _ = run(replace(chunk, policy_weights=torch.ones(400)))
    loss, negative, ratio = chunk.coefficients, chunk.advantages < 0, out.ratio
    low, high = ratio < loss.ratio_low, ratio > loss.ratio_high
    region = torch.zeros(400, dtype=torch.uint8)
    if kind.startswith("dppo"):
        masked = far(loss, out.logprobs.double(), chunk.old_logprobs.double(), chunk.advantages)
        region = torch.where(masked, torch.where(negative, 1, 2), 0).to(torch.uint8)
        assert set(region.tolist()) == {0, 1, 2}
    elif kind not in ("nll", "reinforce", "sapo"):
        for code, where in enumerate((negative & low, ~negative & high, ~negative & low, negative & high), start=1):
            region[where] = code
        region[negative & (ratio > loss.dual_clip)] = 5
        assert set(region.tolist()) >= {0, 1, 2, 3, 4}
    assert torch.equal(out.region, region)


@DTYPES
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("entropy", [0.0, 0.01])
def test_vocabulary_shards_equal_one_pass(dtype: torch.dtype, ranks: int, entropy: float) -> None:
    chunk = random_rows(24, 4096, "gppo_dual", dtype=dtype, entropy_coefficient=entropy, padding=1100, temperature=0.8)
    whole, gradient = run(chunk)
    width = 4096 // ranks  # the last of four shards is all padding
    shards = [chunk.logits[:, i * width : (i + 1) * width].clone() for i in range(ranks)]
    tokens, terms = take_inputs(arguments := chunk.arguments())
    stats = [rows.stats_rows(shard, tokens, vocab_start=i * width, **arguments) for i, shard in enumerate(shards)]
    merged = combine_stats(torch.stack(stats))
    for i, shard in enumerate(shards):
        out = rows.finish_rows(shard, merged, tokens, terms, vocab_start=i * width, **arguments)
        for name in VALUES:
            torch.testing.assert_close(getattr(out, name), getattr(whole, name), atol=1e-6, rtol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3  # a bf16 rounding that falls the other way
    assert relative_error(torch.cat(shards, 1), gradient) < tolerance
    used = chunk.policy_weights != 0
    plain = rows.logprobs_from_stats(merged)
    assert torch.equal(plain.logprobs[used], out.logprobs[used])
    assert torch.equal(plain.entropy[used], out.entropy[used])


def test_combining_follows_the_order_of_the_ranks() -> None:
    chunk = random_rows(8, 300, "nll")
    parts = [
        rows.stats_rows(part, Tokens(targets=chunk.targets), vocab_start=i * 100)
        for i, part in enumerate(chunk.logits.split(100, 1))
    ]
    first = combine_stats(torch.stack([part.contiguous() for part in parts]))
    assert torch.equal(first, combine_stats(torch.stack(parts)))
    assert torch.equal(combine_stats(parts[0][None]), parts[0])


def test_logprob_rows_read_only_and_equal_to_the_loss_path() -> None:
    chunk = random_rows(12, 5003, "nll", padding=3, temperature=0.7)
    chunk = replace(chunk, policy_weights=torch.ones(12))
    before = chunk.logits.clone()
    plain = logprob_rows(chunk.logits, Tokens(targets=chunk.targets, temperature=0.7), vocab_size=chunk.vocab_size)
    out, _ = run(chunk)
    assert torch.equal(chunk.logits.nan_to_num(), before.nan_to_num())
    for name in ("logprobs", "entropy", "lse", "status"):
        assert torch.equal(getattr(plain, name), getattr(out, name)), name
    assert plain.ratio.eq(1).all()
    assert not plain.loss.any()


@pytest.mark.parametrize("entropy", [0.0, 0.01])
def test_narrowed_gradients_have_the_same_bits_in_place_and_apart(entropy: float) -> None:
    chunk = random_rows(9, 5001, "gppo", entropy_coefficient=entropy, padding=1)
    apart = torch.empty(9, 5001, dtype=torch.bfloat16)
    first = policy_loss_rows(chunk.logits.clone(), **chunk.arguments(), gradient=apart)
    logits = chunk.logits.clone()
    view = bf16_view(logits)
    second = policy_loss_rows(logits, **chunk.arguments(), gradient=view)
    assert_same((first, apart), (second, view.clone()))
    _, wide = run(chunk)
    assert torch.equal(apart, wide.to(torch.bfloat16))
    elsewhere = torch.empty_like(chunk.logits)
    policy_loss_rows(chunk.logits, **chunk.arguments(), gradient=elsewhere)
    assert torch.equal(elsewhere, wide)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@DTYPES
@pytest.mark.parametrize("entropy", [0.0, 0.01])
def test_instruction_sets_agree(isa: str, dtype: torch.dtype, entropy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = random_rows(16, 9001, "gppo", dtype=dtype, entropy_coefficient=entropy)
    best, gradient = run(chunk)
    monkeypatch.setenv("KLEAR_CPU_ISA", isa)
    if available().cpu_isa is None:
        pytest.skip(f"this CPU has no {isa}")
    out, other = run(chunk)
    torch.testing.assert_close(out.logprobs, best.logprobs, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(out.entropy, best.entropy, atol=2e-6, rtol=1e-6)
    assert torch.equal(out.region, best.region)
    assert relative_error(other, gradient) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = random_rows(2, 16, "nll")
    monkeypatch.setenv("KLEAR_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="KLEAR_CPU_ISA must be one of"):
        run(chunk)
    assert available().cpu_isa is None


def test_import_and_help_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_klear.kernels import KernelUnavailable, extension

    monkeypatch.setattr(extension, "_module", None)
    monkeypatch.setattr(extension, "_reason", f"it is absent: {extension.HOW_TO_BUILD}")
    assert not available().built
    with pytest.raises(KernelUnavailable, match="build_ext --inplace"):
        run(random_rows(2, 16, "nll"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_launch_without_a_device_says_why() -> None:
    module = rows.core(torch.device("cuda")).module
    with pytest.raises(RuntimeError, match=r"CUDA|driver|device"):
        module.cuda_combine(0, 1, 0, 0, 0, 0)
