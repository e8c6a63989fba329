"""An ablation's table and plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_klear.config.ablation import AblationConfig, Scale
from megatron_klear.statistics.significance import Interval

from .outcome import Judged, Outcome, arm_means
from .plan import AblationError

_COLOURS = ("#2f6fde", "#e0662f", "#1f9d75", "#a24bc4", "#c99a06", "#d6366f", "#3aa6c9", "#7a6a58")


def markdown(config: AblationConfig, scale: Scale, outcomes: Sequence[Outcome], judged: Sequence[Judged]) -> str:
    """What was tried, what came out, and what that says of the paper's claims."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    measured = "after the last step" if config.measure == "end" else "mean over all validations but the first"
    lines = [
        f"# {config.title}",
        "",
        f"The paper: {config.paper}",
        "",
        f"Here: {scale.what} {scale.design or config.design}",
        "",
        f"Held-out accuracy, {measured}; seeds {', '.join(map(str, seeds))}, 95 % intervals over seeds (Student's t).",
        "",
        "| arm | accuracy [95 %] | of seeds |",
        "| --- | --- | --- |",
    ]
    for name, mean in arm_means(outcomes).items():
        values = ", ".join(f"{100 * outcome.value:.1f}" for outcome in outcomes if outcome.arm == name)
        lines.append(f"| {name} | {_percent(mean)} | {values} |")
    lines += [
        "",
        "| claim | the paper | difference over seeds [95 %] | over problems [95 %] | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in judged:
        over_seeds = "one seed" if one.over_seeds is None else _percent(one.over_seeds, sign=True)
        lines.append(
            f"| {one.claim.better} above {one.claim.than} | {one.claim.paper} | {over_seeds} "
            f"| {_percent(one.over_problems, sign=True)} | **{one.verdict}** |"
        )
    lines += [
        "",
        "A claim is confirmed or contradicted where its interval over seeds excludes zero, each claim by itself: of "
        "twenty without any effect one would be. That interval is for these held-out problems, the one over problems "
        "(bootstrap) for these seeds.",
        "",
        "![Held-out accuracy](plot.png)",
        "",
        "Curves are means over seeds, bands their range."
        if _has_curves(outcomes)
        else "Dots are seeds, bars their means.",
        "",
    ]
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """A table of the claims of all results in a folder, as docs/ablations.md has it.

    Raises AblationError where there is none, or one cannot be read.
    """
    lines = ["| recipe | claim: the paper | difference over seeds [95 %] | verdict |", "| --- | --- | --- | --- |"]
    found = sorted(folder.glob("*/result.json"))
    if not found:
        raise AblationError(f"{folder} has no NAME/result.json")
    for path in found:
        try:
            content = json.loads(path.read_text())
            seeds = len({run["seed"] for run in content["runs"]})
            for claim in content["claims"]:
                interval = claim["over_seeds"]
                told = "one seed" if interval is None else _percent(Interval(*interval), sign=True)
                tested = f"{claim['better']} above {claim['than']}: {claim['paper']}"
                lines.append(f"| `{path.parent.name}`, {seeds} seeds | {tested} | {told} | {claim['verdict']} |")
        except (ValueError, KeyError, TypeError) as error:
            raise AblationError(f"{path} is no result of an ablation: {error!r}") from None
    return "\n".join(lines)


def write_plot(config: AblationConfig, outcomes: Sequence[Outcome], path: Path) -> None:
    """Curves of held-out accuracy, mean and range of seeds; bars where there is one figure a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(outcome.arm for outcome in outcomes))
    curves = _has_curves(outcomes)
    for place, name in enumerate(names):
        own = [outcome for outcome in outcomes if outcome.arm == name]
        colour = _COLOURS[place % len(_COLOURS)]
        if curves:
            steps = sorted(set.intersection(*(set(outcome.curve) for outcome in own)))
            table = 100 * np.array([[outcome.curve[step] for step in steps] for outcome in own])
            axes.plot(steps, table.mean(0), label=name, color=colour, linewidth=1.6)
            axes.fill_between(steps, table.min(0), table.max(0), color=colour, alpha=0.13, linewidth=0)
        else:
            values = 100 * np.array([outcome.value for outcome in own])
            axes.bar(place, values.mean(), color=colour, width=0.65)
            axes.plot([place] * len(values), values, "o", color="black", markersize=3.5)
    if curves:
        axes.set_xlabel("rollout step")
        axes.legend(fontsize=8, frameon=False)
    else:
        axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("held-out accuracy, %")
    axes.set_title(config.title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _has_curves(outcomes: Sequence[Outcome]) -> bool:
    return any(len(outcome.curve) > 1 for outcome in outcomes)


def _percent(figure: Interval | float, *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    if not isinstance(figure, Interval):
        return format(100 * figure, form)
    # Student's interval knows no bounds; an accuracy has them.
    low, high = (figure.low, figure.high) if sign else (max(figure.low, 0.0), min(figure.high, 1.0))
    return f"{100 * figure.value:{form}} [{100 * low:{form}}, {100 * high:{form}}]"
