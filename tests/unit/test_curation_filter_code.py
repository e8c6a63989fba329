"""The filter of code problems: enough tests, which the reference passes, and one right output for each input."""

import gzip
import json
import os
import pickle
from contextlib import nullcontext

import pytest
from code_sandbox import DATA, shared_sandbox
from curation_rows import contents, curate, problem, read, write
from sandboxes import needs_bubblewrap
from teacher import curate_until

from megatron_klear.curation import code_tests
from megatron_klear.curation.code_tests import contradiction, num_distinct, only, references_of
from megatron_klear.curation.grading import GradingConfig
from megatron_klear.curation.lines import LineFile
from megatron_klear.data.code_tasks import code_rows
from megatron_klear.data.rows import DataError

pytestmark = needs_bubblewrap
DOUBLE = "print(2 * int(input()))"
ODD = "n = int(input())\nprint(2 * n if n < 3 else 0)"
"""Right up to 2."""
LIMITS = ("--reward.code.cpu-seconds", 1, "--reward.code.total-seconds", 20)


@pytest.fixture(autouse=True, scope="module")
def _sandbox():
    shared_sandbox()


def code(text, tests, **further):
    return {"prompt": text, "data_source": "code", "reward_model": {"ground_truth": tests, "style": "rule"}, **further}


def doubling(count, wrong=()):
    """Tests of doubling; those of the numbers in `wrong` expect too much."""
    outputs = [str(2 * n + (n in wrong)) for n in range(count)]
    return {"inputs": [str(n) for n in range(count)], "outputs": outputs}


def filtered(rows, output, *arguments, min_tests=4):
    return curate("filter-code", "--input", rows, "--output", output, "--min-tests", min_tests, *LIMITS, *arguments)


def lines_of(output):
    return {line["row"]: line for line in read(output.with_name("tests.jsonl"))}


def test_tests_references_and_outputs_decide(tmp_path):
    twice = doubling(2)
    lines = [
        code("right", json.dumps(doubling(4)), solutions=[DOUBLE]),
        code("too few", doubling(3), solutions=[DOUBLE]),
        code("the same two, twice", {name: side * 2 for name, side in twice.items()}, solution=DOUBLE),
        code("wrong tests", doubling(5, wrong={4}), extra_info={"solution": DOUBLE}),
        code("no reference", doubling(4)),
        code("two solutions", doubling(4), solutions=[DOUBLE, ODD]),
        code("a solution that crashes", doubling(4), solutions=[DOUBLE, "1 / 0"]),
        code("a solution of nothing", doubling(4), solutions=[DOUBLE, "print()"]),
        code("contradictory", {"inputs": [*"0120"], "outputs": [*"0240"[:3], "9"]}, code=DOUBLE),
        code("asserts", "\n".join(f"assert f({n}) == {2 * n}" for n in range(4)), code="def f(x):\n    return x + x"),
        code("tests that loop", doubling(4), solution="while True:\n    pass"),
    ]
    rows = write(tmp_path / "rows.jsonl", *lines)
    output = tmp_path / "out" / "rows.jsonl"
    short = ("--reward.code.total-seconds", 2, "--store", tmp_path / "store")
    report = filtered(rows, output, *short)
    assert [row["prompt"] for row in read(output)] == [
        "right", "no reference", "a solution that crashes", "a solution of nothing", "asserts"
    ]  # fmt: skip
    assert report["dropped"] == {"ambiguous": 2, "reference_fails": 2, "too_few_tests": 2}
    assert report["references"] == {"absent": 1, "failed": 1, "not_run": 3, "passed": 5, "timeout": 1}
    assert report["ambiguous"] == 2
    found = lines_of(output)
    assert {number: line["reason"] for number, line in found.items() if line["reason"]} == {
        2: "too_few_tests", 3: "too_few_tests", 4: "reference_fails", 6: "ambiguous", 9: "ambiguous",
        11: "reference_fails",
    }  # fmt: skip
    assert (found[3]["tests"], found[3]["distinct_tests"]) == (4, 2)
    assert found[4]["references"] == [{"status": "failed", "passed": 4}]
    assert found[6]["ambiguous"] == "test 4: a reference passes it, and another gives another output"
    assert found[9]["ambiguous"] == "tests 1 and 4 have one input and different outputs"
    lenient = filtered(
        rows, tmp_path / "lenient" / "rows.jsonl", "--ambiguous", "keep", "--without-reference", "drop",
        "--max-references", 1, *short,
    )  # fmt: skip
    assert lenient["dropped"] == {"no_reference": 1, "reference_fails": 3, "too_few_tests": 2}


