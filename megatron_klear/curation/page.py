"""The page of a curation's report: what was dropped and why, with examples; one HTML file that needs nothing else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

_COLOURS = ("--part-1", "--part-3", "--part-4", "--part-5", "--part-6", "--part-7")
_SHOWN = {"verb", "counts", "dropped", "bad", "sources", "examples", "lengths", "shares", "pass_rates", "common_grams"}
_KEYS_OF_BUILD = {"label", "folder"}
_MOST_CHARACTERS = 800
_BAR_PIXELS = 160


def page_of(report: Mapping[str, Any]) -> str:
    """The page of a verb's report, or of a build's with all its steps."""
    if "sets" in report:
        title = "Training sets"
        body = [f"<h1>{title}</h1>", *(part for name, made in report["sets"].items() for part in _set(name, made))]
    else:
        counts = report["counts"]
        title = f"{report['verb']}: {counts['kept']:,} of {counts['rows']:,} rows kept"
        body = [f"<h1>{html.escape(title)}</h1>", f'<section class="card">{_step(report)}</section>']
    static = resources.files("megatron_klear.curation") / "static"
    style = (resources.files("megatron_klear.runs.report") / "static" / "style.css").read_text(encoding="utf-8")
    filled = {
        "TITLE": html.escape(title),
        "STYLE": style + (static / "style.css").read_text(encoding="utf-8"),
        "BODY": "\n".join(body),
    }
    page = (static / "page.html").read_text(encoding="utf-8")
    # A lone surrogate of an example has no form in UTF-8.
    return re.sub(r"@@([A-Z]+)@@", lambda mark: filled[mark[1]], page).encode("utf-8", "replace").decode()


def _set(name: str, made: Mapping[str, Any]) -> Iterable[str]:
    """A set of a build: its steps in a table, then each with its report."""
    rows = []
    for step in made["steps"]:
        counts = step["counts"]
        why = ", ".join(f"{count:,} {reason}" for part in ("dropped", "bad") for reason, count in step[part].items())
        rows.append([step["label"], f"{counts['rows']:,}", f"{counts['kept']:,}", why])
    yield f'<h2>{html.escape(name)}: {made["rows"]:,} rows</h2><p class="soft">{html.escape(made["file"])}</p>'
    yield _table(("step", "#rows", "#kept", "left out"), rows)
    for step in made["steps"]:
        yield f'<section class="card"><h2>{html.escape(name)}, {html.escape(step["label"])}</h2>{_step(step)}</section>'


def _step(report: Mapping[str, Any]) -> str:
    parts = [_flow(report)]
    if len(report["sources"]) > 1:
        parts += ["<h3>Files</h3>", _files(report["sources"])]
    if "shares" in report:
        parts += ["<h3>Sources</h3>", _shares(report["shares"])]
    histograms = []
    if report["lengths"]:
        bins = [(_bytes(low), count) for low, count in report["lengths"]]
        histograms.append(_histogram("Kept rows by length, from so many bytes up", bins))
    if "pass_rates" in report:
        bins = [(f"{tenth / 10:.1f}", count) for tenth, count in enumerate(report["pass_rates"])]
        histograms.append(_histogram("Kept rows by their problem's pass rate, from", bins))
    parts.append(f'<div class="histograms">{"".join(histograms)}</div>')
    if report.get("common_grams"):
        rows = [[g["text"], f"{g['documents']:,}", f"{g['benchmark_items']:,}"] for g in report["common_grams"]]
        table = _table(("words", "#rows", "#benchmark items"), rows)
        parts.append(f"<details><summary>What most rows share with the benchmarks</summary>{table}</details>")
    parts += [_examples(reason, shown) for reason, shown in report["examples"].items()]
    more = {key: value for key, value in report.items() if key not in _SHOWN | _KEYS_OF_BUILD and value}
    if more:
        told = html.escape(json.dumps(more, ensure_ascii=False, indent=1))
        parts.append(f"<details><summary>Further figures</summary><pre>{told}</pre></details>")
    return "\n".join(parts)


def _flow(report: Mapping[str, Any]) -> str:
    """All rows as one bar: kept, then each reason."""
    total = report["counts"]["rows"]
    reasons = [*report["dropped"].items(), *report["bad"].items()]
    parts = [("kept", report["counts"]["kept"], "--good")]
    parts += [(reason, count, _COLOURS[k % len(_COLOURS)]) for k, (reason, count) in enumerate(reasons)]
    bar = "".join(
        f'<span style="flex: {count} 0 0; background: var({colour})" title="{html.escape(name)}: {count:,}"></span>'
        for name, count, colour in parts
        if count
    )
    legend = "".join(
        f'<span><i class="dot" style="background: var({colour})"></i>{html.escape(name)} {count:,} '
        f"({_percent(count, total)})</span>"
        for name, count, colour in parts
    )
    return f'<div class="flow">{bar}</div><div class="legend">{legend}</div>'


def _files(sources: Sequence[Mapping[str, Any]]) -> str:
    most = max(source["kept"] for source in sources)
    rows = [
        [source["file"], *(f"{source[name]:,}" for name in ("rows", "kept", "dropped", "bad")), (source["kept"], most)]
        for source in sources
    ]
    return _table(("file", "#rows", "#kept", "#dropped", "#bad", ""), rows)


def _shares(shares: Mapping[str, int]) -> str:
    total, most = sum(shares.values()), max(shares.values(), default=1)
    rows = [[name, f"{count:,}", _percent(count, total), (count, most)] for name, count in shares.items()]
    return _table(("source", "#rows", "#share", ""), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; `#` before a head sets its column right, a pair is a bar."""
    side = [' class="number"' if head.startswith("#") else "" for head in heads]
    head = "".join(f"<th{of}>{html.escape(name.lstrip('#'))}</th>" for name, of in zip(heads, side, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{of}>{_cell(cell)}</td>" for cell, of in zip(row, side, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(cell: Any) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    return f'<span class="bar" style="width: {_BAR_PIXELS * cell[0] / max(1, cell[1]):.0f}px"></span>'


def _histogram(title: str, bins: Sequence[tuple[str, int]]) -> str:
    most = max(count for _, count in bins) or 1
    width, height = 46, 110
    parts = []
    for k, (label, count) in enumerate(bins):
        tall = height * count / most
        x = k * width
        parts.append(f'<rect x="{x + 3}" y="{14 + height - tall:.1f}" width="{width - 6}" height="{tall:.1f}" rx="2"/>')
        if count:
            parts.append(f'<text x="{x + width / 2}" y="{10 + height - tall:.1f}">{count:,}</text>')
        parts.append(f'<text x="{x + width / 2}" y="{height + 30}">{html.escape(label)}</text>')
    size = f"{width * len(bins)} {height + 36}"
    drawn = f'<svg class="histogram" viewBox="0 0 {size}">{"".join(parts)}</svg>'
    return f"<div><h3>{html.escape(title)}</h3>{drawn}</div>"


def _examples(reason: str, examples: Sequence[Mapping[str, Any]]) -> str:
    shown = "".join(_example(example) for example in examples)
    told = "1 example" if len(examples) == 1 else f"the first {len(examples)}"
    return f"<details><summary>{html.escape(reason)}: {told}</summary>{shown}</details>"


def _example(example: Mapping[str, Any]) -> str:
    place = f"{example['file']}, row {example['row']}"
    values = "".join(
        f'<div><span class="name">{html.escape(name)}</span>'
        f'<span class="value">{html.escape(_told(value))}</span></div>'
        for name, value in example.items()
        if name not in ("file", "row")
    )
    return f'<div class="example"><div class="place">{html.escape(place)}</div>{values}</div>'


def _told(value: Any) -> str:
    """A value in words: a place as file and row, a table as its parts."""
    if isinstance(value, Mapping):
        if value.keys() == {"file", "row"}:
            return f"{value['file']}, row {value['row']}"
        return "; ".join(f"{key}: {_told(inner)}" for key, inner in value.items())
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else "0 %"


def _bytes(count: int) -> str:
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count >= size:
            return f"{count // size}{unit}"
    return str(count)
