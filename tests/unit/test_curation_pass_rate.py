"""The filter by pass rate: recorded and drawn responses are graded once, verdicts are written, and the rate decides."""

import json
import os
from fractions import Fraction

import pytest
from code_sandbox import fenced, shared_sandbox
from curation_rows import contents, curate, problem, read, write
from sandboxes import needs_bubblewrap
from teacher import answer_to, curate_until

from megatron_klear.cli.curate import main
from megatron_klear.curation.lines import LineFile
from megatron_klear.curation.text import problem_id
from megatron_klear.data.prompts import problem_id as evaluation_id
from megatron_klear.data.rows import DataError, read_problem
from megatron_klear.rewards.base import RewardError
from megatron_klear.rewards.owner import OwnedPool

SAMPLES = 4


def maths(text, answer="1"):
    return {"prompt": text, "data_source": "math", "reward_model": {"ground_truth": answer}}


def said(number):
    return f"<think>\nSo.\n</think>\n\nIt is \\boxed{{{number}}}."


def filtered(rows, output, *arguments, samples=SAMPLES):
    return curate("filter-pass-rate", "--input", rows, "--output", output, "--samples", samples, *arguments)


def with_responses(passed):
    """A row with so many right responses of four."""
    return maths(f"Problem {passed}") | {"responses": [said(1 if k < passed else 2) for k in range(SAMPLES)]}


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", *map(with_responses, range(SAMPLES + 1)))


