"""A function over a stream in several processes, results in the stream's order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import TypeVar

from megatron_klear.data.rows import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result; one worker is this process. At most one task a worker is under way.

    A worker has its end of its own pipe and nobody else's, so that it ends with this process however that one ends.
    Raises DataError where a worker is gone.
    """
    if workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    context = multiprocessing.get_context("spawn")
    started = []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        yield from _deal(tasks, [ours for _, ours in started])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise DataError("a worker of the curation has died; memory may be short: try fewer --workers") from None
    finally:
        for process, ours in started:
            ours.close()
            process.join()


def _deal(tasks: Iterable[Task], connections: list[Connection]) -> Iterator[tuple[Task, Result]]:
    left = iter(tasks)
    waiting: deque[tuple[Task, Connection]] = deque()
    idle = deque(connections)
    while True:
        while idle and (task := next(left, None)) is not None:
            idle[0].send(task)
            waiting.append((task, idle.popleft()))
        if not waiting:
            return
        task, connection = waiting.popleft()
        result = connection.recv()
        if isinstance(result, BaseException):
            raise result
        idle.append(connection)
        yield task, result


def _serve(function: Callable[[Task], Result], connection: Connection) -> None:
    try:
        while True:
            task = connection.recv()
            try:
                connection.send(function(task))
            except Exception as error:
                connection.send(error)
    except (EOFError, OSError, KeyboardInterrupt):
        return
