"""The one place where Python objects and arrays of numpy cross ranks: a few verbs, all of them collective.

Tensors of the training itself go by Megatron's groups; what goes here is control: numbers that every rank plans with,
rows that one data rank trains, errors. It goes by a group of its own where training is on GPUs (`use_group`), so that
nothing here meets NCCL, and no group of Megatron's needs sockets for it.

Errors cross as words: a UserError arrives as one, anything else as RuntimeError that names the rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear.distributed import wire
from megatron_klear.errors import UserError

Result = TypeVar("Result")

BEAT_SECONDS = 30.0
"""How often ranks that wait for work of hours tell each other that they do; far below any collective's time-out."""

CHUNK_BYTES = 4 << 20
"""What a rank has received of an array before it begins to send it on."""

_FAILED = "klear/failed"  # key of the store
_group: dist.ProcessGroup | None = None


def use_group(group: dist.ProcessGroup | None) -> None:
    """Have every later exchange go by `group`, of all ranks and on the CPU; None is torch.distributed's default."""
    global _group
    _group = group


def rank() -> int:
    """This process's place among all; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many ranks there are; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is rank 0, which speaks for the run."""
    return rank() == 0


def tell_all(value: Result) -> Result:
    """Rank 0's value, on every rank; what the others pass is not looked at."""
    if size() == 1:
        return value
    message: list[Any] = [value if is_first() else None]
    dist.broadcast_object_list(message, src=0, group=_group)
    told: Result = message[0]
    return told


def tell_group(value: Result, source: int, group: dist.ProcessGroup) -> Result:
    """The value of the rank that is `source` among all ranks, on every rank of one of Megatron's groups."""
    message: list[Any] = [value if rank() == source else None]
    dist.broadcast_object_list(message, src=source, group=group)
    told: Result = message[0]
    return told


def gather_all(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """The values of all ranks in their order, on every rank; or of one of Megatron's groups.

    For a few bytes: everybody receives everything.
    """
    count = size() if group is None else dist.get_world_size(group)
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value, group=_group if group is None else group)
    return values


def gather_first(value: Result, senders: Sequence[int] | None = None) -> list[Result]:
    """The values of all ranks in their order, on rank 0; empty on the others.

    Where only `senders` have something to tell, its own and theirs: rank 0 hears one after the other.
    """
    if size() == 1:
        return [value]
    # Not torch's gather_object, which pads every message to the longest: where one rank of each replica has something
    # to tell, rank 0 would receive it once for every rank of the world.
    if not is_first():
        if senders is None or rank() in senders:
            _send(value, 0)
        return []
    return [value, *(_pass_on(sender, None) for sender in (range(size()) if senders is None else senders) if sender)]


def give_each(parts: Sequence[Result], receivers: Sequence[Sequence[int]]) -> Result:
    """To every rank the part that is meant for it: part i of rank 0's goes to the ranks of `receivers[i]`.

    Every rank passes the same `receivers`, which name each rank once; `parts` is rank 0's alone. A part leaves rank 0
    once, for the first of its receivers, and goes on from rank to rank: each sends what it has of it while it receives
    the rest, so that the last has it hardly later than the first. No rank receives another's.
    """
    if size() == 1:
        return parts[0]
    own = next(part for part, ranks in enumerate(receivers) if rank() in ranks)
    # Rank 0, where it is among them, goes before them, for it has the part.
    chain = sorted(receivers[own], key=lambda member: member != 0)
    place = chain.index(rank())
    after = chain[place + 1] if place + 1 < len(chain) else None
    if not is_first():
        passed: Result = _pass_on(chain[place - 1] if place else 0, after)
        return passed
    for part, ranks in enumerate(receivers):
        if part != own:
            _send(parts[part], ranks[0])
    if after is not None:
        _send(parts[own], after)
    return parts[own]


