"""Rows of known benchmarks: gold answers are graded right, contests chosen by date, questions what users say."""

import json

import pytest
from test_evaluation import Oracle, settings

from megatron_klear.config.evaluation import BenchmarkConfig, EvaluationConfig
from megatron_klear.data.rows import DataError
from megatron_klear.errors import UserError
from megatron_klear.evaluation import run
from megatron_klear.evaluation.benchmarks import KNOWN, read_benchmark
from megatron_klear.evaluation.protocols import protocol_for
from megatron_klear.evaluation.table import markdown
from megatron_klear.rewards.base import RewardError, RewardSettings
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score, Verdict

FILES = {
    "aime24": (("aime_hmmt/aime24.qs.jsonl", "", 30), ("aime_hmmt/aime24.parquet", "", 30)),
    "aime25": (("aime_hmmt/aime25.qs.jsonl", "", 30), ("aime_hmmt/comp-math-24-25.nemo-skills.jsonl", "aime25", 30)),
    "hmmt_feb_2025": (("aime_hmmt/HMMT-202502.jsonl", "", 30),),
    "math500": (("math/math500_test.json", "", 500),),
    "amc": (("math/amc.json", "", None),),
    "minerva": (("math/minerva.json", "", None),),
    "gsm8k": (("gsm8k/test.jsonl", "", 1319),),
}


def test_every_gold_answer_of_a_maths_benchmark_is_right(shared_data):
    """In each form that its file is met in; HMMT's answer lies under a key of its own."""
    sources = sorted(KNOWN)
    with GradingPool(
        [name for name in sources if name in FILES], RewardSettings(require_thinking=False), timeout_seconds=60
    ) as pool:
        for name, forms in FILES.items():
            for file, subset, count in forms:
                config = {"name": name, "files": [str(shared_data / file)], "subset": subset}
                (benchmark,) = EvaluationConfig.model_validate(
                    {"output": "x", "model": {"path": "m"}, "benchmarks": [config]}
                ).benchmarks
                problems = read_benchmark(benchmark)
                assert count is None or len(problems) == count, file
                golds = [f"So it is \\boxed{{{problem.ground_truth}}}." for problem in problems]
                requests = [
                    Request(p.data_source, p.ground_truth, gold) for p, gold in zip(problems, golds, strict=True)
                ]
                scores = pool.grade(requests)
                wrong = [
                    (p.place, p.ground_truth, s.note)
                    for p, s in zip(problems, scores, strict=True)
                    if s.verdict is not Verdict.RIGHT
                ]
                assert not wrong, (file, wrong[:5], len(wrong))


def test_contests_are_chosen_by_their_date(tmp_path):
    path = tmp_path / "lcb.jsonl"
    rows = [
        {
            "question_content": f"Problem of {date}",
            "starter_code": "",
            "contest_date": f"{date}T00:00:00",
            "public_test_cases": json.dumps([{"input": "1\n", "output": "1\n", "testtype": "stdin"}]),
            "metadata": "{}",
        }
        for date in ("2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01", "2025-04-30", "2025-05-01")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def dates(**more):
        values = {"output": "x", "model": {"path": "m"}, "benchmarks": [{"files": [str(path)], **more}]}
        problems = read_benchmark(EvaluationConfig.model_validate(values).benchmarks[0])
        return [problem.messages[0]["content"].partition("Problem of ")[2][:10] for problem in problems]

    assert dates(name="livecodebench_v5") == ["2024-08-01", "2025-01-31"]
    assert dates(name="livecodebench_v6") == ["2025-02-01", "2025-04-30"]
    assert dates(name="livecodebench_v6", since="2024-01-01", until="2024-08-01") == ["2024-07-31"]
    with pytest.raises(DataError, match=r"YYYY-MM-DD"):
        dates(name="livecodebench_v6", since="yesterday")


@pytest.mark.parametrize(("name", "meant"), [("AIME24", "aime24"), ("hmmt_2025", "hmmt_feb_2025"), ("my_sums", "")])
def test_rows_that_an_unknown_name_cannot_read_say_so(tmp_path, name, meant):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "What is 3 + 4?", "answer": "7"}) + "\n")
    words = f"{name} is no benchmark that is known by name" + (f", did you mean {meant}" if meant else "$")
    with pytest.raises(DataError, match=words):
        read_benchmark(BenchmarkConfig(name=name, files=(str(path),)))


class Grader:
    """Says that all is right, but of the first response that its time was up as long as it is `hurried`."""

    hurried = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing is held."""

    def grade(self, requests):
        Grader.graded = len(requests)
        late = Score(reward=0.0, verdict=Verdict.TIMEOUT, note="no verdict after 1 s")
        right = Score(reward=1.0, verdict=Verdict.RIGHT)
        return [late if self.hurried and i == 0 else right for i in range(len(requests))]


def test_what_could_not_be_graded_is_told_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_pool", lambda *_: Grader())
    folder = settings(tmp_path, tmp_path / "out")
    (result,) = run.evaluate(folder, Oracle)
    assert (result.not_graded, Grader.graded) == (1, 48)
    assert "amc: 1 of 48 responses could not be graded and count as wrong" in markdown([result])
    strict = settings(tmp_path, tmp_path / "out", reward={"require_thinking": False, "max_error_share": 0})
    with pytest.raises(RewardError, match=r"1 of 48 responses of amc could not be graded.*no verdict after 1 s"):
        run.evaluate(strict, Oracle)
    assert Grader.graded == 1
    monkeypatch.setattr(Grader, "hurried", False)
    (result,) = run.evaluate(strict, Oracle)
    assert (result.not_graded, result.accuracy, Grader.graded) == (0, 1.0, 1)
    assert "could not be graded" not in markdown([result])


def test_the_question_of_chat_messages_is_what_the_user_says(tmp_path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
    path.write_text(json.dumps({"messages": messages, "answer": None, "solution": "7"}) + "\n")
    (problem,) = read_benchmark(BenchmarkConfig(name="amc", files=(str(path),)))
    assert problem.messages[0]["content"].startswith("What is 3 + 4?")
    assert problem.ground_truth == "7"


def test_protocols_say_what_they_are(tmp_path):
    config = settings(tmp_path, tmp_path)
    paper = protocol_for("paper", config.sampling, paper_samples=64, samples=None)
    assert paper.samples == 64
    assert paper.words() == "temperature 0.6, top_p 0.95, 32,768 tokens"
    released = protocol_for("released", config.sampling, paper_samples=64, samples=8)
    assert released.words() == "temperature 0.6, top_p 0.95, top_k 20, repetition penalty 1.05, 32,768 tokens"
    with pytest.raises(UserError, match="repetition penalty"):
        released.local()
    assert protocol_for("greedy", config.sampling, paper_samples=64, samples=None).samples == 1
