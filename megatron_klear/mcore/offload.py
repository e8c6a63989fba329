"""Memory that training alone needs, given back while rollout servers have the trainer's cards.

What stays on the card is the weights, which servers are sent. Gradient buffers are freed (a step zeroes them before it
uses them), optimizer state and master weights go to pinned host memory, and the allocator returns what it reserves:
until it does, memory that nothing uses is still taken as far as another process can see.

Megatron's `offload_to_cpu` is not used for the optimizer: it moves every parameter of it, fp32 weights among them,
whose optimizer parameters are views of the model's own buffers, and the views are cut for good. Here whole storages are
emptied and filled, so that tensors and their views stay what they were, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_klear.mcore import device as device_shim

device_shim.install()

from megatron.core.distributed import DistributedDataParallel  # noqa: E402  (the shim must come first)


class TrainingMemory:
    """Gradient buffers and optimizer state of this rank, which can leave the device and come back."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: Any, device: torch.device) -> None:
        self._chunks, self._optimizer, self._device = chunks, optimizer, device
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._host: dict[int, list[Tensor]] = {}  # pinned buffers by bytes, kept: pinning takes longer than copying
        self.asleep = False

    def sleep(self) -> int:
        """Give the memory back; the bytes of tensors that left the device. Does nothing while asleep.

        Until `wake`, nothing may read the optimizer's state or the gradients.
        """
        if self.asleep:
            return 0
        self._optimizer.zero_grad()  # master gradients are views of the buffers, or copies that would stay
        released = sum(_bytes(buffer.grad_data) for buffer in self._buffers())
        for chunk in self._chunks:
            chunk.offload_grad_buffers(empty_cache=False)
        for storage in list(self._state()):
            size = storage.nbytes()
            host = self._host_buffer(size)
            host.copy_(_as_bytes(storage), non_blocking=True)
            self._away.append((storage, host))
            released += size
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # the copies have to be over before their sources are given to other processes
        for storage, _ in self._away:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.asleep = True
        return released

    def wake(self) -> None:
        """Take the memory back, with the optimizer's state as it was and gradients zero. Does nothing while awake."""
        if not self.asleep:
            return
        for storage, host in self._away:
            storage.resize_(host.numel())
            _as_bytes(storage).copy_(host, non_blocking=True)
            self._host.setdefault(host.numel(), []).append(host)
        self._away = []
        for chunk in self._chunks:
            chunk.restore_grad_buffers()  # waits for the copies too
        self.asleep = False

    def _host_buffer(self, size: int) -> Tensor:
        kept = self._host.get(size)
        if kept:
            return kept.pop()
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._device.type == "cuda")

    def _buffers(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from chunk.buffers + chunk.expert_parallel_buffers

    def _state(self) -> Iterator[torch.UntypedStorage]:
        """Storages of master weights and moments on the device, each once, without those that hold the model."""
        seen = {parameter.untyped_storage().data_ptr() for chunk in self._chunks for parameter in chunk.parameters()}
        seen |= {buffer.param_data.untyped_storage().data_ptr() for buffer in self._buffers() if _held(buffer)}
        for tensor in _tensors(self._optimizer):
            storage = tensor.untyped_storage()
            # A single number is AdamW's `step`: nothing to win. State on the host is that of optimizer.cpu_offload.
            if tensor.numel() < 2 or tensor.device.type != self._device.type or storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            yield storage


def _held(buffer: Any) -> bool:
    return buffer.param_data is not None


def _tensors(optimizer: Any) -> Iterator[Tensor]:
    """Master weights and state of all optimizers that one is made of."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload, no-any-return]


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.untyped_storage().nbytes()