def from_first_rank(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, on every rank. Where it raises, every rank raises."""
    result: Result = _of_first(function, everywhere=True)
    return result


def on_first_rank(function: Callable[[], Result]) -> Result | None:
    """What `function` returns on rank 0, None elsewhere: only its end is told. Where it raises, every rank raises."""
    result: Result | None = _of_first(function, everywhere=False)
    return result


def same_outcome(function: Callable[[], Result]) -> Result:
    """What `function` returns on this rank, unless it raises on some rank: then every rank raises."""
    if size() == 1:
        return function()
    own: Exception | None = None
    result: Any = None
    try:
        result = function()
    except Exception as error:
        own = error
    told = gather_all(None if own is None else _told(own))
    if own is not None:
        raise own
    for of_rank, message in enumerate(told):
        if message is not None:
            raise _error(of_rank, message)
    value: Result = result
    return value


def patiently(function: Callable[[], Result]) -> Result:
    """`same_outcome` of work that may take longer than a collective's time-out: who is done waits for the others.

    `function` runs in a thread of its own and must use neither torch.distributed nor the GPU.
    """
    if size() == 1:
        return function()
    with ThreadPoolExecutor(max_workers=1) as pool:
        work = pool.submit(function)
        done = torch.zeros(())
        while not done:
            wait([work], timeout=BEAT_SECONDS)
            done = torch.tensor(float(work.done()))
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=_group)
    return same_outcome(work.result)


def tell_failed() -> None:
    """Leave word for the others that this rank ends by an error. No collective, and it raises nothing."""
    if size() > 1:
        with contextlib.suppress(Exception):  # the error that ends this rank is the one to know
            dist.distributed_c10d._get_default_store().set(_FAILED, "1")


def has_failed() -> bool:
    """Whether a rank left word that it ended by an error, as far as can be heard. No collective."""
    with contextlib.suppress(Exception):
        return size() > 1 and bool(dist.distributed_c10d._get_default_store().check([_FAILED]))
    return False


def _of_first(function: Callable[[], Result], *, everywhere: bool) -> Any:
    if size() == 1:
        return function()
    own: Exception | None = None
    message: tuple[Any, tuple[bool, str] | None] = (None, None)
    result: Any = None
    if is_first():
        try:
            result = function()
            message = (result if everywhere else None, None)
        except Exception as error:
            own, message = error, (None, _told(error))
    told, failure = tell_all(message)
    if own is not None:
        raise own
    if failure is not None:
        raise _error(0, failure)
    return told if everywhere else result


def _send(value: Any, to: int) -> None:
    # Lengths, then the bytes, so that nothing is padded to the longest part.
    head, beside = wire.taken_apart(value)
    sizes = [buffer.nbytes for buffer in beside]
    for message in (torch.tensor([len(sizes), len(head)]), torch.tensor(sizes), _tensor(head)):
        if len(message):
            dist.send(message, to, group=_group)
    for buffer in beside:
        _wait_for([dist.isend(chunk, to, group=_group) for chunk in _chunks(_tensor(buffer))])


def _pass_on(sender: int, to: int | None) -> Any:
    """What `sender` sends; where `to` is a rank, it gets the bytes as they come."""
    sent: list[dist.Work | None] = []

    def passed(message: torch.Tensor) -> torch.Tensor:
        dist.recv(message, sender, group=_group)
        if to is not None:
            sent.append(dist.isend(message, to, group=_group))
        return message

    count, length = passed(torch.zeros(2, dtype=torch.int64)).tolist()
    sizes = passed(torch.zeros(count, dtype=torch.int64)).tolist() if count else []
    head = passed(torch.empty(length, dtype=torch.uint8))
    # NumPy's memory, not torch's: it asks for huge pages, and small ones take longer to get than to fill.
    beside = [np.empty(size, np.uint8) for size in sizes]
    for buffer in beside:
        for chunk in _chunks(torch.from_numpy(buffer)):
            passed(chunk)
    _wait_for(sent)
    return wire.put_together(head.numpy().data, [buffer.data for buffer in beside])


def _chunks(buffer: torch.Tensor) -> Iterator[torch.Tensor]:
    return (buffer[start : start + CHUNK_BYTES] for start in range(0, len(buffer), CHUNK_BYTES))


def _wait_for(sent: Sequence[dist.Work | None]) -> None:
    for work in sent:
        if work is not None:  # as torch has it for a rank outside of the group
            work.wait()


def _tensor(content: bytes | memoryview) -> torch.Tensor:
    # The memory itself, but of what may not be written a copy, for torch has no tensor of it.
    return torch.frombuffer(bytearray(content) if memoryview(content).readonly else content, dtype=torch.uint8)


def _told(error: Exception) -> tuple[bool, str]:
    # Words rather than the error itself, which may not survive the way.
    return isinstance(error, UserError), str(error) if isinstance(error, UserError) else repr(error)


def _error(of_rank: int, message: tuple[bool, str]) -> Exception:
    mendable, text = message
    return UserError(text) if mendable else RuntimeError(f"rank {of_rank} failed: {text}")
