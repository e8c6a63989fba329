"""The stream of supervised training steps: this rank's rows of every step, at a position that can be saved.

The position is an epoch and a step in it, so that it means the same in any layout.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_klear.data.pack import Aggregation, loss_weights, num_predicted, pack
from megatron_klear.data.packing import (
    NO_ROW,
    EpochPlan,
    RowSettings,
    Work,
    assign_rows,
    microbatches_per_rank,
    plan_epoch,
    work_imbalance,
)
from megatron_klear.data.rows import DataError
from megatron_klear.types import PackedBatch, Sample


class SampleStore(Protocol):
    """Tokenised samples that are read one at a time and whose sizes are known without reading them."""

    @property
    def lengths(self) -> npt.NDArray[np.integer]:
        """Tokens of every sample [N]."""
        ...

    @property
    def trained_counts(self) -> npt.NDArray[np.integer]:
        """Trained tokens of every sample [N], its first token not counted: nothing predicts it."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """One sample."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """What a step is made of, over all ranks."""

    epoch: int
    step_in_epoch: int
    num_rows: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    packing_efficiency: float
    """Tokens over the capacity of the step's rows."""
    work_imbalance: float
    """Work of the busiest data-parallel rank over that of the mean one, less one."""


class _Share:
    """What turns a step of a plan into this rank's micro-batches."""

    def __init__(
        self, store: SampleStore, settings: RowSettings, work: Work, data_rank: int = 0, data_size: int = 1
    ) -> None:
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data rank {data_rank} of {data_size}")
        microbatches_per_rank(settings.rows_per_step, data_size)
        self.store, self.settings, self.work = store, settings, work.of(store.lengths)
        self.lengths, self.trained_counts = store.lengths, store.trained_counts
        self.data_rank, self.data_size = data_rank, data_size

    def batches(self, plan: EpochPlan, step: int, weights: npt.NDArray[np.float64]) -> list[PackedBatch]:
        """This rank's rows; `weights` are those of each of the step's samples, in the plan's order."""
        rows = plan.step_rows(step)
        first = plan.bounds[rows.start]
        batches = []
        for place in self._assigned(plan, rows)[self.data_rank].tolist():
            if place == NO_ROW:
                batches.append(pack((), ()))
                continue
            row = rows.start + place
            samples = [self._sample(int(index)) for index in plan.row(row)]
            batches.append(pack(samples, weights[plan.bounds[row] - first : plan.bounds[row + 1] - first].tolist()))
        return batches

    def facts(self, plan: EpochPlan, epoch: int, step: int) -> StepFacts:
        """What the step is made of, over all ranks."""
        rows, samples = plan.step_rows(step), plan.step_samples(step)
        work = np.append(plan.row_sums(self.work, rows), 0.0)  # NO_ROW, -1, reads the zero
        num_tokens = int(self.lengths[samples].sum())
        return StepFacts(
            epoch=epoch,
            step_in_epoch=step,
            num_rows=len(rows),
            num_sequences=len(samples),
            num_tokens=num_tokens,
            num_trained_tokens=int(self.trained_counts[samples].sum()),
            packing_efficiency=num_tokens / (len(rows) * self.settings.tokens_per_row),
            work_imbalance=work_imbalance(work[self._assigned(plan, rows)].sum(axis=1)),
        )

    def _assigned(self, plan: EpochPlan, rows: range) -> npt.NDArray[np.int64]:
        return assign_rows(plan.row_sums(self.work, rows), self.settings.rows_per_step, self.data_size)

    def _sample(self, index: int) -> Sample:
        sample = self.store[index]
        counted = (int(self.lengths[index]), int(self.trained_counts[index]))
        found = (len(sample.tokens), num_predicted(sample))
        if counted != found:
            raise DataError(
                f"sample {index} has {found[0]} tokens, {found[1]} of them trained, where its store counted "
                f"{counted[0]} and {counted[1]}: the token cache is damaged; remove it (data.cache) and run again"
            )
        return sample


