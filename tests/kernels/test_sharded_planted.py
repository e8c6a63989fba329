"""Faults of the kernel whose ranks wait for each other: each is noticed on emulated devices; without one nothing is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from emulator.device import SCHEDULES, CallError, EmulatedDevice
from emulator.planted import PLANTED, noticed
from emulator.planted_sharded import FAULTS, SHARDED
from emulator.world import World
from row_devices import check_results
from sharded_cases import launch, sharded_case, together

from megatron_klear.kernels import available, rows

pytestmark = pytest.mark.skipif(available().cpu_isa is None, reason=available().reason)


def following(faulty: EmulatedDevice) -> None:
    """Launches one after the other on four devices, one of them without a row that has a weight, in three orders."""
    chunks = [sharded_case(41 + i, torch.bfloat16, count=3, padding=2, seed=i) for i in range(4)]
    chunks[1] = replace(chunks[1], policy_weights=torch.zeros(3))
    for name in ("forward", "backward", "preempted"):
        with World(faulty, 4, capacity=3) as devices:
            launched = [launch(devices, chunk) for chunk in chunks]
            devices.run(SCHEDULES[name])
            for chunk, one in zip(chunks, launched, strict=True):
                targets = chunk.targets.clamp(min=0)
                check_results(replace(chunk, targets=targets), *together(one, chunk.logits.shape[1]))


def merged(faulty: EmulatedDevice) -> None:
    """The merge of four ranks has the bits of `combine_stats`."""
    chunk = replace(sharded_case(2000, count=8), policy_weights=torch.ones(8))
    chunk = replace(chunk, targets=chunk.targets.clamp(min=0))
    with World(faulty, 4) as devices:
        launched = launch(devices, chunk)
        devices.run(SCHEDULES["forward"])
        out, _ = together(launched, 2000)
        alone = rows.logprobs_from_stats(rows.combine_stats(devices.posted(1, 8)))
    # the emulated code and the twin call the same logarithm
    assert torch.equal(out.lse, alone.lse), "the merge is not that of the twin, bit by bit"
    assert torch.equal(out.entropy, alone.entropy), "the merge is not that of the twin, bit by bit"


def clusters(faulty: EmulatedDevice) -> None:
    """Two blocks a row, the first of three rows without weight."""
    chunk = sharded_case(80_001, torch.bfloat16, count=3, padding=5)
    for name in ("backward", "random"):
        with World(faulty, 2) as devices:
            launched = launch(devices, chunk)
            devices.run(SCHEDULES[name])
            check_results(replace(chunk, targets=chunk.targets.clamp(min=0)), *together(launched, 80_001))


def absent(faulty: EmulatedDevice) -> None:
    """A rank that never launches is an error of the others, and not a deadlock."""
    with World(faulty, 2) as devices:
        kept = launch(devices, sharded_case(33), absent=(1,))
        with pytest.raises(CallError) as raised:
            devices.run(SCHEDULES["forward"])
        assert raised.value.code == 719
    assert len(kept) == 1


CASES: tuple[Callable[[EmulatedDevice], None], ...] = (following, merged, clusters, absent)


def report(faulty: EmulatedDevice) -> Iterator[str]:
    """What is noticed first, in the words of `Fault.seen_as`; nothing where all is well."""
    faulty.properties()
    return noticed(partial(case, faulty) for case in CASES)


def test_nothing_is_noticed_where_no_fault_is_committed(faulty: EmulatedDevice) -> None:
    faulty.plant(0)
    assert list(report(faulty)) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_noticed(faulty: EmulatedDevice, fault: object) -> None:
    assert fault.file == SHARDED
    faulty.plant(PLANTED.index(fault) + 1)
    try:
        seen = list(report(faulty))
    finally:
        faulty.plant(0)
    assert any(line.startswith(tuple(fault.seen_as.split("|"))) for line in seen), seen
