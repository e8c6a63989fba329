"""The page of an evaluation: one HTML file with its figures beside published ones, its problems and responses."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_klear.config.files import write_text_atomically

from .benchmarks import Problem
from .store import Grade, Key, Response
from .table import BenchmarkResult

RESPONSE_BYTES = 3_000_000
"""Of responses on a page, over all benchmarks, so that it stays well under 5 MB."""
_BINS = 8
_CELL = 9
_COLUMNS = (
    *("benchmark", "problems x samples", "avg@k", "95 % over problems", "run to run", "pass@k", "maj@k"),
    *("cut off", "malformed", "tokens"),
)
_COLOURS = {"right": "--right", "wrong": "--wrong", "malformed": "--malformed", "timeout": "--timeout"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """A benchmark with everything that was drawn for it."""

    result: BenchmarkResult
    problems: Sequence[Problem]
    responses: Mapping[Key, Response]
    grades: Mapping[Key, Grade]


def write_page(evaluated: Sequence[Evaluated], out: Path, *, title: str) -> None:
    """Write the page as a whole, replacing an older one."""
    budget = RESPONSE_BYTES // max(1, len(evaluated))
    parts = [f"<h1>{html.escape(title)}</h1>", _overview([one.result for one in evaluated])]
    parts += [_benchmark(number, one) for number, one in enumerate(evaluated)]
    data = [_browsable(one, budget) for one in evaluated]
    static = resources.files("megatron_klear.evaluation") / "static"
    style = (resources.files("megatron_klear.runs.report") / "static" / "style.css").read_text(encoding="utf-8")
    page = (static / "page.html").read_text(encoding="utf-8")
    filled = {
        "TITLE": html.escape(title),
        "STYLE": style + (static / "style.css").read_text(encoding="utf-8"),
        "BODY": "\n".join(parts),
        # A response may hold any text, the end of a script element too.
        "DATA": json.dumps(data).replace("<", "\\u003c"),
        "SCRIPT": (static / "page.js").read_text(encoding="utf-8"),
    }
    page = re.sub(r"@@([A-Z]+)@@", lambda mark: filled[mark[1]], page)
    write_text_atomically(out, page)


def _overview(results: Sequence[BenchmarkResult]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = []
    for r in results:
        best = max(r.pass_at)
        cells = (
            r.name,
            f"{r.num_problems} x {r.samples}",
            _percent(r.accuracy),
            f"{_percent(r.low)} to {_percent(r.high)}",
            "" if r.run_to_run is None else f"± {_percent(r.run_to_run)}",
            f"{_percent(r.pass_at[best])} (k = {best})",
            "" if r.majority is None else _percent(r.majority),
            _percent(r.cut_off),
            _percent(r.malformed),
            f"{r.mean_tokens:,.0f}",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    note = (
        "The interval is for problems like these; run to run is the standard deviation when these very problems are "
        "sampled again, which is what a published figure for them is compared by."
    )
    return f'<table class="figures"><tr>{head}</tr>{"".join(rows)}</table><p class="soft">{note}</p>'


def _benchmark(number: int, one: Evaluated) -> str:
    r = one.result
    return "\n".join(
        (
            f'<section class="card"><h2>{html.escape(r.name)}</h2><p class="soft">{html.escape(r.protocol)}</p>',
            _beside(r),
            "<h3>Problems and samples</h3>" + _heat_map(one),
            "<h3>Length</h3>" + _by_length(one),
            f'<h3>Responses</h3><div class="browser" data-benchmark="{number}"></div></section>',
        )
    )


def _beside(r: BenchmarkResult) -> str:
    """This figure with its interval above published ones, on one scale of 0 to 100."""
    own = (100 * r.low, 100 * r.high)
    rows: list[tuple[str, float, str, tuple[float, float] | None]] = [("this model", 100 * r.accuracy, r.protocol, own)]
    rows += [(p.model, p.score, p.protocol, None) for p in r.published]
    height, left, width = 26, 230, 420
    parts = []
    for i, (name, score, protocol, interval) in enumerate(rows):
        y = height * i + height / 2
        x = left + width * score / 100
        if interval is not None:
            low, high = (left + width * end / 100 for end in interval)
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" class="interval"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="5" class="{"own" if interval else "other"}"/>')
        parts.append(f'<text x="0" y="{y + 4}">{html.escape(name)}</text>')
        parts.append(
            f'<text x="{left + width + 12}" y="{y + 4}" class="soft">{score:.1f}  {html.escape(protocol)}</text>'
        )
    scale = "".join(
        f'<line x1="{left + width * tick / 100}" x2="{left + width * tick / 100}" y1="0" y2="{height * len(rows)}" '
        'class="rule"/>'
        for tick in (0, 25, 50, 75, 100)
    )
    return f'<svg class="beside" viewBox="0 0 1100 {height * len(rows)}">{scale}{"".join(parts)}</svg>'


def _heat_map(one: Evaluated) -> str:
    """A row a problem, the hardest first; a cell a sample, in the colour of its verdict."""
    order = sorted(one.problems, key=lambda problem: one.result.right[problem.id])
    k = one.result.samples
    cells = []
    for y, problem in enumerate(order):
        for x in range(k):
            grade = one.grades[problem.id, x]
            colour = _COLOURS.get(grade.verdict, "--error")
            cells.append(
                f'<rect x="{x * _CELL}" y="{y * _CELL}" width="{_CELL - 1}" height="{_CELL - 1}" '
                f'style="fill: var({colour})"><title>{html.escape(_place(problem))}, {x}: {grade.verdict}</title>'
                "</rect>"
            )
    width, height = k * _CELL, len(order) * _CELL
    drawn = f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(cells)}</svg>'
    return f'<div class="scroll">{drawn}</div>'


def _by_length(one: Evaluated) -> str:
    """Share of right responses in equal bins of responses by their length."""
    ordered = sorted(one.responses.values(), key=lambda response: response.num_tokens)
    bins = [ordered[len(ordered) * i // _BINS : len(ordered) * (i + 1) // _BINS] for i in range(_BINS)]
    rows = []
    for chunk in filter(None, bins):
        right = sum(one.grades[response.key].verdict == "right" for response in chunk) / len(chunk)
        cut = sum(response.finish == "length" for response in chunk) / len(chunk)
        first, last = chunk[0].num_tokens, chunk[-1].num_tokens
        bar = f'<span class="bar" style="width: {200 * right:.0f}px"></span>'
        cells = (f"{first:,} to {last:,} tokens", f"{bar} {_percent(right)} % right", f"{_percent(cut)} % cut off")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<table class="figures">{"".join(rows)}</table>'


def _browsable(one: Evaluated, budget: int) -> dict[str, Any]:
    """Responses for the page, some of every problem as far as the budget goes; the longest texts are cut."""
    shown: list[dict[str, Any]] = []
    spent, longest = 0, max(2000, budget // max(1, len(one.responses)))
    for number in range(one.result.samples):
        for problem in one.problems:
            response, grade = one.responses[problem.id, number], one.grades[problem.id, number]
            text = response.text if len(response.text) <= longest else f"{response.text[:longest]} [...]"
            spent += len(text)
            if spent > budget:
                return {"responses": shown, "total": len(one.responses)}
            shown.append(
                {
                    "problem": _place(problem),
                    "question": str(problem.messages[-1]["content"])[:4000],
                    "number": number,
                    "verdict": grade.verdict,
                    "note": grade.note,
                    "tokens": response.num_tokens,
                    "finish": response.finish,
                    "text": text,
                }
            )
    return {"responses": shown, "total": len(one.responses)}


def _place(problem: Problem) -> str:
    return problem.place.rpartition("/")[2] or problem.id


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
