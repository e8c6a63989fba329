"""The train/sampler mismatch of a step as sums and a histogram, which ranks add up instead of gathering tokens.

A rank's share is a few kilobytes whatever the number of tokens. Means are exact; a percentile of the ratio is that of
its bin, whose log-ratio is right to 1.2 % of itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_klear.rl.corrections import PERCENTILES, Correction, Mismatch

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]
BINS_OF_A_SIGN = 1023
_SMALLEST, _LARGEST = 1e-8, 1e3
"""Nats. Log-ratios below the first count as 0, ratios beyond the second as infinite."""
_STEP = math.log(_LARGEST / _SMALLEST) / (BINS_OF_A_SIGN - 1)
SUMS = ("tokens", "size", "difference", "k3", "factor", "touched", "masked")


@dataclass(frozen=True, kw_only=True, slots=True)
class MismatchSums:
    """What one rank, or all of them, found over their trained tokens."""

    sums: Floats  # [len(SUMS)]
    histogram: Floats  # [2 * BINS_OF_A_SIGN + 1] tokens by log-ratio, from the most negative on
    largest: float
    """|difference| of log-probs."""

    @classmethod
    def of(
        cls, trainer: Tensor, sampler: Tensor, factors: Tensor, log_ratio: Tensor, correction: Correction
    ) -> MismatchSums:
        """Those of trained tokens: log-probs of both sides [n], and the `factors` [n] a correction made of `log_ratio`.

        A log-prob that is not finite shows as an infinite or NaN mean: nothing is left out.
        """
        difference = trainer.detach().double().cpu() - sampler.detach().double().cpu()
        ratio_of_token = factors.double().cpu() - log_ratio.double().cpu().exp()
        touched = (ratio_of_token.abs() > 1e-6) & (correction != "none")
        masked = touched & (factors.cpu() == 0)
        size = difference.abs()
        sums = [
            float(len(difference)),
            float(size.sum()),
            float(difference.sum()),
            float((difference.expm1() - difference).sum()),
            float(factors.double().sum()),
            float(touched.sum()),
            float(masked.sum()),
        ]
        return cls(
            sums=np.array(sums),
            histogram=_histogram(difference.numpy()),
            largest=float(size.max()) if len(size) else 0.0,
        )

    @classmethod
    def total(cls, parts: Sequence[MismatchSums]) -> MismatchSums:
        """Those of all the tokens of `parts`."""
        return cls(
            sums=np.sum([np.zeros(len(SUMS)), *(part.sums for part in parts)], axis=0),
            histogram=np.sum([np.zeros(2 * BINS_OF_A_SIGN + 1), *(part.histogram for part in parts)], axis=0),
            largest=max((part.largest for part in parts), default=0.0),
        )

    def over_ranks(
        self, add: Callable[[list[float]], list[float]], largest: Callable[[list[float]], list[float]]
    ) -> MismatchSums:
        """Those of all ranks, given the two reductions over them."""
        added = np.array(add([*self.sums.tolist(), *self.histogram.tolist()]))
        (most,) = largest([self.largest])
        return MismatchSums(sums=added[: len(SUMS)], histogram=added[len(SUMS) :], largest=most)

    def mismatch(self) -> Mismatch:
        """The statistics; ratios are one and all else zero where there are no tokens."""
        tokens, size, difference, k3 = self.sums[:4].tolist()
        count = max(tokens, 1.0)
        return Mismatch(
            tokens=int(tokens),
            mean=size / count,
            max=self.largest,
            ratio_percentiles={percent: self._percentile(percent) for percent in PERCENTILES},
            kl_k1=-difference / count if tokens else 0.0,
            kl_k3=k3 / count,
        )

    def correction_metrics(self) -> dict[str, float]:
        """How much the correction touched; see `corrections.correction_metrics`."""
        tokens, factor, touched, masked = (float(self.sums[SUMS.index(n)]) for n in ("tokens", *SUMS[4:]))
        count = max(tokens, 1.0)
        return {
            "correction_clipped_share": touched / count,
            "correction_truncated_share": (touched - masked) / count,
            "correction_masked_share": masked / count,
            "correction_weight_mean": factor / count if tokens else 1.0,
        }

    def _percentile(self, percent: int) -> float:
        total = self.histogram.sum()
        if not total:
            return 1.0
        place = max(1.0, math.ceil(percent / 100 * total))
        return float(np.exp(_VALUES[int(np.searchsorted(np.cumsum(self.histogram), place))]))


def _histogram(difference: Floats) -> Floats:
    """Tokens by bin; NaN counts as the largest, as where numbers are sorted."""
    size = np.abs(np.where(np.isnan(difference), np.inf, difference))
    with np.errstate(divide="ignore"):
        place = np.ceil(np.log(size / _SMALLEST) / _STEP - 0.5)
    outwards = np.clip(np.nan_to_num(place, neginf=-1, posinf=BINS_OF_A_SIGN) + 1, 0, BINS_OF_A_SIGN)
    signed = np.where(np.isnan(difference), 1.0, np.sign(difference)) * outwards
    return np.bincount(signed.astype(np.int64) + BINS_OF_A_SIGN, minlength=2 * BINS_OF_A_SIGN + 1).astype(np.float64)


def _values() -> Floats:
    """The log-ratio that a bin stands for."""
    outwards = _SMALLEST * np.exp(_STEP * np.arange(BINS_OF_A_SIGN, dtype=np.float64))
    outwards[-1] = np.inf
    return np.concatenate([-outwards[::-1], [0.0], outwards])


_VALUES = _values()
