"""Confidence intervals: known quantiles, what they must do under shifts and scales, and that they cover the truth."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.cli import gain
from megatron_klear.statistics.significance import mean_interval, student_quantile, trend

QUANTILES = {1: 12.70620, 2: 4.30265, 3: 3.18245, 10: 2.22814, 28: 2.04841, 120: 1.97993}
NUMBERS = st.lists(st.floats(-10, 10), min_size=4, max_size=40)


@pytest.mark.parametrize(("freedom", "quantile"), QUANTILES.items())
def test_quantiles_of_student_are_those_of_the_tables(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-5)


@given(NUMBERS, st.floats(-5, 5), st.floats(0.1, 5))
def test_trend_moves_with_the_line_that_is_added(values, slope, scale):
    steps = list(range(len(values)))
    plain = trend(steps, values)
    tilted = trend(steps, [scale * value + slope * step + 3 for step, value in zip(steps, values, strict=True)])
    expected = [scale * bound + slope for bound in (plain.value, plain.low, plain.high)]
    assert [tilted.value, tilted.low, tilted.high] == pytest.approx(expected, abs=1e-6)


def test_trend_covers_the_true_slope_as_often_as_it_says():
    rng = np.random.default_rng(1)
    steps = np.arange(20)
    covered = [
        interval.low <= 0.3 <= interval.high
        for interval in (trend(steps, 0.3 * steps + rng.normal(size=20)) for _ in range(1000))
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


def test_mean_interval_covers_the_true_gain_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(60):
        interval = mean_interval(rng.binomial(1, 0.5, 100) - rng.binomial(1, 0.3, 100))
        covered.append(interval.low <= 0.2 <= interval.high)
    assert np.mean(covered) >= 0.85


def test_mean_interval_is_the_same_every_time_and_holds_the_mean():
    values = np.random.default_rng(3).random(50)
    first, second = mean_interval(values), mean_interval(list(values))
    assert first == second
    assert first.low < first.value < first.high
    assert first.excludes_zero
    assert not mean_interval([-1.0, 1.0, 0.0, 0.0]).excludes_zero


@pytest.mark.parametrize(("steps", "values"), [([1, 2], [0.0, 1.0]), ([2, 2, 2], [0.0, 1.0, 2.0])])
def test_too_little_for_a_trend_is_said(steps, values):
    with pytest.raises(ValueError, match="three different steps"):
        trend(steps, values)


def test_no_prompts_are_no_interval():
    with pytest.raises(ValueError, match="at least one prompt"):
        mean_interval([])


def make_run(folder: Path, gained: int) -> Path:
    """A run of 30 steps; of 100 held-out prompts 20 are right before it and `gained` more after."""
    (folder / "validation").mkdir(parents=True)
    lines = [{"step": step, "reward_mean": gained * step / 30 + (step % 3), "accuracy": 0.2} for step in range(1, 31)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, right in ((0, 20), (30, 20 + gained)):
        rows = [{"prompt_id": str(i), "verdict": "right" if i < right else "wrong"} for i in range(100)]
        path = folder / "validation" / f"step-{step:08d}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("gained", "told"), [(30, ["0.300 [0.210, 0.390]", "rises"]), (0, ["0.000 [0.000, 0.000]", "no significant trend"])]
)
def test_tool_tells_a_gain_from_none(tmp_path, capsys, gained, told):
    gain.main([str(make_run(tmp_path / "run", gained))])
    printed = capsys.readouterr().out
    assert "| 0 | 100 | 0.200 [0.130, 0.280] |" in printed
    assert [words for words in told if words not in printed] == []


def test_tool_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gain.main([str(tmp_path / "absent")])
    assert stopped.value.code == 1
    assert "no metrics.jsonl" in capsys.readouterr().err
