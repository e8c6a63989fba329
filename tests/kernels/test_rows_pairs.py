"""The row kernels of sm_100 and its family on the emulated device: pairs, and an exponential by FMA."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from emulator.device import SCHEDULES, EmulatedDevice, Schedule
from emulator.pairs import exp2_error, exp2_polynomial
from row_devices import RowDevice, check_accuracy, check_results, emulated_device, run_cpu
from row_formula import random_rows, relative_error

from megatron_klear.kernels import available
from megatron_klear.kernels.rows import RowOutputs

pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)
KERNELS = pytest.mark.parametrize("kernel", ["two_read", "one_read"])
NAMES = [field.name for field in fields(RowOutputs)]


@pytest.fixture
def newer(faulty: EmulatedDevice) -> EmulatedDevice:
    """The library of the planted faults, of which none is committed: it is built for them anyhow."""
    faulty.plant(0)
    faulty.schedule(SCHEDULES["preempted"])
    faulty.properties(major=10)
    return faulty


def test_the_polynomial_is_as_good_as_the_instruction(newer: EmulatedDevice) -> None:
    """At every fp32 number of [-1.5, -0.5], which has all fractions, and at all magnitudes."""
    start, stop = np.array([-0.5, -1.5], np.float32).view(np.uint32)
    every = np.arange(start, stop, dtype=np.uint32).view(np.float32)
    assert exp2_error(newer, every[: every.size // 2 * 2]) < 1.6e-7
    down, up = np.array([-1e-30, -125.5], np.float32).view(np.uint32)
    magnitudes = np.arange(down, up, 4099, dtype=np.uint32).view(np.float32)
    magnitudes = magnitudes[: magnitudes.size // 2 * 2]
    assert exp2_error(newer, magnitudes) < 1.6e-7
    assert exp2_error(newer, -magnitudes) < 1.6e-7
    special = np.array([-127, np.nan, 0, -0.0, -126.75, -126.75], np.float32)
    assert exp2_polynomial(newer, special).astype(np.float64) == pytest.approx(
        [0, np.nan, 1, 1, 0, 0], abs=0, nan_ok=True
    )


@KERNELS
def test_masks_only_where_a_row_is_ragged(newer: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    device = emulated_device(newer)
    for valid in (1, 7, 8, 9, 15, 16, 17, 1023, 1031):
        columns = 41 if valid < 40 else 1031
        chunk = random_rows(2, columns, "gppo", dtype=torch.bfloat16, padding=columns - valid)
        out, gradient, behind = device.placed(chunk, "in place")
        check_results(chunk, out, gradient)
        assert not behind.any()
    for columns, padding in ((20_001, 0), (40_003, 5), (76_289, 40_000)):
        if kernel == "one_read" or columns < 40_000:
            chunk = random_rows(2, columns, "gppo", dtype=torch.bfloat16, padding=padding, entropy_coefficient=0.01)
            check_accuracy(device, replace(chunk, policy_weights=torch.ones(2)))


@KERNELS
def test_the_bits_are_those_of_every_order(newer: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    chunk = random_rows(2, 40_003, "gppo_dual", dtype=torch.bfloat16, entropy_coefficient=0.01)
    done = []
    for schedule in ("forward", "random"):
        newer.schedule(SCHEDULES[schedule])
        done.append(emulated_device(newer).placed(chunk, "in place"))
    assert all(torch.equal(getattr(done[0][0], name), getattr(done[1][0], name)) for name in NAMES)
    assert torch.equal(done[0][1], done[1][1])


@KERNELS
def test_rows_of_fp32_have_the_bits_of_older_devices(
    newer: EmulatedDevice, emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    chunk = random_rows(3, 20_003, "gppo", dtype=torch.float32, padding=3, entropy_coefficient=0.01)
    for placement in ("in place", "narrow"):
        ours, theirs = (emulated_device(one).placed(chunk, placement) for one in (newer, emulated))
        assert all(torch.equal(getattr(ours[0], name), getattr(theirs[0], name)) for name in NAMES)
        assert torch.equal(ours[1], theirs[1])


def awkward_device(newer: EmulatedDevice) -> RowDevice:
    """One whose instruction is as wrong as PTX allows."""
    newer.schedule(Schedule(exp2_error=1))
    return emulated_device(newer)


@KERNELS
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_masks_and_infinities_weigh_nothing(
    newer: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, kernel: str, temperature: float
) -> None:
    """In each place of a unit, so by either exponential: gradients of exactly 0, and NaN where a logit is NaN."""
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    masks = (float("-inf"), -3.3895314e38, -1e30, -1e20, -1e9)
    chunk = random_rows(len(masks) + 8, 1031, "gppo", dtype=torch.bfloat16, entropy_coefficient=0.01)
    logits, targets = (chunk.logits * temperature).to(torch.bfloat16), torch.full_like(chunk.targets, 1)
    for row, mask in enumerate(masks):
        logits[row, 8:] = mask
    for place in range(8):
        logits[len(masks) + place, 512 + place] = float("nan")
    chunk = replace(chunk, logits=logits, targets=targets, old_logprobs=None, temperature=temperature)
    chunk = replace(chunk, policy_weights=torch.ones(len(logits)))
    out, gradient, _ = awkward_device(newer).placed(chunk, "in place")
    twin, wanted = run_cpu(chunk)
    for name in NAMES:
        torch.testing.assert_close(getattr(out, name), getattr(twin, name), atol=2e-5, rtol=4e-5, equal_nan=True)
    assert out.status.tolist() == [0] * len(masks) + [4] * 8
    assert gradient[len(masks) :].isnan().all()
    assert relative_error(gradient[: len(masks)], wanted[: len(masks)]) < 4e-3
    assert not gradient[: len(masks), 8:].any()
