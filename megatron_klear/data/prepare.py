"""Known data sets turned into rows for both stages: a prompt, a response that thinks and then boxes its answer."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_klear.data.rows import DataError

from .arithmetic import INSTRUCTION, training_row

logger = logging.getLogger(__name__)

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def gsm8k_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a GSM8K JSONL file (`question`, `answer` with its result after `####`).

    The worked solution becomes the thinking, without its calculator annotations (`<<48/2=24>>`); the result loses its
    thousands separators. Raises DataError with file and line for anything else.
    """
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                worked, mark, answer = row["answer"].rpartition("####")
                question = row["question"]
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}:{number}: expected an object with `question` and `answer` ({error})") from None
            if not mark:
                raise DataError(f"{path}:{number}: `answer` has no result after ####")
            answer = answer.strip().replace(",", "")
            thinking = _CALCULATOR.sub("", worked).strip()
            yield training_row(question + INSTRUCTION, thinking, _conclusion(answer), answer, "gsm8k")


def math_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a MATH-like JSON list: `problem` and `answer`, and where there is one a `solution`.

    A model's own `message_thinking` and `message_content` are kept as they are (`gtruth_answer` is then the answer). A
    problem without any of them gives a row without `response`, which only reinforcement learning can use. An entry
    with no answer is left out with a warning.
    Raises DataError with file and entry for anything else.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of objects with `problem` and `answer`")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or "problem" not in entry or not {"answer", "gtruth_answer"} & set(entry):
            raise DataError(f"{path}: entry {number}: expected an object with `problem` and `answer`")
        answer = _answer_text(entry.get("answer", entry.get("gtruth_answer")))
        if not answer:
            logger.warning("%s: entry %d has no answer and is left out", path, number)
            continue
        thinking, conclusion = entry.get("solution"), _conclusion(answer)
        if entry.get("message_thinking"):
            thinking, conclusion = entry["message_thinking"].strip("\n"), entry["message_content"].lstrip("\n")
        row = training_row(entry["problem"] + INSTRUCTION, thinking or "", conclusion, answer, "math")
        if not thinking:
            del row["response"]
        yield row


def write_rows(rows: Iterable[dict[str, Any]], output: Path, *, force: bool = False, limit: int | None = None) -> int:
    """Write rows as JSONL, the first `limit` of them, whole or not at all; returns how many.

    Raises FileExistsError where `output` exists and `force` is false, DataError where there is no row.
    """
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists; choose another file or pass --force")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for row in rows:
                if limit is not None and count >= limit:
                    break
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise DataError(f"no row to write to {output}")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _answer_text(answer: object) -> str:
    """An answer as text: the first of a list of equal ones, a whole number without its `.0`, nothing for a null."""
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return "" if answer is None else str(answer).strip()


def _conclusion(answer: str) -> str:
    return f"The answer is \\boxed{{{answer}}}."
