"""From graded groups to the rows of each optimizer step: pure functions that every rank computes alike.

A rollout step's groups are cut into updates; each update's weights sum over its own samples, and its rows are balanced
over the data-parallel ranks by work. Nothing here talks to another process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_klear.config.rl import AlgorithmConfig
from megatron_klear.data.pack import num_predicted, pack
from megatron_klear.data.packing import NO_ROW, EpochPlan, RowSettings, Work, assign_rows, plan_epoch
from megatron_klear.rl.weights import aggregate, drop_overlong, nll_weights
from megatron_klear.types import Group, PackedBatch, Sample, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The samples of one optimizer step, in order, with what each of its trained tokens carries."""

    samples: list[Sample]
    first: int  # the first one's number among the samples of all updates
    advantages: npt.NDArray[np.float64]  # [S]
    correct: npt.NDArray[np.bool_]  # [S]
    overlong: npt.NDArray[np.bool_]  # [S] cut at the length cap


def cut_into_updates(
    groups: Sequence[Group], advantages: Sequence[npt.NDArray[np.float64]], prompts_per_update: int
) -> list[Update]:
    """Updates of at most `prompts_per_update` groups, in order; `advantages` has one array [samples] a group."""
    updates: list[Update] = []
    for start in range(0, len(groups), prompts_per_update):
        part = range(start, min(start + prompts_per_update, len(groups)))
        samples = [sample for index in part for sample in groups[index].samples]
        scores = [score for index in part for score in groups[index].scores or ()]
        updates.append(
            Update(
                samples=samples,
                first=updates[-1].first + len(updates[-1].samples) if updates else 0,
                advantages=np.concatenate([advantages[index] for index in part]),
                correct=np.array([score.verdict is Verdict.RIGHT for score in scores], dtype=np.bool_),
                overlong=np.array([sample.finish == "length" for sample in samples], dtype=np.bool_),
            )
        )
    return updates


def pack_update(
    update: Update,
    algorithm: AlgorithmConfig,
    rows: RowSettings,
    work: Work,
    *,
    longest_response: int,
    data_rank: int,
    data_size: int,
) -> list[PackedBatch]:
    """This data rank's rows of an update, equally many on every rank; weights sum over all ranks as configured."""
    lengths = np.array([len(sample.tokens) for sample in update.samples])
    plan = plan_epoch(lengths, rows, seed=0, epoch=0)
    counts = np.array([num_predicted(sample) for sample in update.samples])
    if algorithm.overlong_filter:
        counts = drop_overlong(counts, update.overlong)
    row_of = _row_of(plan, len(lengths))
    weights = aggregate(algorithm.aggregation, counts, length=longest_response, microbatches=row_of)
    released = algorithm.aggregation == "as_released"
    nll = nll_weights(counts, update.correct, algorithm.nll_coefficient, row_of if released else None)
    num_rows = -(-plan.num_rows // data_size) * data_size
    loads = plan.row_sums(work.of(lengths), range(plan.num_rows))
    batches = []
    for row in assign_rows(loads, num_rows, data_size)[data_rank].tolist():
        chosen = [] if row == NO_ROW else plan.row(row).tolist()
        batches.append(
            pack(
                [update.samples[index] for index in chosen],
                [float(weights[index]) for index in chosen],
                advantages=[float(update.advantages[index]) for index in chosen],
                nll_weights=[float(nll[index]) for index in chosen] if algorithm.nll_coefficient else None,
                sample_numbers=[update.first + index for index in chosen],
            )
        )
    return batches


def _row_of(plan: EpochPlan, count: int) -> npt.NDArray[np.int64]:
    """Each sample's row."""
    row_of = np.empty(count, dtype=np.int64)
    row_of[plan.samples] = np.repeat(np.arange(plan.num_rows), np.diff(plan.bounds))
    return row_of
