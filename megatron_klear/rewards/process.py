"""A grading process, seen from its parent: started, asked, read, killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from megatron_klear.types import Score

from .worker import LENGTH, MAX_ANSWER_BYTES, Answer, NoAnswerError, Request, WorkerJob, pack, read_answer

_START_SECONDS = 120.0  # imports on a busy machine
_EXIT_SECONDS = 2.0
_READ_BYTES = 1 << 16
ENVIRONMENT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE"),
    *("LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHASHSEED", "PYTHONUTF8", "XDG_CACHE_HOME"),
    *("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "NLTK_DATA", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
)
"""Names of environment variables that grading processes get; none holds a secret."""


@dataclass(eq=False, slots=True)
class Task:
    """A response to grade and who waits for its score."""

    request: Request
    future: Future[Score] = field(default_factory=Future)


def import_paths() -> list[str]:
    """Where a process that this one starts finds the modules that this one does: the package, PYTHONPATH, here."""
    root = str(Path(__file__).resolve().parents[2])
    return [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), os.getcwd()]


class GradingProcess:
    """One worker; its pipes never block."""

    def __init__(self, job: WorkerJob, names: Sequence[str]) -> None:
        """Start it with the variables of `ENVIRONMENT` and of `names`; it reads its job, then imports the rewards."""
        kept = {name: os.environ[name] for name in (*ENVIRONMENT, *names) if name in os.environ}
        environment = {**kept, "PYTHONPATH": os.pathsep.join(import_paths()), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from megatron_klear.rewards.worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # so that what a reward starts is killed with it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self.ready = False
        self.number = 0  # of what it was asked last; the job is the first
        self.task: Task | None = None
        self.deadline: float | None = time.monotonic() + _START_SECONDS
        self.unwritten = memoryview(pack(job))
        self._unread = bytearray()

    def begin(self, task: Task, seconds: float) -> None:
        """Give the worker something to do; its time runs from now. Raises where the request cannot be pickled."""
        self.unwritten = memoryview(pack((self.number + 1, task.request)))
        self.task, self.deadline, self.number = task, time.monotonic() + seconds, self.number + 1

    def write(self) -> None:
        """Write what the pipe has room for. Raises BrokenPipeError where the process is gone."""
        self.unwritten = self.unwritten[os.write(self.stdin, self.unwritten) :]

    def read(self) -> list[tuple[int, Answer]]:
        """The answers that are complete, each with the number of what was asked.

        Raises EOFError where the process is gone, NoAnswerError where it says what is none.
        """
        content = os.read(self.stdout, _READ_BYTES)
        if not content:
            raise EOFError
        self._unread += content
        messages = []
        while len(self._unread) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._unread)
            if size > MAX_ANSWER_BYTES:
                raise NoAnswerError(f"a grading process announced an answer of {size} bytes")
            end = LENGTH.size + size
            if len(self._unread) < end:
                break
            messages.append(read_answer(bytes(self._unread[LENGTH.size : end])))
            del self._unread[:end]
        return messages

    def wait(self) -> None:
        """Give a process that closed its pipe the moment that its exit takes, so that its own code is told."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)

    def kill(self) -> int:
        """End the process and what it started; returns its exit code."""
        code = self._process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        waited = self._process.wait()
        return waited if code is None else code