def test_tests_that_the_reference_fails_are_dropped_where_enough_are_left(tmp_path):
    def asserts(wrong):
        return {"test_list": [f"assert f({n}) == {2 * n + (n == wrong)}" for n in range(6)]}

    as_list = [{"input": str(n), "output": str(2 * n + (n == 1))} for n in range(6)]
    double = "def f(x):\n    return x + x"
    lines = [
        code("pairs", json.dumps(doubling(6, wrong={0, 3})), solutions=DOUBLE),
        code("wrapped", {"input_output": json.dumps(doubling(5, wrong={4})), "id": 7}, solutions=DOUBLE),
        code("list", as_list, solutions=DOUBLE),
        code("asserts", asserts(2), code=double),
        code("one source", "\n".join(asserts(2)["test_list"]), code=double),
        code("too many wrong", doubling(6, wrong={0, 1, 2}), solutions=DOUBLE),
        code("all right", json.dumps(doubling(4)), solutions=DOUBLE),
    ]
    rows = write(tmp_path / "rows.jsonl", *lines)
    output = tmp_path / "out" / "rows.jsonl"
    report = filtered(rows, output, "--drop-failing-tests")
    kept = {row["prompt"]: row for row in read(output)}
    assert list(kept) == ["pairs", "wrapped", "list", "asserts", "all right"]
    assert report["dropped"] == {"reference_fails": 2}
    assert (report["problems_with_dropped_tests"], report["dropped_tests"]) == (4, 5)
    assert json.loads(kept["pairs"]["reward_model"]["ground_truth"])["inputs"] == [*"1245"]
    assert kept["pairs"]["reward_model"]["style"] == "rule"
    assert json.loads(kept["wrapped"]["reward_model"]["ground_truth"]["input_output"]) == doubling(4)
    assert kept["wrapped"]["reward_model"]["ground_truth"]["id"] == 7
    assert [test["input"] for test in kept["list"]["reward_model"]["ground_truth"]] == [*"02345"]
    assert len(kept["asserts"]["reward_model"]["ground_truth"]["test_list"]) == 5
    assert kept["all right"] == lines[-1]
    assert lines_of(output)[1]["dropped_tests"] == [1, 4]
    again = filtered(output, tmp_path / "again" / "rows.jsonl")
    assert again["counts"]["kept"] == 5


def test_some_tests_alone_are_those_tests(tmp_path):
    for row in code_rows(5, cases=3):
        truth = row["reward_model"]["ground_truth"]
        tests = code_tests.tests_of(truth)
        for numbers in ([0], [3, 5], list(range(len(tests.tests)))):
            made = only(truth, tests, numbers)
            assert code_tests.tests_of(made).tests == tuple(tests.tests[number] for number in numbers)
            assert type(made) is type(truth)
    source = {
        "functional": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 4\ncheck(f)"
    }
    assert only(source, code_tests.tests_of(source), [0]) is None


def test_equal_and_contradictory_tests():
    def of(*pairs):
        return code_tests.tests_of(
            {"inputs": [given for given, _ in pairs], "outputs": [wanted for _, wanted in pairs]}
        ).tests

    assert num_distinct(of(("1", "2"), ("1", "2"), ("2", "2"))) == 2
    assert contradiction(of(("1", "2"), ("1", "2 \n"), ("2", "3"))) is None
    assert contradiction(of(("1", "2"), ("2", "2"), ("1", "3"))) == (1, 3)
    calls = {"fn_name": "f", "inputs": [[1], [1]], "outputs": [2, 3]}
    assert contradiction(code_tests.tests_of(calls).tests) == (1, 2)


def test_references_are_found_under_their_usual_names():
    names = ("solutions", "code", "extra_info.solution")
    contests = {"language": [2, 3, 1], "solution": ["c++", "python", "python 2"]}
    for row, found in [
        ({"code": "a"}, ["a"]),
        ({"solutions": ["a", "b"], "code": "c"}, ["a", "b"]),
        ({"solutions": [], "code": "c"}, ["c"]),
        ({"solutions": '["a", "b"]'}, ["a", "b"]),
        ({"solutions": contests}, ["python"]),
        ({"solutions": contests | {"language": 7}}, []),
        ({"extra_info": {"solution": "a"}}, ["a"]),
        ({"solutions": None, "extra_info": None}, []),
        ({"solutions": " ", "code": 5}, []),
    ]:
        assert references_of(row, names) == found


