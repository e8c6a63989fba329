"""Problems out of the rows of known benchmarks' files, whichever of their usual forms those have."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_klear.config.evaluation import BenchmarkConfig
from megatron_klear.data.rows import DataError, ProblemRow, read_problem

Reader = Callable[[dict[str, Any], BenchmarkConfig], ProblemRow | None]
"""A problem out of a row of a benchmark's file; None for a row that is not asked for. Raises DataError."""

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_COMPLETE = (
    "Complete the function below. Answer with the whole program in one ```python block.\n\n```python\n{stub}\n```"
)
# The words of LiveCodeBench's own runner, lcb_runner/prompts/code_generation.py.
_LCB_INTRO = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests."
)
_LCB_FUNCTION = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
_LCB_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)


def maths(source: str) -> Reader:
    """Rows with `problem` (or `question`, or chat `messages`) and the answer under one of the usual keys."""

    def read(row: dict[str, Any], config: BenchmarkConfig) -> ProblemRow | None:
        if config.subset and row.get("subset_for_metrics") != config.subset:
            return None
        if "reward_model" in row and "prompt" in row:
            problem = read_problem(row)
            return ProblemRow(problem.messages, source, problem.ground_truth, problem.extra_info)
        question, answer = _question(row), _answer(row)
        return ProblemRow(({"role": "user", "content": question + BOXED},), source, answer, None)

    return read


def _question(row: Mapping[str, Any]) -> str:
    meta = row.get("meta")
    for holder in (row, meta if isinstance(meta, Mapping) else {}):
        for key in ("problem", "question", "Problem"):
            if isinstance(holder.get(key), str) and holder[key].strip():
                return str(holder[key])
    messages = row.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping) and message.get("role", "user") == "user":  # a system message is no question
            content = message.get("content")
            if isinstance(content, str) and content.strip():
                return content
    raise DataError("the row has no `problem`, `question` or `messages`")


def _answer(row: Mapping[str, Any]) -> str:
    """The answer, under the key of the benchmark's own file.

    `answer` goes before `solution`: of HMMT's rows the released judge reads `meta.solution`, which they do not have,
    and so scores all of them wrong.
    """
    meta = row.get("meta")
    for holder in (row, meta if isinstance(meta, Mapping) else {}):
        for key in ("expected_answer", "answer", "gtruth_answer", "final_answer", "solution"):
            value = holder.get(key)
            if isinstance(value, list):
                value = value[0] if value else None
            if isinstance(value, float):
                if not math.isfinite(value):
                    continue  # how tables of pandas spell that there is none
                value = int(value) if value.is_integer() else value  # AMC's file has 142.0 for 142
            if value is not None and not isinstance(value, bool | dict | list) and (told := _final(str(value))):
                return told
    raise DataError("the row has no `answer`, `expected_answer` or `solution`")


def _final(answer: str) -> str:
    """What follows GSM8K's `####`, without thousands separators; any other answer as it is."""
    _, mark, final = answer.rpartition("####")
    return final.strip().replace(",", "") if mark else answer.strip()


def own(row: dict[str, Any], config: BenchmarkConfig) -> ProblemRow:
    """Rows of the form that training takes."""
    return read_problem(row)


def humaneval(row: dict[str, Any], config: BenchmarkConfig) -> ProblemRow:
    """HumanEval's own rows: complete the function of `prompt`; `test` and `entry_point` judge it."""
    stub, tests, entry = (row.get(key) for key in ("prompt", "test", "entry_point"))
    if not isinstance(stub, str) or not isinstance(tests, str) or not isinstance(entry, str):
        raise DataError("a row of HumanEval has `prompt`, `test` and `entry_point`")
    truth = {"prompt": stub, "test": tests, "entry_point": entry}
    return ProblemRow(({"role": "user", "content": _COMPLETE.format(stub=stub.rstrip())},), "humaneval", truth, None)


def mbpp(row: dict[str, Any], config: BenchmarkConfig) -> ProblemRow:
    """MBPP's own rows, of the whole set or the sanitised one; the first test is shown, as the paper does."""
    text, tests = row.get("text") or row.get("prompt"), row.get("test_list")
    if not isinstance(text, str) or not isinstance(tests, list) or not tests:
        raise DataError("a row of MBPP has `text` or `prompt`, and `test_list`")
    asked = f"{text}\nYour program must pass this test:\n\n```python\n{tests[0]}\n```\nAnswer with one ```python block."
    truth = {key: row[key] for key in ("test_list", "test_setup_code", "test_imports") if row.get(key)}
    return ProblemRow(({"role": "user", "content": asked},), "mbpp", truth, None)


def livecodebench(row: dict[str, Any], config: BenchmarkConfig) -> ProblemRow | None:
    """LiveCodeBench's own rows, of contests within `since` and `until`; asked as its own runner does."""
    date = str(row.get("contest_date", ""))[:10]
    try:
        day = datetime.date.fromisoformat(date)
        since = datetime.date.fromisoformat(config.since) if config.since else datetime.date.min
        until = datetime.date.fromisoformat(config.until) if config.until else datetime.date.max
    except ValueError as error:
        raise DataError(f"contest_date, since and until are dates, YYYY-MM-DD: {error}") from None
    if not since <= day < until:
        return None
    question = row.get("question_content")
    if not isinstance(question, str) or "public_test_cases" not in row:
        raise DataError("a row of LiveCodeBench has `question_content` and `public_test_cases`")
    stub = str(row.get("starter_code") or "")
    how, body = (_LCB_FUNCTION, stub) if stub else (_LCB_STDIN, "# YOUR CODE HERE")
    asked = f"{_LCB_INTRO}\n\nQuestion: {question}\n\n{how}\n```python\n{body}\n```\n"
    keys = ("public_test_cases", "private_test_cases", "metadata", "starter_code")
    truth = {key: row[key] for key in keys if row.get(key) is not None}
    return ProblemRow(({"role": "user", "content": asked},), "livecodebench", truth, None)
