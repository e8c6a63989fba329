"""The orchestrator's process: started by rank 0, served over a link, gone with rank 0 however that one ends.

`main` is given the numbers of two inherited descriptors, the link's and the lifeline's. Rank 0 calls, the orchestrator
answers; before it answers it may ask the trainer for something itself, and tell people something.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

from megatron_klear.config.rl import SamplingConfig
from megatron_klear.config.start import GPPOStart
from megatron_klear.errors import configure_logging
from megatron_klear.orchestrator.link import Link, LinkClosedError, told
from megatron_klear.orchestrator.orchestrator import Orchestrator
from megatron_klear.orchestrator.trainer import Delivery
from megatron_klear.types import Prompt, Sample

_WORK_SECONDS = 0.05
"""Between two looks at what is under way while the trainer trains."""
_SIGNAL_SECONDS = 0.5
CALLS = ["open_grading", "open", "sync", "next_step", "arrays", "keep"]
CALLS += ["validate", "sample", "sleep", "flush", "state", "load_state"]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Spawned:
    """The process as rank 0 sees it: closing `lifeline` ends it, whatever it is at."""

    process: subprocess.Popen[bytes]
    link: Link
    lifeline: socket.socket


def spawn() -> Spawned:
    """Start the process, in a session of its own: signals to rank 0's group are for rank 0 to deal with."""
    (ours, theirs), (kept, watched) = socket.socketpair(), socket.socketpair()
    descriptors = theirs.fileno(), watched.fileno()
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    process = subprocess.Popen(
        # Not -m, under which the errors of this module would be those of a module that rank 0 does not have.
        [sys.executable, "-c", f"from {__name__} import main; main()", *map(str, descriptors)],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        pass_fds=descriptors,
        start_new_session=True,
    )
    theirs.close()
    watched.close()
    return Spawned(process, Link(ours), kept)


class TrainerFailedError(Exception):
    """The trainer could not do what it was asked, and knows why."""


class RemoteTrainer:
    """The trainer at the other end of a link; see Trainer."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def make_room(self) -> None:
        self._ask("make_room")

    def deliver(self, version: int, urls: Sequence[str], gone: Sequence[str]) -> Delivery:
        return cast(Delivery, self._ask("deliver", version, urls, gone))

    def check_echo(self, version: int, answers: Mapping[str, Any]) -> None:
        self._ask("check_echo", version, answers)

    def load(self, version: int) -> None:
        self._ask("load", version)

    def draw(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[list[Sample]]:
        return cast(list[list[Sample]], self._ask("draw", prompts, sampling, seed))

    def free(self) -> None:
        self._ask("free")

    def _ask(self, name: str, *arguments: Any) -> Any:
        self._link.send(("ask", name, arguments))
        kind, value = self._link.receive()
        if kind == "failed":
            raise TrainerFailedError(value)
        return value


def serve(link: Link) -> None:
    """Answer calls until the other end is gone or says that it is over."""
    start: GPPOStart = link.receive()
    trainer = RemoteTrainer(link)

    def tell(text: str) -> None:
        link.send(("say", text))

    opened: list[Orchestrator] = []

    def answer(name: str, arguments: tuple[Any, ...]) -> Any:
        if name not in CALLS:
            raise ValueError(f"the orchestrator has no call {name!r}")
        return getattr(opened[0], name)(*arguments)

    def begin() -> list[str]:
        opened.append(Orchestrator(start, trainer, tell))
        return opened[0].warnings()

    try:
        _answer(link, begin)
        while True:
            idle = _WORK_SECONDS if opened and opened[0].draws_ahead else None
            message = link.receive(idle)
            if message == "close":
                return
            if message is None:
                opened[0].work()
                continue
            name, arguments = message
            _answer(link, partial(answer, name, arguments))
    finally:
        for one in opened:
            one.__exit__()


def _answer(link: Link, call: Callable[[], Any]) -> None:
    try:
        message = ("result", call())
    except LinkClosedError:
        raise
    except Exception as error:
        message = ("error", told(error, traceback.format_exc()))
    link.send(message)


def _end_with(lifeline: socket.socket) -> None:
    """Have this process end as soon as the other end of `lifeline` is closed, if only by the death of its holder."""

    def watch() -> None:
        lifeline.recv(1)
        while True:  # a signal that comes just before the main thread blocks in a call does not wake it
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_SIGNAL_SECONDS)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _terminated(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: servers are being ended
    raise SystemExit(0)


def main() -> None:
    """Serve the descriptors of the command line."""
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link, lifeline = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    for end in (link, lifeline):
        end.set_inheritable(False)
    _end_with(lifeline)
    configure_logging()
    with contextlib.suppress(LinkClosedError):
        serve(Link(link))
