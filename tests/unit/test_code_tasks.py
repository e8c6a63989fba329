"""Programming problems made from a seed: their tests, their slips, their command."""

import json

import pytest

from megatron_klear.cli.prepare_data import main
from megatron_klear.data.code_tasks import MAX_CASES, NUM_TESTS, code_rows


def passed(row):
    """Which of a row's tests its own response passes."""
    tests = json.loads(row["reward_model"]["ground_truth"])
    namespace = {}
    exec(row["response"].partition("```python\n")[2].removesuffix("```"), namespace)
    pairs = zip(tests["inputs"], tests["outputs"], strict=True)
    return [namespace[tests["fn_name"]](json.loads(given)) == json.loads(wanted) for given, wanted in pairs]


@pytest.mark.parametrize("cases", range(1, MAX_CASES + 1))
def test_programs_without_slips_pass_their_tests(cases):
    for row in code_rows(50, seed=cases, cases=cases):
        results = passed(row)
        assert all(results)
        assert NUM_TESTS <= len(results) <= NUM_TESTS + cases
        assert row["prompt"][0]["content"].count("return") == cases


def test_a_slip_fails_the_tests_of_its_case_alone():
    rows = list(code_rows(400, cases=2, slip_share=0.5))
    shares = [sum(passed(row)) / len(passed(row)) for row in rows]
    whole, half, none = (
        sum(low <= share <= high for share in shares) for low, high in ((1, 1), (0.5, 0.75), (0, 0.25))
    )
    assert 70 <= whole <= 130  # a quarter
    assert 160 <= half <= 240  # one of two cases, but for values that are equal by chance
    assert 60 <= none <= 130
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in code_rows(400, cases=2)]


def test_a_faulty_problem_fails_its_right_program_in_one_case():
    rows = list(code_rows(300, cases=2, faulty_share=0.5, reference=True))
    shares = [sum(results) / len(results) for results in map(passed, rows)]
    assert 110 <= sum(share < 1 for share in shares) <= 190
    assert all(share >= 0.5 for share in shares)
    right = list(code_rows(300, cases=2))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in right]
    assert all(row["extra_info"]["solution"] in plain["response"] for row, plain in zip(rows, right, strict=True))


def test_the_same_seed_gives_the_same_rows():
    assert list(code_rows(20, seed=3)) == list(code_rows(20, seed=3)) != list(code_rows(20, seed=4))


@pytest.mark.parametrize(
    "arguments", [{"count": -1}, {"cases": 0}, {"cases": 5}, {"slip_share": 1.5}, {"faulty_share": -0.1}]
)
def test_arguments_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match="code rows"):
        next(code_rows(**{"count": 1, **arguments}))


def test_the_command_holds_prompts_out(tmp_path):
    held_out, rest = tmp_path / "held_out.jsonl", tmp_path / "rest.jsonl"
    assert main(["code", "--count", "30", "--cases", "1", "--output", str(held_out)]) == 0
    assert main(["code", "--count", "300", "--cases", "1", "--output", str(rest), "--exclude", str(held_out)]) == 0
    prompts = [{json.loads(line)["prompt"][0]["content"] for line in path.open()} for path in (held_out, rest)]
    assert prompts[1]
    assert not prompts[0] & prompts[1]
