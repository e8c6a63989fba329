"""Megatron-Core on a machine without a GPU: its CUDA-only calls, answered by the CPU.

`install()` must run before `megatron.core` is first imported and does nothing where CUDA is available. Megatron is
not touched; each piece below stands for calls it makes without asking (files of 0.16.1 and 0.19.2):

    torch.cuda.current_device() as a device     tensor_parallel/mappings, layers, param_and_grad_buffer, p2p
    device="cuda", Tensor.cuda(), pin_memory    schedules, clip_grads, distrib_optimizer, rope_utils
    Tensor.type() == "torch.cuda.FloatTensor"   clip_grads, optimizer, distrib_optimizer
    torch.cuda streams, events, synchronize     param_and_grad_buffer, p2p, checkpoint writers
    torch.cuda RNG state                        tensor_parallel/random (queues callbacks for ever otherwise)
    import triton                               transformer/moe/ops/paged_stash (0.17 and newer)
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import time
import types
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_TENSOR_TYPE = torch.Tensor.type


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class CudaMeansCpu(TorchFunctionMode):
    """While entered, a CUDA device argument is the CPU. The mode is per thread: a worker thread enters its own."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Redirect one call."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is _TENSOR_TYPE and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Stream:
    """Stands for a CUDA stream: everything is already in order on a CPU."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __getattr__(self, _: str) -> Any:
        return lambda *args, **kwargs: None


class _Event(_Stream):
    """Stands for a CUDA event, as a wall clock."""

    def __init__(self, *_: object, **__: object) -> None:
        self.seconds = 0.0

    def record(self, *_: object) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: _Event) -> float:
        return (later.seconds - self.seconds) * 1e3


def _stub_triton_module() -> None:
    """One mixture-of-experts module imports triton unconditionally; nothing here calls it."""
    if importlib.util.find_spec("triton") is not None:
        return
    name = "megatron.core.transformer.moe.ops.paged_stash"
    module: Any = types.ModuleType(name)
    module.GLOBAL_BLOCK_SIZE = 1024
    module.paged_stash_copy_kernel = module.paged_stash_pop_kernel = None
    sys.modules[name] = module


def _replace_cuda_functions() -> None:
    cuda: Any = torch.cuda

    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_rng_state
    cuda.manual_seed = manual_seed


def _use_cpu_generator() -> None:
    import megatron.core.tensor_parallel.random as tracker

    def get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    tracker._get_cuda_rng_state = get_state
    tracker._set_cuda_rng_state = set_state
    # Forking the tracker moves the CPU generator, which Megatron reports at every layer as a mistake.
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _split_sizes_as_numbers() -> None:
    """Sizes of an all-to-all come off a GPU as NumPy arrays, which torch.distributed takes; here they stay tensors."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    move = dispatcher.maybe_move_tensor_to_cpu

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        tensor = move(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = moved


def _quieten() -> None:
    """Drop Megatron's notes on packages that are absent (the doctor tells of those) and on torch names that moved."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    warnings.filterwarnings(
        "ignore", category=UserWarning, message=r"The \.grad attribute of a Tensor that is not a leaf"
    )
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
    )


_mode: CudaMeansCpu | None = None


def install() -> bool:
    """Answer Megatron's CUDA calls with the CPU for the rest of the process; true where that was needed.

    Idempotent. Also turns torch.compile off in the process: Megatron's fusions compile for seconds and save nothing on
    a CPU.
    """
    global _mode
    _quieten()
    if torch.cuda.is_available():
        return False
    if _mode is None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        _stub_triton_module()
        _replace_cuda_functions()
        _mode = CudaMeansCpu()
        _mode.__enter__()  # type: ignore[no-untyped-call]
        _use_cpu_generator()
        _split_sizes_as_numbers()
    return True
