"""Can the emulated device fail? Each of many faults of the CUDA row kernels is noticed; without one nothing is."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from emulator.device import SCHEDULES, EmulatedDevice
from emulator.pairs import exp2_error
from emulator.planted import noticed
from emulator.planted_faults import FAULTS, NEWER, Fault
from row_devices import RowDevice, emulated_device, run_cpu
from row_formula import Rows, policy_loss_rows, random_rows, relative_error, take_inputs

from megatron_klear.kernels import available, rows
from megatron_klear.kernels.rows import RowOutputs, combine_stats

pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)
NAMES = [field.name for field in fields(RowOutputs)]
DEFAULT = 4  # every so many faults are tried by default, the others with the slow tests


def compare(chunk: Rows, out: RowOutputs, gradient: torch.Tensor, behind: torch.Tensor) -> None:
    """With what the twin gives, row by row."""
    twin, wanted = run_cpu(chunk)
    for name in NAMES:
        value, true = getattr(out, name), getattr(twin, name)
        torch.testing.assert_close(value, true, atol=2e-5, rtol=4e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    assert not behind.any(), "what is behind the valid columns is not 0"
    assert torch.equal(gradient.isnan(), wanted.isnan())
    for row in torch.nonzero(~wanted.isnan().any(1))[:, 0].tolist():
        error = relative_error(gradient[row], wanted[row])
        assert error < (4e-3 if gradient.dtype == torch.bfloat16 else 1e-5), f"gradient of row {row}: {error:.1e}"


def rows_case(columns: int, dtype: torch.dtype, placement: str, count: int = 4) -> tuple[Rows, str]:
    """Rows of which the first has no weight, the second a NaN or an infinity, and the others wide masks."""
    chunk = random_rows(count, columns, "gppo", dtype=dtype, temperature=0.5, padding=2, seed=columns)
    chunk = replace(chunk, entropy_coefficient=0.01)
    logits = chunk.logits.clone()
    logits[1, 500] = float("nan") if columns < 2000 else float("inf")
    targets = chunk.targets.clone()
    for row, mask in zip(range(2, count), (-2.1e9, -5e9), strict=False):
        logits[row, columns // 2 : -2], targets[row] = mask, 5
    return replace(chunk, logits=logits, targets=targets, old_logprobs=chunk.old_logprobs.clamp(min=-30)), placement


PASSES = (
    rows_case(1031, torch.bfloat16, "in place"),
    rows_case(1028, torch.float32, "in place"),
    rows_case(1030, torch.float32, "apart"),
    rows_case(1031, torch.float32, "narrow"),
    rows_case(20_001, torch.float32, "narrow"),
    rows_case(40_003, torch.bfloat16, "in place"),
    rows_case(60_001, torch.float32, "narrow", count=3),
)


def passes(device: RowDevice, emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over rows of several widths by both kernels, in several orders."""
    for number, (chunk, placement) in enumerate(PASSES):
        emulated.schedule(list(SCHEDULES.values())[number % 3])
        for kernel in ("two_read", "one_read"):
            monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
            compare(chunk, *device.placed(chunk, placement, extra=8 * (number % 2)))
    monkeypatch.delenv("KLEAR_CUDA_ROW_KERNEL")


def shards(device: RowDevice, emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, merge and finish over four shards; log-probs alone, by either name of the kernel."""
    chunk = random_rows(9, 4096, "gppo", padding=100, entropy_coefficient=0.01)
    _, wanted = run_cpu(chunk)
    parts = [chunk.logits[:, i : i + 1024].contiguous() for i in range(0, 4096, 1024)]
    tokens, terms = take_inputs(arguments := chunk.arguments())
    starts = [{"vocab_start": 1024 * i, **arguments} for i in range(4)]
    with device.active():
        stats = torch.stack([rows.stats_rows(p, tokens, **start) for p, start in zip(parts, starts, strict=True)])
        merged = combine_stats(stats)
        for part, start in zip(parts, starts, strict=True):
            rows.finish_rows(part, merged, tokens, terms, **start)
        rows.logprobs_from_stats(merged)
        monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", "one_read")
        rows.logprob_rows(chunk.logits, tokens, vocab_size=chunk.vocab_size)
        monkeypatch.delenv("KLEAR_CUDA_ROW_KERNEL")
    assert torch.equal(merged, combine_stats(stats)), "the merge is not that of the twin, bit by bit"
    assert relative_error(torch.cat(parts, 1), wanted) < 1e-5


def without_room(device: RowDevice, emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of eight where the device has no room for them."""
    chunk, placement = rows_case(152_577, torch.bfloat16, "in place", count=3)
    for room in ({"most_cluster": 4}, {"refused_cluster": 8}):
        emulated.properties(**room)
        compare(chunk, *device.placed(chunk, placement))
        assert [launch.file for launch in emulated.launches] == ["cuda_two_read.cu"]
    emulated.properties()


def far(device: RowDevice, emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2^31 elements apart, over memory that is hardly touched."""
    chunk = replace(random_rows(2, 1031, "gppo"), policy_weights=torch.ones(2))
    space = mmap.mmap(-1, (1 << 33) + (1 << 16), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    logits = torch.from_numpy(np.frombuffer(space, np.uint8)).view(torch.float32).as_strided((2, 1031), (1 << 31, 1))
    logits.copy_(chunk.logits)
    with device.active():
        out = policy_loss_rows(logits, **chunk.arguments())
    compare(chunk, out, logits, torch.zeros(0))


def powers(device: RowDevice, emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials by the polynomial: within what PTX allows ex2.approx."""
    assert exp2_error(emulated, np.linspace(-2, 0, 10_000, dtype=np.float32)) < 2.0**-22


Case = Callable[[RowDevice, EmulatedDevice, pytest.MonkeyPatch], None]
CASES: tuple[Case, ...] = (passes, shards, without_room, far, powers)


def report(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What is noticed first, in the words of `Fault.seen_as`; nothing where all is well."""
    emulated.properties()
    return noticed(partial(case, emulated_device(emulated), emulated, monkeypatch) for case in CASES)


def test_nothing_is_noticed_where_no_fault_is_committed(
    faulty: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.plant(0)
    assert list(report(faulty, monkeypatch)) == []


def by_default(number: int, fault: Fault) -> bool:
    """Whether a fault is tried without the slow tests too."""
    return fault in NEWER or number % DEFAULT == 0


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        pytest.param(number, fault, id=fault.name, marks=[] if by_default(number, fault) else [pytest.mark.slow])
        for number, fault in enumerate(FAULTS, start=1)
    ],
)
def test_a_fault_is_noticed(faulty: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, number: int, fault: Fault) -> None:
    faulty.plant(number)
    seen = list(report(faulty, monkeypatch))
    assert any(line.startswith(tuple(fault.seen_as.split("|"))) for line in seen), seen
