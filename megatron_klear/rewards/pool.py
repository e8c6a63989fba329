"""Grading in worker processes with a hard kill: a response that cannot be graded in time costs its own time only."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_klear.types import Score, Verdict

from .base import SCHEMES, RewardError, RewardSettings, check_sources
from .worker import (
    LENGTH,
    MAX_ANSWER_BYTES,
    READY,
    TIMED_OUT,
    Answer,
    NoAnswerError,
    Refused,
    Request,
    WorkerJob,
    pack,
    read_answer,
)

_KILL_AFTER_SECONDS = 2.0  # past the limit: first the worker may stop by itself, which is quicker than a new one
_START_SECONDS = 120.0  # imports on a busy machine
_EXIT_SECONDS = 2.0
_MAX_FAILED_STARTS = 3
_READ_BYTES = 1 << 16
ENVIRONMENT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE"),
    *("LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHASHSEED", "PYTHONUTF8", "XDG_CACHE_HOME"),
    *("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "NLTK_DATA", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
)
"""Names of environment variables that grading processes get; none holds a secret."""
MEMORY_BYTES = 8 << 30
"""Address space of one worker; imports alone reserve some of it."""


class GradingPool:
    """Workers that grade responses; use it as a context manager, or `close` it.

    `timeout_seconds` is for one response. Then its worker is killed, another takes its place, and the response counts
    as `timeout`. A worker that dies by itself (out of memory, a crash in a library) makes the response an `error`.
    `workers` 0 is one per usable core. The workers start at once and import in the background.
    """

    def __init__(
        self,
        data_sources: Iterable[str],
        settings: RewardSettings | None = None,
        *,
        timeout_seconds: float = 5.0,
        workers: int = 0,
        memory_bytes: int = MEMORY_BYTES,
        trials: Sequence[Request] = (),
        environment: Sequence[str] = (),
    ) -> None:
        """Start the workers. Raises RewardError where a data source has no reward.

        They get the variables of `ENVIRONMENT` and those that `environment` names, and no others: no token of a hub, a
        tracker or a rollout server comes near to what a model wrote.

        `trials` are made-up responses that each worker judges before it is ready: `wait_until_ready` raises where a
        reward fails on one.
        """
        self.settings = settings or RewardSettings()
        sources = tuple(sorted(set(data_sources)))
        check_sources(sources, self.settings.functions)
        self._job = WorkerJob(
            settings=self.settings,
            data_sources=sources,
            timeout_seconds=timeout_seconds,
            memory_bytes=memory_bytes,
            trials=tuple(trials),
        )
        self._environment = tuple(environment)
        self.restarts = 0
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        for _ in range(workers or usable_cores()):
            self._start()

    def __enter__(self) -> GradingPool:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        self.close()

    def wait_until_ready(self) -> None:
        """Return when every worker has imported its rewards. Raises RewardError where one cannot."""
        while any(not worker.ready for worker in self._workers):
            self._step({})

    def grade(self, requests: Sequence[Request]) -> list[Score]:
        """Scores in the order of the requests, every one of them graded, timed out or an error.

        Raises RewardError where a worker cannot start.
        """
        waiting = deque(range(len(requests)))
        done: dict[int, Score] = {}
        while len(done) < len(requests):
            for worker in self._workers:
                if waiting and worker.ready and worker.task is None:
                    task = waiting.popleft()
                    worker.begin(task, requests[task], self._job.timeout_seconds + _KILL_AFTER_SECONDS)
                    self._watch(worker)
            self._step(done)
        return [done[task] for task in range(len(requests))]

    def close(self) -> None:
        """End all workers, whatever they are at. Closing twice is harmless."""
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()

    def failure(self, verdict: Verdict, note: str) -> Score:
        """The score of a response that could not be graded."""
        return Score(reward=SCHEMES[self.settings.scheme].value(verdict), verdict=verdict, note=note)

    def _step(self, done: dict[int, Score]) -> None:
        """Wait for the next answer, deadline or death, and deal with it."""
        now = time.monotonic()
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        for key, events in self._selector.select(max(0.0, min(deadlines) - now) if deadlines else None):
            worker: _Worker = key.data
            if worker not in self._workers:
                continue
            try:
                if events & selectors.EVENT_WRITE:
                    worker.write()
                    self._watch(worker)
                if events & selectors.EVENT_READ:
                    for number, answer in worker.read():
                        self._take(worker, number, answer, done)
            except (EOFError, OSError):
                self._bury(worker, done)
            except NoAnswerError as error:  # not what a worker says: a reward wrote among the answers
                self._forged(worker, str(error), done)
        now = time.monotonic()
        for worker in [w for w in self._workers if w.deadline is not None and w.deadline <= now]:
            self._overdue(worker, done)

    def _take(self, worker: _Worker, number: int, message: Answer, done: dict[int, Score]) -> None:
        if number != worker.number or (worker.ready and worker.task is None):
            raise NoAnswerError("a grading process answered what it was not asked")
        if not worker.ready:
            if message != READY:
                self.close()
                raise RewardError(message.words if isinstance(message, Refused) else str(message))
            worker.ready, worker.deadline, self._failed_starts = True, None, 0
            return
        assert worker.task is not None
        if isinstance(message, Score):
            done[worker.task] = message
        else:
            failed = self.failure(Verdict.ERROR, str(message))
            done[worker.task] = self._timed_out() if message == TIMED_OUT else failed
        worker.task = worker.deadline = None

    def _forged(self, worker: _Worker, words: str, done: dict[int, Score]) -> None:
        """Replace a worker that answers with what is none; the response it was at is an error."""
        self._replace(worker)
        if worker.task is not None:
            done[worker.task] = self.failure(Verdict.ERROR, words)

    def _overdue(self, worker: _Worker, done: dict[int, Score]) -> None:
        """Replace a worker whose time is up."""
        if worker.task is None:
            self._bury(worker, done)
            return
        done[worker.task] = self._timed_out()
        self._replace(worker)

    def _bury(self, worker: _Worker, done: dict[int, Score]) -> None:
        """Replace a worker that died, or that did not start in time."""
        late = worker.deadline is not None and worker.deadline <= time.monotonic()
        if not late:
            worker.wait()
        code = self._replace(worker)
        if worker.task is not None:
            words = f"the grading process ended with exit code {code}"
            done[worker.task] = self._timed_out() if late else self.failure(Verdict.ERROR, words)
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self.close()
                raise RewardError(
                    f"grading processes do not start (exit code {code}, {_MAX_FAILED_STARTS} times in a row): their "
                    "own messages are above; is the machine out of memory, or a module of [reward.functions] broken?"
                )

    def _timed_out(self) -> Score:
        return self.failure(Verdict.TIMEOUT, f"not graded within {self._job.timeout_seconds:g} s")

    def _replace(self, worker: _Worker) -> int:
        code = self._end(worker)
        self.restarts += 1
        self._start()
        return code

    def _start(self) -> None:
        worker = _Worker(self._job, self._environment)
        self._workers.append(worker)
        self._watch(worker)

    def _end(self, worker: _Worker) -> int:
        for stream in (worker.stdin, worker.stdout):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
        if worker in self._workers:
            self._workers.remove(worker)
        return worker.kill()

    def _watch(self, worker: _Worker) -> None:
        """Listen to a worker, and for room in its pipe while there is something left to write."""
        registered: Mapping[Any, selectors.SelectorKey] = self._selector.get_map()
        if worker.stdout not in registered:
            self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        if worker.unwritten and worker.stdin not in registered:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        elif not worker.unwritten and worker.stdin in registered:
            self._selector.unregister(worker.stdin)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A grading process, seen from its parent; its pipes never block."""

    def __init__(self, job: WorkerJob, names: Sequence[str]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), os.getcwd()]
        kept = {name: os.environ[name] for name in (*ENVIRONMENT, *names) if name in os.environ}
        environment = {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
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
        self.task: int | None = None
        self.deadline: float | None = time.monotonic() + _START_SECONDS
        self.unwritten = memoryview(pack(job))
        self._unread = bytearray()

    def begin(self, task: int, request: Request, seconds: float) -> None:
        """Give the worker something to do; its time runs from now."""
        self.task, self.deadline, self.number = task, time.monotonic() + seconds, self.number + 1
        self.unwritten = memoryview(pack((self.number, request)))

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
