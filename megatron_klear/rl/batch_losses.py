"""Losses that look at whole responses, or at a whole update, before they are losses of tokens.

Such a loss has two phases. The first has the present log-probs of the update's rows and rewrites their old log-probs
and advantages; the second is a loss of the fused family on what was written. The gradient is the loss's own; the
reported value of a token that the first phase took out is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from megatron_klear.rl.clipped import PPO
from megatron_klear.rl.ratio import importance_ratio
from megatron_klear.rl.surrogate import StrictLoss, check_clip
from megatron_klear.types import PackedBatch, TokenLoss

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-4
"""Nats below which a log-ratio is the rounding of two passes over the same weights."""


class DataRanks(Protocol):
    """The ranks that hold the other rows of an update."""

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the ranks."""
        ...

    def gather(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Every rank's values, in rank order."""
        ...


class Alone:
    """DataRanks of one process."""

    def sum(self, values: list[float]) -> list[float]:
        """The values."""
        return values

    def gather(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """The values."""
        return [values]


@runtime_checkable
class BatchLoss(Protocol):
    """A loss of two phases over all rows of an update; every rank of the update calls together."""

    def token_loss(self) -> TokenLoss:
        """The loss of the second phase."""
        ...

    def rewrite(
        self, rows: Sequence[PackedBatch], logprobs: Sequence[Tensor], ranks: DataRanks, salt: int
    ) -> list[PackedBatch]:
        """This rank's rows as the second phase reads them.

        `logprobs` [T] a row are those of the weights about to be updated; `salt` is another number at every update.
        """
        ...


@dataclass(frozen=True)
class GMPO(StrictLoss):
    """Geometric-mean policy optimisation (arXiv 2507.20673, Eq. 4; the authors' code clips log-ratios).

        s = exp(mean over the response of m),   loss = -s A,   m = min(d, clip_high) where A > 0, else max(d, -clip_low)

    with d = logp - old_logp. A token past the clip has no gradient; the others share that of s. Weights of a sequence
    mean (`aggregation = "sequence_mean"`) make the paper's objective.
    """

    clip_low: float = 0.4
    """Bound of the log-ratio of a token of negative advantage, in nats below 0."""
    clip_high: float = 0.4
    """Bound of the log-ratio of a token of positive advantage, in nats above 0."""
    kind: Literal["gmpo"] = field(default="gmpo", kw_only=True)

    def __post_init__(self) -> None:
        if not (self.clip_low > 0 and self.clip_high > 0):
            raise ValueError(f"clip_low {self.clip_low} and clip_high {self.clip_high} must be positive: log-ratios")

    def token_loss(self) -> PPO:
        """The loss of the second phase: the response's ratio without a clip of its own."""
        return PPO(clip_low=1.0, clip_high=math.inf)

    def rewrite(
        self, rows: Sequence[PackedBatch], logprobs: Sequence[Tensor], ranks: DataRanks, salt: int
    ) -> list[PackedBatch]:
        """Rows whose tokens have the response's geometric mean as their ratio; see BatchLoss."""
        return [self._rewritten(row, present.detach()) for row, present in zip(rows, logprobs, strict=True)]

    def _rewritten(self, row: PackedBatch, present: Tensor) -> PackedBatch:
        import torch

        old, advantages, trained = _inputs(row)
        difference = present - old
        # Only steps too far in the wanted direction are cut.
        bounded = torch.where(
            advantages > 0, difference.clamp(max=self.clip_high), difference.clamp(min=-self.clip_low)
        )
        clipped = bounded != difference
        log_ratio = torch.where(trained, bounded, 0.0)
        lengths = row.cu_seqlens.long().diff()
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        sums = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, sequence, log_ratio.double())
        counts = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, sequence, trained.double())
        mean = (sums / counts.clamp(min=1))[sequence].to(present.dtype)
        return replace(
            row,
            old_logprobs=torch.where(trained, present - mean, present),
            advantages=torch.where(trained & ~clipped, advantages, 0.0),
        )


@dataclass(frozen=True)
class ClipCov(StrictLoss):
    """PPO's surrogate, and no gradient for a few tokens of high covariance (Clip-Cov, arXiv 2505.22617, Eq. 10 and 11).

    The covariance of a token is (A - mean A)(logp - mean logp), means over the trained tokens of the update. Of those
    between the bounds that PPO does not clip, `share` of all trained tokens is taken out, chosen at random: by a hash
    of sample and position, the same in every layout. (verl chooses in each micro-batch.)
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    share: float = 2e-4
    """Of the update's trained tokens, that lose their gradient; at least one does."""
    cov_low: float = 1.0
    """Lower bound of the covariance of a token that may be taken out."""
    cov_high: float = 5.0
    """Upper bound."""
    kind: Literal["clip_cov"] = field(default="clip_cov", kw_only=True)

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)
        _check_share(self.share)
        if not self.cov_low < self.cov_high:
            raise ValueError(f"cov_low {self.cov_low} must be below cov_high {self.cov_high}")

    def token_loss(self) -> PPO:
        """The loss of the second phase."""
        return PPO(self.clip_low, self.clip_high)

    def rewrite(
        self, rows: Sequence[PackedBatch], logprobs: Sequence[Tensor], ranks: DataRanks, salt: int
    ) -> list[PackedBatch]:
        """Rows in which the chosen tokens have the advantage 0; see BatchLoss."""
        import torch

        covariances, total = _covariances(rows, logprobs, ranks)
        keys = []
        for row, present, covariance in zip(rows, logprobs, covariances, strict=True):
            old, advantages, trained = _inputs(row)
            ratio = importance_ratio(present.detach(), old)
            clipped = ((advantages > 0) & (ratio > 1 + self.clip_high)) | (
                (advantages < 0) & (ratio < 1 - self.clip_low)
            )
            may = trained & ~clipped & (covariance > self.cov_low) & (covariance < self.cov_high)
            keys.append(np.where(may.numpy(), _hashes(row, salt), np.inf))
        chosen = _smallest(keys, _count(self.share, total), ranks)
        return [_without(row, torch.from_numpy(mask)) for row, mask in zip(rows, chosen, strict=True)]


