"""What a process has to say in its environment before CUDA starts in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import MutableMapping

from megatron_klear.config.base import ParallelConfig

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
BLACKWELL = 10.0
"""Compute capability from which on the order of kernels no longer hangs on the number of connections."""


def prepare_environment(
    parallel: ParallelConfig, environ: MutableMapping[str, str] = os.environ, capability: float | None = None
) -> list[str]:
    """Set `CUDA_DEVICE_MAX_CONNECTIONS` to 1 in `environ` where the layout needs it; returns warnings.

    Megatron starts a collective of the tensor or context axis right before the product that is to hide it, and relies
    on one hardware queue to have it scheduled first (`tensor_parallel/layers.py`). Its own launcher insists on 1 for
    tensor or context parallelism on cards before Blackwell (`megatron/training/arguments.py`). A value that is set
    already stands, with a warning where it is another. `capability` is asked of the driver unless given; where nobody
    knows it, 1 is set. It must be called before CUDA starts, which reads the variable once.
    """
    if parallel.tensor * parallel.context == 1 or parallel.device == "cpu":
        return []
    if capability is None:
        capability = smallest_capability()
    if capability is not None and capability >= BLACKWELL:
        return []
    value = environ.setdefault(CONNECTIONS, "1")
    if value == "1":
        return []
    return [
        f"{CONNECTIONS} is {value}, and parallel.tensor {parallel.tensor} x parallel.context {parallel.context} hides "
        "its communication only where it is 1 (on cards before Blackwell); unset it to have it set"
    ]


def query_gpus(field: str) -> list[str]:
    """What NVIDIA's driver tells of each GPU of this machine, empty where there is none or no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (subprocess.SubprocessError, OSError):
        return []


def smallest_gpu_bytes() -> int | None:
    """Memory of this machine's smallest NVIDIA GPU as its driver tells, None where there is none."""
    return _smallest("memory.total", 2**20)


def smallest_capability() -> float | None:
    """Compute capability of this machine's oldest NVIDIA GPU, such as 9.0 for Hopper, None where there is none."""
    found = _smallest("compute_cap", 10)
    return None if found is None else found / 10


def _smallest(field: str, scale: int) -> int | None:
    try:
        return min((round(float(line) * scale) for line in query_gpus(field)), default=None)
    except ValueError:
        return None
