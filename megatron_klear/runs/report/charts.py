"""What a report draws: which metrics, in which order, in which unit, thinned to what a screen can show."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_klear.runs.report.runs import Curve, Run

Format = Literal["number", "percent", "tokens", "seconds", "small"]
MAX_POINTS, MIN_POINTS, POINTS_OF_ALL_RUNS = 400, 80, 2400
MAX_OTHER_CHARTS, MAX_PHASES = 40, 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A chart of one metric, one line a run, with the validation's value of the same name where there is one."""

    metric: str
    title: str
    about: str
    section: str
    format: Format = "number"
    better: Literal["higher", "lower", ""] = ""


LEARNING, POLICY, OPTIMIZER, SPEED, OTHER = "Learning", "Policy", "Optimisation", "Time", "Everything else"
SECTIONS = (LEARNING, POLICY, OPTIMIZER, SPEED, OTHER)
SECTIONS_OF_SFT = {POLICY: LEARNING, OPTIMIZER: LEARNING}
"""Supervised fine-tuning has too few charts of these for sections of their own."""
LINES = (
    Line(
        metric="reward_mean",
        title="Reward",
        about="mean over the samples of a step",
        section=LEARNING,
        better="higher",
    ),
    Line(
        metric="accuracy",
        title="Accuracy",
        about="share of responses judged right",
        section=LEARNING,
        format="percent",
        better="higher",
    ),
    Line(
        metric="response_length_mean",
        title="Response length",
        about="mean, in tokens",
        section=LEARNING,
        format="tokens",
    ),
    Line(metric="loss", title="Loss", about="a trained token", section=LEARNING, better="lower"),
    Line(metric="entropy", title="Entropy", about="of the policy, nats a token", section=POLICY),
    Line(
        metric="zero_advantage_share",
        title="Groups without a signal",
        about="prompts whose samples all got one reward",
        section=POLICY,
        format="percent",
    ),
    Line(
        metric="mismatch_mean",
        title="Mismatch, mean",
        about="|log-prob of trainer - of sampler|, over tokens",
        section=POLICY,
        format="small",
    ),
    Line(
        metric="mismatch_max",
        title="Mismatch, largest",
        about="|log-prob of trainer - of sampler|, worst token",
        section=POLICY,
        format="small",
    ),
    Line(
        metric="weight_version_lag_mean",
        title="Version lag, mean",
        about="rollout steps between the policy that drew a token and the one trained",
        section=POLICY,
    ),
    Line(
        metric="correction_clipped_share",
        title="Corrected tokens",
        about="truncated or masked for their ratio of trainer to sampler",
        section=POLICY,
        format="percent",
    ),
    Line(
        metric="grad_norm",
        title="Gradient norm",
        about="before clipping",
        section=OPTIMIZER,
    ),
    Line(metric="learning_rate", title="Learning rate", about="", section=OPTIMIZER, format="small"),
    Line(
        metric="tokens_per_second",
        title="Tokens per second",
        about="over whole steps",
        section=SPEED,
        format="tokens",
    ),
    Line(metric="mfu", title="MFU", about="share of the devices' peak", section=SPEED, format="percent"),
    Line(
        metric="packing_efficiency",
        title="Packing efficiency",
        about="share of the token budget that holds tokens",
        section=SPEED,
        format="percent",
    ),
    Line(metric="step_seconds", title="Seconds a step", about="", section=SPEED, format="seconds"),
)
KEY_METRICS = {
    "rl": ("accuracy", "reward_mean", "response_length_mean", "entropy", "grad_norm"),
    "sft": ("loss", "tokens_per_second", "entropy", "grad_norm"),
}
REGIONS = {
    1: "1 · A < 0, ratio low",
    2: "2 · A ≥ 0, ratio high",
    3: "3 · A ≥ 0, ratio low",
    4: "4 · A < 0, ratio high",
    5: "5 · past the dual clip",
}
VERDICTS = ("right", "wrong", "malformed", "timeout", "error")
_SHARE = re.compile(r"accuracy|avg|pass|.*_share\Z")
_REGION = re.compile(r"clip_region_(\d)(?:_share)?\Z")


