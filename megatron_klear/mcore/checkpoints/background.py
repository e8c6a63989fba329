"""Processes that write a checkpoint behind the training: forked, and ended by the kernel when their parent ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from megatron_klear.mcore import device as device_shim
from megatron_klear.mcore.checkpoints import manifest

device_shim.install()

import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async  # noqa: E402  (shim first)

_PR_SET_PDEATHSIG = 1


def fork_result_queue() -> None:
    """Make Megatron's queue of write results by forking.

    Its own way spawns a process, which imports the entry script again: seconds on every rank, and a run started twice
    by a script without a `__main__` guard. The forked process ends with this one, killed or not; until then it keeps
    its own copy of every page that is written here after the fork. Hence once, before there is a model in memory.
    """
    if getattr(filesystem_async, "_results_queue", "absent") is not None:
        return
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=_end_with_parent, initargs=(os.getpid(),))
    filesystem_async._results_queue = manager.Queue()


def ending_with_this(write: Callable[..., None] | None, hidden: Path, rank: int) -> Callable[..., None] | None:
    """`write` for a forked process that must not outlive this one: a resumed run would meet it in the same folder.

    What it wrote is hashed and flushed there as well.
    """
    return None if write is None else partial(_write_while_parent_lives, os.getpid(), write, hidden, rank)


def _write_while_parent_lives(
    parent: int, write: Callable[..., None], hidden: Path, rank: int, *args: Any, **kwargs: Any
) -> None:
    own = os.getpid()
    os.register_at_fork(after_in_child=lambda: _end_with_parent(own))  # it forks one process a file
    _end_with_parent(parent)
    write(*args, **kwargs)
    manifest.note_written(hidden, rank)


def _end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which forked it, ends, and nothing else end it before.

    torchrun's SIGTERM and a terminal's Ctrl-C go to a rank's whole process group: a run that is told to stop saves as
    it leaves, and the save that is under way is whole as well.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
