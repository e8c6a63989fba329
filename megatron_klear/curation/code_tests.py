"""The tests of a code problem as curation looks at them: how many differ, which contradict, and some of them alone."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_klear.rewards.code.cases import load_json
from megatron_klear.rewards.code.compare_text import same_text
from megatron_klear.rewards.code.compare_values import same_value
from megatron_klear.rewards.code.extract import find_program, is_python
from megatron_klear.rewards.code.forms import FormError, read_problem
from megatron_klear.rewards.code.problem import AnyOf, Case, Expected, Problem, Test, Text

from .rows import BadRow

_WRAPPING = ("input_output", "verification_info", "test_cases", "tests", "ground_truth", "reward_model")
_PYTHON_3 = 3
"""The language of a solution, as code_contests numbers them."""


def tests_of(ground_truth: Any) -> Problem:
    """The tests of a ground truth. Raises BadRow where they cannot be read."""
    try:
        return read_problem(ground_truth)
    except FormError as error:
        raise BadRow("bad_tests", str(error)) from None


def num_distinct(tests: Sequence[Test]) -> int:
    """How many tests differ in their input or in what they expect."""
    return len({(test.input, repr(test.expected)) if isinstance(test, Case) else test.source for test in tests})


def contradiction(tests: Sequence[Test]) -> tuple[int, int] | None:
    """Numbers, from 1, of two tests of one input that no output passes both; None where there are none."""
    by_input: dict[bytes, list[tuple[int, Expected]]] = defaultdict(list)
    for number, test in enumerate(tests, 1):
        if isinstance(test, Case):
            for before, expected in by_input[test.input]:
                if _differ(expected, test.expected):
                    return before, number
            by_input[test.input].append((number, test.expected))
    return None


def _differ(one: Expected, other: Expected) -> bool:
    if isinstance(one, Text) and isinstance(other, Text):
        return not same_text(one.text, other.text)
    if isinstance(one, AnyOf) and isinstance(other, AnyOf):
        return not any(same_value(a, b) for a in one.values for b in other.values)
    return False


def only(ground_truth: Any, problem: Problem, numbers: Sequence[int]) -> Any:
    """The ground truth with those of its tests alone, in the same form; `numbers` count from 0.

    None where its form does not allow that: tests that are one Python source, in files, or packed.
    """
    try:
        made = _picked(ground_truth, numbers, len(problem.tests))
        read = read_problem(made) if made is not None else None
    except (FormError, ValueError, RecursionError):
        return None
    wanted = tuple(problem.tests[number] for number in numbers)
    same = read is not None and (read.tests, read.mode, read.entry) == (wanted, problem.mode, problem.entry)
    return made if same else None


def as_value(ground_truth: Any) -> Any:
    """A ground truth without the JSON around it, where it is a text of that."""
    try:
        return load_json(ground_truth) if isinstance(ground_truth, str) else ground_truth
    except (ValueError, RecursionError):
        return ground_truth


def _picked(truth: Any, numbers: Sequence[int], count: int) -> Any:
    if isinstance(truth, str):
        picked = _picked(load_json(truth), numbers, count)
        return None if picked is None else json.dumps(picked, ensure_ascii=False)
    if isinstance(truth, list):
        return [truth[number] for number in numbers] if len(truth) == count else None
    if not isinstance(truth, dict):
        return None
    for names in (("inputs", "outputs"), ("test_list",)):
        if all(isinstance(truth.get(name), list) and len(truth[name]) == count for name in names):
            return truth | {name: [truth[name][number] for number in numbers] for name in names}
    for name in _WRAPPING:
        if truth.get(name) is not None:
            picked = _picked(truth[name], numbers, count)
            return None if picked is None else truth | {name: picked}
    return None


def references_of(row: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
    """The reference solutions of a row: those under the first of the fields that it has; none where it has none.

    A field, dots for fields inside, holds a program, a response with one, a list of them, that list as JSON, or
    code_contests' table, of which the programs in Python 3 are taken.
    """
    for name in fields:
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str) and value.lstrip().startswith("["):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        if isinstance(value, Mapping) and isinstance(value.get("solution"), list):
            languages = value.get("language") or [_PYTHON_3] * len(value["solution"])
            languages = languages if isinstance(languages, list) else []
            pairs = zip(languages, value["solution"], strict=False)
            value = [program for language, program in pairs if language == _PYTHON_3]
        programs = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        if found := [program for program in programs if isinstance(program, str) and program.strip()]:
            return found
    return []


def as_response(program: str) -> str:
    """A program as the reward reads it, in a fence that it does not hold itself; a response with one as it is.

    The rest of the prompt's function (HumanEval) keeps its indentation.
    """
    if not is_python(program) and find_program(program).program is not None:
        return program
    if program.lstrip("\r\n")[:1].isspace():
        program = f"#\n{program}"  # a block that is indented as a whole would lose that
    fence = "```"
    while fence in program:
        fence += "`"
    return f"{fence}python\n{program}\n{fence}\n"