def rounded(value: float | None, digits: int = 5) -> float | None:
    """A number as short as the page needs it."""
    return None if value is None else float(f"{value:.{digits}g}")


def all_charts(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """The charts of these runs, as data for the page, and notes on what was left out."""
    points = max(MIN_POINTS, min(MAX_POINTS, POINTS_OF_ALL_RUNS // len(runs)))
    charts = [_line_chart(runs, line, points) for line in (*LINES, *_kl_lines(runs))]
    for index, run in enumerate(runs):
        where = f" · {run.name}" if len(runs) > 1 else ""
        charts += list(_stacks(run, index, where, points))
    others, notes = _other_lines(runs)
    charts += [_line_chart(runs, line, points) for line in others]
    if all(run.kind == "sft" for run in runs):
        charts = [chart | {"section": SECTIONS_OF_SFT.get(chart["section"], chart["section"])} for chart in charts]
    order = {section: place for place, section in enumerate(SECTIONS)}
    shown = [chart for chart in charts if chart["series"]]
    return sorted(shown, key=lambda chart: order[chart["section"]]), notes


def key_numbers(run: Run) -> list[dict[str, Any]]:
    """First, last and best value of the metrics that tell how a run went, validation's before the training's own."""
    known = {line.metric: line for line in LINES}
    found = []
    for metric in KEY_METRICS[run.kind]:
        for validation in (True, False) if known[metric].better else (False,):
            pairs = run.curve(metric, validation=validation).finite()
            if not pairs:
                continue
            line = known[metric]
            sign = {"higher": 1, "lower": -1, "": 0}[line.better]
            best = max(pairs, key=lambda pair: sign * pair[1]) if sign else None
            found.append(
                {
                    "title": f"{line.title}{', validation' if validation else ''}",
                    "format": line.format,
                    "first": rounded(pairs[0][1]),
                    "last": rounded(pairs[-1][1]),
                    "best": rounded(best[1]) if best else None,
                    "bestStep": best[0] if best else None,
                    "chart": metric,
                    "validation": validation,
                    "better": line.better,
                }
            )
    return found


def thin(curve: Curve, points: int) -> Curve:
    """At most about `points` points: the least and the greatest of each stretch, so that no spike is lost."""
    count = len(curve.steps)
    if count <= points:
        return curve
    stretches = points // 2 - 1
    kept = {0, count - 1}
    for stretch in range(stretches):
        place = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        finite = [(value, at) for at in place if (value := curve.values[at]) is not None]
        kept |= {min(finite)[1], max(finite)[1]} if finite else {place[0]}
    order = sorted(kept)
    return Curve(steps=[curve.steps[at] for at in order], values=[curve.values[at] for at in order])


def _line_chart(runs: Sequence[Run], line: Line, points: int) -> dict[str, Any]:
    series = []
    for index, run in enumerate(runs):
        for validation in (False, True):
            curve = run.curve(line.metric, validation=validation)
            if curve.finite():
                short = thin(curve, points)
                series.append(
                    {
                        "run": index,
                        "name": "validation" if validation else "training",
                        "x": short.steps,
                        "y": [rounded(value) for value in short.values],
                    }
                )
    dashed = "dashed: validation" if any(s["name"] == "validation" for s in series) else ""
    return {
        "id": line.metric,
        "kind": "lines",
        "title": line.title,
        "about": "; ".join(filter(None, [line.about, dashed])),
        "smooth": line.metric != "learning_rate",
        "section": line.section,
        "format": line.format,
        "series": series,
    }


def _kl_lines(runs: Sequence[Run]) -> list[Line]:
    names = dict.fromkeys(name for run in runs for name in run.names() if re.match(r"(mismatch_)?kl(_|/|\Z)", name))
    return [Line(metric=name, title=f"KL ({name})", about="nats a token", section=POLICY) for name in names]


def _other_lines(runs: Sequence[Run]) -> tuple[list[Line], list[str]]:
    drawn = {line.metric for line in (*LINES, *_kl_lines(runs))} | {"step", "samples_per_prompt", "num_prompts"}
    trained = dict.fromkeys(name for run in runs for name in run.names())
    validated = dict.fromkeys(name for run in runs for record in run.validation for name in record)
    others = [
        Line(
            metric=name,
            title=name,
            about="",
            section=LEARNING if name not in trained and _SHARE.match(name) else OTHER,
            format="percent" if _SHARE.match(name) else "number",
        )
        for name in trained | validated
        if name not in drawn and not _REGION.match(name) and not name.startswith(("seconds/", "verdict/"))
    ]
    constant = {line.metric: value for line in others if (value := _only_value(runs, line.metric)) is not None}
    told = ", ".join(f"{name} {value:g}" for name, value in constant.items())
    notes = [f"The same at every step: {told}."] if constant else []
    others = [line for line in others if line.metric not in constant]
    left_out = [line.metric for line in others[MAX_OTHER_CHARTS:]]
    if left_out:
        notes.append(f"{len(left_out)} further metrics are not drawn: {', '.join(left_out[:20])} ...")
    return others[:MAX_OTHER_CHARTS], notes


def _only_value(runs: Sequence[Run], metric: str) -> float | None:
    """What a metric is at every step of all runs, None where it changes or there is one step to go by."""
    curves = [run.curve(metric, validation=validation).finite() for run in runs for validation in (False, True)]
    values = {rounded(value) for curve in curves for _, value in curve}
    return values.pop() if len(values) == 1 and max(map(len, curves)) > 1 else None


def _stacks(run: Run, index: int, where: str, points: int) -> Iterator[dict[str, Any]]:
    names = run.names()
    regions = {match[1]: name for name in names if (match := _REGION.match(name))}
    parts = {REGIONS.get(int(code), f"region {code}"): regions[code] for code in sorted(regions)}
    about = "tokens outside; in 1 and 2 only GPPO keeps a gradient"
    yield _stack(run, index, parts, points) | {
        "id": f"clip_regions-{index}",
        "title": f"Clip regions{where}",
        "about": about,
        "section": POLICY,
        "format": "percent",
    }
    parts = {verdict: f"verdict/{verdict}" for verdict in VERDICTS if f"verdict/{verdict}" in names}
    yield _stack(run, index, parts, points, shares=True) | {
        "id": f"verdicts-{index}",
        "title": f"Verdicts{where}",
        "about": "share of responses by how grading ended",
        "section": LEARNING,
        "format": "percent",
        "verdicts": True,
    }
    parts = {name.removeprefix("seconds/"): name for name in names if name.startswith("seconds/")}
    yield _stack(run, index, parts, points, largest=MAX_PHASES) | {
        "id": f"seconds-{index}",
        "title": f"Time by phase{where}",
        "about": "seconds of each step",
        "section": SPEED,
        "format": "seconds",
    }


def _stack(
    run: Run, index: int, parts: dict[str, str], points: int, *, shares: bool = False, largest: int | None = None
) -> dict[str, Any]:
    """A stacked chart of metrics over one common axis; long runs are averaged over stretches of steps."""
    records = [r for r in run.metrics if any(isinstance(r.get(name), int | float) for name in parts.values())]
    steps = [record["step"] for record in records]
    rows = {title: [float(r.get(name) or 0.0) for r in records] for title, name in parts.items()}
    if largest is not None:
        rows = _largest(rows, largest)
    if shares:
        totals = [sum(values) or 1.0 for values in zip(*rows.values(), strict=True)]
        rows = {title: [v / t for v, t in zip(values, totals, strict=True)] for title, values in rows.items()}
    stretches = min(len(steps), points // 2)
    bounds = [(i * len(steps) // stretches, (i + 1) * len(steps) // stretches) for i in range(stretches)]
    x = [steps[last - 1] for _, last in bounds]
    series = [
        {"run": index, "name": title, "x": x, "y": [rounded(sum(row[a:b]) / (b - a)) for a, b in bounds]}
        for title, row in rows.items()
    ]
    return {"kind": "stack", "series": series if steps else []}


def _largest(rows: dict[str, list[float]], count: int) -> dict[str, list[float]]:
    """The `count` rows of the largest sums, and the sum of the others as `other`."""
    order = sorted(rows, key=lambda title: -sum(rows[title]))
    kept = {title: rows[title] for title in order[:count]}
    rest = [rows[title] for title in order[count:]]
    return kept | ({"other phases": [sum(values) for values in zip(*rest, strict=True)]} if rest else {})
