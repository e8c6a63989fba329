"""A NCCL communicator outside torch.distributed, for a group of this trainer and the rollout servers' workers.

torch.distributed knows one world; servers come and go and are no part of it. The calls are NCCL's own C interface
(nccl.h), through ctypes on the library that torch has loaded. Not run: there was no machine with two GPUs.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

UNIQUE_ID_BYTES = 128
_SUM = 0
_CODES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}


class NCCLError(RuntimeError):
    """A call of NCCL that failed."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * UNIQUE_ID_BYTES),)


_COUNT, _POINTER, _NUMBER = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
_SIGNATURES: dict[str, list[Any]] = {
    "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
    "ncclCommInitRank": [ctypes.POINTER(ctypes.c_void_p), _NUMBER, _UniqueId, _NUMBER],
    "ncclAllReduce": [_POINTER, _POINTER, _COUNT, _NUMBER, _NUMBER, _POINTER, _POINTER],
    "ncclBroadcast": [_POINTER, _POINTER, _COUNT, _NUMBER, _NUMBER, _POINTER, _POINTER],
    "ncclCommAbort": [_POINTER],
    "ncclCommDestroy": [_POINTER],
}


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise NCCLError(f"no NCCL library is loaded: {error}") from None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _NUMBER
    library.ncclGetErrorString.argtypes, library.ncclGetErrorString.restype = [_NUMBER], ctypes.c_char_p
    return library


def _call(name: str, *arguments: Any) -> None:
    result = getattr(_library(), name)(*arguments)
    if result:
        raise NCCLError(f"{name}: {_library().ncclGetErrorString(result).decode()}")


def new_unique_id() -> bytes:
    """The bytes by which the members of a new group find each other; this process must be its rank 0."""
    unique = _UniqueId()
    _call("ncclGetUniqueId", ctypes.byref(unique))
    return bytes(unique)


class Communicator:
    """Rank 0 of a group whose other members are vLLM's workers."""

    def __init__(self, unique_id: bytes, world_size: int, device: torch.device) -> None:
        """Waits until all members have come."""
        self.device = device
        self._handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            unique = _UniqueId.from_buffer_copy(unique_id)
            _call("ncclCommInitRank", ctypes.byref(self._handle), world_size, unique, 0)
            # vLLM's workers sum one number to warm up, and every member has to.
            one = torch.zeros(1, device=device)
            _call(
                "ncclAllReduce",
                one.data_ptr(),
                one.data_ptr(),
                1,
                _CODES[one.dtype],
                _SUM,
                self._handle,
                self._stream(),
            )
            torch.cuda.current_stream(device).synchronize()

    def broadcast(self, tensor: Tensor) -> None:
        """Put the sending of a contiguous tensor on the current stream."""
        if not tensor.is_contiguous() or tensor.device != self.device:
            raise ValueError(f"broadcast needs a contiguous tensor on {self.device}, not one on {tensor.device}")
        pointer, code = tensor.data_ptr(), _CODES[tensor.dtype]
        with torch.cuda.device(self.device):
            _call("ncclBroadcast", pointer, pointer, tensor.numel(), code, 0, self._handle, self._stream())

    def abort(self) -> None:
        """End the group at once, whatever is under way."""
        if self._handle:
            _call("ncclCommAbort", self._handle)
            self._handle = ctypes.c_void_p()

    def close(self) -> None:
        """End the group when what is under way is done."""
        if self._handle:
            _call("ncclCommDestroy", self._handle)
            self._handle = ctypes.c_void_p()

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)
