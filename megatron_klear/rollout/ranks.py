"""Ranks that share one outcome, so that none is left waiting for another that failed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_klear.errors import UserError

Result = TypeVar("Result")

BEAT_SECONDS = 30.0
"""How often ranks that wait for work of hours tell each other that they do; far below any collective's time-out."""


def from_first_rank(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, on every rank. Collective.

    Where it raises, every rank raises: UserError as UserError, anything else as RuntimeError on the other ranks.
    """
    if not _several():
        return function()
    message: list[Any] = [None, None]
    own: Exception | None = None
    if dist.get_rank() == 0:
        try:
            message[0] = function()
        except Exception as error:
            own, message[1] = error, _told(error)
    dist.broadcast_object_list(message, src=0)
    if own is not None:
        raise own
    if message[1] is not None:
        raise _error(0, message[1])
    result: Result = message[0]
    return result


def same_outcome(function: Callable[[], Result]) -> Result:
    """What `function` returns on this rank, unless it raises on some rank: then every rank raises. Collective."""
    if not _several():
        return function()
    own: Exception | None = None
    result: Any = None
    try:
        result = function()
    except Exception as error:
        own = error
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if own is None else _told(own))
    if own is not None:
        raise own
    for rank, message in enumerate(told):
        if message is not None:
            raise _error(rank, message)
    value: Result = result
    return value


def patiently(function: Callable[[], Result]) -> Result:
    """`same_outcome` of work that may take longer than a collective's time-out: who is done waits for the others.

    `function` runs in a thread of its own and must use neither torch.distributed nor the GPU. Collective.
    """
    if not _several():
        return function()
    with ThreadPoolExecutor(max_workers=1) as pool:
        work = pool.submit(function)
        done = torch.zeros(())
        while not done:
            wait([work], timeout=BEAT_SECONDS)
            done = torch.tensor(float(work.done()))
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return same_outcome(work.result)


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _told(error: Exception) -> tuple[bool, str]:
    # Words rather than the error itself, which may not survive the way.
    return isinstance(error, UserError), str(error) if isinstance(error, UserError) else repr(error)


def _error(rank: int, message: tuple[bool, str]) -> Exception:
    mendable, text = message
    return UserError(text) if mendable else RuntimeError(f"rank {rank} failed: {text}")
