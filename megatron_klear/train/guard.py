"""Steps whose loss or gradient was not finite: kept for inspection, and too many in a row end the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_klear.errors import UserError
from megatron_klear.runs.log import RunLog
from megatron_klear.types import PackedBatch, StepStats


class TrainingStopped(UserError, RuntimeError):
    """The run gave up: too many steps in a row whose loss or gradient was not finite."""


class SkipGuard:
    """Watches for steps that were skipped: keeps what led to them, and gives up after `limit` in a row."""

    def __init__(self, folder: Path, limit: int, rank: int) -> None:
        self.folder, self.limit, self.rank, self.in_a_row = folder, limit, rank, 0

    def observe(self, stats: StepStats, batches: Sequence[PackedBatch], log: RunLog) -> None:
        """Count a step. Raises TrainingStopped at the limit; a skipped step's rows are dumped first."""
        if not stats.skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        dump = self.folder / f"step-{stats.step:08d}-rank-{self.rank}.pt"
        torch.save({"stats": stats, "batches": list(batches)}, dump)
        log.say(
            f"step {stats.step} was skipped: loss {stats.loss}, gradient norm {stats.grad_norm}; weights are as "
            f"before, its rows are in {dump}"
        )
        if self.in_a_row >= self.limit:
            raise TrainingStopped(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite (the last one: step "
                f"{stats.step}, loss {stats.loss}, gradient norm {stats.grad_norm}). Its rows are in {self.folder}; "
                "lower optimizer.learning_rate, or raise train.max_skipped_steps to let the run go on"
            )
