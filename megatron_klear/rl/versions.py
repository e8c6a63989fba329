"""Which policy drew each token, and how many versions older it is than the one trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_klear.types import Group, Sample


def token_versions(sample: Sample) -> npt.NDArray[np.int64]:
    """The version of the policy that drew each trained token [tokens of the response].

    Raises ValueError where `version_spans` leave a trained token without a policy.
    """
    if not sample.version_spans:
        return np.full(int(sample.trained.sum()), sample.policy_version, dtype=np.int64)
    versions = np.full(len(sample.tokens), -1, dtype=np.int64)
    for span in sample.version_spans:
        versions[span.start : span.end] = span.version
    of_response = versions[sample.trained]
    if (of_response < 0).any():
        raise ValueError(
            f"{int((of_response < 0).sum())} tokens of a response lie in none of its version spans "
            f"{[tuple(span) for span in sample.version_spans]}"
        )
    return of_response


def oldest_version(group: Group) -> int:
    """The oldest policy that drew a token of the group. Raises ValueError where it has no token."""
    return int(min(token_versions(sample).min(initial=np.iinfo(np.int64).max) for sample in group.samples))


def version_lag(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Mean and largest number of versions between a trained token's policy and `version`; 0 without tokens."""
    lags = version - np.concatenate(
        [np.zeros(0, dtype=np.int64), *(token_versions(sample) for group in groups for sample in group.samples)]
    )
    return {
        "weight_version_lag_mean": float(lags.mean()) if len(lags) else 0.0,
        "weight_version_lag_max": float(lags.max(initial=0)),
    }
