"""The orchestrator in a fork of rank 0, with parts of it replaced: for tests of what it and the trainer do together."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable

from megatron_klear.orchestrator.link import Link
from megatron_klear.orchestrator.process import Spawned, serve


class Forked:
    """A forked process as subprocess.Popen shows one, as far as Rollouts asks."""

    def __init__(self, pid: int) -> None:
        self.pid, self._code, self._reaping = pid, None, threading.Lock()

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while not self._has_ended():
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("orchestrator", timeout)
            else:
                time.sleep(0.01)
        return self._code

    def _has_ended(self) -> bool:
        with self._reaping:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code is not None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def spawning(prepare: Callable[[], None]) -> Callable[[], Spawned]:
    """What takes the place of `process.spawn`; `prepare` runs in the fork, before anything is read."""

    def spawn() -> Spawned:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid:
            theirs.close()
            return Spawned(Forked(pid), Link(ours), socket.socket())
        try:
            ours.close()
            prepare()
            serve(Link(theirs))
        finally:
            os._exit(0)

    return spawn
