"""The compiled extension: whether it is there, what it can do here, and how to call it on a tensor's device."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

_ROW_KERNELS = {"": 0, "two_read": 1, "one_read": 2}
HOW_TO_BUILD = "build it with `python setup.py build_ext --inplace` (or `pip install -e .`)"


class KernelUnavailable(RuntimeError):
    """The row kernels cannot run on the asked device; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """What the row kernels can do in this process."""

    built: bool
    cpu_isa: str | None
    """avx512, avx2 or scalar; None when KLEAR_CPU_ISA names one this CPU lacks."""
    cuda_archs: tuple[str, ...]
    """Architectures the CUDA part was compiled for, empty without one."""
    cuda_devices: int
    reason: str
    """Why something is missing, in words; empty when everything is there."""


def _load() -> tuple[Any, str]:
    try:
        return importlib.import_module("megatron_klear.kernels._policy_loss"), ""
    except ImportError as error:
        return None, f"megatron_klear.kernels._policy_loss cannot be imported ({error}): {HOW_TO_BUILD}"


_module, _reason = _load()


def available() -> Availability:
    """Say which row kernels are compiled in and usable; never raises."""
    if _module is None:
        return Availability(built=False, cpu_isa=None, cuda_archs=(), cuda_devices=0, reason=_reason)
    archs = tuple(filter(None, _module.cuda_archs().split(";")))
    devices, reason = _module.cuda_devices()
    isa = _module.cpu_isa()
    if isa is None:
        reason = "KLEAR_CPU_ISA must be one of avx512, avx2 and scalar, and this CPU must have it"
    return Availability(built=True, cpu_isa=isa, cuda_archs=archs, cuda_devices=devices, reason=reason)


def usable(device: torch.device) -> bool:
    """Whether the row kernels run on `device` (a launch may still fail on an architecture they lack)."""
    here = available()
    if device.type == "cpu":
        return here.cpu_isa is not None
    return device.type == "cuda" and bool(here.cuda_archs) and here.cuda_devices > 0


@dataclass(frozen=True, slots=True)
class CpuCore:
    """The row kernels' C functions for tensors on the CPU."""

    module: Any
    threads: int
    aligned: ClassVar[bool] = False

    def call(self, name: str, *arguments: Any) -> None:
        """Run `rows`, `stats`, `combine` or `finish` of csrc/policy_loss.h, with the GIL released."""
        threads = () if name == "combine" else (self.threads,)
        getattr(self.module, f"cpu_{name}")(*arguments, *threads)


@dataclass(frozen=True, slots=True)
class CudaCore:
    """The row kernels' C functions for tensors on a CUDA device, ordered on its current stream."""

    module: Any
    device: torch.device
    aligned: ClassVar[bool] = True
    """Rows start at multiples of 16 bytes, and own the columns up to the next multiple of 8."""

    def call(self, name: str, *arguments: Any) -> None:
        """Run `rows`, `stats`, `combine`, `finish` or `sharded_rows` of csrc/policy_loss.h, with the GIL released."""
        kernel = (_row_kernel(),) if name == "rows" else ()
        with self.launch_place() as place:
            getattr(self.module, f"cuda_{name}")(*arguments, *kernel, *place)

    def sharded_refusal(self, struct: Any) -> str:
        """Why the device cannot read the rows of a shard `struct` once, in CUDA's words; empty where it can."""
        with self.launch_place() as (device, _):
            return str(self.module.cuda_sharded_fits(struct, device))

    @contextmanager
    def launch_place(self) -> Iterator[tuple[int, int]]:
        """Index of the device, made current meanwhile, and address of its current stream."""
        with torch.cuda.device(self.device):
            yield torch.cuda.current_device(), int(torch.cuda.current_stream(self.device).cuda_stream)


def core(device: torch.device, threads: int | None = None) -> CpuCore | CudaCore:
    """The row kernels for tensors on `device`; `threads` bounds the CPU's (None: torch's number).

    Raises KernelUnavailable where they are not built or know no such device.
    """
    if _module is None:
        raise KernelUnavailable(_reason)
    if device.type == "cuda":
        return CudaCore(_module, device)
    if device.type != "cpu":
        raise KernelUnavailable(f"the row kernels run on cpu and cuda, not on {device}")
    return CpuCore(_module, torch.get_num_threads() if threads is None else threads)


def _row_kernel() -> int:
    """Which CUDA kernel does the one pass; the best for the device unless KLEAR_CUDA_ROW_KERNEL names one."""
    name = os.environ.get("KLEAR_CUDA_ROW_KERNEL", "")
    if name not in _ROW_KERNELS:
        raise ValueError(f"KLEAR_CUDA_ROW_KERNEL must be two_read or one_read, not {name!r}")
    return _ROW_KERNELS[name]
