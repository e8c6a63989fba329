"""A rollout step's record out of its updates'."""

from typing import Any

from megatron_klear.train.step import Step
from megatron_klear.types import StepStats


def update(number: int, **metrics: float) -> StepStats:
    return StepStats(
        step=number,
        loss=1.0,
        grad_norm=1.0,
        learning_rate=0.1,
        num_tokens=8,
        num_trained_tokens=4,
        num_sequences=1,
        skipped=False,
        metrics={"entropy": 1.0, **metrics},
    )


def summary(*stats: StepStats) -> dict[str, float]:
    nothing: Any = None
    step = Step(nothing, nothing, 3)
    step.mismatch = {"mismatch": 0.0}  # measured already
    return step.summary(stats, sync_seconds=0.0).metrics


def test_updates_without_a_token_of_weight_have_no_routes_to_compare() -> None:
    compared, none = update(1, moe_load_max=2.0, moe_route_mismatch=0.25), update(2, moe_load_max=4.0)
    for stats in ((compared, none), (compared, compared)):
        assert summary(*stats)["moe_route_mismatch"] == 0.25
    assert summary(compared, none)["moe_load_max"] == 3.0
    assert "moe_route_mismatch" not in summary(none, compared)