class SampleStream:
    """Steps of training, epoch after epoch without end; every sample once an epoch.

    `next_step` gives this rank's micro-batches, equally many on every rank and in every step: an epoch's last step may
    have fewer rows, and a row without samples (one token, weight 0) takes the place of a missing one. Weights sum to
    one over the micro-batches of all ranks. `facts` describe the step given last.
    """

    facts: StepFacts

    def __init__(
        self,
        store: SampleStore,
        settings: RowSettings,
        *,
        work: Work,
        aggregation: Aggregation = "token_mean",
        seed: int = 0,
        content: str = "",
        data_rank: int = 0,
        data_size: int = 1,
    ) -> None:
        """Plan the first epoch; `content` names what the samples are, for a saved position.

        Raises ValueError where ranks do not divide the rows or the store has no samples.
        """
        if not len(store.lengths):
            raise ValueError(
                "there are no samples to train on: data.train is empty or all of it was held out or dropped"
            )
        self._share = _Share(store, settings, work, data_rank, data_size)
        self._settings, self._seed, self._content = settings, seed, content
        self._aggregation: Aggregation = aggregation
        self._epoch = self._step = 0
        self._num_steps: dict[int, int] = {}
        self._plan = self._plan_epoch(0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the current epoch; epochs may differ by a step, as each is packed anew."""
        return self._plan.num_steps

    def total_steps(self, epochs: int, steps: int | None = None) -> int:
        """Steps of a run: `steps` where given, else those of all `epochs`, each of which is planned to count them."""
        if steps is not None:
            return steps
        for epoch in range(epochs):
            if epoch not in self._num_steps:
                self._plan_epoch(epoch)
        return sum(self._num_steps[epoch] for epoch in range(epochs))

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next step."""
        if self._step == self._plan.num_steps:
            self._epoch, self._step = self._epoch + 1, 0
            self._plan = self._plan_epoch(self._epoch)
        counts = self._share.trained_counts[self._plan.step_samples(self._step)]
        batches = self._share.batches(self._plan, self._step, loss_weights(counts, self._aggregation))
        self.facts = self._share.facts(self._plan, self._epoch, self._step)
        self._step += 1
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank and in every layout, with what it is only valid for."""
        return {"epoch": self._epoch, "step_in_epoch": self._step, "made_with": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises DataError where data or settings would not make the same steps again."""
        here = self._identity()
        changed = [key for key in here if state["made_with"].get(key) != here[key]]
        if changed:
            told = ", ".join(f"{key} was {state['made_with'].get(key)} and is {here[key]}" for key in changed)
            raise DataError(
                f"the checkpoint's position in the data does not fit this run: {told}; restore these settings, or "
                "start a new run from the checkpoint's weights (model.checkpoint)"
            )
        self._epoch, self._step = int(state["epoch"]), int(state["step_in_epoch"])
        self._plan = self._plan_epoch(self._epoch)

    def _plan_epoch(self, epoch: int) -> EpochPlan:
        plan = plan_epoch(self._share.lengths, self._settings, seed=self._seed, epoch=epoch)
        self._num_steps[epoch] = plan.num_steps
        return plan

    def _identity(self) -> dict[str, Any]:
        lengths = np.ascontiguousarray(self._share.lengths, dtype=np.int64)
        return asdict(self._settings) | {
            "seed": self._seed,
            "num_samples": len(lengths),
            "checksum_of_lengths": zlib.crc32(lengths.tobytes()),
            "content": self._content,
        }


def held_out_steps(
    store: SampleStore,
    settings: RowSettings,
    *,
    work: Work,
    aggregation: Aggregation = "token_mean",
    data_rank: int = 0,
    data_size: int = 1,
) -> Iterator[list[PackedBatch]]:
    """This rank's micro-batches of every held-out sample once, in steps, always the same; none for an empty store.

    Weights sum to one over all steps and ranks, so the validation loss is the plain sum of weight * token loss.
    """
    share = _Share(store, settings, work, data_rank, data_size)
    if not len(store.lengths):
        return
    plan = plan_epoch(store.lengths, settings, seed=0, epoch=0)
    weights = loss_weights(store.trained_counts[plan.samples], aggregation)
    for step in range(plan.num_steps):
        rows = plan.step_rows(step)
        yield share.batches(plan, step, weights[plan.bounds[rows.start] : plan.bounds[rows.stop]])
