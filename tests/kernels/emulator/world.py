"""Several emulated devices whose launches run together, and the mailboxes between them.

A call queues its launch on the device of its rank, in that device's order; `run` runs what is queued, threads of all
devices taking turns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from emulator.device import READ, WRITE, EmulatedDevice, Schedule
from emulator.product import EmulatedCore
from megatron_klear.kernels import rows
from megatron_klear.kernels.mailboxes import Mailboxes

ALIGNMENT = 32  # of a mailbox


@dataclass(frozen=True, slots=True)
class _RankCore(EmulatedCore):
    """CUDA's calls on one device of several."""

    rank: int = 0

    @contextmanager
    def launch_place(self) -> Iterator[tuple[int, int]]:
        yield self.rank, 0


class World(EmulatedDevice):
    """`ranks` devices, each of which runs `resident` clusters at a time."""

    def __init__(
        self,
        emulated: EmulatedDevice,
        ranks: int,
        *,
        resident: int = 2,
        capacity: int = 16,
        timeout_seconds: float = 5.0,
    ) -> None:
        self.lib, self.launches, self.owner = emulated.lib, [], -1
        self.ranks, self.resident, self.codes = ranks, resident, [0]
        size = self.cuda_mailbox_bytes(ranks, capacity)
        self.memory = [np.zeros(size + ALIGNMENT, np.uint8) for _ in range(ranks)]
        self.addresses = [memory.ctypes.data + -memory.ctypes.data % ALIGNMENT for memory in self.memory]
        self.size, self.capacity = size, capacity
        self.mailboxes = [
            Mailboxes(
                addresses=tuple(self.addresses),
                ticket=torch.zeros(1, dtype=torch.int32),
                capacity=capacity,
                rank=rank,
                timeout_seconds=timeout_seconds,
            )
            for rank in range(ranks)
        ]

    def __enter__(self) -> World:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.emulated_devices(1, 1, 0)

    def _open(self) -> None:
        self.lib.emulated_devices(self.ranks, self.resident, 1)
        self.lib.emulated_reset()
        self.codes = [0]
        for rank, address in enumerate(self.addresses):
            self._shared(b"mailbox", address, self.size, rank, -1)
            self._shared(b"ticket", self.mailboxes[rank].ticket.data_ptr(), 4, rank, rank)

    def _shared(self, name: bytes, address: int, size: int, reader: int, writer: int) -> None:
        self.lib.emulated_array(name, address, size, 2, 1, 1, 0)
        self.lib.emulated_owner(reader, writer)
        for mode in (READ, WRITE):
            self.lib.emulated_window(address, size, size, 1, mode, None)

    @contextmanager
    def rank(self, rank: int) -> Iterator[Mailboxes]:
        """Meanwhile `kernels.rows` is that of a process on device `rank`, whose tensors are its own."""
        before = rows.core
        rows.core = lambda device, threads=None: _RankCore(self, device, rank)
        try:
            yield self.mailboxes[rank]
        finally:
            rows.core = before

    def cuda_sharded_rows(
        self, logits: Any, tokens: Any, loss: Any, out: Any, peers: Any, device: int, stream: int
    ) -> None:
        """Queues klear_cuda_sharded_rows."""
        self._declare(logits, tokens, out, owner=device)
        structures = map(ctypes.byref, (logits, tokens, loss, out, peers))
        self.codes.append(self.lib.klear_cuda_sharded_rows(*structures, device, None))

    def posted(self, generation: int, count: int) -> torch.Tensor:
        """The statistics [ranks, 4, rows] of a launch's first rows as they lie in the mailbox of rank 0."""
        start = self.addresses[0] - self.memory[0].ctypes.data
        words = self.memory[0][start : start + self.size].view(np.float32)
        entries = torch.from_numpy(words).view(2, self.capacity, self.ranks, ALIGNMENT // 4)
        return entries[generation % 2, :count, :, :4].permute(1, 2, 0).contiguous()

    def run(self, schedule: Schedule | None = None) -> None:
        """Runs what is queued. Raises EmulatedFault and CallError as a call does, here for all of them."""
        if schedule is not None:
            self.schedule(schedule)
        try:
            self._finish(max(self.codes, key=abs) or self.lib.emulated_run())
        finally:
            self._open()
