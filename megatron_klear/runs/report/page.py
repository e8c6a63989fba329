"""Put a report's page together."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_klear.config.files import write_text_atomically
from megatron_klear.runs.report.charts import all_charts, key_numbers
from megatron_klear.runs.report.png import write_pngs
from megatron_klear.runs.report.rollouts import read_rollouts, to_json
from megatron_klear.runs.report.runs import Run, read_runs

ROLLOUT_BYTES = 3_000_000
"""Of all runs together, so that the page stays well under 5 MB."""


def write_report(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    title: str | None = None,
    png: Path | str | None = None,
    samples_per_step: int = 12,
) -> Path:
    """Write the page of one run, or of several compared, and return its path; `png` is a folder for figures.

    Raises ReportError when a folder is not that of a run. The page replaces an older one as a whole.
    """
    read = read_runs([Path(run) for run in runs])
    data = report_data(read, title, samples_per_step)
    out = Path(out)
    write_text_atomically(out, page_of(data))
    if png is not None:
        write_pngs(data, Path(png))
    return out


def report_data(runs: Sequence[Run], title: str | None, samples_per_step: int) -> dict[str, Any]:
    """All that the page shows, as JSON values."""
    charts, notes = all_charts(runs)
    budget = ROLLOUT_BYTES // max(1, sum(run.kind == "rl" for run in runs))
    described = []
    for run in runs:
        rollouts = read_rollouts(run, samples_per_step, budget)
        described.append(
            {
                "name": run.name,
                "folder": str(run.folder),
                "kind": run.kind,
                "steps": len(run.metrics),
                "lastStep": max((record["step"] for record in run.metrics), default=None),
                "seconds": round(run.seconds, 1),
                "tokens": round(sum(value for _, value in run.curve("num_tokens").finite())),
                "config": run.config_text,
                "notes": run.notes,
                "numbers": key_numbers(run),
                "rollouts": [{"step": step.step, "total": step.total, "samples": step.samples} for step in rollouts],
            }
        )
    return {
        "title": title or " · ".join(run.name for run in runs),
        "written": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "notes": notes,
        "runs": described,
        "charts": charts,
        "differences": _differences(runs),
    }


def page_of(data: dict[str, Any]) -> str:
    """The HTML text of the page."""
    folder = resources.files("megatron_klear.runs.report") / "static"
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in ("charts.js", "rollouts.js", "page.js"))
    parts = {
        "title": html.escape(data["title"]),
        "style": (folder / "style.css").read_text(encoding="utf-8"),
        "data": to_json(data),
        "script": script,
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings in which compared runs differ, other than where they write."""
    if len(runs) < 2:
        return []
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "output")
    rows = [{"key": key, "values": [_shown(run, key) for run in runs]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def _shown(run: Run, key: str) -> str:
    return str(run.settings[key])[:200] if key in run.settings else "—"