def test_bad_rows_are_counted_with_their_places_and_the_rest_goes_on(tmp_path):
    maths = {"prompt": "x", "data_source": "math", "reward_model": {"ground_truth": "1"}}
    uneven = code("uneven", {"inputs": ["1"], "outputs": []})
    good = code("right", doubling(4), solutions=[DOUBLE])
    rows = write(tmp_path / "rows.jsonl", b"{", maths, uneven, problem("no reward"), {"prompt": "x"}, good)
    report = filtered(rows, tmp_path / "out" / "rows.jsonl")
    assert report["counts"] == {"rows": 6, "kept": 1, "dropped": 0, "bad": 5}
    places = {example["row"]: kind for kind, examples in report["examples"].items() for example in examples}
    assert places == {1: "malformed_json", 2: "no_code", 3: "bad_truth", 4: "no_reward", 5: "missing_field"}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not valid JSON"):
        filtered(rows, tmp_path / "strict" / "rows.jsonl", "--strict")


class RememberingPool:
    """What a real pool said once, again."""

    def __init__(self, open_pool):
        self._open, self._known = open_pool, {}

    def __call__(self, *given, **named):
        self._pool = lambda: self._open(*given, **named)
        return nullcontext(self)

    def grade(self, requests):
        if new := {pickle.dumps(request): request for request in requests if pickle.dumps(request) not in self._known}:
            with self._pool() as pool:
                self._known.update(zip(new, pool.grade(list(new.values())), strict=True))
        return [self._known[pickle.dumps(request)] for request in requests]


def test_killed_at_any_instant_it_goes_on_to_the_same_files(tmp_path, monkeypatch):
    pool = RememberingPool(GradingConfig.open_pool)
    monkeypatch.setattr(GradingConfig, "open_pool", lambda *given, **named: pool(*given, **named))
    lines = [code(f"Problem {k}", doubling(5, wrong={k}), solutions=[DOUBLE, ODD]) for k in range(4)]
    rows = write(tmp_path / "rows.jsonl", *lines)
    given = ("filter-code", "--input", rows, "--min-tests", 4, "--drop-failing-tests", "--ambiguous", "keep", *LIMITS)
    curate(*given, "--output", tmp_path / "whole" / "rows.jsonl")
    results = ("rows.jsonl", "tests.jsonl", "report.json", "report.html", "manifest.json")

    def made(folder):
        return {name: content for name, content in contents(folder).items() if name in results}

    watched = [(LineFile, "add"), (LineFile, "read"), (os, "replace"), (os, "fsync"), (RememberingPool, "grade")]
    watched += [(json, "dumps")]
    for instant in range(0, 200, 5):
        output = tmp_path / str(instant) / "rows.jsonl"
        done = curate_until(instant, watched, *given, "--output", output)
        if output.exists():
            assert made(output.parent) == made(tmp_path / "whole")
        curate(*given, "--output", output)
        assert made(output.parent) == made(tmp_path / "whole")
        if done:
            break
    assert instant >= 100


def references_in_shared_data():
    for line in (DATA / "mbpp" / "mbpp.jsonl").read_text().splitlines()[:20]:
        row = json.loads(line)
        yield code(row["text"], row, code=row["code"])
    with gzip.open(DATA / "humaneval" / "HumanEval.jsonl.gz", "rt") as stream:
        for line in list(stream)[:15]:
            row = json.loads(line)
            yield code(row["prompt"], row, canonical_solution=row["canonical_solution"])
    for row in json.loads((DATA / "code_rl" / "leetcode_test_200.json").read_text())[:15]:
        yield code(row["problem"], row["tests"], solutions=row["solutions"])
    for row in json.loads((DATA / "code_rl" / "code_contests_test_165.json").read_text())[:10]:
        yield code(row["problem"], row["tests"])


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
def test_references_of_real_data_pass(tmp_path):
    rows = write(tmp_path / "rows.jsonl", *references_in_shared_data())
    output = tmp_path / "out" / "rows.jsonl"
    report = filtered(rows, output, min_tests=1)
    assert report["references"]["absent"] == 10
    assert report["references"]["passed"] >= 48
    assert report["counts"]["bad"] == 0
    many = filtered(rows, tmp_path / "many" / "rows.jsonl", "--store", output.parent, min_tests=16)
    counts = [line["distinct_tests"] for line in lines_of(output).values()]
    assert many["counts"]["dropped"] - many["dropped"]["too_few_tests"] <= 2
    assert many["dropped"]["too_few_tests"] == sum(count < 16 for count in counts)