@dataclass(frozen=True)
class KLCov(StrictLoss):
    """The surrogate without a clip, and a penalty on tokens of high covariance (KL-Cov, arXiv 2505.22617, Eq. 12).

        loss = -r A,   and -r A + kl_coefficient |logp - old_logp| on `share` of the trained tokens

    chosen over the whole update. (verl chooses in each micro-batch.) Where logp and old_logp differ by rounding alone
    the penalty has no slope.
    """

    share: float = 2e-4
    """Of the update's trained tokens, that are penalised; at least one is."""
    kl_coefficient: float = 1.0
    kind: Literal["kl_cov"] = field(default="kl_cov", kw_only=True)

    def __post_init__(self) -> None:
        _check_share(self.share)
        if not self.kl_coefficient >= 0:
            raise ValueError(f"kl_coefficient {self.kl_coefficient} must not be negative")

    def token_loss(self) -> PPO:
        """The loss of the second phase."""
        return PPO(clip_low=1.0, clip_high=math.inf)

    def rewrite(
        self, rows: Sequence[PackedBatch], logprobs: Sequence[Tensor], ranks: DataRanks, salt: int
    ) -> list[PackedBatch]:
        """Rows in which a chosen token's advantage makes up the slope of its penalty; see BatchLoss."""
        import torch

        covariances, total = _covariances(rows, logprobs, ranks)
        keys = [
            np.where(_inputs(row)[2].numpy(), -covariance.numpy(), np.inf)
            for row, covariance in zip(rows, covariances, strict=True)
        ]
        chosen = _smallest(keys, _count(self.share, total), ranks)
        done = []
        for row, present, mask in zip(rows, logprobs, chosen, strict=True):
            old, advantages, _ = _inputs(row)
            difference = present.detach() - old
            slope = torch.where(difference.abs() > _ROUNDING, torch.sign(difference), 0.0)
            # The slope of -r A' is -r A plus that of the penalty.
            penalised = advantages - self.kl_coefficient * slope / importance_ratio(present.detach(), old)
            done.append(replace(row, advantages=torch.where(torch.from_numpy(mask), penalised, advantages)))
        return done


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share {share} must be a part of the update's trained tokens, above 0 and at most 1")


def _inputs(row: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Old log-probs, advantages and whether a token is trained, each [T]."""
    if row.old_logprobs is None or row.advantages is None:
        raise ValueError("the loss needs old_logprobs and advantages, and the batch carries not both")
    return row.old_logprobs, row.advantages, row.weights != 0


def _count(share: float, total: float) -> int:
    return max(int(share * total), 1)


def _covariances(
    rows: Sequence[PackedBatch], logprobs: Sequence[Tensor], ranks: DataRanks
) -> tuple[list[Tensor], float]:
    """(A - mean A)(logp - mean logp) of every token [T] a row, means over all ranks' trained tokens; their number."""
    import torch

    sums = torch.zeros(3, dtype=torch.float64)
    for row, present in zip(rows, logprobs, strict=True):
        _, advantages, trained = _inputs(row)
        sums += torch.stack(
            [trained.sum().double(), advantages[trained].double().sum(), present.detach()[trained].double().sum()]
        )
    total, of_advantages, of_logprobs = ranks.sum(sums.tolist())
    count = max(total, 1.0)
    found = []
    for row, present in zip(rows, logprobs, strict=True):
        advantages = _inputs(row)[1].double()
        found.append((advantages - of_advantages / count) * (present.detach().double() - of_logprobs / count))
    return found, total


def _hashes(row: PackedBatch, salt: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for every token [T] that depends on its sample, its position and the salt alone."""
    bounds = row.cu_seqlens.numpy().astype(np.int64)
    lengths = np.diff(bounds)
    numbers = np.repeat(np.array(row.sample_numbers or [0] * len(lengths), dtype=np.uint64), lengths)
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    mixed = (numbers << np.uint64(32)) + positions.astype(np.uint64)
    mixed += np.uint64((salt * 0x9E3779B97F4A7C15) % 2**64)  # splitmix64 (Steele et al., 2014)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _smallest(keys: Sequence[npt.NDArray[np.float64]], count: int, ranks: DataRanks) -> list[npt.NDArray[np.bool_]]:
    """Which tokens [T] a row have the `count` smallest keys of all ranks; infinite ones are never chosen."""
    own = np.concatenate([np.zeros(0), *keys])
    own = np.sort(own[np.isfinite(own)])[:count]  # no more of a rank's can be among them
    of_all = np.sort(np.concatenate(ranks.gather(own)))[:count]
    last = of_all[-1] if len(of_all) else -np.inf
    return [values <= last for values in keys]


def _without(row: PackedBatch, taken: Tensor) -> PackedBatch:
    import torch

    assert row.advantages is not None
    return replace(row, advantages=torch.where(taken, 0.0, row.advantages))
