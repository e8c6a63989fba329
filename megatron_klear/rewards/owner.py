"""What every grading pool does alike: responses wait in a queue, and one thread has the workers."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from megatron_klear.types import Score, Verdict

from .base import RewardSettings, failure_value
from .process import Task
from .ray_node import Head
from .worker import Request


class PoolClosedError(RuntimeError):
    """A response came to a pool that is closed, or waited in it when it was closed."""


class OwnedPool(ABC):
    """A pool whose workers belong to one thread; all verbs may be called from any thread. A context manager.

    A subclass has the workers: `_turn` waits for the next thing to happen and deals with it, `_wake` ends its waiting,
    `_end` ends the workers. An error out of `_turn` ends the pool and reaches everyone who waits.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        self._waiting: deque[Task] = deque()
        self._under_way: set[Task] = set()  # the owner thread's own
        self._changed = threading.Condition()  # guards what follows, and what is put in the queue
        self._ready = False
        self._over: BaseException | None = None
        self._closing = False
        self._owner = threading.Thread(target=self._run, name="grading", daemon=True)

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        self.close()

    def submit(self, request: Request) -> Future[Score]:
        """Have a response graded; returns at once. Responses are begun in the order in which they came.

        The future ends in a Score, whatever the response does: right, timed out, an error. It raises RewardError where
        the workers cannot start, PoolClosedError where the pool is closed before the response is graded. One that has
        not begun may be cancelled.
        """
        return self._submit([request])[0]

    def grade(self, requests: Sequence[Request]) -> list[Score]:
        """Scores in the order of the requests, every one of them graded, timed out or an error.

        Raises RewardError where a worker cannot start.
        """
        futures = self._submit(requests)
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def wait_until_ready(self) -> None:
        """Return when every worker has imported its rewards. Raises RewardError where one cannot."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._over is not None)
            if self._over is not None:
                raise self._over

    def head(self) -> Head | None:
        """What other nodes join to grade as well, as soon as they can; None where none are to.

        Raises RewardError where it does not come up.
        """
        return None

    def close(self) -> None:
        """End all workers, whatever they are at; what waits fails with PoolClosedError. Closing twice is harmless."""
        with self._changed:
            self._closing = True
            if self._over is None:
                self._wake()
        if self._owner.ident is not None and self._owner is not threading.current_thread():
            self._owner.join()

    def failure(self, request: Request, verdict: Verdict, note: str) -> Score:
        """The score of a response that could not be graded; its reward is what a wrong one of its data source gets."""
        value = failure_value(request.data_source, self.settings, verdict)
        return Score(reward=value, verdict=verdict, note=note)

    @abstractmethod
    def _turn(self) -> None: ...

    @abstractmethod
    def _wake(self) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...

    def _submit(self, requests: Sequence[Request]) -> list[Future[Score]]:
        tasks = [Task(request) for request in requests]
        with self._changed:
            over = self._over
            if over is None:
                self._waiting.extend(tasks)
                self._wake()
        if over is not None:
            for task in tasks:
                task.future.set_exception(over)
        return [task.future for task in tasks]

    def _next(self) -> Task | None:
        """The response to begin now, if one waits."""
        while self._waiting:
            task = self._waiting.popleft()
            if task in self._under_way or task.future.set_running_or_notify_cancel():
                self._under_way.add(task)
                return task
        return None

    def _finish(self, task: Task, score: Score) -> None:
        self._under_way.discard(task)
        task.future.set_result(score)

    def _fail(self, task: Task, error: BaseException) -> None:
        self._under_way.discard(task)
        task.future.set_exception(error)

    def _tell_ready(self, ready: bool) -> None:
        if ready != self._ready:
            with self._changed:
                self._ready = ready
                self._changed.notify_all()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
            over: BaseException = PoolClosedError("the grading pool was closed before the response was graded")
        except BaseException as error:
            over = error
        with self._changed:  # from here on nobody puts anything in the queue, or wakes what is about to be closed
            self._over = over
        try:
            self._end()
        finally:
            with self._changed:
                self._changed.notify_all()
            # Outside of the lock: what waits for a future may call the pool.
            while (task := self._next()) is not None or self._under_way:
                self._fail(task or next(iter(self._under_way)), over)
