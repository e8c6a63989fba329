"""Memory through which the kernels of a vocabulary's shards tell each other a row's statistics while they run.

Each rank has a mailbox that all others write into, in symmetric memory of the devices (one NVLink or P2P domain).
It is made once for a group and asked for by KLEAR_CUDA_SHARDED_KERNEL=one_read. That kernel has not run on a GPU yet.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.kernels.extension import CudaCore, KernelUnavailable, core
from megatron_klear.kernels.rows import sharded_refusal

VARIABLE = "KLEAR_CUDA_SHARDED_KERNEL"
TIMEOUT_SECONDS = 600
"""How long a row waits for a peer before its kernel traps, which is an error of the CUDA context: as long as torch's
collectives wait by default."""
MOST_RANKS = 16  # KLEAR_MOST_RANKS of csrc/policy_loss.h
FEWEST_ROWS = 4096  # 512 KiB for two ranks


@dataclass(kw_only=True, slots=True)
class Mailboxes:
    """The mailboxes of a group as one of its ranks reaches them."""

    addresses: tuple[int, ...]
    """By rank, each of `cuda_mailbox_bytes` bytes that were zero before the first launch."""
    ticket: Tensor
    """[1] int32 on this rank's device, 0 before the first launch: the kernel's counter of rows."""
    capacity: int
    """Rows of a launch that fit."""
    rank: int
    timeout_seconds: float = TIMEOUT_SECONDS
    launches: int = 0
    memory: Any = None
    """What keeps the addresses valid."""

    def turn(self, module: Any, rows: int) -> Any:
        """The kernel's argument for the next launch, of `rows` rows; every rank must come to the same number of turns.

        Raises ValueError where so many rows do not fit.
        """
        if rows > self.capacity:
            raise ValueError(f"the mailboxes hold {self.capacity} rows, not {rows}")
        self.launches += 1
        return module.Peers(
            mailboxes=list(self.addresses),
            ticket=self.ticket.data_ptr(),
            capacity=self.capacity,
            timeout_ns=int(self.timeout_seconds * 1e9),
            generation=self.launches,
            rank=self.rank,
        )


def wanted() -> bool:
    """Whether the rows of a sharded vocabulary are to be read once. Raises ValueError where that is set to nonsense."""
    name = os.environ.get(VARIABLE, "")
    if name not in ("", "two_read", "one_read"):
        raise ValueError(f"{VARIABLE} must be two_read or one_read, not {name!r}")
    return name == "one_read"


_groups: dict[str, _Group] = {}


def group_mailboxes(group: dist.ProcessGroup, logits: Tensor, gradient: Tensor) -> Mailboxes:
    """The group's mailboxes for a chunk [C, V_local] of logits, made where there are none that hold C rows.

    A collective of the group where they are made, or the width and types are new: each rank must be able to run the
    kernel before any starts it. Raises KernelUnavailable, on all ranks, where one is not.
    """
    name = str(group.group_name)
    known = _groups.get(name)
    if known is None or known.group is not group:
        known = _groups[name] = _Group(group)
    return known.mailboxes(logits, gradient)


class _Group:
    """What has been made for a group and found out of it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.able: set[tuple[Any, ...]] = set()
        self.made: list[Mailboxes] = []  # the last is in use; a peer's kernel may still write into one before
        self.stream: torch.cuda.Stream | None = None

    def mailboxes(self, logits: Tensor, gradient: Tensor) -> Mailboxes:
        kind = (logits.device, logits.shape[1], logits.dtype, gradient.dtype)
        if kind not in self.able:
            self._agree(_why_not(logits, gradient, dist.get_world_size(self.group)), logits.device)
            self.able.add(kind)
        if torch.cuda.is_current_stream_capturing():
            raise _refused("its launches are numbered and cannot be part of a CUDA graph")
        if not self.made or self.made[-1].capacity < len(logits):
            self.made.append(self._make(max(FEWEST_ROWS, 2 * len(logits)), logits.device))
        stream = torch.cuda.current_stream(logits.device)
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)  # launches follow each other: the next but one writes over what this reads
        self.stream = stream
        return self.made[-1]

    def _agree(self, reason: str, device: torch.device) -> None:
        failing = torch.tensor([int(bool(reason))], dtype=torch.int32, device=device)
        dist.all_reduce(failing, group=self.group)
        if int(failing):
            raise _refused(reason or f"{int(failing)} other ranks of its group cannot run it")

    def _make(self, capacity: int, device: torch.device) -> Mailboxes:
        size = dist.get_world_size(self.group)
        needed = core(device).module.cuda_mailbox_bytes(size, capacity)
        try:
            import torch.distributed._symmetric_memory as symmetric

            memory = symmetric.empty(needed, dtype=torch.uint8, device=device)
            memory.zero_()
            torch.cuda.synchronize(device)  # before any peer can write into it
            handle = symmetric.rendezvous(memory, self.group)
            peers = [handle.get_remote_tensor(rank, memory.shape, memory.dtype) for rank in range(size)]
        except (ImportError, AttributeError, RuntimeError) as error:
            raise _refused(f"torch makes no symmetric memory for the {size} ranks of its group: {error}") from error
        return Mailboxes(
            addresses=tuple(peer.data_ptr() for peer in peers),
            ticket=torch.zeros(1, dtype=torch.int32, device=device),
            capacity=capacity,
            rank=dist.get_rank(self.group),
            memory=(memory, handle, peers),
        )


def _why_not(logits: Tensor, gradient: Tensor, ranks: int) -> str:
    """Why this rank cannot run the kernel, empty where it can."""
    if not isinstance(core(logits.device), CudaCore):
        return f"it runs on CUDA devices, not on {logits.device}"
    if ranks > MOST_RANKS:
        return f"it knows at most {MOST_RANKS} ranks, not {ranks}"
    words = sharded_refusal(logits, gradient)
    return words and f"the device cannot run it for rows of {logits.shape[1]} columns ({words})"


def _refused(reason: str) -> KernelUnavailable:
    return KernelUnavailable(
        f"{VARIABLE}=one_read asks for the row kernel that reads a sharded vocabulary once, but {reason}. "
        "Leave it unset and logits are read twice"
    )
