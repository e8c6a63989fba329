"""Grading in a distributed run: rank 0 grades in its worker processes and every rank gets the scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_klear.errors import UserError
from megatron_klear.rewards.base import RewardSettings
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.scoring import ErrorAlarm, Graded, score
from megatron_klear.rl_config import RewardConfig
from megatron_klear.types import Group


class Grader:
    """Scores groups the same on every rank; a context, since it holds worker processes on rank 0."""

    def __init__(self, config: RewardConfig, data_sources: Iterable[str], rank: int) -> None:
        """Start the workers. Raises RewardError where a data source has no reward."""
        self._alarm = ErrorAlarm(config.max_error_share)
        settings = RewardSettings(
            scheme=config.scheme, require_thinking=config.require_thinking, functions=config.functions
        )
        self._pool: GradingPool | None = None
        self._in_use = Lock()  # the pool serves one caller at a time
        self._background: ThreadPoolExecutor | None = None
        if rank == 0:
            self._pool = GradingPool(
                data_sources, settings, timeout_seconds=config.timeout_seconds, workers=config.workers
            )

    def grade(self, groups: Sequence[Group]) -> Graded:
        """Groups with scores. Raises GradingAlarm on every rank when too many could not be graded."""
        message: list[Any] = [None]
        if self._pool is not None:
            try:
                message = [self._score(groups)]
            except UserError as error:
                message = [error]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(message, src=0)
        if isinstance(message[0], UserError):
            raise message[0]
        graded: Graded = message[0]
        self._alarm.check(graded)
        return graded

    def begin(self, groups: Sequence[Group]) -> Future[Graded]:
        """Rank 0: grade in the background, without the alarm; `check` is for what came of it."""
        if self._background is None:
            self._background = ThreadPoolExecutor(1, thread_name_prefix="grading")
        return self._background.submit(self._score, list(groups))

    def check(self, graded: Graded) -> None:
        """Raise GradingAlarm when too many could not be graded."""
        self._alarm.check(graded)

    def _score(self, groups: Sequence[Group]) -> Graded:
        assert self._pool is not None
        with self._in_use:
            return score(groups, self._pool)

    def __enter__(self) -> Grader:
        """The grader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        if self._background is not None:
            self._background.shutdown(cancel_futures=True)
        if self._pool is not None:
            self._pool.close()
