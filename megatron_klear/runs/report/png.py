"""The charts of a report as PNG files, for papers and chats."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN_COLOURS = ("#2f6fde", "#e0662f", "#1f9d75", "#a24bc4", "#c99a06", "#d6366f", "#3aa6c9", "#7a6a58")
STACK_COLOURS = ("#2f6fde", "#e0662f", "#1f9d75", "#c99a06", "#a24bc4", "#3aa6c9", "#d6366f", "#8b94a3")
VERDICT_COLOURS = {
    "right": "#2aa06d",
    "wrong": "#dd5a4e",
    "malformed": "#d9a02b",
    "timeout": "#9468c8",
    "error": "#7d8796",
}


def write_pngs(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write `overview.png` with every chart, and one file a chart; returns their paths."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    charts = data["charts"]
    names = [run["name"] for run in data["runs"]]
    columns = min(3, max(1, len(charts)))
    rows = max(1, math.ceil(len(charts) / columns))
    overview = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    overview.suptitle(_plain(data["title"]), fontsize=14)
    for place, chart in enumerate(charts):
        _draw(overview.add_subplot(rows, columns, place + 1), chart, names)
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        _draw(figure.add_subplot(), chart, names)
        path = folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', chart['id'])}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    overview.savefig(folder / "overview.png", dpi=110)
    return [*written, folder / "overview.png"]


def _draw(axes: Axes, chart: dict[str, Any], names: list[str]) -> None:
    scale = 100.0 if chart["format"] == "percent" else 1.0
    series = [s | {"y": [math.nan if v is None else v * scale for v in s["y"]]} for s in chart["series"]]
    if chart["kind"] == "stack":
        colours = [VERDICT_COLOURS.get(s["name"], STACK_COLOURS[i % 8]) for i, s in enumerate(series)]
        labels = [_plain(s["name"]) for s in series]
        axes.stackplot(series[0]["x"], [s["y"] for s in series], labels=labels, colors=colours, alpha=0.85)
    for s in series if chart["kind"] == "lines" else []:
        is_validation = s["name"] == "validation"
        label = f"{names[s['run']]}{', validation' if is_validation else ''}"
        style: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 4} if is_validation else {}
        axes.plot(s["x"], s["y"], label=_plain(label), color=RUN_COLOURS[s["run"] % 8], linewidth=1.4, **style)
    axes.set_title(_plain(chart["title"]), loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    unit = {"percent": "%", "tokens": "tokens", "seconds": "s"}.get(chart["format"], "")
    axes.set_ylabel(unit, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def _plain(text: str) -> str:
    """Text that matplotlib takes literally: a pair of dollar signs would start a formula."""
    return text.replace("$", r"\$")
