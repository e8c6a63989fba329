"""Where the CUDA row kernels can run in a test: on a CUDA device, or emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from emulator.device import EmulatedDevice
from emulator.product import instead_of_the_twin
from row_formula import Rows, policy_loss_rows
from torch import Tensor

from megatron_klear.kernels.rows import RowOutputs


@dataclass(frozen=True, slots=True)
class RowDevice:
    """A device for CUDA's row kernels. Calls of the CPU twin are made outside of `active`."""

    torch: torch.device
    major: int
    """Compute capability."""
    active: Callable[[], AbstractContextManager[None]]
    """Entered around calls of the row kernels."""
    emulated: bool

    def count(self, rows: int, emulated: int) -> int:
        """How many rows to test; an emulated one takes some 5 ms, and a wide one 50."""
        return emulated if self.emulated else rows

    def padded(self, logits: Tensor) -> Tensor:
        """A copy on the device whose rows start at multiples of 16 bytes."""
        width = -(-logits.shape[1] // 8) * 8
        buffer = torch.full((logits.shape[0], width), 7.0, dtype=logits.dtype, device=self.torch)
        view = buffer[:, : logits.shape[1]]
        view.copy_(logits)
        return view

    def place(self, chunk: Rows) -> Rows:
        """A copy of `chunk` on the device."""
        moved = chunk.map(lambda tensor: tensor.to(self.torch))
        return replace(moved, logits=self.padded(chunk.logits))

    def run(self, chunk: Rows) -> tuple[RowOutputs, Tensor]:
        """One pass in place over a copy: outputs and gradient."""
        moved = self.place(chunk)
        with self.active():
            return policy_loss_rows(moved.logits, **moved.arguments()), moved.logits


def cuda_device() -> RowDevice:
    """The first CUDA device."""
    device = torch.device("cuda", 0)
    return RowDevice(device, torch.cuda.get_device_capability(device)[0], nullcontext, False)


def emulated_device(emulated: EmulatedDevice) -> RowDevice:
    """The emulated device, of compute capability 9."""
    return RowDevice(torch.device("cpu"), 9, lambda: instead_of_the_twin(emulated), True)


def run_cpu(chunk: Rows) -> tuple[RowOutputs, Tensor]:
    """What the CPU twin gives."""
    logits = chunk.logits.clone()
    return policy_loss_rows(logits, **chunk.arguments()), logits