def test_the_rate_decides_strictly_or_not(tmp_path, rows):
    given = ("--responses", rows, "--store", tmp_path / "store")
    rules = {
        (): range(3, 5),
        ("--above-rate", 0.5): range(3, 5),
        ("--min-rate", 0.5): range(2, 5),
        ("--above-rate", 0, "--max-rate", 0.75): range(1, 4),
        ("--min-rate", 0): range(5),
    }
    for index, (rule, kept) in enumerate(rules.items()):
        output = tmp_path / str(index) / "rows.jsonl"
        report = filtered(rows, output, *given, *rule)
        assert [row["prompt"] for row in read(output)] == [f"Problem {passed}" for passed in kept]
        assert report["problems_by_passed"] == {str(passed): 1 for passed in range(5)}
        assert report["counts"]["dropped"] == 5 - len(kept)
        assert [tenth for tenth, count in enumerate(report["pass_rates"]) if count] == [10 * k // 4 for k in kept]
    assert report["verdicts"] == {"right": 10, "wrong": 10}
    assert report["rule"] == "pass rate >= 0 and <= 1, of 4 responses"
    verdicts = read(output.with_name("verdicts.jsonl"))
    assert [(line["problem"], line["sample"], line["passed"]) for line in verdicts] == [
        (problem_id(f"Problem {passed}"), sample, sample < passed) for passed in range(5) for sample in range(SAMPLES)
    ]
    assert {(line["verdict"], line["score"], line["answer"]) for line in verdicts} == {
        ("right", 1.0, "1"), ("wrong", -1.0, "2")
    }  # fmt: skip


def test_a_rate_on_the_bound_is_exact():
    from megatron_klear.curation.pass_rate import PassRateSettings

    for samples in range(1, 40):
        for passed in range(samples + 1):
            rate = round(passed / samples, 2)
            if Fraction(passed, samples) == Fraction(str(rate)):
                least = PassRateSettings(samples=samples, min_rate=rate, responses=("x",))
                above = PassRateSettings(samples=samples, above_rate=rate, responses=("x",)) if rate < 1 else None
                assert least.why_dropped(passed) == ""
                assert above is None or above.why_dropped(passed) == "rate_too_low"


def test_grades_are_kept_for_other_rates(tmp_path, rows, monkeypatch):
    graded = []
    grade = OwnedPool.grade
    monkeypatch.setattr(OwnedPool, "grade", lambda pool, asked: graded.extend(asked) or grade(pool, asked))
    store = ("--responses", rows, "--store", tmp_path / "store")
    filtered(rows, tmp_path / "a" / "rows.jsonl", *store)
    assert len(graded) == 2  # one right text and one wrong one, for the same ground truth
    filtered(rows, tmp_path / "b" / "rows.jsonl", *store, "--min-rate", "0.25")
    assert len(graded) == 2


def test_every_form_of_recorded_responses_gives_the_same_verdicts(tmp_path):
    problems = [maths("Problem A"), maths("Problem B", "7")]
    rows = write(tmp_path / "rows.jsonl", *problems)
    truths = {row["prompt"]: row["reward_model"]["ground_truth"] for row in problems}
    texts = {(p, k): said(truth if k else 9) for p, truth in truths.items() for k in range(3)}
    names = {row["prompt"]: evaluation_id(read_problem(row)) for row in problems}
    forms = {
        "store": [
            {"asked": "00", "model": "m", "at_most": [1, 1]},
            *({"problem": problem_id(p), "sample": k, "finish": "stop", "text": t} for (p, k), t in texts.items()),
        ],
        "evaluation": [
            {"made_with": {"seed": 0}},
            *(
                {"problem": name, "number": k, "finish": "stop", "text": texts[p, k]}
                for p, name in names.items()
                for k in (2, 0, 1)
            ),
        ],
        "sft": [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": t}], "sample": k}
            for (p, k), t in reversed(texts.items())
        ],
        "pairs": [{"prompt": p, "response": t} for (p, _), t in texts.items()],
        "lists": [row | {"responses": [texts[row["prompt"], k] for k in range(3)]} for row in problems],
    }  # fmt: skip
    found = {}
    for name, lines in forms.items():
        recorded = write(tmp_path / f"{name}.jsonl", *lines, b"{", {"odd": 1}, {"prompt": "unknown", "response": "x"})
        given = ("--responses", recorded, "--store", tmp_path / "store")
        report = filtered(rows, tmp_path / name / "rows.jsonl", *given, samples=3)
        assert report["responses"] == {
            "read": 7, "not_used": 1, "bad": {"malformed_json": 1, "wrong_type": 1}
        }  # fmt: skip
        assert [entry["row"] for entry in report["bad_responses"]] == [len(lines) + 1, len(lines) + 2]
        found[name] = (tmp_path / name / "verdicts.jsonl").read_bytes()
        with pytest.raises(DataError, match=rf"--responses .*{name}\.jsonl:{len(lines) + 1}: not valid JSON"):
            filtered(rows, tmp_path / "no" / "rows.jsonl", "--responses", recorded, "--strict", samples=3)
    assert len(set(found.values())) == 1
    twice = write(tmp_path / "twice.jsonl", *forms["store"], *forms["store"])
    with pytest.raises(DataError, match=r"twice\.jsonl:9: a second response number 0"):
        filtered(rows, tmp_path / "twice" / "rows.jsonl", "--responses", twice, samples=3)


def test_rows_that_cannot_be_judged_are_counted_and_the_rest_goes_on(tmp_path):
    good = with_responses(4)
    lines = [
        b"[", {"prompt": "x", "response": "y"}, problem("of no reward"), maths("no answer", ""), maths("unasked"), good,
        good, {"prompt": 5},
    ]  # fmt: skip
    rows, recorded = write(tmp_path / "rows.jsonl", *lines), write(tmp_path / "recorded.jsonl", good)
    report = filtered(rows, tmp_path / "out" / "rows.jsonl", "--responses", recorded)
    assert report["counts"] == {"rows": 8, "kept": 1, "dropped": 2, "bad": 5}
    assert report["dropped"] == {"duplicate": 1, "too_few_responses": 1}
    places = {example["row"]: kind for kind, examples in report["examples"].items() for example in examples}
    assert places == {
        1: "malformed_json", 2: "missing_field", 3: "no_reward", 4: "bad_truth", 5: "too_few_responses", 7: "duplicate",
        8: "missing_field",
    }  # fmt: skip
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not valid JSON"):
        filtered(rows, tmp_path / "strict" / "rows.jsonl", "--responses", recorded, "--strict")


def test_grading_that_fails_stops_and_is_not_kept(tmp_path, monkeypatch):
    module = tmp_path / "odd_reward.py"
    module.write_text("def reward(response, ground_truth):\n    raise RuntimeError('no judge today')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    row = problem("Problem") | {"responses": ["a", "b"]}
    rows = write(tmp_path / "rows.jsonl", row)
    given = ("--responses", rows, "--reward.functions", '{made_up = "odd_reward:reward"}')
    with pytest.raises(RewardError, match=r"2 of 2 responses could not be graded, the first: .*no judge today"):
        filtered(rows, tmp_path / "out" / "rows.jsonl", *given, samples=2)
    module.write_text("def reward(response, ground_truth):\n    return float(response == 'a')\n")
    report = filtered(rows, tmp_path / "out" / "rows.jsonl", *given, "--min-rate", "0.5", samples=2)
    assert report["problems_by_passed"]["1"] == 1


@needs_bubblewrap
def test_programs_are_run_on_the_tests_of_their_rows(tmp_path):
    shared_sandbox()
    row = {
        "prompt": "Double it.",
        "data_source": "code",
        "reward_model": {"ground_truth": json.dumps({"inputs": ["1", "2"], "outputs": ["2", "4"]})},
        "responses": [fenced("print(2 * int(input()))"), fenced("print(2)"), "no program", fenced("1 / 0")],
    }
    rows = write(tmp_path / "rows.jsonl", row)
    output = tmp_path / "out" / "rows.jsonl"
    report = filtered(rows, output, "--responses", rows, "--min-rate", "0.25", "--reward.code.cpu-seconds", 1)
    assert report["verdicts"] == {"crashed": 1, "failed": 1, "malformed": 1, "passed": 1}
    assert [(line["passed"], line["score"]) for line in read(output.with_name("verdicts.jsonl"))] == [
        (True, 1.0), (False, 0.5), (False, 0.0), (False, 0.0)
    ]  # fmt: skip


def test_drawn_responses_share_the_store_of_distillation(tmp_path, teacher):
    texts = [f"Problem {k}" for k in range(5)] + ["a filtered one", "a long one"]
    rows = write(tmp_path / "rows.jsonl", *map(maths, texts))
    store = ("--store", tmp_path / "store", "--samples", SAMPLES, *teacher.flags())
    curate("distill", "--input", rows, "--output", tmp_path / "sft" / "rows.jsonl", *store)
    asked = teacher.asked.total()
    given = ("filter-pass-rate", "--input", rows, *store, "--above-rate", 0)
    report = curate(*given, "--output", tmp_path / "out" / "rows.jsonl")
    assert teacher.asked.total() == asked == len(texts) * SAMPLES
    assert report["verdicts"]["refused"] == SAMPLES
    passed = dict.fromkeys(texts, 0)
    for text, seed in teacher.answered:
        passed[text] += "\\boxed{1}" in (answer_to(text, seed)[0] or "")
    assert [row["prompt"] for row in read(tmp_path / "out" / "rows.jsonl")] == [text for text in texts if passed[text]]
    verdicts, right = tmp_path / "out" / "verdicts.jsonl", tmp_path / "right" / "rows.jsonl"
    chosen = ("--verdicts", verdicts, "--correct", "only", "--output", right)
    curate("select", "--input", tmp_path / "sft" / "rows.jsonl", *chosen)
    assert 0 < len(read(right)) < len(read(tmp_path / "sft" / "rows.jsonl"))
    for row in read(tmp_path / "sft" / "rows.jsonl"):
        assert ("\\boxed{1}" in row["messages"][-1]["content"]) == (row in read(right))
    again = curate(*given, "--output", tmp_path / "again" / "rows.jsonl", "--recorded")
    assert again["problems_by_passed"] == report["problems_by_passed"]
    assert teacher.asked.total() == asked


def test_killed_at_any_instant_it_goes_on_to_the_same_files(tmp_path, teacher, light_reward):
    rows = write(tmp_path / "rows.jsonl", problem("Problem 1"), problem("Problem 2"))
    given = ("filter-pass-rate", "--input", rows, *teacher.flags(), *light_reward)
    given = (*given, "--samples", 2, "--min-rate", 0, "--output")
    curate(*given, tmp_path / "whole" / "rows.jsonl")
    results = ("rows.jsonl", "verdicts.jsonl", "report.json", "report.html", "manifest.json")

    def made(folder):
        return {name: content for name, content in contents(folder).items() if name in results}

    watched = [(LineFile, "add"), (os, "replace"), (os, "fsync"), (OwnedPool, "grade"), (LineFile, "read")]
    for instant in range(100):
        output = tmp_path / str(instant) / "rows.jsonl"
        done = curate_until(instant, watched, *given, output)
        if output.exists():
            assert made(output.parent) == made(tmp_path / "whole")
        curate(*given, output)
        assert made(output.parent) == made(tmp_path / "whole")
        assert set(contents(output.parent)) == {*results, "responses.jsonl", "grades.jsonl"}
        if done:
            break
    assert instant >= 20


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--responses", "rows.jsonl", "--above-rate", "0.5", "--min-rate", "0.5"], "give one"),
        ([], "give responses, files that hold them, or endpoint.model"),
        (["--endpoint.model", "m"], "endpoint.urls is not set"),
        (["--responses", "rows.jsonl", "--endpoint.model", "m"], "give responses"),
        (["--responses", "rows.jsonl", "--min-rate", "1.5"], "min_rate is 1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, rows, arguments, told, capsys):
    with pytest.raises(SystemExit):
        filtered(rows, tmp_path / "out" / "rows.jsonl", *arguments)
    assert told in capsys.readouterr().err


def test_it_is_a_step_of_a_build(tmp_path, light_reward):
    rows = [problem(f"Problem {k}") | {"responses": ["Seed", "Seed" if k else "none"]} for k in range(2)]
    write(tmp_path / "rows.jsonl", *rows)
    step = f'kind = "filter-pass-rate", samples = 2, responses = ["{tmp_path}/rows.jsonl"]'
    config = tmp_path / "build.toml"
    config.write_text(
        f'output = "{tmp_path}/out"\nsources = [{{ name = "all", files = ["{tmp_path}/rows.jsonl"] }}]\n[math_rl]\n'
        f'sources = ["all"]\nsteps = [{{ {step}, reward.functions = {light_reward[1]} }}]\n'
    )
    main(["build", "--config", str(config)])
    assert [row["prompt"] for row in read(tmp_path / "out" / "math_rl" / "rows.jsonl")] == ["Problem 1"]
