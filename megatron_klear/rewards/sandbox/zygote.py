"""A slot's process, seen from outside: started, spoken to, ended."""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_klear.rewards.base import RewardError

from .remedies import remedy

_START_SECONDS = 60.0  # on a busy machine
_EXIT_SECONDS = 2.0
_MESSAGE_BYTES = 1 << 16
_MOST_REQUEST_BYTES = 100 << 10
_STACK_BYTES = 512 << 20


class LostError(Exception):
    """The sandbox has ended or does not answer."""


class Zygote:
    """A started slot; `command` makes its command of the descriptor of its control socket.

    It ends with the thread that starts it. Raises RewardError where it does not start.
    """

    def __init__(self, command: Callable[[int], list[str]], environment: dict[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = os.memfd_create("errors")
        try:
            with theirs, _large_stack():
                self.process = subprocess.Popen(
                    command(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    env=environment,
                    start_new_session=True,
                )
        except BaseException:
            self._control.close()
            os.close(self._errors)
            raise
        try:
            self.receive(_START_SECONDS)
        except LostError as error:
            self.close()
            raise RewardError(f"the sandbox does not start ({error}): {remedy(str(error))}") from None
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self.process.poll() is None

    def ask(self, requests: Sequence[dict[str, Any]], descriptors: Sequence[int]) -> None:
        """Begin a program, or two at once. Raises LostError, or RewardError where the request is too long."""
        content = json.dumps(requests).encode()
        if len(content) > _MOST_REQUEST_BYTES:
            raise RewardError(f"a prelude of {len(content)} bytes is too long; {_MOST_REQUEST_BYTES} are the most")
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        try:
            self._control.sendmsg([content], [rights])
        except OSError as error:
            raise LostError(f"the sandbox has ended ({error.strerror})") from None

    def command(self, word: bytes) -> None:
        """Tell the program's keeper something. Raises LostError."""
        try:
            self._control.send(word)
        except OSError as error:
            raise LostError(f"the sandbox has ended ({error.strerror})") from None

    def receive(self, timeout_seconds: float) -> dict[str, Any]:
        """What is said next in the sandbox, by its trusted part. Raises LostError."""
        self._control.settimeout(timeout_seconds)
        try:
            content = self._control.recv(_MESSAGE_BYTES)
        except TimeoutError:
            raise LostError(f"no answer for {timeout_seconds:.0f} s") from None
        except OSError as error:
            raise LostError(str(error.strerror)) from None
        if not content:
            raise LostError(self._last_words())
        message: dict[str, Any] = json.loads(content)
        return message

    def close(self) -> None:
        """End it and everything in it."""
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_SECONDS)
        self.process.kill()
        self.process.wait()
        os.close(self._errors)

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_SECONDS)
        lines = os.pread(self._errors, 1 << 16, 0).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it has ended, exit code {self.process.poll()}"


@contextlib.contextmanager
def _large_stack() -> Iterator[None]:
    """Let what is started meanwhile have a large stack: recursion through C needs it, and exec lays it out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    large = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (large, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def plain_environment() -> dict[str, str]:
    """Nothing of this process's environment but the way to programs."""
    return {"PATH": os.environ.get("PATH", os.defpath)}
