"""Which weights drew a token, and how far a step's samples lag behind them."""

import tracemalloc

import numpy as np
import pytest
from rl_groups import fixed_groups

from megatron_klear.rl.versions import oldest_version, version_counts, version_lag
from megatron_klear.types import Sample, VersionSpan


def test_versions_by_hand():
    sample = Sample(
        tokens=np.arange(6, dtype=np.int32),
        trained=np.arange(6) >= 2,
        policy_version=3,
        version_spans=(VersionSpan(3, 2, 3), VersionSpan(5, 3, 6)),
    )
    assert version_counts(sample) == {3: 1, 5: 3}
    group = fixed_groups(1, 1)[0]
    group.samples[0] = sample
    assert oldest_version(group) == 3
    assert version_lag([group], 6) == {"weight_version_lag_mean": 1.5, "weight_version_lag_max": 3.0}
    assert version_lag([], 6) == {"weight_version_lag_mean": 0.0, "weight_version_lag_max": 0.0}
    whole = Sample(tokens=sample.tokens, trained=sample.trained, policy_version=4)
    assert version_counts(whole) == {4: 4}
    torn = Sample(tokens=sample.tokens, trained=sample.trained, version_spans=(VersionSpan(3, 2, 4),))
    with pytest.raises(ValueError, match="2 tokens of a response lie in none of its version spans"):
        version_counts(torn)
    empty = Sample(tokens=sample.tokens, trained=np.zeros(6, np.bool_), policy_version=4)
    assert version_counts(empty) == {}


def test_a_group_is_looked_at_without_arrays_as_long_as_its_responses():
    # All ranks wait for what is said of a step: 16 million versions took a third of a second.
    count = 1 << 20
    group = fixed_groups(1, 1)[0]
    group.samples[0] = Sample(
        tokens=np.zeros(count, np.int32),
        trained=np.ones(count, np.bool_),
        version_spans=(VersionSpan(3, 0, 5), VersionSpan(4, 5, count)),
    )
    tracemalloc.start()
    try:
        assert oldest_version(group) == 3
        assert version_lag([group], 4)["weight_version_lag_mean"] == 5 / count
        assert tracemalloc.get_traced_memory()[1] < count
    finally:
        tracemalloc.stop()
