"""A card emulated on the CPU: every tensor lies on it but those that were sent to the host.

Enough to run what moves optimizer state between the two, and to fail where a real card would: an optimizer's kernel
refuses tensors of both, and only host memory is pinned. Streams and speed are not emulated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

IS_CUDA = torch.Tensor.is_cuda.__get__
PIN = torch.Tensor.pin_memory
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor)


def on_host(tensor: torch.Tensor) -> bool:
    """Whether a tensor was sent to the host, or made from one that was."""
    return getattr(tensor, "_on_host", False)


def _first(values: Any) -> torch.Tensor | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, (list, tuple)) and (found := _first(value)) is not None:
            return found
    return None


def _target(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The device that a call names, if it names one."""
    if func is torch.Tensor.cpu:
        return "cpu"
    if func is torch.Tensor.cuda:
        return "cuda"
    named = kwargs.get("device", args[1] if func is torch.Tensor.to and len(args) > 1 else None)
    return named.split(":")[0] if isinstance(named, str) else None


class EmulatedCard(TorchFunctionMode):
    """While entered, `is_cuda` is true of every tensor but the host's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer one call, and note on which side its result lies."""
        kwargs = kwargs or {}
        if func == IS_CUDA:  # a new wrapper at each access
            return not on_host(args[0])
        if func is PIN:
            assert on_host(args[0]), "only host memory can be pinned"
            return args[0]
        if func is torch._fused_adamw_:
            sides = {on_host(tensor) for tensors in args for tensor in tensors if isinstance(tensor, torch.Tensor)}
            assert len(sides) == 1, "expected all tensors to be on the same device"
        source, target = _first(args), _target(func, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or (result is source and target is None):
            return result
        host = source is not None and on_host(source) if target is None else target == "cpu"
        if source is not None and host != on_host(source) and result is source:
            result = source.clone()  # a move to the other side is another tensor
        result._on_host = host  # type: ignore[attr-defined]
        return result
