"""Curate training rows: drop repeated problems, and problems that overlap with benchmarks.

klear curate deduplicate --input first.jsonl second.jsonl --output runs/curated/distinct/rows.jsonl
klear curate decontaminate --input rows.jsonl --output runs/curated/clean/rows.jsonl --against aime.jsonl

Each output has a folder of its own: manifest.json and report.json stand beside it, and hits.jsonl of decontaminate.
docs/curation.md says what they hold and what the rules are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from megatron_klear.curation.rules import Rule, RuleName
from megatron_klear.curation.run import Files, run_decontaminate, run_deduplicate
from megatron_klear.data.sources import resolve_files
from megatron_klear.errors import exit_on_error

_TOLD_SECONDS = 0.5
_MIB = 1 << 20
_RULE = Rule()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("deduplicate", help="keep one row of each problem, of the first file that has it")
    clean = verbs.add_parser("decontaminate", help="drop rows whose problem overlaps with a benchmark's")
    for command in verbs.choices.values():
        command.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".jsonl or .parquet, or globs")
        command.add_argument("--output", type=Path, required=True, help=".jsonl or .parquet, alone in its folder")
        command.add_argument("--strict", action="store_true", help="stop at a row that cannot be used")
        command.add_argument("--force", action="store_true", help="replace an existing output")
        command.add_argument("--max-row-mib", type=float, default=16, help="a longer row is left out (default 16)")
    clean.add_argument("--against", nargs="+", required=True, metavar="FILE", help="benchmark files or globs")
    clean.add_argument(
        "--rule", choices=get_args(RuleName), default=_RULE.name, help="any shared 9-gram (default), or enough of them"
    )
    clean.add_argument("--template", nargs="+", type=Path, default=[], metavar="FILE", help="cut from items first")
    clean.add_argument(
        "--max-items", type=int, help=f"careful: a 9-gram of more items is a phrase (default {_RULE.max_items})"
    )
    clean.add_argument(
        "--min-share", type=float, help=f"careful: of an item's 9-grams, 0 to 1 (default {_RULE.min_share})"
    )
    clean.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    options = parser.parse_args(arguments)
    if not 0 < options.max_row_mib <= 1024:
        parser.error("--max-row-mib must be above 0, at most 1024")
    if options.verb == "decontaminate":
        _check_rule(options, parser)
    return options


def _check_rule(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if options.rule == "paper" and (options.max_items, options.min_share) != (None, None):
        parser.error("--max-items and --min-share go with --rule careful")
    options.max_items = _RULE.max_items if options.max_items is None else options.max_items
    options.min_share = _RULE.min_share if options.min_share is None else options.min_share
    if options.max_items < 1 or options.workers < 1:
        parser.error("--max-items and --workers must be at least 1")
    if not 0 <= options.min_share <= 1:
        parser.error("--min-share must be 0 to 1")


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Do what the command line asks for; returns the report, None where it was done already."""
    files = Files(
        inputs=resolve_files(options.input, "--input"),
        output=options.output,
        strict=options.strict,
        force=options.force,
        max_row_bytes=int(options.max_row_mib * _MIB),
        progress=_progress(),
    )
    if options.verb == "deduplicate":
        return run_deduplicate(files)
    rule = Rule(options.rule, options.max_items, options.min_share)
    against = resolve_files(options.against, "--against")
    return run_decontaminate(files, against, options.template, rule, options.workers)


def _progress() -> Callable[[int], None]:
    """A counter on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda rows: None
    told = time.monotonic()

    def tell(rows: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TOLD_SECONDS:
            told = time.monotonic()
            print(f"\r{rows} rows", end="\r", file=sys.stderr, flush=True)

    return tell


def main(arguments: list[str] | None = None) -> None:
    """Exit code 1 with a message where a file is wrong or the output exists."""
    options = parse_arguments(arguments)
    with exit_on_error():
        report = run(options)
        if report is None:
            print(f"{options.output} is there already, of these files and settings", file=sys.stderr)
            return
        counts = report["counts"]
        why = [f"{count} {reason}" for part in ("dropped", "bad") for reason, count in report[part].items()]
        told = f" ({', '.join(why)})" if why else ""
        print(f"{counts['kept']} of {counts['rows']} rows kept{told} -> {options.output}", file=sys.stderr)
