"""Memory through which the kernels of a vocabulary's shards tell each other a row's statistics while they run.

Each rank has a mailbox that all others write into, in symmetric memory of the devices (one NVLink or P2P domain).
It is made once for a group and asked for by KLEAR_CUDA_SHARDED_KERNEL: `one_read`, or `auto` for two reads where a rank
of the group cannot. That kernel has not run on a GPU yet.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.kernels.extension import CudaCore, KernelUnavailable, core
from megatron_klear.kernels.rows import sharded_refusal

VARIABLE = "KLEAR_CUDA_SHARDED_KERNEL"
MODES = ("two_read", "one_read", "auto")
TIMEOUT_SECONDS = 600
"""How long a row waits for a peer before its kernel traps, which is an error of the CUDA context: as long as torch's
collectives wait by default."""
MOST_RANKS = 16  # KLEAR_MOST_RANKS of csrc/policy_loss.h
FEWEST_ROWS = 4096  # 512 KiB for two ranks

_log = logging.getLogger(__name__)


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


def mode() -> str:
    """How the rows of a sharded vocabulary are to be read: one of `MODES`. Raises ValueError where it is nonsense."""
    name = os.environ.get(VARIABLE) or MODES[0]
    if name not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, not {name!r}")
    return name


_groups: dict[str, _Group] = {}


def group_mailboxes(group: dist.ProcessGroup, logits: Tensor, gradient: Tensor) -> Mailboxes | None:
    """The group's mailboxes for a chunk [C, V_local] of logits, or None where its rows are to be read twice.

    A collective of the group, of which every rank must have the same `mode`, where mailboxes are made and where width
    and types are new: all must be able to run the kernel before any starts it. Where one is not, all raise
    KernelUnavailable under `one_read`, and all have None under `auto`, which says so once.
    """
    chosen = mode()
    if chosen == "two_read":
        return None
    name = str(group.group_name)
    known = _groups.get(name)
    if known is None or known.group is not group:
        known = _groups[name] = _Group(group)
    found, reason = known.mailboxes(logits, gradient)
    if reason and chosen == "one_read":
        raise KernelUnavailable(
            f"{VARIABLE}=one_read asks for the row kernel that reads a sharded vocabulary once, but {reason}. "
            "Leave it unset, or set it to auto, and logits are read twice"
        )
    if reason and reason not in known.said:
        known.said.add(reason)
        _log.warning("%s=auto: logits are read twice, for %s", VARIABLE, reason)
    return found


class _Group:
    """What has been made for a group and found out of it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.refusals: dict[tuple[Any, ...], str] = {}  # by kind of chunk, empty where the ranks can
        self.made: list[Mailboxes] = []  # the last is in use; a peer's kernel may still write into one before
        self.stream: torch.cuda.Stream | None = None
        self.said: set[str] = set()

    def mailboxes(self, logits: Tensor, gradient: Tensor) -> tuple[Mailboxes | None, str]:
        """The group's mailboxes, or why some rank cannot use any."""
        kind = (logits.device, logits.shape[1], logits.dtype, gradient.dtype)
        if kind not in self.refusals:
            self.refusals[kind] = self._agreed(_why_not(logits, gradient, self._size()), logits.device)
        if self.refusals[kind]:
            return None, self.refusals[kind]
        if torch.cuda.is_current_stream_capturing():
            return None, "its launches are numbered and cannot be part of a CUDA graph"
        if not self.made or self.made[-1].capacity < len(logits):
            made, reason = self._make(max(FEWEST_ROWS, 2 * len(logits)), logits.device)
            self.refusals[kind] = self._agreed(reason, logits.device)
            if made is None or self.refusals[kind]:
                return None, self.refusals[kind]
            self.made.append(made)
        stream = torch.cuda.current_stream(logits.device)
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)  # launches follow each other: the next but one writes over what this reads
        self.stream = stream
        return self.made[-1], ""

    def _size(self) -> int:
        return dist.get_world_size(self.group)

    def _agreed(self, reason: str, device: torch.device) -> str:
        """Why some rank cannot, empty where all can."""
        failing = torch.tensor([int(bool(reason))], dtype=torch.int32, device=device)
        dist.all_reduce(failing, group=self.group)
        return reason or (f"{int(failing)} other ranks of its group cannot run it" if int(failing) else "")

    def _make(self, capacity: int, device: torch.device) -> tuple[Mailboxes | None, str]:
        """Mailboxes, or why there are none."""
        size = self._size()
        needed = core(device).module.cuda_mailbox_bytes(size, capacity)
        try:
            import torch.distributed._symmetric_memory as symmetric

            memory = symmetric.empty(needed, dtype=torch.uint8, device=device)
            memory.zero_()
            torch.cuda.synchronize(device)  # before any peer can write into it
            handle = symmetric.rendezvous(memory, self.group)
            peers = [handle.get_remote_tensor(rank, memory.shape, memory.dtype) for rank in range(size)]
        except (ImportError, AttributeError, RuntimeError) as error:
            return None, f"torch makes no symmetric memory for the {size} ranks of its group: {error}"
        made = Mailboxes(
            addresses=tuple(peer.data_ptr() for peer in peers),
            ticket=torch.zeros(1, dtype=torch.int32, device=device),
            capacity=capacity,
            rank=dist.get_rank(self.group),
            memory=(memory, handle, peers),
        )
        return made, ""


def _why_not(logits: Tensor, gradient: Tensor, ranks: int) -> str:
    """Why this rank cannot run the kernel, empty where it can."""
    if not isinstance(core(logits.device), CudaCore):
        return f"it runs on CUDA devices, not on {logits.device}"
    if ranks > MOST_RANKS:
        return f"it knows at most {MOST_RANKS} ranks, not {ranks}"
    words = sharded_refusal(logits, gradient)
    return words and f"the device cannot run it for rows of {logits.shape[1]} columns ({words})"
