"""LiveCodeBench's runner on a file of its exact form: stdin and functions, public tests and pickled private ones."""

import base64
import json
import pickle
import zlib

import pytest
from sandboxes import needs_bubblewrap

from megatron_klear.config.evaluation import EvaluationConfig
from megatron_klear.evaluation.run import evaluate
from megatron_klear.evaluation.store import Response
from megatron_klear.rewards.base import RewardError

pytestmark = needs_bubblewrap


def packed(tests):
    """As the benchmark packs its private tests: JSON, pickled, compressed, in base64."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def row(title, *, starter="", public, private, function=None, date="2024-09-01T00:00:00"):
    kind = "functional" if function else "stdin"
    public, private = ([{"input": i, "output": o, "testtype": kind} for i, o in tests] for tests in (public, private))
    return {
        "question_title": title,
        "question_content": f"Problem {title}.",
        "platform": "leetcode" if function else "atcoder",
        "question_id": title,
        "contest_id": "abc",
        "contest_date": date,
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(public),
        "private_test_cases": packed(private),
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


STDIN = row("sum", public=[("1 2\n", "3\n")], private=[("5 6\n", "11\n"), ("-1 1\n", "0\n")])
FUNCTION = row(
    "twice",
    starter="class Solution:\n    def twice(self, xs: List[int], k: int) -> List[int]:\n        ",
    public=[("[1, 2]\n2", "[2, 4]")],
    private=[("[]\n3", "[]"), ("[-1]\n0", "[0]")],
    function="twice",
)
OLD = row("old", public=[("1\n", "1\n")], private=[("1\n", "1\n")], date="2024-07-31T00:00:00")
PROGRAMS = {
    "sum": [
        "a, b = map(int, input().split())\nprint(a + b)",
        "a, b = map(int, input().split())\nprint(abs(a) + abs(b))",  # right on the public test alone
    ],
    "twice": [
        "class Solution:\n    def twice(self, xs: List[int], k: int) -> List[int]:\n        return [k * x for x in xs]",
        "class Solution:\n    def twice(self, xs, k):\n        return [k * x for x in xs] or None",
    ],
}


class Programmer:
    """Answers with the right program, one that only private tests find out, and prose."""

    def check(self, problems, protocol):
        """Nothing is refused."""

    def draw(self, wanted, protocol, seed, drawn):
        for one in wanted:
            title = next(title for title in PROGRAMS if f"Problem {title}." in one.problem.messages[0]["content"])
            texts = [*(f"So:\n```python\n{program}\n```" for program in PROGRAMS[title]), "I cannot."]
            drawn(
                [
                    Response(problem=one.problem.id, number=n, text=texts[n], finish="stop", num_tokens=9)
                    for n in one.numbers
                ]
            )

    def opening(self, problem):
        return ""

    def extension(self):
        return ""

    def identity(self):
        return {"model": "programmer"}


def settings(tmp_path, rows):
    path = tmp_path / "release_v5.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return EvaluationConfig.model_validate(
        {
            "output": tmp_path / "evaluation",
            "model": {"path": tmp_path},
            "benchmarks": [{"name": "livecodebench_v5", "files": [str(path)], "samples": 3}],
            "reward": {"require_thinking": False, "workers": 1, "timeout_seconds": 65},
        }
    )


def test_public_and_private_tests_of_both_kinds_judge(tmp_path):
    config = settings(tmp_path, [STDIN, OLD, FUNCTION])
    (result,) = evaluate(config, Programmer)
    assert result.num_problems == 2  # the old contest is not asked for
    assert list(result.right.values()) == [1, 1]
    grades = (config.output / "livecodebench_v5" / "grades.jsonl").read_text().splitlines()[1:]
    verdicts = {(one["problem"], one["number"]): one["verdict"] for one in map(json.loads, grades)}
    assert [verdicts[problem, n] for problem in result.right for n in range(3)] == ["right", "wrong", "malformed"] * 2
    assert result.majority is None
    assert result.accuracy == pytest.approx(1 / 3)


class Touch:
    """Unpickled without care it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_would_run_something_is_refused_before_a_model_is_loaded(tmp_path):
    hostile = base64.b64encode(zlib.compress(pickle.dumps(Touch(tmp_path / "touched")))).decode()

    def no_model():
        raise AssertionError("the model was loaded first")

    with pytest.raises(RewardError, match=r"release_v5\.jsonl"):
        evaluate(settings(tmp_path, [{**STDIN, "private_test_cases": hostile}]), no_model)
    assert not (tmp_path / "touched").exists()
