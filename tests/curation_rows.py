"""Rows and benchmarks for the tests of curation."""

import json
import random
from pathlib import Path
from typing import Any

from megatron_klear.cli.curate import parse_arguments, run

PHRASE = "where m and n are relatively prime positive integers find the value of m plus n"
WORDS = [f"{start}{end}" for start in ("ba", "ke", "lo", "mi", "nu", "pra", "sto", "tri") for end in "abcdefghij"]


def problem(prompt: Any) -> dict[str, Any]:
    """A row for reinforcement learning."""
    return {"prompt": prompt, "data_source": "made_up", "reward_model": {"ground_truth": "1"}}


def write(path: Path, *rows: Any) -> Path:
    """Write rows as JSONL; bytes are lines as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Read rows of JSONL."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def sentence(number: int, count: int) -> str:
    """`count` words that depend on `number`."""
    chosen = random.Random(number)
    return " ".join(chosen.choice(WORDS) for _ in range(count))


def curate(*arguments: object) -> dict[str, Any] | None:
    """`klear curate` in this process; its report."""
    return run(parse_arguments([str(argument) for argument in arguments]))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
