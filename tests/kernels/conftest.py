"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
from emulator.build import build, why_absent
from emulator.device import SCHEDULES, EmulatedDevice


@pytest.fixture(scope="session")
def emulated_library() -> EmulatedDevice:
    """csrc/'s CUDA part on the emulated device, built once for each content of its sources."""
    if reason := why_absent():
        pytest.skip(reason)
    return EmulatedDevice(build())


@pytest.fixture
def emulated(emulated_library: EmulatedDevice) -> EmulatedDevice:
    """The emulated device as a new one: compute capability 9, threads in a random order, preempted."""
    emulated_library.schedule(SCHEDULES["preempted"])
    emulated_library.properties()
    return emulated_library
