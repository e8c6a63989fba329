"""SIGTERM and Ctrl-C: the step that runs is finished, a checkpoint is saved, and all ranks leave together.

    with Leaving(topology) as leaving:
        while ...:
            train a step
            if leaving.asked():     # collective: the same answer on every rank
                save
                raise leaving.left(step, folder)

The exit code is 128 + the signal: 143 after SIGTERM, 130 after Ctrl-C. Ctrl-C pressed again ends the process at once.

SIGTERM is also how torchrun ends the ranks that are left where one failed. Their step will never end, on NCCL without
an error of its own: a rank that was told to stop and hears that another failed ends at once, with exit code 1.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron_klear.distributed import exchange
from megatron_klear.errors import RunLeft
from megatron_klear.mcore.topology import Topology

_SAME_PRESS_SECONDS = 1.0
"""A terminal sends Ctrl-C to all processes and torchrun forwards its own: one press reaches a rank twice."""
_LISTEN_SECONDS = 0.5
_OWN_END_SECONDS = 3.0
"""For a rank that meets the same error, or one that follows from it, to end in its own way."""


class Leaving:
    """Takes SIGTERM and SIGINT while a run trains; outside the main thread, where Python has no signals, takes none."""

    def __init__(self, topology: Topology) -> None:
        self._topology, self._pressed, self._pid = topology, 0.0, os.getpid()
        self._signal = self._agreed = 0
        self._before: dict[int, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> Leaving:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
            if self._topology.size > 1:
                threading.Thread(target=self._listen, name="failures", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Put back the handlers that were there."""
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether any rank was asked to stop. Collective: one number over the world."""
        # A signal that comes while the ranks wait here is the next call's: the answer must not take its place.
        self._agreed = int(self._topology.all_reduce([float(self._signal)], op=dist.ReduceOp.MAX)[0])
        return self._agreed != 0

    def left(self, step: int, checkpoint: Path) -> RunLeft:
        """The error that ends the run after its checkpoint was saved."""
        name = "Ctrl-C" if self._agreed == signal.SIGINT else "SIGTERM"
        return RunLeft(
            f"{name}: stopped after step {step}, saved {checkpoint}; the same command goes on from there",
            128 + self._agreed,
        )

    def _take(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # forked a moment ago, and about to ignore signals: it writes a checkpoint
            return
        now = time.monotonic()
        if number == signal.SIGINT and self._pressed and now - self._pressed > _SAME_PRESS_SECONDS:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\ninterrupted again: ended without saving\n")
            os._exit(130)
        if number == signal.SIGINT and not self._pressed:
            self._pressed = now
        self._signal = max(self._signal, int(number))

    def _listen(self) -> None:
        """End this rank where it was told to stop, another failed, and its step goes on regardless."""
        while not self._over.wait(_LISTEN_SECONDS):
            if self._signal != signal.SIGTERM or not exchange.has_failed():
                continue
            if not self._over.wait(_OWN_END_SECONDS):
                words = f"rank {self._topology.rank}: another rank failed, and this one ends without its step\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, words.encode())
                os._exit(1)
