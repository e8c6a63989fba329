"""The row kernels with every fault in them, and the exponential of sm_100's to be called alone."""

from __future__ import annotations

import ctypes

import numpy as np

from emulator.build import build, read_sources
from emulator.device import EmulatedDevice
from emulator.planted import plant

_ALONE = """
#if KLEAR_PAIRS
extern "C" void emulated_exp2_pairs(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i + 1 < count; i += 2)
        klear::take_apart(klear::exp2_polynomial(klear::make_pair(x[i], x[i + 1])), y[i], y[i + 1]);
}
#endif
"""


def faulty_device(architecture: int) -> EmulatedDevice:
    """The row kernels as __CUDA_ARCH__ `architecture` makes them with all faults in them, none committed."""
    sources = plant(read_sources())
    sources["policy_loss_cuda.cu"] += _ALONE
    return EmulatedDevice(build(sources, architecture))


def exp2_polynomial(device: EmulatedDevice, x: np.ndarray) -> np.ndarray:
    """2^x by the polynomial of csrc/cuda_pairs.cuh; `x` is fp32, of an even count."""
    assert x.dtype == np.float32
    assert x.size % 2 == 0
    y = np.empty_like(x)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (x, y))
    device.lib.emulated_exp2_pairs(*pointers, ctypes.c_int64(x.size))
    return y


def exp2_error(device: EmulatedDevice, x: np.ndarray) -> float:
    """The largest relative error of `exp2_polynomial` at `x`."""
    true = np.exp2(x.astype(np.float64))
    return float(np.abs(exp2_polynomial(device, x) / true - 1).max())
