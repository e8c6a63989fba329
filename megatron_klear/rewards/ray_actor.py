"""What runs in a Ray actor: a grading pool of one worker, so that a response costs no more there than it does here.

Arguments and answers are bytes of JSON. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import os
import sys

from .base import RewardError
from .pool import GradingPool
from .wire import read_job, read_request
from .worker import READY, Refused, answer_json


class GradingActor:
    """Grades for a run, one response at a time, in a process of its own that it can kill."""

    def __init__(self) -> None:
        self._pool: GradingPool | None = None

    def start(self, content: bytes) -> bytes:
        """Take the job and start the worker; returns once it is ready, or why it cannot be.

        Told by a call and not to the constructor, whose arguments Ray keeps for the whole cluster: there may be keys
        among the variables.
        """
        told = read_job(content)
        os.environ.update(told.variables)
        paths = [*told.paths, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        with contextlib.suppress(OSError):  # a node without it: modules are found by the paths
            os.chdir(told.folder)
        try:
            self._pool = GradingPool(
                told.job.data_sources,
                told.job.settings,
                timeout_seconds=told.job.timeout_seconds,
                workers=1,
                memory_bytes=told.job.memory_bytes,
                trials=told.job.trials,
                environment=told.environment,
            )
            self._pool.wait_until_ready()
        except RewardError as error:
            return answer_json(0, Refused(f"{error} (on node {os.uname().nodename}, {sys.executable})"))
        return answer_json(0, READY)

    def grade(self, content: bytes) -> bytes:
        """The score of a request."""
        assert self._pool is not None
        return answer_json(0, self._pool.grade([read_request(content)])[0])

    def stop(self) -> None:
        """End the worker, whatever it is at."""
        if self._pool is not None:
            self._pool.close()

    def process_id(self) -> int:
        """Of this actor."""
        return os.getpid()
