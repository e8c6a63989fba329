"""Fixtures of the kernels' tests."""

from __future__ import annotations

import os

import pytest
from emulator.build import build, why_absent
from emulator.device import SCHEDULES, EmulatedDevice
from emulator.pairs import faulty_device


@pytest.fixture(scope="session")
def emulated_library() -> EmulatedDevice:
    """csrc/'s CUDA part on the emulated device, built once for each content of its sources.

    Compiled as for __CUDA_ARCH__ KLEAR_EMULATED_ARCH: 900 by default; 1000 has the code of sm_100 and its family.
    """
    if reason := why_absent():
        pytest.skip(reason)
    return EmulatedDevice(build(architecture=int(os.environ.get("KLEAR_EMULATED_ARCH", "900"))))


@pytest.fixture(scope="session")
def faulty() -> EmulatedDevice:
    """The row kernels of sm_100 and its family with all planted faults in them, none of which is committed.

    Of the code of older devices only the loops without `sweep` and the sums of bf16 are not in it.
    """
    if reason := why_absent():
        pytest.skip(reason)
    return faulty_device(1000)


@pytest.fixture
def emulated(emulated_library: EmulatedDevice) -> EmulatedDevice:
    """The emulated device as a new one: compute capability 9, threads in a random order, preempted."""
    emulated_library.schedule(SCHEDULES["preempted"])
    emulated_library.properties()
    return emulated_library
