"""What the row kernels do at the edges: huge ratios, masked logits, rows without weight, bad arguments."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from row_formula import KINDS, Rows, expected, policy_loss_rows, random_rows, relative_error
from torch import Tensor

from megatron_klear.kernels import available
from megatron_klear.kernels.rows import RowOutputs, bf16_view

pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)
INFINITY = float("inf")
NAMES = [field.name for field in fields(RowOutputs)]


def run(chunk: Rows) -> tuple[RowOutputs, Tensor]:
    logits = chunk.logits.clone()
    return policy_loss_rows(logits, **chunk.arguments()), logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
def test_huge_log_ratios_stay_finite_and_right(kind: str, log_ratio: float) -> None:
    chunk = random_rows(32, 65, kind, seed=1)
    logprobs = expected(chunk, torch.float64).logprobs
    chunk = replace(chunk, old_logprobs=(logprobs - log_ratio).float(), policy_weights=torch.ones(32))
    exact = expected(chunk, torch.float64)
    out, gradient = run(chunk)
    assert out.loss.isfinite().all()
    torch.testing.assert_close(out.loss.double(), exact.loss, atol=1e-9, rtol=2e-5)
    assert relative_error(gradient, exact.gradient) < 1e-5


@pytest.mark.parametrize("log_ratio", [0.0, 0.1, -0.5, 0.5, 1e4, -1e4])
def test_gppo_derivative_is_its_value(log_ratio: float) -> None:
    chunk = random_rows(32, 7, "gppo", seed=2)
    chunk = replace(chunk, policy_weights=torch.ones(32), old_logprobs=None)
    on_policy, _ = run(chunk)
    out, gradient = run(replace(chunk, old_logprobs=on_policy.logprobs - log_ratio))
    at_target = gradient.gather(1, chunk.targets[:, None])[:, 0]
    torch.testing.assert_close(at_target, out.loss * -torch.expm1(out.logprobs), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("gap", [-25.0, -11.5, -9.0, 0.5, 2.5, 2.7, 8.0, 25.0, 1e4])
def test_the_kl_of_an_outlier_is_bounded_and_stops(gap: float) -> None:
    """k3 is above 10 past ref - logp = 2.61 or below -11; there it is 10 and moves nothing, as in verl and NeMo-RL."""
    chunk = replace(random_rows(8, 33, "reinforce", kl_coefficient=1.0, seed=7), policy_weights=torch.ones(8))
    chunk = replace(chunk, advantages=torch.zeros(8))
    logprobs = expected(chunk, torch.float64).logprobs
    chunk = replace(chunk, ref_logprobs=(logprobs + gap).float())
    out, gradient = run(chunk)
    past = gap > 2.61 or gap < -11
    k3 = torch.tensor(10.0 if past else math.expm1(gap) - gap, dtype=torch.float64)
    torch.testing.assert_close(out.loss.double(), k3.expand(8), rtol=2e-5, atol=1e-6)
    if past:
        assert not gradient.any()
    else:
        assert relative_error(gradient, expected(chunk, torch.float64).gradient) < 2e-5


def test_minus_infinity_has_no_probability_and_no_gradient() -> None:
    chunk = random_rows(16, 301, "gppo", entropy_coefficient=0.02, seed=4)
    kept = torch.ones(301, dtype=torch.bool)
    kept[3::7] = False
    kept[290:] = False
    position = torch.cumsum(kept, 0) - 1
    targets = torch.where(kept[chunk.targets], chunk.targets, 0)
    masked = replace(chunk, logits=chunk.logits.masked_fill(~kept, -INFINITY), targets=targets)
    dense = replace(chunk, logits=chunk.logits[:, kept], targets=position[targets], vocab_size=None)
    out, gradient = run(masked)
    exact = expected(dense, torch.float64)
    assert not gradient[:, ~kept].any()
    assert not out.status.any()
    assert (out.logprobs - exact.logprobs).abs().max() < 1e-5
    assert (out.entropy - exact.entropy).abs().max() < 1e-5
    assert relative_error(gradient[:, kept], exact.gradient) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("mask", [-1e4, -2.1e9, -3e9, -1e10, -1e20, -1e37, -3.3895314e38])
def test_finite_masks_count_as_minus_infinity(dtype: torch.dtype, temperature: float, mask: float) -> None:
    """Also where a block of columns, or the first ones, holds nothing else."""
    chunk = random_rows(8, 9000, "gppo", dtype=dtype, temperature=temperature, entropy_coefficient=0.01)
    chunk = replace(chunk, policy_weights=torch.ones(8), targets=torch.full((8,), 7001), old_logprobs=None)
    logits = chunk.logits.clone()
    logits[:4, :7000], logits[4:, 1::2] = mask, mask
    logits[4:, 7001] = 1.0
    out, gradient = run(replace(chunk, logits=logits))
    exact = expected(replace(chunk, logits=logits), torch.float64)
    assert not out.status.any()
    assert (out.logprobs - exact.logprobs).abs().max() < 1e-5
    assert (out.entropy - exact.entropy).abs().max() < 1e-5
    assert relative_error(gradient, exact.gradient) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_target_is_flagged_and_its_gradient_finite(kind: str) -> None:
    chunk = random_rows(8, 33, kind, entropy_coefficient=0.01)
    chunk = replace(
        chunk, policy_weights=torch.ones(8), logits=chunk.logits.scatter(1, chunk.targets[:, None], -INFINITY)
    )
    out, gradient = run(chunk)
    assert out.status.eq(2).all()
    assert out.logprobs.eq(-INFINITY).all()
    assert out.ratio.isfinite().all()
    assert gradient.isfinite().all()
    assert not out.loss.isnan().any()


@pytest.mark.parametrize(
    ("bad", "status"), [("nan", 4), ("+inf", 4), ("all masked", 4), ("target", 1), ("negative", 1)]
)
def test_rows_that_mean_nothing_are_flagged_and_harm_no_other(bad: str, status: int) -> None:
    chunk = random_rows(6, 100, "gppo", seed=6)
    chunk = replace(chunk, policy_weights=torch.ones(6))
    good, fine = run(chunk)
    logits, targets = chunk.logits.clone(), chunk.targets.clone()
    if bad == "all masked":
        logits[2] = -INFINITY
    elif bad in ("nan", "+inf"):
        logits[2, 50] = float(bad.replace("+", ""))
    else:
        targets[2] = 100 if bad == "target" else -1
    out, gradient = run(replace(chunk, logits=logits, targets=targets))
    assert out.status.tolist() == [0, 0, status, 0, 0, 0]
    assert out.loss[2].isnan()
    assert gradient[2].isnan().any()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(gradient[others], fine[others])
    assert torch.equal(out.loss[others], good.loss[others])


@pytest.mark.parametrize("narrow", [False, True])
def test_rows_without_weight_are_never_read(narrow: bool) -> None:
    chunk = random_rows(5, 70, "gppo", nll=True)
    chunk = replace(chunk, policy_weights=torch.zeros(5), nll_weights=torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
    logits = chunk.logits.clone()
    logits[[0, 1, 3, 4]] = float("nan")
    targets = torch.tensor([-7, 10**9, 3, 0, 0])
    chunk = replace(chunk, logits=logits, targets=targets, advantages=torch.full((5,), float("nan")))
    gradient = torch.full((5, 70), 9.0, dtype=torch.bfloat16 if narrow else torch.float32)
    out = policy_loss_rows(logits, **chunk.arguments(), gradient=gradient)
    idle = torch.tensor([0, 1, 3, 4])
    assert not gradient[idle].any()
    assert all(not getattr(out, name)[idle].any() for name in NAMES)
    torch.testing.assert_close(out.loss[2], -torch.log_softmax(logits[2], -1)[3], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["ppo", "gppo", "reinforce", "cispo"])
def test_zero_advantage_gives_outputs_and_no_gradient(kind: str) -> None:
    chunk = random_rows(8, 100, kind)
    chunk = replace(chunk, advantages=torch.zeros(8), policy_weights=torch.ones(8))
    out, gradient = run(chunk)
    assert not gradient.any()
    assert not out.loss.any()
    assert out.logprobs.lt(0).all()


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty_chunks(shape: tuple[int, int]) -> None:
    logits = torch.empty(shape)
    ones = torch.ones(shape[0])
    out = policy_loss_rows(
        logits, targets=torch.zeros(shape[0], dtype=torch.int64), coefficients=KINDS["nll"], policy_weights=ones
    )
    assert out.loss.shape == (shape[0],)
    assert out.status.eq(5).all()  # a vocabulary without columns holds no target and sums to nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"logits": a["logits"].double()}, "logits must be float32 or bfloat16"),
        (lambda a: {"logits": a["logits"].t()}, "contiguous columns"),
        (lambda a: {"targets": a["targets"].int()}, r"targets must be torch.int64 \[16\]"),
        (lambda a: {"advantages": None}, "GPPO needs advantages"),
        (lambda a: {"advantages": a["advantages"][:3]}, r"advantages must be torch.float32 \[16\]"),
        (lambda a: {"old_logprobs": a["old_logprobs"].repeat(2)[::2]}, "old_logprobs must be contiguous"),
        (lambda a: {"policy_weights": None}, "without either no row has a loss"),
        (lambda a: {"temperature": 0.0}, "temperature must be positive"),
        (lambda a: {"gradient": torch.empty(16, 15)}, r"gradient must be \[16, 16\]"),
        (lambda a: {"gradient": a["logits"].flatten()[:-1].view(1, -1)}, r"gradient must be \[16, 16\]"),
        (lambda a: {"gradient": a["logits"].view(torch.bfloat16)[:, 16:]}, "overlaps the logits"),
        (lambda a: {"gradient": a["logits"].half()}, "gradient must be float32 or bfloat16"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(change: Any, message: str) -> None:
    chunk = random_rows(16, 16, "gppo")
    arguments = {"logits": chunk.logits, **chunk.arguments()}
    before = chunk.logits.clone()
    with pytest.raises(ValueError, match=message):
        policy_loss_rows(**{**arguments, **change(arguments)})
    assert torch.equal(chunk.logits, before)


def test_bf16_view_takes_float32_only() -> None:
    with pytest.raises(ValueError, match="float32"):
        bf16_view(torch.zeros(2, 2, dtype=torch.bfloat16))
