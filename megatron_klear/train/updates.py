"""From a step's numbers to the rows of each optimizer step: pure functions that every rank computes alike.

A rollout step's groups are cut into updates; each update's weights sum over its own samples, and its rows are balanced
over the data-parallel ranks by work. Nothing here talks to another process or reads a token before its rows are packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_klear.config.rl import AlgorithmConfig
from megatron_klear.data.pack import pack
from megatron_klear.data.packing import NO_ROW, EpochPlan, RowSettings, Work, assign_rows, plan_epoch
from megatron_klear.orchestrator.step_numbers import StepNumbers
from megatron_klear.rl.weights import aggregate, drop_overlong, nll_weights
from megatron_klear.types import PackedBatch, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The samples of one optimizer step, in order, with what each of its trained tokens carries."""

    first: int  # the first sample's number among those of all updates
    lengths: npt.NDArray[np.int32]  # [S]
    trained: npt.NDArray[np.int32]  # [S] tokens that the loss reads
    advantages: npt.NDArray[np.float64]  # [S]
    correct: npt.NDArray[np.bool_]  # [S]
    overlong: npt.NDArray[np.bool_]  # [S] cut at the length cap


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdatePlan:
    """Which rank trains which samples of an update in which rows, and the weights of their tokens."""

    update: Update
    rows: list[list[list[int]]]
    """[data rank][row] -> samples of the update; equally many rows on every rank, some of them empty."""
    weights: npt.NDArray[np.float64]  # [S]
    nll: npt.NDArray[np.float64] | None  # [S], None where there is no such term

    def numbers_of(self, data_rank: int) -> list[int]:
        """The samples that a data rank trains, in the count of all updates."""
        return [self.update.first + index for row in self.rows[data_rank] for index in row]


def cut_into_updates(
    numbers: StepNumbers, advantages: Sequence[npt.NDArray[np.float64]], prompts_per_update: int
) -> list[Update]:
    """Updates of at most `prompts_per_update` groups, in order; `advantages` has one array [samples] a group."""
    bounds = np.concatenate([[0], np.cumsum(numbers.sizes)])
    updates: list[Update] = []
    for start in range(0, len(numbers.sizes), prompts_per_update):
        end = min(start + prompts_per_update, len(numbers.sizes))
        part = slice(int(bounds[start]), int(bounds[end]))
        updates.append(
            Update(
                first=part.start,
                lengths=numbers.lengths[part],
                trained=numbers.trained[part],
                advantages=np.concatenate(advantages[start:end]),
                correct=numbers.correct[part],
                overlong=numbers.overlong[part],
            )
        )
    return updates


def plan_update(
    update: Update,
    algorithm: AlgorithmConfig,
    rows: RowSettings,
    work: Work,
    *,
    longest_response: int,
    data_size: int,
) -> UpdatePlan:
    """Rows for every data rank, equally many on each; weights sum over all ranks as configured."""
    lengths = update.lengths.astype(np.int64)
    plan = plan_epoch(lengths, rows, seed=0, epoch=0)
    counts = update.trained.astype(np.int64)
    if algorithm.overlong_filter:
        counts = drop_overlong(counts, update.overlong)
    row_of = _row_of(plan, len(lengths))
    weights = aggregate(algorithm.aggregation, counts, length=longest_response, microbatches=row_of)
    released = algorithm.aggregation == "as_released"
    nll = nll_weights(counts, update.correct, algorithm.nll_coefficient, row_of if released else None)
    num_rows = -(-plan.num_rows // data_size) * data_size
    loads = plan.row_sums(work.of(lengths), range(plan.num_rows))
    assigned = assign_rows(loads, num_rows, data_size)
    return UpdatePlan(
        update=update,
        rows=[[[] if row == NO_ROW else plan.row(row).tolist() for row in of_rank.tolist()] for of_rank in assigned],
        weights=weights,
        nll=nll if algorithm.nll_coefficient else None,
    )


def pack_rows(plan: UpdatePlan, data_rank: int, samples: Mapping[int, Sample]) -> list[PackedBatch]:
    """A data rank's rows of an update, of its samples by their numbers in the count of all updates."""
    update = plan.update
    return [
        pack(
            [samples[update.first + index] for index in chosen],
            [float(plan.weights[index]) for index in chosen],
            advantages=[float(update.advantages[index]) for index in chosen],
            nll_weights=None if plan.nll is None else [float(plan.nll[index]) for index in chosen],
            sample_numbers=[update.first + index for index in chosen],
        )
        for chosen in plan.rows[data_rank]
    ]


def _row_of(plan: EpochPlan, count: int) -> npt.NDArray[np.int64]:
    """Each sample's row."""
    row_of = np.empty(count, dtype=np.int64)
    row_of[plan.samples] = np.repeat(np.arange(plan.num_rows), np.diff(plan.bounds))
    return row_of
