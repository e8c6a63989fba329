"""Maths answers: what is read, what is equal, what each outcome is worth."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rewards.answers import compare, last_boxed, normalise, read_answer, too_complex
from megatron_klear.rewards.base import SCHEMES, RewardError, RewardSettings, check_sources, find, resolve
from megatron_klear.rewards.format import Thinking, complete, split_thinking
from megatron_klear.rewards.math import MathReward, grade
from megatron_klear.types import Score, Verdict

formulas = st.text(alphabet="0123456789xy+-^{}()\\$, .fracboxed\n", max_size=60)
decimals = st.decimals(-(10**9), 10**9, allow_nan=False, places=3)


@given(formulas)
def test_boxed_content_comes_back_to_the_letter(content: str) -> None:
    depth, balanced = 0, True
    for letter in content:
        depth += (letter == "{") - (letter == "}")
        balanced = balanced and depth >= 0
    if balanced and not depth and "box" not in content:
        assert last_boxed(f"So it is $\\boxed{{{content}}}$, at last.") == (content.strip() or None)


@given(st.text(alphabet="0123456789,. xy+-()", max_size=30))
def test_normalising_keeps_every_letter_and_digit(text: str) -> None:
    kept = [letter for letter in text if letter.isalnum()]
    assert [letter for letter in normalise(text) if letter.isalnum()] == kept


@given(decimals, decimals)
def test_numbers_compare_by_value_both_ways(first: Any, second: Any) -> None:
    left, right = str(first), f"{second:,}"
    assert compare(left, f"{first:,}") is True
    assert compare(left, right) == compare(right, left)
    if first == second:
        assert compare(left, right) is True
    elif compare(left, right) is not None:
        assert compare(left, right) is False


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_always_decided_without_the_engine(first: int, second: int) -> None:
    assert compare(str(first), f"${second:,}$") is (first == second)


READINGS = {
    "box": ("so \\boxed{18}.", "18"),
    "last box": ("\\boxed{17}. No:\n\n\\boxed{18}", "18"),
    "nested braces": ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    "list of boxes": ("\\boxed{1} and \\boxed{2}", "1, 2"),
    "box without braces": ("\\boxed 5$", "5"),
    "gsm8k mark": ("48/2 = 24\n#### 72", "72"),
    "answer line": ("thus\n**Answer:** 18", "18"),
    "lone formula": ("$x^2 + 1$", "x^2 + 1"),
}


@pytest.mark.parametrize("case", READINGS)
def test_final_answer_is_read(case: str) -> None:
    text, expected = READINGS[case]
    answer = read_answer(text)
    assert answer is not None
    assert (answer.text, answer.isolated) == (expected, True)


GRADES = {
    "prose": ("18", "The final answer is 18.", Verdict.RIGHT),
    "currency": ("18", "\\boxed{\\$18}", Verdict.RIGHT),
    "unit": ("18", "\\boxed{18\\text{ dollars}}", Verdict.RIGHT),
    "thousands": ("1,800", "\\boxed{1800.0}", Verdict.RIGHT),
    "fraction": ("0.5", "\\boxed{\\dfrac12}", Verdict.RIGHT),
    "symbolic": ("(x+1)^2", "\\boxed{x^2+2x+1}", Verdict.RIGHT),
    "set in another order": ("1, 2", "\\boxed{2,1}", Verdict.RIGHT),
    "pair in another order": ("(1,2)", "\\boxed{(2,1)}", Verdict.WRONG),
    "sign": ("5", "\\boxed{-5}", Verdict.WRONG),
    "a guess and another": ("18", "\\boxed{17} or \\boxed{18}", Verdict.WRONG),
    "digits apart": ("12", "\\boxed{1 2}", Verdict.WRONG),
    "hundred times": ("0.75", "\\boxed{75}", Verdict.WRONG),
    "nothing": ("18", "", Verdict.MALFORMED),
    "no number": ("18", "I do not know", Verdict.MALFORMED),
    "empty box": ("18", "It is \\boxed{}", Verdict.MALFORMED),
    "cut off in the box": ("18", "It is 18: \\boxed{18", Verdict.MALFORMED),
    "too deep": ("x", "\\boxed{" + "(" * 300 + "x" + ")" * 300 + "}", Verdict.MALFORMED),
    "empty ground truth": ("", "\\boxed{18}", Verdict.ERROR),
}


@pytest.mark.parametrize("case", GRADES)
def test_grades(case: str) -> None:
    gold, text, verdict = GRADES[case]
    assert grade(gold, text)[0] is verdict


THOUGHT = "<think>\nso \\boxed{5}\n</think>\n\nIt is \\boxed{%s}."
SCHEME_VALUES = {
    "right": (THOUGHT % 18, Verdict.RIGHT, 1.0, 1.0),
    "wrong": (THOUGHT % 5, Verdict.WRONG, -1.0, -1.0),
    "never opened": ("so\n</think>\n\nIt is \\boxed{18}.", Verdict.MALFORMED, -1.0, -2.0),
    "never closed": ("<think>\nIt is \\boxed{18}.", Verdict.MALFORMED, -1.0, -0.5),
    "no tags": ("It is \\boxed{18}.", Verdict.MALFORMED, -1.0, -0.5),
    "closed twice": ("<think>a</think>b</think>\\boxed{18}", Verdict.MALFORMED, -1.0, -1.0),
    "answer only in the thinking": ("<think>\\boxed{18}</think>", Verdict.MALFORMED, -1.0, -1.0),
}


@pytest.mark.parametrize("case", SCHEME_VALUES)
def test_reward_values_of_both_schemes(case: str) -> None:
    response, verdict, paper, released = SCHEME_VALUES[case]
    for name, value in (("paper", paper), ("released", released)):
        score = MathReward(SCHEMES[name])(response, "18")
        assert (score.verdict, score.reward) == (verdict, value)


def test_thinking_need_not_be_required() -> None:
    reward = MathReward(SCHEMES["paper"], require_thinking=False)
    assert reward("It is \\boxed{18}.", "18").reward == 1.0
    assert reward("hm </think> \\boxed{18}", "18").reward == 1.0
    assert reward("\\boxed{18} hm </think> \\boxed{17}", "18").reward == -1.0


def test_any_of_several_ground_truths_will_do() -> None:
    reward = MathReward(SCHEMES["paper"], require_thinking=False)
    assert reward("\\boxed{2}", ["1", 2]).verdict is Verdict.RIGHT
    assert reward("\\boxed{3}", ["1", 2]).verdict is Verdict.WRONG


def test_prompt_may_open_or_close_the_thinking() -> None:
    assert split_thinking(complete("user: 1+1?\n<think>\n", "so\n</think>\n2")).thinking is Thinking.KEPT
    assert split_thinking(complete("1+1?\n<think>\n\n</think>\n\n", "2")) == split_thinking("<think></think>\n\n2")
    assert complete("Explain <think> to me.", "2") == "2"


def test_sources_find_their_reward() -> None:
    functions = {"math_mine": "my:reward", "zebra": "my:zebra"}
    assert find("math_longcot_math_verify") == find("math")
    assert find("math_mine/hard", functions) == ("my:reward", False)
    assert find("math", functions)[1]
    with pytest.raises(RewardError, match=r"'mathematica'.*\[reward\.functions\]"):
        check_sources(["math", "mathematica"], functions)


@pytest.mark.parametrize(
    ("path", "words"),
    [("nowhere", "module:function"), ("no_such_module:reward", "cannot be imported"), ("os:sep", "not a function")],
)
def test_broken_dotted_paths_are_named(path: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        resolve("mine", RewardSettings(functions={"mine": path}))


def number_reward(response: str, ground_truth: Any) -> float:
    return float("nan") if response == "nan" else float(response == ground_truth) - 0.5


def test_rewards_of_ones_own_may_return_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    reward = resolve("mine", RewardSettings(functions={"mine": "test_math_reward:number_reward"}))
    assert reward("a", "a") == Score(reward=0.5, verdict=Verdict.RIGHT)
    assert reward("b", "a") == Score(reward=-0.5, verdict=Verdict.WRONG)
    with pytest.raises(ValueError, match="not finite"):
        reward("nan", "a")


def test_rewards_import_no_torch() -> None:
    code = (
        "import sys, megatron_klear.rewards.scoring, megatron_klear.rewards.math as m; m.warm_up(); "
        "assert 'torch' not in sys.modules and 'megatron_klear.rewards.worker' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_very_long_texts_are_read_in_linear_time() -> None:
    hostile = ["\\boxed{" * 20000, "{" * 200000, "$" * 100000 + "x", "\\boxed{1} and " * 10000, "answer is " * 30000]
    for text in hostile:
        answer = read_answer(text)
        assert answer is None or not answer.isolated or len(answer.text) < 200000
    assert too_complex("1" * 100000)


def test_agreement_with_the_labelled_cases(shared_data: Path) -> None:
    lines = (shared_data / "verifier_cases" / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    differing = [c["id"] for c in cases if (grade(c["gold"], c["pred"])[0] is Verdict.RIGHT) != c["expected"]]
    assert len(differing) <= 0.03 * len(cases), differing
