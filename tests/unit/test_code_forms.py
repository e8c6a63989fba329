"""Ground truths of code problems: every form is read into the same tests, and what is none is told by its row."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import textwrap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from code_sandbox import DATA

from megatron_klear.rewards.base import RewardError, check_truths
from megatron_klear.rewards.code.forms import FormError, check_form, read_problem
from megatron_klear.rewards.code.problem import AnyOf, Case, Check, Is, Near, Problem, Text

SQUARES = {"inputs": ["2\n", "3\n"], "outputs": ["4\n", "9\n"]}
PAIRS = [{"input": "2\n", "output": "4\n"}, {"input": "3\n", "output": "9\n"}]


def compressed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


def packed(tests: Any) -> str:
    return compressed(pickle.dumps(json.dumps(tests)))


LCB = [row | {"testtype": "stdin"} for row in PAIRS]
STDIN_FORMS: dict[str, Any] = {
    "Klear": SQUARES,
    "Klear, as JSON": json.dumps(SQUARES),
    "a list of lines": {"inputs": [["2"], ["3"]], "outputs": [["4"], ["9"]]},
    "APPS": {"input_output": json.dumps(SQUARES)},
    "Codeforces": PAIRS,
    "rllm": [row | {"testtype": "stdin_stdout"} for row in PAIRS],
    "rllm, as JSON": json.dumps([row | {"type": "stdin_stdout"} for row in PAIRS]),
    "PrimeIntellect": {"language": "python", "test_cases": [row | {"type": "stdin_stdout"} for row in PAIRS]},
    "LiveCodeBench": {"public_test_cases": json.dumps(LCB[:1]), "private_test_cases": packed(LCB[1:])},
    "LiveCodeBench, plain": {"public_test_cases": LCB[:1], "private_test_cases": json.dumps(LCB[1:]), "metadata": "{}"},
    "code_contests": {
        "public_tests": {"input": ["2\n"], "output": ["4\n"]},
        "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": ["3\n"], "output": ["9\n"]},
    },
    "a row of data": {"reward_model": {"style": "rule", "ground_truth": json.dumps(SQUARES)}},
    "numpy": {"inputs": np.array(["2\n", "3\n"], dtype=object), "outputs": np.array(["4\n", "9\n"], dtype=object)},
    "numbers": {"inputs": [2, 3], "outputs": [4, 9]},
}


def stripped(problem: Problem) -> list[tuple[bytes, bytes]]:
    found = []
    for test in problem.tests:
        assert isinstance(test, Case)
        assert isinstance(test.expected, Text)
        found.append((test.input.strip(), test.expected.text.strip()))
    return found


@pytest.mark.parametrize("name", STDIN_FORMS)
def test_programs_that_read_and_print(name: str) -> None:
    problem = read_problem(STDIN_FORMS[name])
    assert problem.mode == "stdin"
    assert problem.prelude == ""
    assert stripped(problem) == [(b"2", b"4"), (b"3", b"9")]
    check_form(STDIN_FORMS[name])


ADD: dict[str, Any] = {
    "verl": {"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"},
    "rllm": [
        {"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}},
        {"input": "3\n4", "output": "7", "testtype": "functional", "metadata": {"func_name": "add"}},
    ],
    "PrimeIntellect": [
        {"type": "function_call", "fn_name": "add", "input": [1, 2], "output": 3},
        {"type": "function_call", "fn_name": "add", "input": [3, 4], "output": 7},
    ],
    "LiveCodeBench": {
        "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
        "private_test_cases": packed([{"input": "3\n4", "output": "7", "testtype": "functional"}]),
        "metadata": json.dumps({"func_name": "add"}),
    },
}


@pytest.mark.parametrize("name", ADD)
def test_functions_that_are_called(name: str) -> None:
    problem = read_problem(ADD[name])
    assert (problem.mode, problem.entry) == ("call", "add")
    assert problem.prelude.rstrip().splitlines()[17] == "from builtins import *"
    assert [test.expected for test in problem.tests if isinstance(test, Case)] == [AnyOf((3,)), AnyOf((7,))]
    assert problem.tests[0].input == read_problem(ADD["verl"]).tests[0].input  # type: ignore[union-attr]


def test_outputs_in_a_list_of_one_are_right_with_and_without_it() -> None:
    wrapped = read_problem({"inputs": [[1], [2]], "outputs": [[2], [[3]]], "fn_name": "f"})
    assert [test.expected for test in wrapped.tests] == [AnyOf(([2], 2)), AnyOf(([[3]], [3]))]  # type: ignore[union-attr]
    plain = read_problem({"inputs": [[1], [2]], "outputs": [[2], [3, 4]], "fn_name": "f"})
    assert [test.expected for test in plain.tests] == [AnyOf(([2],)), AnyOf(([3, 4],))]  # type: ignore[union-attr]


CHECK = "def check(candidate):\n    assert candidate(x = 2) == 4\n    assert candidate(3) == 9\n"
PYTEST = (
    "from solution import square\n\ndef test_two():\n    assert square(2) == 4\n\n"
    "def test_three():\n    assert square(3) == 9\n"
)
SOURCES: dict[str, tuple[Any, str]] = {
    "LeetCode": ({"functional": f"{CHECK}\n\ncheck(Solution().square)"}, "square"),
    "LeetCode, as JSON": (json.dumps({"functional": f"{CHECK}\ncheck(Solution().square)"}), "square"),
    "a function": (f"{CHECK}\ncheck(square)", "square"),
    "HumanEval": (
        {
            "prompt": "def square(x):\n    '''x**2'''\n",
            "test": "METADATA = {}\n" + CHECK,
            "entry_point": "square",
            "task_id": "a/0",
        },
        "square",
    ),
    "rllm's HumanEval": ({"functional": CHECK, "entry_point": "square"}, "square"),
    "MBPP": (
        {"test_list": ["assert square(2) == 4", "assert square(3) == 9"], "test_setup_code": "", "test_imports": []},
        "square",
    ),
    "asserts": (["assert square(2) == 4", "assert 9 == square(3)"], "square"),
    "KodCode": (PYTEST, "square"),
    "Klear's pytest": ({"pytest": PYTEST}, "square"),
    "the solution as a module": (
        "import solution\ndef test_a():\n    assert solution.square(2) == 4\n    assert solution.square(3) == 9",
        "square",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_tests_that_are_python(name: str) -> None:
    truth, entry = SOURCES[name]
    problem = read_problem(truth)
    assert (problem.mode, problem.entry, problem.whole) == ("expression", entry, True)
    assert [test.expected for test in problem.tests if isinstance(test, Case)] == [AnyOf((4,)), AnyOf((9,))]
    for test, wanted in zip(problem.tests, ("4", "9"), strict=True):
        assert isinstance(test, Case)
        assert wanted.encode() not in test.input.replace(b"square(2)", b"").replace(b"square(3)", b"")


def test_a_body_alone_becomes_humanevals_function() -> None:
    truth = {
        "prompt": "import math\n\ndef half(x):\n    return x / 2\n\ndef f(x):\n",
        "test": CHECK,
        "entry_point": "f",
    }
    complete = read_problem(truth).complete
    assert complete is not None
    assert complete("    return x * x\n") == truth["prompt"] + "    return x * x\n"
    body = "    y = x * x\n    if y:\n        return y\n    return 0\n"
    for written in (body, textwrap.dedent(body), body.lstrip()):
        assert complete(written) == truth["prompt"] + body
    whole = complete("def f(x):\n    return x * x\n")
    assert "def half" in whole
    assert whole.count("def f(") == 1


def test_tests_on_disk_are_read_when_a_response_is_graded(tmp_path: Path) -> None:
    inputs, outputs = tmp_path / "in.json", tmp_path / "out.jsonl"
    inputs.write_text(json.dumps(SQUARES["inputs"]))
    outputs.write_text("".join(json.dumps(text) + "\n" for text in SQUARES["outputs"]))
    truth = {"inputs_file": str(inputs), "outputs_file": str(outputs)}
    assert stripped(read_problem(json.dumps(truth))) == [(b"2", b"4"), (b"3", b"9")]
    inputs.write_text("{")
    check_form(truth)  # that it is there is all that is asked before a run
    with pytest.raises(FormError, match=r"in\.json cannot be read as JSON"):
        read_problem(truth)
    inputs.unlink()
    with pytest.raises(FormError, match=r"`inputs_file` .* is not there"):
        check_form(truth)


class _Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/klear-pickle-was-run"),)


UNREADABLE: dict[str, tuple[Any, str]] = {
    "nothing": (None, "type NoneType"),
    "a number": (5, "type int"),
    "no JSON and no Python": ("{not json", "neither JSON nor Python"),
    "an answer": ("42 apples", "neither JSON nor Python"),
    "Python without a test": ("x = 1", "tests nothing"),
    "JSON that is no form": ("17", "int in JSON"),
    "other keys": ({"answer": 4}, "'answer'"),
    "no keys": ({}, "of nothing"),
    "an empty list": ([], "empty list"),
    "no tests": ({"inputs": [], "outputs": []}, "no test"),
    "unequal sides": ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
    "inputs that are a text": ({"inputs": "1", "outputs": ["1"]}, "`inputs` is of type str"),
    "an input that is an object": ({"inputs": [{"a": 1}], "outputs": ["1"]}, "input 0 is of type dict"),
    "an output that is none": ({"inputs": ["1"], "outputs": [None]}, "output 0 is of type NoneType"),
    "a function without a name": ([{"input": "1", "output": "1", "testtype": "functional"}], "do not name it"),
    "a name that is none": ({"inputs": [[1]], "outputs": [1], "fn_name": "f("}, "no name of a function"),
    "arguments that are no JSON": ({"inputs": ["x y"], "outputs": ["1"], "fn_name": "f"}, "input 0, 'x y', is no JSON"),
    "kinds mixed": ([PAIRS[0], {"input": "1", "output": "1", "fn_name": "f"}], "call, stdin"),
    "a test without an output": ([{"input": "1"}], "test 0"),
    "check without a call": ({"functional": CHECK}, "no entry_point"),
    "check that tests nothing": ({"functional": "def check(candidate):\n    pass\ncheck(f)"}, "tests nothing"),
    "broken Python": ({"functional": "def check(candidate:\n"}, "no Python"),
    "a fixture": ({"pytest": "def test_a(tmp_path):\n    assert f(1) == 1"}, "fixture"),
    "a pickle that runs code": (
        {"public_test_cases": [], "private_test_cases": compressed(pickle.dumps(_Evil()))},
        "plain text alone",
    ),
    "a pickle of something else": (
        {"public_test_cases": [], "private_test_cases": compressed(pickle.dumps([1]))},
        "holds list",
    ),
    "no pickle": (
        {"public_test_cases": [], "private_test_cases": compressed(b"cos")},
        "pickle is broken",
    ),
    "no base64": ({"public_test_cases": [], "private_test_cases": "???"}, "neither JSON nor base64"),
    "lists in lists": (json.loads("[" * 600 + "]" * 600), "nested too deep"),
    "one file of two": ({"inputs_file": "/nowhere/in.json"}, "is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_ground_truth_is_told_by_its_row(name: str) -> None:
    truth, words = UNREADABLE[name]
    with pytest.raises(FormError, match=words):
        read_problem(truth)
    with pytest.raises(RewardError) as told:
        check_truths([("data.jsonl:1", "codeforces", SQUARES), ("data.jsonl:2", "codeforces", truth)])
    assert str(told.value).startswith("data.jsonl:2 (data_source 'codeforces'): ")
    assert words.replace("\\", "") in str(told.value)
    assert not Path("/tmp/klear-pickle-was-run").exists()


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")


@needs_data
def test_hardly_any_assert_of_the_usual_sets_is_not_split() -> None:
    humaneval = gzip.decompress((DATA / "humaneval" / "HumanEval.jsonl.gz").read_bytes())
    rows = [json.loads(line) for line in humaneval.splitlines()]
    rows += json.loads((DATA / "mbpp" / "mbpp_sanitized_399.json").read_text())
    tests = [test for row in rows for test in read_problem(row).tests]
    checks = [test for test in tests if isinstance(test, Check)]
    assert (len(tests), len(checks)) == (2368, 34)
    leetcode = json.loads((DATA / "code_rl" / "leetcode_test_200.json").read_text())
    tests = [test for row in leetcode for test in read_problem(row["tests"]).tests]
    assert (len(tests), sum(isinstance(test, Check) for test in tests)) == (492, 0)


def test_kinds_of_expectations() -> None:
    problem = read_problem(
        [
            "import math",
            "assert f(1) is True",
            "assert not f(2)",
            "assert math.isclose(f(3), 0.5, rel_tol=0.001)",
            "assert abs(f(4) - 2.0 / 4) < 1e-6",
        ]
    )
    assert [test.expected for test in problem.tests if isinstance(test, Case)] == [
        Is(True),
        Is(False),
        Near(0.5, 0.001, 0.0),
        Near(0.5, 0.0, 1e-6, inclusive=False),
    ]
