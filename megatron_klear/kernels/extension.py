"""The compiled extension: whether it is there, what it can do here, and how to call it on a tensor's device."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

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


def extension(device: torch.device) -> Any:
    """The compiled module, for calls on `device`.

    Raises KernelUnavailable where it is not built or knows no such device.
    """
    if _module is None:
        raise KernelUnavailable(_reason)
    if device.type not in ("cpu", "cuda"):
        raise KernelUnavailable(f"the row kernels run on cpu and cuda, not on {device}")
    return _module


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device current for a launch; nothing to do on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch_place(device: torch.device) -> tuple[int, int]:
    """Index of a CUDA device and address of its current stream, on which launches are ordered."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, int(torch.cuda.current_stream(device).cuda_stream)
