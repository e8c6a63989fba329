"""The emulated device under the product's own calls: `kernels.rows`, and with it the fused loss, run on it.

Its tensors are ordinary ones of the CPU, so that all of torch around the row kernels works on them; while it is in
place there is no CPU twin. Rows must be aligned as on CUDA, and the choice of the kernel is CUDA's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from emulator.device import EmulatedDevice
from megatron_klear.kernels import rows
from megatron_klear.kernels.extension import CudaCore


class EmulatedCore(CudaCore):
    """CUDA's calls without CUDA's devices and streams."""

    @contextmanager
    def launch_place(self) -> Iterator[tuple[int, int]]:
        """Device 0 and its default stream."""
        yield 0, 0


@contextmanager
def instead_of_the_twin(emulated: EmulatedDevice) -> Iterator[None]:
    """Meanwhile the row kernels of tensors on the CPU are CUDA's, on `emulated`."""

    def core(device: torch.device, threads: int | None = None) -> EmulatedCore:
        return EmulatedCore(emulated, device)

    before = rows.core
    rows.core = core
    try:
        yield
    finally:
        rows.core = before
