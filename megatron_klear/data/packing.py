"""Which samples share a row, which rows make a step, and which rank runs which row: pure functions of the lengths.

Every rank computes the same plan and takes its slice. The rows and their steps are made without knowing the number of
ranks, so a step trains on the same samples in every layout; only who runs a row depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_klear.models.architecture import Architecture

NO_ROW = -1
"""In an assignment: a micro-batch without a row, which a rank runs to keep step with the others."""

_WINDOW_ROWS = 2048  # rows packed together: enough to fill them, few enough that an epoch's rows stay random
_BALANCED = 1e-3  # work imbalance below which no further exchange of rows is tried


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSettings:
    """What makes rows and steps out of samples."""

    tokens_per_row: int
    """Strict cap on a row's tokens, every sequence rounded up to `segment_multiple`."""
    segment_multiple: int
    rows_per_step: int
    """Rows of one optimizer step, over all data-parallel ranks."""
    packing: bool = True
    """False puts one sequence in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Cost of a sequence of L tokens: per_token * L + per_token_squared * L^2, in any unit."""

    per_token: float
    per_token_squared: float

    def of(self, lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Work of each sequence, from its length in tokens."""
        exact = lengths.astype(np.float64)
        return exact * (self.per_token + self.per_token_squared * exact)


def sequence_work(architecture: Architecture) -> Work:
    """Forward and backward FLOPs of a sequence: a causal token reads half of its sequence on average."""
    fixed = architecture.flops_per_token(0.0)
    return Work(per_token=fixed, per_token_squared=(architecture.flops_per_token(1.0) - fixed) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochPlan:
    """An epoch's rows in the order they are trained on."""

    samples: npt.NDArray[np.int64]  # [N] sample indices, row after row
    bounds: npt.NDArray[np.int64]  # [R + 1] where each row begins in `samples`
    rows_per_step: int

    @property
    def num_rows(self) -> int:
        """Rows of the epoch, R."""
        return len(self.bounds) - 1

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch; the last one may have fewer rows."""
        return -(-self.num_rows // self.rows_per_step)

    def row(self, row: int) -> npt.NDArray[np.int64]:
        """Indices of a row's samples."""
        return self.samples[self.bounds[row] : self.bounds[row + 1]]

    def step_rows(self, step: int) -> range:
        """Rows of a step, counted from the epoch's first."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch of {self.num_steps} steps")
        return range(step * self.rows_per_step, min((step + 1) * self.rows_per_step, self.num_rows))

    def step_samples(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of all samples of a step."""
        rows = self.step_rows(step)
        return self.samples[self.bounds[rows.start] : self.bounds[rows.stop]]

    def row_sums(self, values: npt.NDArray[np.float64], rows: range) -> npt.NDArray[np.float64]:
        """Sum of a per-sample quantity [N] over each of the rows."""
        bounds = self.bounds[rows.start : rows.stop + 1]
        taken = values[self.samples[bounds[0] : bounds[-1]]]
        sums: npt.NDArray[np.float64] = np.add.reduceat(taken, bounds[:-1] - bounds[0])
        return sums


def plan_epoch(lengths: npt.NDArray[np.integer], settings: RowSettings, *, seed: int, epoch: int) -> EpochPlan:
    """Rows and steps of an epoch, every sample exactly once; the same for the same arguments.

    `lengths` [N] are in tokens. Shuffled samples are packed by best fit, longest first, in windows of about 2048 rows;
    the rows are then shuffled over the whole epoch. Raises ValueError where a sample does not fit in a row.
    """
    multiple = settings.segment_multiple
    _check(lengths, settings)
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = generator.permutation(len(lengths))
    if settings.packing:
        capacity = settings.tokens_per_row // multiple
        units = -(-lengths.astype(np.int64) // multiple)
        row_of, num_rows = _pack(units[order], capacity)
    else:
        row_of, num_rows = np.arange(len(order)), len(order)
    place = generator.permutation(num_rows)[row_of]  # of each shuffled sample's row, in the order of training
    counts = np.bincount(place, minlength=num_rows)
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    samples = order[np.argsort(place, kind="stable")]
    return EpochPlan(samples=samples, bounds=bounds, rows_per_step=settings.rows_per_step)


def _check(lengths: npt.NDArray[np.integer], settings: RowSettings) -> None:
    if settings.tokens_per_row % settings.segment_multiple:
        raise ValueError(
            f"tokens per row {settings.tokens_per_row} must be a multiple of segment_multiple "
            f"{settings.segment_multiple}"
        )
    if settings.rows_per_step < 1:
        raise ValueError(f"rows_per_step is {settings.rows_per_step}, expected at least 1")
    if len(lengths) and int(lengths.min()) < 1:
        raise ValueError(f"sample {int(np.argmin(lengths))} has no tokens; drop it before planning")
    long = np.flatnonzero(lengths > settings.tokens_per_row)
    if len(long):
        raise ValueError(
            f"{len(long)} samples do not fit in a row of {settings.tokens_per_row} tokens, the first is sample "
            f"{long[0]} with {lengths[long[0]]}; raise data.tokens_per_microbatch or lower data.max_length"
        )


def _pack(units: npt.NDArray[np.int64], capacity: int) -> tuple[npt.NDArray[np.int64], int]:
    """Row of every sample, given in the epoch's shuffled order, and the number of rows."""
    num_windows = max(1, int(units.sum()) // (_WINDOW_ROWS * capacity))
    row_of = np.empty(len(units), dtype=np.int64)
    num_rows = start = 0
    for window in np.array_split(units, num_windows):
        longest_first = np.argsort(-window, kind="stable")
        rows = _best_fit(window[longest_first].tolist(), capacity)
        row_of[start + longest_first] = num_rows + np.asarray(rows, dtype=np.int64)
        num_rows += max(rows, default=-1) + 1
        start += len(window)
    return row_of, num_rows


def _best_fit(units: list[int], capacity: int) -> list[int]:
    """Put each size, in the order given, into the open row it leaves least room in; the row of each.

    Open rows are kept by their free space. Bit f of `free_sizes` says that one with f units free exists, so the
    fullest row that still fits is one shift and one lowest-set-bit away, whatever the number of rows.
    """
    open_rows: dict[int, list[int]] = {}
    free_sizes = num_rows = 0
    row_of = []
    for size in units:
        fitting = free_sizes >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            rows = open_rows[free]
            row = rows.pop()
            if not rows:
                free_sizes ^= 1 << free
        else:
            free, row = capacity, num_rows
            num_rows += 1
        row_of.append(row)
        free -= size
        if free:
            open_rows.setdefault(free, []).append(row)
            free_sizes |= 1 << free
    return row_of


def microbatches_per_rank(rows_per_step: int, data_size: int) -> int:
    """Micro-batches that each data-parallel rank runs in every step, the last of an epoch included."""
    if rows_per_step % data_size:
        raise ValueError(
            f"train.rows_per_step {rows_per_step} must be a multiple of the number of data-parallel ranks {data_size}: "
            "every rank runs as many rows as any other"
        )
    return rows_per_step // data_size


def assign_rows(work: npt.NDArray[np.float64], rows_per_step: int, data_size: int) -> npt.NDArray[np.int64]:
    """Rows of each data-parallel rank, [data_size, rows_per_step / data_size], in the order it runs them.

    `work` [r] is that of the step's rows, r at most `rows_per_step`; where it is less, NO_ROW stands for the missing
    ones. Every rank gets equally many, with sums of work as equal as exchanging rows makes them. A rank runs its light
    rows first and last and its heavy ones between: the first and last micro-batches are what a pipeline's idle ramps
    last.
    """
    count = microbatches_per_rank(rows_per_step, data_size)
    if not 0 < len(work) <= rows_per_step:
        raise ValueError(f"a step of {len(work)} rows where 1 to {rows_per_step} are expected")
    padded = np.zeros(rows_per_step)
    padded[: len(work)] = work
    table = _deal(padded, data_size, count)
    _exchange(padded, table)
    rising = np.take_along_axis(table, np.argsort(padded[table], axis=1, kind="stable"), axis=1)
    ordered = np.concatenate([rising[:, 0::2], rising[:, 1::2][:, ::-1]], axis=1)
    return np.where(ordered < len(work), ordered, NO_ROW)


def _deal(work: npt.NDArray[np.float64], data_size: int, count: int) -> npt.NDArray[np.int64]:
    """Deal rows in rounds of one a rank, heaviest rounds first, the heaviest row of a round to the idlest rank."""
    rounds = np.argsort(-work, kind="stable").reshape(count, data_size)
    table = np.empty((data_size, count), dtype=np.int64)
    load = np.zeros(data_size)
    for index, rows in enumerate(rounds):
        idlest_first = np.argsort(load, kind="stable")
        table[idlest_first, index] = rows
        load[idlest_first] += work[rows]
    return table


def _exchange(work: npt.NDArray[np.float64], table: npt.NDArray[np.int64]) -> None:
    """Exchange rows between the busiest rank and another, in place, while that lowers the larger of their loads."""
    data_size = len(table)
    for _ in range(8 * data_size):
        rows = work[table]
        load = rows.sum(axis=1)
        busiest = int(load.argmax())
        if load[busiest] <= load.mean() * (1 + _BALANCED):
            return
        moved = rows[busiest][:, None, None] - rows[None]  # what the busiest would lose
        larger = np.maximum(load[busiest] - moved, load[None, :, None] + moved)
        larger[:, busiest] = np.inf
        mine, other, theirs = np.unravel_index(int(larger.argmin()), larger.shape)
        if larger[mine, other, theirs] >= load[busiest] * (1 - 1e-9):
            return
        table[busiest, mine], table[other, theirs] = table[other, theirs], table[busiest, mine]


def work_imbalance(loads: npt.NDArray[np.float64]) -> float:
    """How much more the busiest rank works than the mean one, as a share: max / mean - 1, from each rank's work."""
    return float(loads.max() / loads.mean() - 1)
