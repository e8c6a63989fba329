"""Which CUDA row kernel runs on which device, on the emulated one: clusters, their room, and what takes their place."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulator.build import build
from emulator.device import CallError, EmulatedDevice
from row_devices import check_accuracy, emulated_device
from row_formula import Rows, random_rows

from megatron_klear.kernels import available, rows
from megatron_klear.kernels.inputs import Tokens

pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)
ONE_READ, TWO_READ = "cuda_one_read.cu", "cuda_two_read.cu"


def two_rows(columns: int, dtype: torch.dtype = torch.float32) -> Rows:
    return replace(random_rows(2, columns, "gppo", dtype=dtype, seed=columns), policy_weights=torch.ones(2))


def launched(emulated: EmulatedDevice) -> list[tuple[str, int]]:
    """File and cluster of each kernel of the last call."""
    return [(launch.file, launch.cluster) for launch in emulated.launches]


@pytest.mark.parametrize(("major", "file"), [(8, TWO_READ), (9, ONE_READ), (10, ONE_READ), (12, TWO_READ)])
def test_one_read_needs_a_device_with_room_for_clusters(emulated: EmulatedDevice, major: int, file: str) -> None:
    emulated.properties(major=major)
    check_accuracy(emulated_device(emulated), two_rows(1031))
    assert launched(emulated) == [(file, 1)]


@pytest.mark.parametrize(
    ("columns", "dtype", "cluster"),
    [
        (38_144, torch.bfloat16, 1),
        (38_145, torch.bfloat16, 2),
        (76_288, torch.bfloat16, 2),
        (76_289, torch.bfloat16, 4),
        (151_936, torch.bfloat16, 4),
        (152_577, torch.bfloat16, 8),
        (151_936, torch.float32, 8),
        (460_800, torch.float32, 8),
        (460_801, torch.float32, 0),
    ],
)
def test_a_row_takes_the_smallest_cluster_that_leaves_room_for_three_blocks(
    emulated: EmulatedDevice, columns: int, dtype: torch.dtype, cluster: int
) -> None:
    check_accuracy(emulated_device(emulated), two_rows(columns, dtype))
    assert launched(emulated) == ([(ONE_READ, cluster)] if cluster else [(TWO_READ, 1)])
    if cluster in (1, 2, 4):
        assert emulated.launches[0].resident >= 3


@pytest.mark.parametrize("room", [{"most_cluster": 4}, {"refused_cluster": 8}], ids=["no room", "refused"])
def test_two_reads_where_a_cluster_finds_no_room(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, room: dict[str, Any]
) -> None:
    emulated.properties(**room)
    device = emulated_device(emulated)
    check_accuracy(device, two_rows(152_577, torch.bfloat16))
    assert launched(emulated) == [(TWO_READ, 1)]
    check_accuracy(device, two_rows(151_936, torch.bfloat16))
    assert launched(emulated) == [(ONE_READ, 4)]
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", "one_read")
    with pytest.raises(CallError) as raised:
        device.run(two_rows(152_577, torch.bfloat16))
    assert raised.value.code == 801


def test_code_compiled_without_clusters_is_not_started_on_a_device_that_has_them(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a driver compiles the PTX of compute capability 8 for an H100: the one-read kernel has no body."""
    old = EmulatedDevice(build(one_read_for=800))
    device = emulated_device(old)
    check_accuracy(device, two_rows(1031))
    assert launched(old) == [(TWO_READ, 1)]
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", "one_read")
    with pytest.raises(CallError) as raised:
        device.run(two_rows(1031))
    assert raised.value.code == 801


def test_without_a_gradient_the_rows_are_read_once_by_the_other_kernel(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLEAR_CUDA_ROW_KERNEL", "one_read")
    chunk, device = two_rows(1032), emulated_device(emulated)
    with device.active():
        rows.logprob_rows(chunk.logits, Tokens(targets=chunk.targets))
    assert launched(emulated) == [(TWO_READ, 1)]


def test_the_width_that_was_launched_last_limits_no_other(emulated: EmulatedDevice) -> None:
    """Two threads may launch one kernel for two widths: its limit of shared memory must be that of the widest."""
    device = emulated_device(emulated)
    device.run(two_rows(120_000, torch.bfloat16))
    assert emulated.lib.emulated_smallest_limit() > 200_000


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 1 << 28},
        {"columns": 1 << 30},
        {"valid_columns": 1032},
        {"logits_stride": 1033},
        {"gradient_stride": 1033},
        {"logits": 4104},
        {"logits_type": 1},
    ],
    ids=str,
)
def test_arguments_out_of_range_start_nothing(emulated: EmulatedDevice, change: dict[str, int]) -> None:
    fields = {
        "logits": 4096,
        "gradient": 4096,
        "logits_stride": 1032,
        "gradient_stride": 1032,
        "rows": 3,
        "columns": 1031,
        "valid_columns": 1031,
    }
    logits = emulated.Logits(**{**fields, **change})
    arguments = (logits, emulated.Tokens(), emulated.Coefficients(), emulated.Outputs())
    assert emulated.lib.klear_cuda_rows(*map(ctypes.byref, arguments), 0, 0, None) == -1
