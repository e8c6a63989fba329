"""transformer-engine's own Python in this process, its CUDA extension emulated: import before Megatron is.

KLEAR_TE names the folder of one version's wheel. The CUDA libraries are left out by transformer-engine's own switch for
builds; `transformer_engine_torch` is `te_functions`, and any other function of it is refused by name when it is called.
What only its absent parts import (triton, onnxscript) is a name and nothing more. The rest of the process is told of a
Hopper card where transformer-engine and Megatron ask for one, and of none elsewhere.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import te_functions
import torch

from megatron_klear.mcore import device

HOPPER = types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="emulated H100", L2_cache_size=50 << 20
)

IS_CUDA = torch.Tensor.is_cuda.__get__


class Names(type):
    """Makes a class any attribute of which is a number of its own: the extension's enumerations."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return zlib.crc32(name.encode()) % 997


class Extension(types.ModuleType):
    """`transformer_engine_torch`: what is emulated, and a refusal for any other name."""

    def __getattr__(self, name: str) -> Any:
        """A class where the name looks like one, else a function that says that it was called."""
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name[0].isupper():
            value = Names(name, (), {"__members__": {}, "__init__": lambda self, *args, **kwargs: None})
        else:

            def value(*args: Any, **kwargs: Any) -> Any:
                raise NotImplementedError(f"transformer_engine_torch.{name} is not emulated")

        setattr(self, name, value)
        return value


CALLS: Counter[str] = Counter()
"""How often each emulated function was called in this process."""


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def _extension() -> Extension:
    extension: Any = Extension("transformer_engine_torch")
    extension.DType = te_functions.DType
    for function in te_functions.FUNCTIONS:
        setattr(extension, function.__name__, _counted(function))
    extension.FP8FwdTensors = enum.IntEnum(
        "FP8FwdTensors", [f"GEMM{gemm}_{what}" for gemm in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")], start=0
    )
    extension.FP8BwdTensors = enum.IntEnum(
        "FP8BwdTensors", [f"GRAD_{what}{gemm}" for gemm in (1, 2, 3) for what in ("OUTPUT", "INPUT")], start=0
    )
    extension.NVTE_Fused_Attn_Backend = enum.IntEnum(
        "NVTE_Fused_Attn_Backend",
        {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
    )
    extension.NVTE_Fused_Attn_Backend.NVTE_F16_max512_seqlen = 0  # no longer a member in newer versions
    extension.get_cudnn_version = lambda: 91500
    extension.get_cublasLt_version = lambda: 130000
    extension.get_cuda_version = lambda *_: 13000
    extension.get_num_cublas_streams = lambda: 4
    extension._num_cublas_streams = 4
    extension.device_supports_multicast = lambda *_: False
    extension.is_non_nt_fp8_gemm_supported = lambda: False
    for name in ("layernorm_fwd", "layernorm_bwd", "quantize", "swiglu"):
        getattr(extension, name)  # asked for under `import *`, which takes what is there
    return extension


def _leave_out(*names: str) -> None:
    for name in names:
        module = mock.MagicMock(name=name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        module.__version__ = "3.6.0"
        sys.modules[name] = module


def install(folder: Path) -> None:
    """Import transformer-engine from `folder`, the unpacked wheel of one version."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    sys.path.insert(0, str(folder))
    sys.modules["transformer_engine_torch"] = _extension()
    if importlib.util.find_spec("onnxscript") is None:
        _leave_out("onnxscript", "onnxscript.onnx_types", "onnx")
    if importlib.util.find_spec("triton") is None:
        # What asks whether there is a triton must have asked before there is the name of one.
        importlib.import_module("torch._dynamo")
        for name in ("utils", "runtime.hints", "codecache"):
            importlib.import_module(f"torch._inductor.{name}")
        _leave_out(
            "triton",
            *(f"triton.{name}" for name in ("language", "language.core", "language.standard", "runtime", "compiler")),
            "triton.runtime.cache",
        )
    _show_a_card()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("transformer_engine")  # stops where it looks for the compiled extension
        common: Any = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        importlib.import_module("transformer_engine.pytorch")
    device.install()  # Megatron is first imported here
    _keep_the_card_in_backward()
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and getattr(module, "canonicalize_device", None) is not None:
            module.canonicalize_device = lambda device: torch.device("cpu")  # type: ignore[attr-defined]


def _keep_the_card_in_backward() -> None:
    """Torch leaves a mode for as long as a call of autograd's takes, and layers are run in a backward pass too."""
    autograd: Any = torch.autograd
    run = autograd._engine_run_backward

    def run_with_card(*args: Any, **kwargs: Any) -> Any:
        assert device._mode is not None
        with device._mode:
            return run(*args, **kwargs)

    autograd._engine_run_backward = run_with_card


def _show_a_card() -> None:
    cuda: Any = torch.cuda
    torch.version.cuda = "13.0"
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: HOPPER
    cuda.is_current_stream_capturing = lambda: False
    cuda.device = lambda device: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None

    cuda.is_available = lambda: _asked_by("transformer_engine.", "megatron_klear.mcore.model")
    answer = device.CudaMeansCpu.__torch_function__

    def answer_with_card(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == IS_CUDA and _asked_by("transformer_engine."):
            return True
        return answer(self, func, types, args, kwargs)

    device.CudaMeansCpu.__torch_function__ = answer_with_card  # type: ignore[method-assign]


def _asked_by(*modules: str) -> bool:
    """Whether the function that called the caller is of one of these modules."""
    name: str = sys._getframe(2).f_globals.get("__name__", "")
    return name.startswith(modules)


if "KLEAR_TE" in os.environ:
    install(Path(os.environ["KLEAR_TE"]))
