"""The CUDA row kernels on the emulated device: the same bits in every order, and right in random and awkward cases."""

from __future__ import annotations

import itertools
import mmap
import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from emulator.build import build
from emulator.device import SCHEDULES, EmulatedDevice, Schedule
from row_devices import RowDevice, check_accuracy, check_results, emulated_device, run_cpu
from row_formula import KINDS, Rows, expected, policy_loss_rows, random_rows, relative_error, take_inputs
from torch import Tensor

from megatron_klear.kernels import available, rows
from megatron_klear.kernels.rows import RowOutputs, combine_stats

pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)
NAMES = [field.name for field in fields(RowOutputs)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KERNELS = pytest.mark.parametrize("kernel", ["two_read", "one_read"])
INFINITY = float("inf")
MAP_NORESERVE = 0x4000  # of Linux: address space alone


@pytest.fixture
def device(emulated: EmulatedDevice) -> RowDevice:
    return emulated_device(emulated)


def same_bits(a: tuple[RowOutputs, Tensor, Tensor], b: tuple[RowOutputs, Tensor, Tensor]) -> bool:
    pairs = [(getattr(a[0], name), getattr(b[0], name)) for name in NAMES] + [(a[1], b[1])]
    return all(torch.equal(x, y) for x, y in pairs)


@DTYPES
@KERNELS
@pytest.mark.parametrize("columns", [1031, 40_000, 151_936])
def test_every_order_of_threads_and_copies_gives_the_same_bits(
    device: RowDevice,
    emulated: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    kernel: str,
    columns: int,
) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    chunk = random_rows(5 if columns < 2000 else 2, columns, "gppo_dual", dtype=dtype, entropy_coefficient=0.01)
    first = None
    for schedule in SCHEDULES.values():
        emulated.schedule(schedule)
        now = device.placed(chunk, "in place")
        first = first or now
        assert same_bits(now, first)
    assert same_bits(device.placed(chunk, "apart", extra=24), first)
    if dtype == torch.float32:
        narrow = device.placed(chunk, "narrow", extra=8)
        assert same_bits(device.placed(chunk, "narrow apart"), narrow)
        assert torch.equal(narrow[1], first[1].bfloat16())


WIDTHS = (1, 7, 8, 9, 17, 1031, 4096, 18_992)
WIDE = (32_000, 37_984, 75_968, 151_936, 200_000, 262_144)
ESTIMATORS = ("k3", "k2", "k3_unbiased", "k3_weighted")


def random_case(seed: int, widths: tuple[int, ...]) -> tuple[Rows, str, int, str, Schedule]:
    """A chunk, where its gradient goes, the distance of its rows, kernel and schedule; anything goes with anything."""
    choose = random.Random(seed)
    columns = choose.choice(widths)
    dtype = choose.choice((torch.float32, torch.float32, torch.bfloat16))
    chunk = random_rows(
        choose.randint(2, 7) if columns < 20_000 else 2,
        columns,
        choose.choice(sorted(KINDS)),
        dtype=dtype,
        temperature=choose.choice((1.0, 0.6, 1.7, "token")),
        entropy_coefficient=choose.choice((0.0, 0.0, 0.003, 0.05)),
        kl_coefficient=choose.choice((0.0, 0.0, 0.05)),
        kl_estimator=choose.choice(ESTIMATORS),
        padding=choose.randrange(min(columns, 60)),
        nll=choose.random() < 0.3,
        seed=seed,
    )
    placements = ("in place", "apart", "narrow", "narrow apart") if dtype == torch.float32 else ("in place", "apart")
    schedule = replace(choose.choice(list(SCHEDULES.values())), seed=seed)
    kernel = choose.choice(("two_read", "one_read"))
    return chunk, choose.choice(placements), 8 * choose.randrange(3), kernel, schedule


@pytest.mark.parametrize(
    ("seeds", "widths"),
    [
        (range(60), WIDTHS),
        (range(60, 72), WIDE),
        pytest.param(range(100, 600), WIDTHS, marks=pytest.mark.slow),
        pytest.param(range(600, 700), WIDE, marks=pytest.mark.slow),
    ],
    ids=["narrow", "wide", "many narrow", "many wide"],
)
def test_random_cases(
    device: RowDevice,
    emulated: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    seeds: range,
    widths: tuple[int, ...],
) -> None:
    for seed in seeds:
        chunk, placement, extra, kernel, schedule = random_case(seed, widths)
        monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
        emulated.schedule(schedule)
        try:
            out, gradient, behind = device.placed(chunk, placement, extra)
            check_results(chunk, out, gradient)
            assert not behind.any()
        except AssertionError as error:
            error.add_note(f"seed {seed}: {list(chunk.logits.shape)} {placement} {kernel} {schedule}")
            raise


BOUNDS = (8, 3 * 384, 3072, 4096, 16_384, 19_072, 32_768, 38_144, 76_288, 152_576, 305_152)


@KERNELS
@DTYPES
def test_widths_around_units_pieces_and_clusters(
    device: RowDevice, monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    for number, (bound, offset) in enumerate(itertools.product(BOUNDS, (-1, 1))):
        if bound > 20_000 and (kernel == "two_read" or offset < 0):
            continue
        chunk = random_rows(2, bound + offset, "gppo", dtype=dtype, padding=number % 5, seed=number)
        check_accuracy(device, replace(chunk, policy_weights=torch.ones(2)))


@KERNELS
@DTYPES
@pytest.mark.parametrize("columns", [40, 41, 1031])
def test_any_number_of_valid_columns(
    device: RowDevice, monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, columns: int
) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    for valid in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 39, 40):
        chunk = random_rows(3, columns, "gppo", dtype=dtype, padding=columns - valid, entropy_coefficient=0.01)
        out, gradient, behind = device.placed(chunk, "in place")
        check_results(chunk, out, gradient)
        assert not behind.any()


@DTYPES
@pytest.mark.parametrize("valid", [0, 1, 5, 37_984])
def test_blocks_of_a_cluster_that_hold_padding_only(device: RowDevice, dtype: torch.dtype, valid: int) -> None:
    chunk = random_rows(2, 151_936, "gppo", dtype=dtype, padding=151_936 - max(valid, 1), entropy_coefficient=0.01)
    chunk = replace(chunk, policy_weights=torch.tensor([0.0, 1.0]), vocab_size=valid)
    out, gradient, behind = device.placed(chunk, "in place")
    assert not behind.any()
    if valid:
        check_results(chunk, out, gradient)
    else:
        assert out.status.tolist() == [0, 5]


@pytest.mark.parametrize("kernel", ["two_read", "one_read"])
def test_rows_without_columns(device: RowDevice, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    chunk = replace(random_rows(3, 8, "nll"), logits=torch.empty(3, 0), vocab_size=None, policy_weights=torch.ones(3))
    with device.active():
        assert policy_loss_rows(chunk.logits, **chunk.arguments()).status.tolist() == [5, 5, 5]


def awkward(columns: int, dtype: torch.dtype, kind: str, entropy: float) -> Rows:
    """What may go wrong in a row, one row each."""
    chunk = random_rows(18, columns, kind, dtype=dtype, entropy_coefficient=entropy, padding=5)
    x, targets, valid = chunk.logits.clone(), chunk.targets.clone(), columns - 5
    old, weights = chunk.old_logprobs.clone(), torch.ones(18)
    x[1, 50] = x[16, valid - 1] = float("nan")
    x[2, 51], x[3] = INFINITY, -INFINITY
    x[4, targets[4]] = x[14, targets[14]] = -INFINITY
    targets[5], targets[6] = valid, -1
    old[7], old[8], old[14] = 1e4, -1e4, -INFINITY
    weights[9], x[9], targets[9] = 0, float("nan"), 10**12
    x[10, ::3], targets[10] = -INFINITY, 1
    x[11] = 1e4 * x[11].sign()
    x[12], x[13] = x[12] + 1e4, x[13] - 1e4
    x[15], targets[15] = -INFINITY, valid - 1
    x[15, valid - 1] = 2.5
    x[17, 0], targets[17] = 1e4, 0
    x[:, valid:] = float("nan")
    return replace(chunk, logits=x, targets=targets, old_logprobs=old, policy_weights=weights)


@KERNELS
@DTYPES
@pytest.mark.parametrize("columns", [997, pytest.param(45_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["gppo", "ppo", "nll", "dppo_kl"])
def test_awkward_rows_are_those_of_the_twin(
    device: RowDevice, monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, columns: int, kind: str
) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    for placement, entropy in (("in place", 0.0), ("in place", 0.01), ("narrow", 0.0)):
        if placement == "narrow" and dtype == torch.bfloat16:
            continue
        chunk = awkward(columns, dtype, kind, entropy)
        out, gradient, behind = device.placed(chunk, placement)
        twin, wanted = run_cpu(chunk)
        for name in NAMES:
            torch.testing.assert_close(getattr(out, name), getattr(twin, name), atol=2e-5, rtol=4e-5, equal_nan=True)
        assert not behind.any()
        broken = [1, 2, 3, 5, 6, 16]
        assert gradient[broken, : chunk.vocab_size].isnan().all()
        fine = [i for i in range(18) if i not in broken]
        narrow = gradient.dtype == torch.bfloat16
        assert relative_error(gradient[fine], wanted[fine]) < (4e-3 if narrow else 1e-5)
        assert not gradient[10, : chunk.vocab_size : 3].any()


@KERNELS
@DTYPES
@pytest.mark.parametrize("columns", [1031, 45_000])
def test_finite_masks_over_threads_and_blocks(
    device: RowDevice, monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, columns: int
) -> None:
    """Also where a thread, a warp or a block of the cluster sees nothing but masks."""
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    masks = (-1e4, -1e9, -2.1e9, -3e9, -1e10, -7e12, -1e20, -1e30, -1e37, -3.3895314e38)
    chunk = random_rows(2 * len(masks), columns, "gppo", dtype=dtype, temperature=0.5, entropy_coefficient=0.01)
    logits = chunk.logits.clone()
    for i, mask in enumerate(masks):
        logits[2 * i, ::2] = mask
        logits[2 * i + 1, columns // 20 :] = mask
    logits[:, 1] = 1.0
    chunk = replace(chunk, logits=logits, targets=torch.ones_like(chunk.targets), old_logprobs=None)
    chunk = replace(chunk, policy_weights=torch.ones(2 * len(masks)))
    out, gradient, _ = device.placed(chunk, "in place")
    assert not out.status.any()
    exact = expected(chunk, torch.float64)
    assert (out.logprobs - exact.logprobs).abs().max() < 1e-5
    assert relative_error(gradient, exact.gradient) < (1e-5 if dtype == torch.float32 else 4e-3)


@DTYPES
@pytest.mark.parametrize(("ranks", "columns"), [(2, 1000), (4, 1024), (8, 4096)])
def test_shards_some_without_a_valid_column(device: RowDevice, dtype: torch.dtype, ranks: int, columns: int) -> None:
    valid = int(columns * 0.4)
    chunk = random_rows(7, columns, "gppo_dual", dtype=dtype, padding=columns - valid, entropy_coefficient=0.01)
    logits = chunk.logits.clone()
    logits[3, 5], logits[4, : valid // 2] = float("nan"), -INFINITY
    chunk = replace(chunk, logits=logits, policy_weights=torch.tensor([0.0, 1, 1, 1, 1, 1, 1]))
    whole, wanted = run_cpu(chunk)
    width = columns // ranks
    shards = [device.padded(logits[:, i * width : (i + 1) * width]) for i in range(ranks)]
    tokens, terms = take_inputs(arguments := chunk.arguments())
    with device.active():
        starts = [{"vocab_start": i * width, **arguments} for i in range(ranks)]
        stats = torch.stack([rows.stats_rows(s, tokens, **a) for s, a in zip(shards, starts, strict=True)])
        merged = combine_stats(stats)
        outs = [rows.finish_rows(s, merged, tokens, terms, **a) for s, a in zip(shards, starts, strict=True)]
    assert merged.numpy().tobytes() == combine_stats(stats).numpy().tobytes(), "the twin merges to the same bits"
    for out, name in itertools.product(outs, NAMES):
        torch.testing.assert_close(getattr(out, name), getattr(whole, name), atol=1e-5, rtol=4e-5, equal_nan=True)
    gradient, fine = torch.cat(shards, 1), torch.tensor([0, 1, 2, 4, 5, 6])
    assert relative_error(gradient[fine], wanted[fine]) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert not gradient[:, valid:].any()


@KERNELS
@DTYPES
def test_rows_two_billion_elements_apart(
    device: RowDevice, monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype
) -> None:
    """Offsets beyond 32 bits, over memory that is hardly touched."""
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    chunk = replace(random_rows(3, 1031, "gppo", dtype=dtype), policy_weights=torch.ones(3))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    space = mmap.mmap(-1, (2 << 31) * dtype.itemsize + (1 << 16), flags=flags)
    logits = torch.from_numpy(np.frombuffer(space, np.uint8)).view(dtype).as_strided((3, 1031), (1 << 31, 1))
    logits.copy_(chunk.logits)
    with device.active():
        out = policy_loss_rows(logits, **chunk.arguments())
    check_results(chunk, out, logits)


@KERNELS
@DTYPES
@pytest.mark.parametrize("error", [1, 2, 3])
def test_the_exponential_may_be_as_wrong_as_ptx_allows(
    device: RowDevice,
    emulated: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    dtype: torch.dtype,
    error: int,
) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    emulated.schedule(Schedule(exp2_error=error))
    chunk = random_rows(3, 40_000, "gppo", dtype=dtype, entropy_coefficient=0.01)
    check_accuracy(device, replace(chunk, policy_weights=torch.ones(3)))


@pytest.mark.slow
@KERNELS
def test_contracted_as_nvcc_does(monkeypatch: pytest.MonkeyPatch, emulated: EmulatedDevice, kernel: str) -> None:
    """a * b + c in one rounding wherever the compiler likes."""
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", kernel)
    contracted = emulated_device(EmulatedDevice(build(flags=("-ffp-contract=fast", "-mfma"))))
    for seed in range(40):
        chunk, placement, extra, _, _ = random_case(seed, (*WIDTHS, 40_000))
        out, gradient, _ = contracted.placed(chunk, placement, extra)
        check_results(chunk, out, gradient)
