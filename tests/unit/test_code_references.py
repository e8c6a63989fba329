"""Reference solutions are worth 1, and what is made of them is worth what plain Python says of the same asserts.

The whole of HumanEval, MBPP and LeetCode is run by `-m slow` where the shared data is.
"""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from code_sandbox import DATA, fenced, shared_sandbox

from megatron_klear.rewards.base import SCHEMES
from megatron_klear.rewards.code.reward import CodeReward
from megatron_klear.rewards.code.settings import CodeSettings
from megatron_klear.types import Score

EXCERPT = Path(__file__).resolve().parent.parent / "data" / "code" / "problems.jsonl"
Problem = tuple[str, str, Any, str]
"""Its name, a right program, its ground truth, and the name of the function."""


def reward(**settings: Any) -> CodeReward:
    told = CodeSettings(**{"cpu_seconds": 6.0, "total_seconds": 60.0} | settings)
    return CodeReward(SCHEMES["paper"], settings=told, sandbox=shared_sandbox())


def problem_of(row: dict[str, Any]) -> Problem:
    if "entry_point" in row:
        return row["task_id"], row["prompt"] + row["canonical_solution"], row, row["entry_point"]
    names = [node.name for node in ast.parse(row["code"]).body if isinstance(node, ast.FunctionDef)]
    called = [name for name in names if f"{name}(" in row["test_list"][0]]
    return f"MBPP/{row['task_id']}", row["code"], row, called[0]


PROBLEMS = [problem_of(json.loads(line)) for line in EXCERPT.read_text().splitlines()]
NAMES = [name for name, *_ in PROBLEMS]

MUTANTS = {
    "off by one": (
        "def {name}(*given):\n    found = _right(*given)\n"
        "    return found + 1 if type(found) in (int, float) else found"
    ),
    "wrong type": "def {name}(*given):\n    return [[_right(*given)]]",
    "a crash now and then": (
        "def {name}(*given):\n    if len(repr(given)) % 3 == 0:\n        raise ValueError\n    return _right(*given)"
    ),
    "right by accident": (
        "def {name}(*given):\n    found = _right(*given)\n    return found if len(repr(given)) % 2 else type(found)()"
    ),
}  # fmt: skip
LOOP = "def {name}(*given):\n    while len(repr(given)) % 3 == 0:\n        pass\n    return _right(*given)"


def mutant(program: str, name: str, wrapper: str) -> str:
    return f"{program}\n_right = {name}\n{wrapper.format(name=name)}\n"


def statements(truth: dict[str, Any]) -> list[ast.stmt]:
    """The statements of a problem's tests, `candidate` among their names."""
    if "test" not in truth:
        return ast.parse("\n".join([*truth["test_imports"], *truth["test_list"]])).body
    tree = ast.parse(truth["test"])
    (check,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    return check.body


def by_plain_python(program: str, name: str, truth: dict[str, Any]) -> tuple[int, int]:
    """Tests passed, of how many, each statement with an assert by itself. The programs here are our own."""
    names: dict[str, Any] = {}
    exec(program, names)
    names["candidate"] = names[name]
    passed = total = 0
    for statement in statements(truth):
        asserts = [node.test for node in ast.walk(statement) if isinstance(node, ast.Assert)]
        if all(isinstance(test, ast.Constant) for test in asserts) and asserts:
            continue
        total += bool(asserts)
        try:
            exec(compile(ast.Module([statement], []), "test", "exec"), names)
            passed += bool(asserts)
        except Exception:
            pass
    return passed, total


def counts(score: Score) -> tuple[int, int]:
    assert score.program is not None
    return score.program.passed, score.program.total


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_right_programs_and_what_is_made_of_them(problem: Problem) -> None:
    _, program, truth, name = problem
    score = reward()(fenced(program), truth)
    assert score.reward == 1.0, score.note
    assert counts(score) == by_plain_python(program, name, truth)
    for kind, wrapper in MUTANTS.items():
        changed = mutant(program, name, wrapper)
        score = reward()(fenced(changed), truth)
        assert counts(score) == by_plain_python(changed, name, truth), f"{kind}: {score.note}"


def test_a_loop_costs_the_tests_it_loops_on() -> None:
    _, program, truth, name = PROBLEMS[NAMES.index("HumanEval/0")]
    looping = reward(cpu_seconds=0.3)(fenced(mutant(program, name, LOOP)), truth)
    crashing = mutant(program, name, MUTANTS["a crash now and then"])
    assert counts(looping) == by_plain_python(crashing, name, truth)
    assert looping.program is not None
    assert looping.program.status == "timeout"


def test_a_body_alone_is_put_under_its_prompt() -> None:
    row = json.loads(EXCERPT.read_text().splitlines()[0])
    body = "# goes on\n" + row["canonical_solution"]
    assert body.startswith("# goes on\n    for idx")
    assert reward()(fenced(body), row).reward == 1.0


def whole_sets() -> Iterator[tuple[str, int, list[tuple[str, Any]]]]:
    humaneval = gzip.decompress((DATA / "humaneval" / "HumanEval.jsonl.gz").read_bytes()).splitlines()
    rows = [json.loads(line) for line in humaneval]
    yield "HumanEval", 164, [(row["prompt"] + row["canonical_solution"], row) for row in rows]
    rows = json.loads((DATA / "mbpp" / "mbpp_sanitized_399.json").read_text())
    yield "MBPP", 399, [(row["code"], row) for row in rows]
    rows = json.loads((DATA / "code_rl" / "leetcode_test_200.json").read_text())
    yield "LeetCode", 200, [(row["solutions"], row["tests"]) for row in rows]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_every_reference_solution_is_worth_one() -> None:
    judged = reward()
    for name, count, problems in whole_sets():
        scores = [judged(program if "```" in program else fenced(program), truth) for program, truth in problems]
        assert len(scores) == count
        assert [score.note for score in scores if score.reward != 1.0] == [], name
