"""Activations that wait in pinned host memory between the forward and the backward pass (`[offload] activations`).

What a layer saves for its backward pass is copied away as it is saved, on a stream of its own, and fetched one tensor
ahead of its use. It goes with any recomputation: of a fully recomputed layer it is the layer's input that waits on the
host, of others whatever is kept. Nothing here makes the host wait for the device. As with all hooks on saved tensors,
torch does not see a tensor that is changed in place after it was saved: without offloading that is an error.

Megatron's own (`fine_grained_activation_offloading`, arXiv 2504.14960) is not used: it learns in the first step how
many micro-batches a step has and which tensors each saves, and keeps a host buffer for every shape it has met. Packed
rows differ in number and length from step to step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_klear.config.base import OffloadConfig
from megatron_klear.mcore import device as device_shim

device_shim.install()

_weak: Any = reductions.StorageWeakRef


@dataclass(slots=True, eq=False)
class _Kept:
    """A saved tensor: on the device, on its way, or in host memory."""

    number: int
    """Its place among those of its row."""
    device: Tensor | None
    host: Tensor
    copied: Any
    """The event after which `host` is whole, and the memory of `device` can be given to another."""
    uses: int = 1
    """Times that the backward pass will ask for it."""
    fetched: Any = None
    """The event after which `device` is whole again; None where it never left."""

    def __del__(self) -> None:
        """Of what was fetched and never asked for, the memory is given out again only behind the copy into it."""
        if self.device is not None and self.fetched is not None:
            torch.cuda.current_stream().wait_event(self.fetched)


@dataclass(slots=True)
class _Row:
    """What the pass of one row has saved, in order."""

    kept: list[_Kept | None] = field(default_factory=list)
    by_storage: dict[tuple[Any, ...], tuple[Any, _Kept]] = field(default_factory=dict)


class ActivationOffload:
    """Copies of what is saved, for all rows that are under way on this rank."""

    def __init__(self, config: OffloadConfig, models: Sequence[torch.nn.Module], device: torch.device) -> None:
        """Offload to the host what `models` save on `device`, their parameters left out."""
        self._smallest, self._window, self._device = config.smallest_bytes, config.window, device
        self._models = models
        cuda: Any = torch.cuda
        self._to_host, self._to_device = cuda.Stream(), cuda.Stream()
        self._leaving: deque[_Kept] = deque()  # of all rows: still on the device, their copies under way
        self._weights: set[int] = set()

    @contextmanager
    def row(self) -> Iterator[None]:
        """What is saved within waits on the host."""
        row = _Row()
        if not self._weights:  # storages keep their place: training memory that comes back fills the same ones
            self._weights = {
                parameter.untyped_storage().data_ptr() for model in self._models for parameter in model.parameters()
            }
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: self._keep(row, tensor), lambda kept: self._give(row, kept)
        ):
            yield
        row.by_storage.clear()

    def _keep(self, row: _Row, tensor: Tensor) -> Tensor | _Kept:
        """Begin to copy a tensor away, where it is worth it."""
        storage = tensor.untyped_storage()
        small = tensor.nbytes < self._smallest or tensor.device.type != self._device.type
        if small or storage.data_ptr() in self._weights:
            return tensor
        # Several operators save the same tensor. Its address may be another's once its storage is gone.
        place = storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()
        key = (*place, tensor.dtype, tensor._version)
        seen = row.by_storage.get(key)
        if seen is not None and not seen[0].expired():
            seen[1].uses += 1
            return seen[1]
        compute = torch.cuda.current_stream()
        on_device, host = tensor.detach(), self._host(tensor)
        self._to_host.wait_stream(compute)
        self._copy(host, on_device, self._to_host)
        kept = _Kept(len(row.kept), on_device, host, self._to_host.record_event())
        row.kept.append(kept)
        row.by_storage[key] = _weak(storage), kept
        self._leaving.append(kept)
        while len(self._leaving) > self._window:
            gone = self._leaving.popleft()
            # The allocator gives the memory out again in the order of this stream, which is thus after the copy.
            compute.wait_event(gone.copied)
            if gone.fetched is None:
                gone.device = None
        return kept

    def _give(self, row: _Row, kept: Tensor | _Kept) -> Tensor:
        """A tensor as it was saved; the one before it, which is asked for next, is fetched meanwhile."""
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        before = next((one for one in reversed(row.kept[: kept.number]) if one is not None), None)
        if before is not None:
            self._fetch(before)
        if kept.fetched is not None:
            torch.cuda.current_stream().wait_event(kept.fetched)
        tensor = kept.device
        assert tensor is not None
        kept.uses -= 1
        if not kept.uses:
            row.kept[kept.number] = None
            kept.device = None
        return tensor

    def _fetch(self, kept: _Kept) -> None:
        if kept.device is not None:
            return
        # Made on the stream that uses it, so that the memory goes back in that stream's order. That stream has waited
        # for the copy to the host.
        kept.device = self._room(kept.host)
        self._to_device.wait_stream(torch.cuda.current_stream())
        self._copy(kept.device, kept.host, self._to_device)
        kept.fetched = self._to_device.record_event()

    def _copy(self, to: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)

    def _host(self, tensor: Tensor) -> Tensor:
        """Pinned memory, which torch gives out again only once its copies have been made."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda")

    def _room(self, host: Tensor) -> Tensor:
        return torch.empty(host.shape, dtype=host.dtype, device=self._device)
