"""Grading in worker processes with a hard kill: a response that cannot be graded in time costs its own time only."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_klear.types import Score, Verdict

from .base import RewardError, RewardSettings, check_sources
from .owner import OwnedPool, PoolClosedError
from .process import ENVIRONMENT, GradingProcess
from .worker import READY, TIMED_OUT, Answer, NoAnswerError, Refused, Request, WorkerJob

__all__ = ["ENVIRONMENT", "MEMORY_BYTES", "GradingPool", "PoolClosedError", "usable_cores"]

_KILL_AFTER_SECONDS = 2.0  # past the limit: first the worker may stop by itself, which is quicker than a new one
_MAX_FAILED_STARTS = 3
_READ_BYTES = 1 << 12
MEMORY_BYTES = 8 << 30
"""Address space of one worker; imports alone reserve some of it."""


class GradingPool(OwnedPool):
    """Workers that grade responses; use it as a context manager, or `close` it.

    `timeout_seconds` is for one response. Then its worker is killed, another takes its place, and the response counts
    as `timeout`. A worker that dies by itself (out of memory, a crash in a library) makes the response an `error`.
    `workers` 0 is one per usable core. The workers start at once and import in the background. `restarts` counts those
    that took the place of another.
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
        super().__init__(settings or RewardSettings())
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
        self._wakes, self._waker = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._waker, False)
        self._selector.register(self._wakes, selectors.EVENT_READ)
        self._workers: list[GradingProcess] = []
        self._failed_starts = 0
        try:
            for _ in range(workers or usable_cores()):
                self._start()
            self._owner.start()
        except BaseException:
            self._end()
            raise

    def _turn(self) -> None:
        """Hand out what waits, then wait for the next answer, deadline or death, and deal with it."""
        self._hand_out()
        now = time.monotonic()
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        for key, events in self._selector.select(max(0.0, min(deadlines) - now) if deadlines else None):
            worker: GradingProcess | None = key.data
            if worker is None:
                os.read(self._wakes, _READ_BYTES)
            elif worker in self._workers:
                self._serve(worker, events)
        now = time.monotonic()
        for worker in [w for w in self._workers if w.deadline is not None and w.deadline <= now]:
            self._overdue(worker)
        self._tell_ready(all(worker.ready for worker in self._workers))

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # so many wakes are unread that one more says nothing
            os.write(self._waker, b"w")

    def _end(self) -> None:
        for worker in list(self._workers):
            self._bury(worker)
        self._selector.close()
        os.close(self._wakes)
        os.close(self._waker)

    def _hand_out(self) -> None:
        if not self._waiting:
            return
        for worker in self._workers:
            while worker.ready and worker.task is None and (task := self._next()) is not None:
                try:
                    worker.begin(task, self._job.timeout_seconds + _KILL_AFTER_SECONDS)
                except Exception as error:  # what was asked cannot be pickled
                    self._fail(task, error)
                else:
                    self._watch(worker)

    def _serve(self, worker: GradingProcess, events: int) -> None:
        """Write to a worker and read from it, as far as its pipes go."""
        try:
            if events & selectors.EVENT_WRITE:
                worker.write()
                self._watch(worker)
            if events & selectors.EVENT_READ:
                for number, answer in worker.read():
                    self._take(worker, number, answer)
        except (EOFError, OSError):
            self._died(worker)
        except NoAnswerError as error:  # not what a worker says: a reward wrote among the answers
            self._replace(worker, Verdict.ERROR, str(error))

    def _take(self, worker: GradingProcess, number: int, message: Answer) -> None:
        if number != worker.number or (worker.ready and worker.task is None):
            raise NoAnswerError("a grading process answered what it was not asked")
        if not worker.ready:
            if message != READY:
                raise RewardError(message.words if isinstance(message, Refused) else str(message))
            worker.ready, worker.deadline, self._failed_starts = True, None, 0
            return
        task, worker.task, worker.deadline = worker.task, None, None
        assert task is not None
        if isinstance(message, Score):
            self._finish(task, message)
        elif message == TIMED_OUT:
            self._finish(task, self.failure(task.request, Verdict.TIMEOUT, self._late))
        else:
            self._finish(task, self.failure(task.request, Verdict.ERROR, str(message)))

    def _overdue(self, worker: GradingProcess) -> None:
        """Replace a worker whose time is up."""
        if worker.task is None:
            self._died(worker)
        else:
            self._replace(worker, Verdict.TIMEOUT, self._late)

    def _died(self, worker: GradingProcess) -> None:
        """Replace a worker that died, or that did not start in time."""
        late = worker.deadline is not None and worker.deadline <= time.monotonic()
        if not late:
            worker.wait()
        code = self._bury(worker)
        if worker.task is None and not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise RewardError(
                    f"grading processes do not start (exit code {code}, {_MAX_FAILED_STARTS} times in a row): their "
                    "own messages are above; is the machine out of memory, or a module of [reward.functions] broken?"
                )
        words = f"the grading process ended with exit code {code}"
        self._renew(worker, *((Verdict.TIMEOUT, self._late) if late else (Verdict.ERROR, words)))

    @property
    def _late(self) -> str:
        return f"not graded within {self._job.timeout_seconds:g} s"

    def _replace(self, worker: GradingProcess, verdict: Verdict, note: str) -> None:
        """End a worker and start another; what is said is of the response that it was at."""
        self._bury(worker)
        self._renew(worker, verdict, note)

    def _renew(self, worker: GradingProcess, verdict: Verdict, note: str) -> None:
        """Start another worker in the place of one that is gone; what is said is of the response it was at, if any."""
        self.restarts += 1
        self._start()
        if worker.task is not None:
            self._finish(worker.task, self.failure(worker.task.request, verdict, note))

    def _start(self) -> None:
        worker = GradingProcess(self._job, self._environment)
        self._workers.append(worker)
        self._watch(worker)

    def _bury(self, worker: GradingProcess) -> int:
        """End a worker; returns its exit code."""
        for stream in (worker.stdin, worker.stdout):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
        if worker in self._workers:
            self._workers.remove(worker)
        return worker.kill()

    def _watch(self, worker: GradingProcess) -> None:
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
