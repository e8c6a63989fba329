"""Turn known raw files into rows for SFT and RL, or make arithmetic problems from a seed.

klear prepare gsm8k --input train.jsonl --output runs/data/gsm8k.jsonl
klear prepare math --input math.json --output runs/data/math.jsonl
klear prepare arithmetic --count 5000 --digits 3 --output runs/data/arithmetic.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_klear.data.arithmetic import arithmetic_rows
from megatron_klear.data.prepare import gsm8k_rows, math_rows, write_rows


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, what in (("gsm8k", "GSM8K JSONL"), ("math", "MATH-like JSON"), ("arithmetic", "seeded problems")):
        command = kinds.add_parser(kind, help=what)
        command.add_argument("--output", type=Path, required=True, help="JSONL file to write")
        command.add_argument("--force", action="store_true", help="replace an existing file")
        if kind == "arithmetic":
            command.add_argument("--count", type=int, default=2000)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--terms", type=int, default=3, help="most numbers in a problem")
            command.add_argument("--digits", type=int, default=2, help="most digits of a number")
            command.add_argument("--operators", default="+-*", help="those of a problem's first step")
            command.add_argument("--slip-share", type=float, default=0.0, help="steps worked out wrongly")
            command.add_argument("--exclude", type=Path, help="rows to hold out: their prompts are left out")
        else:
            command.add_argument("--input", type=Path, required=True, help="raw file")
            command.add_argument("--limit", type=int, default=None, help="take only the first rows")
    return parser.parse_args(arguments)


def contents(path: Path) -> frozenset[str]:
    """The prompts in a file of rows."""
    with path.open(encoding="utf-8") as file:
        return frozenset(json.loads(line)["prompt"][0]["content"] for line in file)


def main(arguments: list[str] | None = None) -> int:
    """Write the rows; exit code 1 with a message where the input is wrong or the output exists."""
    options = parse_arguments(arguments)
    try:
        if options.kind == "arithmetic":
            held_out = contents(options.exclude) if options.exclude else frozenset()
            rows = arithmetic_rows(
                options.count,
                seed=options.seed,
                terms=options.terms,
                digits=options.digits,
                operators=options.operators,
                slip_share=options.slip_share,
            )
            kept = (row for row in rows if row["prompt"][0]["content"] not in held_out)
            count = write_rows(kept, options.output, force=options.force)
        else:
            reader = gsm8k_rows if options.kind == "gsm8k" else math_rows
            count = write_rows(reader(options.input), options.output, force=options.force, limit=options.limit)
    except (OSError, ValueError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    print(f"wrote {count} rows to {options.output}")
    return 0
