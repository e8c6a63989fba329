"""A rollout step's record out of its updates'."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_klear.runs.log import RunLog
from megatron_klear.train import gppo
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


def test_handing_over_samples_is_counted_as_time_of_the_orchestrator(monkeypatch):
    now = [0.0]

    def takes(seconds, value=None):
        def work(*_, **__):
            now[0] += seconds
            return value

        return work

    step = SimpleNamespace(collect=takes(1), prepare=takes(2, []), ratios=takes(4), summary=takes(0), advantages=[])
    monkeypatch.setattr(gppo, "Step", lambda *_: step)
    monkeypatch.setattr(gppo, "save", takes(0))
    of_rollouts = dict.fromkeys(["sync", "sleep", "flush", "validate"], takes(0))
    rollouts = SimpleNamespace(arrays=None, keep=takes(8), **of_rollouts)
    config = SimpleNamespace(
        output=Path("run"),
        train=SimpleNamespace(max_skipped_steps=1, steps=1, keep_rollouts=True),
        validation=SimpleNamespace(every=0),
        checkpoint=SimpleNamespace(save_every=0),
    )
    engine = SimpleNamespace(topology=SimpleNamespace(rank=0), finish_save=takes(0))
    log = RunLog(clock=lambda: now[0])
    monkeypatch.setattr(log, "step", takes(0))  # which forgets the phases
    gppo.train_steps(config, engine, rollouts, log, SimpleNamespace(asked=lambda: False))
    assert log.seconds("orchestrator") == 12
    assert log.seconds("old_logprobs") == 2
