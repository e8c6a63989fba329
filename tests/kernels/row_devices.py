"""Where the CUDA row kernels can run in a test: on a CUDA device, or emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from emulator.device import EmulatedDevice
from emulator.product import instead_of_the_twin
from row_formula import Rows, expected, policy_loss_rows, relative_error
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

    def placed(self, chunk: Rows, placement: str, extra: int = 0) -> tuple[RowOutputs, Tensor, Tensor]:
        """One pass whose gradient goes "in place", "apart", "narrow" (in place) or "narrow apart".

        Returns outputs, gradient [C, V], and what is behind its valid columns in the memory of the rows. Rows lie
        `extra` elements further apart than they must, and behind their columns is NaN.
        """
        count, columns = chunk.logits.shape
        width = -(-columns // 8) * 8
        buffer = torch.full((count, width + extra), float("nan"), dtype=chunk.logits.dtype, device=self.torch)
        buffer[:, :columns] = chunk.logits
        logits, whole = buffer[:, :columns], buffer[:, :width]
        if placement == "narrow":
            whole = buffer.view(torch.bfloat16)[:, :width]
        elif placement != "in place":
            dtype = torch.bfloat16 if "narrow" in placement else chunk.logits.dtype
            whole = torch.full((count, width + 8), 77.0, dtype=dtype, device=self.torch)[:, :width]
        with self.active():
            out = policy_loss_rows(logits, **chunk.arguments(), gradient=whole[:, :columns])
        valid = columns if chunk.vocab_size is None else chunk.vocab_size
        return out, whole[:, :columns], whole[:, valid:]


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


def check_accuracy(device: RowDevice, chunk: Rows) -> None:
    """One pass in place gives what float64 and the CPU twin give, as near as float32 does in torch."""
    out, gradient = device.run(chunk)
    check_results(chunk, out, gradient)


def check_results(chunk: Rows, out: RowOutputs, gradient: Tensor) -> None:
    """Outputs and gradient [C, V] against float64 and the CPU twin; the gradient may be narrower than the logits."""
    exact, plain = expected(chunk, torch.float64), expected(chunk, torch.float32)
    twin, of_twin = run_cpu(chunk)
    for name in ("logprobs", "entropy", "lse"):
        value = getattr(out, name).cpu()
        assert (value - getattr(exact, name)).abs().max() < 1e-5, name
        torch.testing.assert_close(value, getattr(twin, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss.cpu(), twin.loss, atol=1e-6, rtol=4e-5)
    torch.testing.assert_close(out.ratio.cpu(), twin.ratio, atol=0, rtol=4e-5)
    assert torch.equal(out.region.cpu(), twin.region)
    assert torch.equal(out.status.cpu(), twin.status)
    own, torchs = relative_error(gradient.cpu(), exact.gradient), relative_error(plain.gradient, exact.gradient)
    rounding = 2.0**-8 if gradient.dtype == torch.bfloat16 else 0.0
    # where the terms of a derivative cancel, its error grows; the twin's grows alike
    twins = relative_error(of_twin, exact.gradient)
    assert own <= max(2 * torchs, 1.5 * twins, 1e-6, rounding), f"error {own:.1e}, torch's {torchs:.1e}, {twins:.1e}"
    assert not gradient[:, chunk.vocab_size :].any()
