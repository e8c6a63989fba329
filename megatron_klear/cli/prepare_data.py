"""Turn known raw files into rows for SFT and RL, or make problems from a seed: sums, or small programs.

klear prepare gsm8k --input train.jsonl --output runs/data/gsm8k.jsonl
klear prepare math --input math.json --output runs/data/math.jsonl
klear prepare arithmetic --count 5000 --digits 3 --output runs/data/arithmetic.jsonl
klear prepare code --count 5000 --cases 3 --output runs/data/code.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_klear.data.arithmetic import arithmetic_rows
from megatron_klear.data.code_tasks import MAX_CASES, code_rows
from megatron_klear.data.prepare import gsm8k_rows, math_rows, write_rows


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, what in (("gsm8k", "GSM8K JSONL"), ("math", "MATH-like JSON")):
        command = kinds.add_parser(kind, help=what)
        command.add_argument("--input", type=Path, required=True, help="raw file")
        command.add_argument("--limit", type=int, default=None, help="take only the first rows")
    arithmetic = kinds.add_parser("arithmetic", help="sums from a seed")
    arithmetic.add_argument("--terms", type=int, default=3, help="most numbers in a problem")
    arithmetic.add_argument("--digits", type=int, default=2, help="most digits of a number")
    arithmetic.add_argument("--operators", default="+-*", help="those of a problem's first step")
    arithmetic.add_argument("--slip-share", type=float, default=0.0, help="steps worked out wrongly")
    code = kinds.add_parser("code", help="functions by cases from a seed, with their tests")
    code.add_argument("--cases", type=int, default=2, help=f"of each function, 1 to {MAX_CASES}")
    code.add_argument("--slip-share", type=float, default=0.0, help="cases programmed wrongly")
    code.add_argument("--faulty-share", type=float, default=0.0, help="problems with tests that are partly wrong")
    code.add_argument("--reference", action="store_true", help="write a right program into extra_info.solution")
    for command in (arithmetic, code):
        command.add_argument("--count", type=int, default=2000)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--exclude", type=Path, help="rows to hold out: their prompts are left out")
    for command in kinds.choices.values():
        command.add_argument("--output", type=Path, required=True, help="JSONL file to write")
        command.add_argument("--force", action="store_true", help="replace an existing file")
    return parser.parse_args(arguments)


def generated_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a seed, without those whose prompts are held out."""
    held_out = contents(options.exclude) if options.exclude else frozenset()
    if options.kind == "arithmetic":
        rows = arithmetic_rows(
            options.count,
            seed=options.seed,
            terms=options.terms,
            digits=options.digits,
            operators=options.operators,
            slip_share=options.slip_share,
        )
    else:
        rows = code_rows(
            options.count,
            seed=options.seed,
            cases=options.cases,
            slip_share=options.slip_share,
            faulty_share=options.faulty_share,
            reference=options.reference,
        )
    return (row for row in rows if row["prompt"][0]["content"] not in held_out)


def contents(path: Path) -> frozenset[str]:
    """The prompts in a file of rows."""
    with path.open(encoding="utf-8") as file:
        return frozenset(json.loads(line)["prompt"][0]["content"] for line in file)


def main(arguments: list[str] | None = None) -> int:
    """Write the rows; exit code 1 with a message where the input is wrong or the output exists."""
    options = parse_arguments(arguments)
    try:
        if options.kind in ("arithmetic", "code"):
            count = write_rows(generated_rows(options), options.output, force=options.force)
        else:
            reader = gsm8k_rows if options.kind == "gsm8k" else math_rows
            count = write_rows(reader(options.input), options.output, force=options.force, limit=options.limit)
    except (OSError, ValueError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    print(f"wrote {count} rows to {options.output}")
    return 0
