"""Grade predictions against right answers.

klear grade math --input predictions.jsonl --output graded.jsonl

Each row of the input has `gold` (the right answer) and `pred` (an answer, or a whole response); the output has the same
rows with `verdict`: right, wrong, malformed (no answer can be read), timeout or error; and `verdict_note`, why.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_klear.errors import UserError, exit_on_error
from megatron_klear.rewards.base import RewardSettings
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score, Verdict

_ROWS_AT_A_TIME = 512


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    command = kinds.add_parser("math", help="maths answers")
    command.add_argument("--input", type=Path, required=True, help="JSONL with gold and pred")
    command.add_argument("--output", type=Path, required=True, help="JSONL to write")
    command.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="for one row (default 5)")
    command.add_argument("--workers", type=int, default=0, help="grading processes (default: one per core)")
    command.add_argument("--force", action="store_true", help="replace an existing output")
    options = parser.parse_args(arguments)
    if options.timeout <= 0 or options.workers < 0:
        parser.error("--timeout must be above 0 and --workers not below it")
    return options


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. Raises UserError with file and line where one lacks `gold` or `pred`."""
    rows = []
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    rows.append(_read_row(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return rows


def _read_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or row.get("gold") is None or not isinstance(row.get("pred"), str):
        raise UserError(f"{where}: expected an object with `gold` (a text or number) and `pred` (a text)")
    return row


def grade(rows: list[dict[str, Any]], pool: GradingPool) -> Iterator[Score]:
    """Scores of the rows in their order, with progress on a terminal."""
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        yield from pool.grade([Request("math", r["gold"], r["pred"]) for r in rows[start : start + _ROWS_AT_A_TIME]])
        if sys.stderr.isatty():
            done = min(start + _ROWS_AT_A_TIME, len(rows))
            print(f"\r{done} of {len(rows)}", end="\n" if done == len(rows) else "", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> None:
    """Grade the input and write the output, whole or not at all."""
    output: Path = options.output
    if output.exists() and not options.force:
        raise UserError(f"{output} exists; choose another file or pass --force")
    rows = read_rows(options.input)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    counts: Counter[Verdict] = Counter()
    settings = RewardSettings(require_thinking=False)
    try:
        with (
            partial.open("w", encoding="utf-8") as stream,
            GradingPool(["math"], settings, timeout_seconds=options.timeout, workers=options.workers) as pool,
        ):
            pool.wait_until_ready()
            start = time.perf_counter()
            for row, score in zip(rows, grade(rows, pool), strict=True):
                counts[score.verdict] += 1
                graded = row | {"verdict": score.verdict.value, "verdict_note": score.note}
                stream.write(json.dumps(graded, ensure_ascii=False) + "\n")
            seconds = time.perf_counter() - start
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    told = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict)
    rate = f" ({len(rows) / seconds:.0f} a second)" if rows else ""
    print(f"{len(rows)} graded in {seconds:.1f} s{rate}: {told} -> {output}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Exit code 1 with a message where the input is wrong or the output exists."""
    options = parse_arguments(arguments)
    with exit_on_error():
        run(options)
