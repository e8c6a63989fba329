"""Say whether a reinforcement-learning run really got better: its curve, with 95 % confidence intervals.

klear gain runs/gppo_smollm2_arithmetic
klear gain runs/seed0 runs/seed1

Held-out accuracy: every validation's mean over prompts, and the gain over the first one on the same prompts, both with
the bootstrap over prompts; it reads validation/step-*.parquet, which a run with train.keep_rollouts leaves. Training
reward and accuracy: the slope of a straight line over the steps with Student's interval, and the means of the first
and the last fifth of the steps; these read metrics.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_klear.errors import exit_on_error
from megatron_klear.runs.held_out import held_out
from megatron_klear.runs.report.runs import Run, read_runs
from megatron_klear.statistics.significance import mean_interval, trend

BARS = "▁▂▃▄▅▆▇█"


def held_out_lines(accuracies: Mapping[int, Mapping[str, float]]) -> list[str]:
    """A table of the validations: accuracy, and the gain over the first on the prompts that both have."""
    if not accuracies:
        return ["no held-out samples (validation.sources, train.keep_rollouts)"]
    first = accuracies[min(accuracies)]
    lines = [
        "| step | held-out prompts | accuracy [95 %] | gain on the same prompts [95 %] |",
        "| --- | --- | --- | --- |",
    ]
    for step, of_prompts in sorted(accuracies.items()):
        same = [of_prompts[name] - first[name] for name in of_prompts if name in first]
        gain = "" if of_prompts is first or not same else f"{mean_interval(same)}"
        lines.append(f"| {step} | {len(of_prompts)} | {mean_interval(list(of_prompts.values()))} | {gain} |")
    return lines


def training_lines(run: Run, names: Sequence[str] = ("reward_mean", "accuracy")) -> list[str]:
    """The trend of each metric over the steps, and its curve in small."""
    lines = []
    for name in names:
        pairs = run.curve(name).finite()
        if len(pairs) < 3:
            lines.append(f"{name}: {len(pairs)} steps are too few for a trend")
            continue
        steps, values = zip(*pairs, strict=True)
        slope, fifth = trend(steps, values), max(1, len(values) // 5)
        verdict = "rises" if slope.low > 0 else "falls" if slope.high < 0 else "no significant trend"
        lines.append(
            f"{name}: {np.mean(values[:fifth]):.3f} over the first {fifth} of {len(values)} steps, "
            f"{np.mean(values[-fifth:]):.3f} over the last {fifth}; slope per step {slope.value:.4f} "
            f"[{slope.low:.4f}, {slope.high:.4f}], {verdict}  {sparkline(values)}"
        )
    return lines


def sparkline(values: Sequence[float]) -> str:
    """A curve of block characters from the least to the greatest value."""
    low, high = min(values), max(values)
    return "".join(BARS[round((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in values)


def main(arguments: list[str] | None = None) -> None:
    """Print the figures of every run; exit code 1 with a message where a folder is not a run's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    options = parser.parse_args(arguments)
    with exit_on_error():
        for run in read_runs(options.runs):
            print("\n".join([f"{run.name}", *held_out_lines(held_out(run.folder)), *training_lines(run), ""]))
