"""Which policy drew how many tokens, and how many versions older it is than the one trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_klear.types import Group, Sample


def version_counts(sample: Sample) -> Counter[int]:
    """Trained tokens by the version of the policy that drew them; none of 0. No array of the sample's length is made.

    Raises ValueError where `version_spans` leave a trained token without a policy.
    """
    total = int(np.count_nonzero(sample.trained))
    counts = Counter({sample.policy_version: total})
    if sample.version_spans:
        counts = Counter()
        for span in sample.version_spans:
            counts[span.version] += int(np.count_nonzero(sample.trained[span.start : span.end]))
        if counts.total() != total:
            raise ValueError(
                f"{total - counts.total()} tokens of a response lie in none of its version spans "
                f"{[tuple(span) for span in sample.version_spans]}"
            )
    return +counts


def oldest_version(group: Group) -> int:
    """The oldest policy that drew a token of the group. Raises ValueError where it has no sample."""
    return min(min(version_counts(sample), default=np.iinfo(np.int64).max) for sample in group.samples)


def version_lag(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Mean and largest number of versions between a trained token's policy and `version`; 0 without tokens."""
    counts = sum((version_counts(sample) for group in groups for sample in group.samples), Counter[int]())
    lags = {version - of_policy: count for of_policy, count in counts.items()}
    return {
        "weight_version_lag_mean": sum(lag * count for lag, count in lags.items()) / max(counts.total(), 1),
        "weight_version_lag_max": float(max([0, *lags])),
    }
