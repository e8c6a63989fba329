"""Grade predictions against right answers, or programs against tests.

klear grade math --input predictions.jsonl --output graded.jsonl
klear grade code --input responses.jsonl --output graded.jsonl

math: each row of the input has `gold` (the right answer) and `pred` (an answer, or a whole response); the output has
the same rows with `verdict`: right, wrong, malformed (no answer can be read), timeout or error; and `verdict_note`,
why.

code: each row has `response`, of which the last block of Python after the thinking is run (or the whole, where it is
Python and has no block), or `program`, which is run as it is; and `tests`, a ground truth of any form. The output has
the same rows with `reward`, `passed` and `total` tests, `verdict`: passed, failed, timeout, memory, crashed, contained,
malformed (no program) or error; and `verdict_note`, why.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.cli import grade_code
from megatron_klear.errors import UserError, exit_on_error
from megatron_klear.rewards.base import RewardSettings
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score, Verdict

_ROWS_AHEAD = 512
"""Handed to the pool before the first of them is written."""
_TOLD_SECONDS = 0.2
_PROGRAM_VERDICTS = ("passed", "failed", "timeout", "memory", "crashed", "contained", "malformed", "error")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """How rows of a kind are graded."""

    data_source: str
    settings: RewardSettings
    timeout_seconds: float
    check: Callable[[Any, str], None]
    """Raises UserError where a row cannot be used; it is given the row and its place."""
    request: Callable[[dict[str, Any]], Request]
    added: Callable[[Score], dict[str, Any]]
    """What is added to a row, `verdict` among it."""
    verdicts: tuple[str, ...]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="grades", required=True)
    math = kinds.add_parser("math", help="maths answers")
    math.add_argument("--input", type=Path, required=True, help="JSONL with gold and pred")
    math.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="for one row (default 5)")
    code = kinds.add_parser("code", help="programs")
    grade_code.add_arguments(code)
    for command in (math, code):
        command.add_argument("--output", type=Path, required=True, help="JSONL to write")
        command.add_argument("--workers", type=int, default=0, help="grading processes (default: one per core)")
        command.add_argument("--force", action="store_true", help="replace an existing output")
    options = parser.parse_args(arguments)
    if options.workers < 0 or (options.grades == "math" and options.timeout <= 0):
        parser.error("--timeout must be above 0 and --workers not below it")
    if options.grades == "code":
        grade_code.check_arguments(options, code)
    return options


def read_rows(path: Path, check: Callable[[Any, str], None]) -> list[dict[str, Any]]:
    """The rows of a JSONL file. Raises UserError with file and line where one cannot be used."""
    rows = []
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    rows.append(_read_row(line, f"{path}:{number}", check))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return rows


def _read_row(line: str, where: str, check: Callable[[Any, str], None]) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    check(row, where)
    return row


def _check_maths(row: Any, where: str) -> None:
    if not isinstance(row, dict) or row.get("gold") is None or not isinstance(row.get("pred"), str):
        raise UserError(f"{where}: expected an object with `gold` (a text or number) and `pred` (a text)")


def _kind(options: argparse.Namespace) -> _Kind:
    if options.grades == "math":
        return _Kind(
            data_source="math",
            settings=RewardSettings(require_thinking=False),
            timeout_seconds=options.timeout,
            check=_check_maths,
            request=lambda row: Request("math", row["gold"], row["pred"]),
            added=lambda score: {"verdict": score.verdict.value, "verdict_note": score.note},
            verdicts=tuple(verdict.value for verdict in Verdict),
        )
    settings = grade_code.settings_of(options)
    return _Kind(
        data_source="code",
        settings=settings,
        timeout_seconds=settings.code.longest_seconds,
        check=grade_code.check_row,
        request=grade_code.request_of,
        added=grade_code.graded,
        verdicts=_PROGRAM_VERDICTS,
    )


def grade(requests: Iterable[Request], pool: GradingPool, count: int) -> Iterator[Score]:
    """Scores in the order of the requests, of which there are `count`, with progress on a terminal."""
    waiting: deque[Any] = deque()
    left, done, told = iter(requests), 0, 0.0
    while True:
        while len(waiting) < _ROWS_AHEAD and (request := next(left, None)) is not None:
            waiting.append(pool.submit(request))
        if not waiting:
            return
        yield waiting.popleft().result()
        done += 1
        if sys.stderr.isatty() and (done == count or time.monotonic() - told > _TOLD_SECONDS):
            told = time.monotonic()
            print(f"\r{done} of {count}", end="\n" if done == count else "", file=sys.stderr, flush=True)


def _leave(number: int, _: object) -> None:
    """End as on Ctrl-C: what is half written is removed."""
    raise SystemExit(128 + number)


def _line(row: dict[str, Any]) -> str:
    """A row as JSON: readable, but where a text holds half a character (a lone surrogate), which no file takes."""
    line = json.dumps(row, ensure_ascii=False)
    return (line if line.isascii() or _is_text(line) else json.dumps(row)) + "\n"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def run(options: argparse.Namespace) -> None:
    """Grade the input and write the output, whole or not at all."""
    output: Path = options.output
    if output.exists() and not options.force:
        raise UserError(f"{output} exists; choose another file or pass --force")
    if output.exists() and not output.is_file():
        raise UserError(f"{output} is a folder or a device; name a file")
    if not output.parent.is_dir() and any(parent.is_file() for parent in output.parents):
        raise UserError(f"{output.parent} cannot be a folder: a file is in the way")
    kind = _kind(options)
    rows = read_rows(options.input, kind.check)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    counts: Counter[str] = Counter()
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with (
            partial.open("w", encoding="utf-8") as stream,
            GradingPool(
                [kind.data_source], kind.settings, timeout_seconds=kind.timeout_seconds, workers=options.workers
            ) as pool,
        ):
            pool.wait_until_ready()
            start = time.perf_counter()
            for row, score in zip(rows, grade(map(kind.request, rows), pool, len(rows)), strict=True):
                added = kind.added(score)
                counts[added["verdict"]] += 1
                stream.write(_line(row | added))
            seconds = time.perf_counter() - start
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, before)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in kind.verdicts)
    rate = f" ({len(rows) / seconds:.0f} a second)" if rows else ""
    print(f"{len(rows)} graded in {seconds:.1f} s{rate}: {told} -> {output}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Exit code 1 with a message where the input is wrong or the output exists."""
    options = parse_arguments(arguments)
    with exit_on_error():
        run(options)
