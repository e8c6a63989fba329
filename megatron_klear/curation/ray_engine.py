"""`workers.ordered_map` on Ray: one of the command's own, which ends with it, or one that it joins and leaves."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from megatron_klear.data.rows import DataError
from megatron_klear.rewards.ray_node import RayNode, check_ray

Task = TypeVar("Task")
Result = TypeVar("Result")
_UNDER_WAY = 2
"""Tasks a worker, so that none waits for the next one."""


class RayEngine:
    """Ray with a number of workers; started or joined at the first task, ended or left by `close`."""

    def __init__(self, workers: int, address: str = "") -> None:
        """`address` is of a Ray to join, `host:port` or `auto`, whose nodes have this package and its Python.

        Raises RewardError where Ray is not installed.
        """
        check_ray()
        self._workers, self._address = workers, address
        self._node: RayNode | None = None
        self._ray: Any = None

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, in the tasks' order; what the function raises is raised here.

        At most two tasks a worker are under way. Raises DataError where the Ray cannot be joined, or a worker dies
        again and again.
        """
        ray = self._start()
        held = ray.put(function)  # sent to a worker once, not with every task
        call = ray.remote(num_cpus=1, max_retries=2)(_call)
        left, waiting = iter(tasks), deque[tuple[Task, Any]]()
        while True:
            while len(waiting) < _UNDER_WAY * self._workers and (task := next(left, None)) is not None:
                waiting.append((task, call.remote(held, task)))
            if not waiting:
                return
            task, reference = waiting.popleft()
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                told = str(error).strip().splitlines()[0]
                raise DataError(f"Ray has lost a worker of the curation ({told}); memory may be short") from None
            if isinstance(result, BaseException):
                raise result
            yield task, result

    def close(self) -> None:
        """End Ray and all of its processes. Closing twice is harmless."""
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None
        if self._node is not None:
            self._node.close()
            self._node = None

    def _start(self) -> Any:
        if self._ray is None:
            if not self._address:
                self._node = RayNode.start(self._workers)
            import ray

            logging.getLogger("ray").setLevel(logging.ERROR)
            address = self._node.address if self._node is not None else self._address
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                told = str(error).strip().splitlines()[0]
                raise DataError(f"the Ray at {address} cannot be joined ({told})") from None
            self._ray = ray
        return self._ray


@contextmanager
def open_engine(name: str, workers: int, address: str = "") -> Iterator[RayEngine | None]:
    """The engine of a name, closed at the end; None for `local`. Raises RewardError where Ray is not installed."""
    engine = RayEngine(workers, address) if name == "ray" else None
    try:
        yield engine
    finally:
        if engine is not None:
            engine.close()


def _call(function: Callable[[Any], Any], task: Any) -> Any:
    """The result, or the exception as a value: Ray would give it another class."""
    try:
        return function(task)
    except Exception as error:
        return error
