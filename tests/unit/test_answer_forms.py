"""Forms of maths answers: what is the same in another dress, what is never paid, and which ground truths are none."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.rewards.answers import compare
from megatron_klear.rewards.exact import TooLargeError, based_number, exact_value
from megatron_klear.rewards.math import grade
from megatron_klear.rewards.truths import TruthError, read_truths
from megatron_klear.types import Verdict

SAME = [
    ("no solution", "no solution"),
    ("no solution", "\\text{No solution}"),
    ("does not exist", "\\text{does not exist}"),
    ("New York", "New York"),
    ("July 4", "\\text{July 4}"),
    ("\\text{north-east}", "north-east"),
    ("\\text{red and blue}", "red and blue"),
    ("\u662f", "\\text{\u662f}"),
    ("\\frac{1}{7}\\triangle ABC", "\\frac{1}{7}\\triangle ABC"),
    ("30", "30\u00b0"),
    ("30^\\circ", "30\u00b0"),
    ("\\emptyset", "\\varnothing"),
    ("\u20ac5", "5"),
    ("5", "\u00a35"),
    ("5", "5,"),
    ("5", "5\\ "),
    ("5", "5\\"),
    ("5", "**5**"),
    ("5", "\\textbf{5}"),
    ("5", "5\\text{ apples}"),
    ("5", "5 apples"),
    ("5 cm", "5\\text{ centimeters}"),
    ("42", "42\u4e2a"),
    ("10", "10\\text{ cm}^2"),
    ("4\\sqrt{2}", "4\\sqrt{2}\\text{ cm}"),
    ("5000000", "5\\text{ million}"),
    ("1500", "1.5e3"),
    ("1e-05", "10^{-5}"),
    ("1\\,000\\,000", "10^6"),
    ("\\sqrt{1,000,000}", "1000"),
    ("\\frac{40!}{20!20!}", "\\binom{40}{20}"),
    ("\\frac{\\pi}{2^{99}}", "\\pi\\cdot 2^{-99}"),
    ("120_5", "120_{5}"),
    ("(-\\infty,3)", "x<3"),
    ("3 or 4", "4 or 3"),
    ("B", "(B)"),
    ("B", "B. 12"),
    ("B", "B) 12"),
    ("B", "\\textbf{(B)}\\ 12"),
    ("D", "\\text{D: it rains}"),
    ("x = 3", "3"),
]
OTHER = [
    ("New York", "Boston"),
    ("July 4", "\\text{July 5}"),
    ("July 4", "4"),
    ("4", "July 4"),
    ("5 am", "5 pm"),
    ("B", "C. 12"),
    ("B", "\\text{Because}"),
    ("B", "A or B"),
    ("B", "(A)(B)"),
    ("B", "B. 12, C. 13"),
    ("A", "B. A"),
    ("4", "3 \\text{ or } 4"),
    ("3", "3 or 4"),
    ("4", "either 3 or 4"),
    ("4", "3, 4"),
    ("4", "3=4"),
    ("3", "x=4=3"),
    ("3", "1+2=4=x=3"),
    ("3", "\\pm 3"),
    ("5", "5\\text{ million}"),
    ("2", "2ab"),
    ("5", "5\\text{x}"),
    ("5 cm", "5 m"),
    ("5 g", "5 s"),
    ("30^\\circ", "30\\%"),
    ("120_5", "120"),
    ("35", "120_5"),
    ("0", "\\frac{1}{2^{99}}"),
    ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("\\frac{100!}{50!\\cdot 50!}", "\\frac{100!}{51!\\cdot 49!}"),
    ("\\frac{2^{2005}+1}{3\\cdot 2^{2006}}", "\\frac{5}{3\\cdot 2^{2006}}"),
    ("(\\frac{1}{2^{99}}, 1)", "(\\frac{1}{2^{98}}, 1)"),
    ("\\{\\frac{1}{2^{99}}, 3\\}", "\\{\\frac{1}{2^{98}}, 3\\}"),
    ("\\frac{x}{2^{99}}", "\\frac{x}{2^{98}}"),
    ("\\frac{\\pi}{2^{99}}", "\\frac{\\pi}{2^{98}}"),
    ("e^{-50}", "e^{-60}"),
    ("1.0e-7", "1.1e-7"),
    ("2^{1000}", "2^{1000}+1"),
    ("18", "9^{9^{9}}"),
    ("18", "100000000!"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_another_dress_is_the_same_answer(gold: str, answer: str) -> None:
    assert grade(gold, f"So it is \\boxed{{{answer}}}.")[0] is Verdict.RIGHT


@pytest.mark.parametrize(("gold", "answer"), OTHER)
def test_another_answer_is_never_paid(gold: str, answer: str) -> None:
    assert grade(gold, f"So it is \\boxed{{{answer}}}.")[0] is Verdict.WRONG


HEDGES = [
    "\\boxed{3}\\text{ or }\\boxed{4}",
    "\\boxed{3}\\text{ and }\\boxed{4}",
    "$\\boxed{3}$ or $\\boxed{4}$",
    "\\boxed{3} or maybe \\boxed{4}",
    "\\boxed{3} or perhaps it is \\boxed{4}",
    "\\boxed{3}\\quad\\text{or}\\quad\\boxed{4}",
    "\\[\\boxed{3} \\quad \\text{and} \\quad \\boxed{4}\\]",
    "\\boxed{3} \u6216 \\boxed{4}",
    "\\boxed{3} / \\boxed{4}",
    "<answer>3 or 4</answer>",
    "<answer>3</answer> or <answer>4</answer>",
    "Answer: 3 or 4",
    "#### 3 or 4",
    "\u7b54\u6848\uff1a3\u62164",
]


@pytest.mark.parametrize("text", HEDGES)
@pytest.mark.parametrize("gold", ["3", "4"])
def test_hedging_is_never_paid(gold: str, text: str) -> None:
    assert grade(gold, text)[0] is not Verdict.RIGHT


@pytest.mark.parametrize(
    "text",
    [
        "<answer>42</answer>",
        "<answer> $42$ </answer>",
        "<answer>\\boxed{42}</answer>",
        "\u7b54\u6848\uff1a42",
        "**\u7b54\u6848**\uff1a42",
        "\u6240\u4ee5\u7b54\u6848\u662f42\u3002",
        "\u6545\u7b54\u6848\u4e3a\uff1a42",
        "<answer>41</answer> no: \\boxed{42}",
    ],
)
def test_labels_and_tags_are_read(text: str) -> None:
    assert grade("42", text)[0] is Verdict.RIGHT
    assert grade("43", text)[0] is Verdict.WRONG


def test_lists_of_boxes_are_one_answer() -> None:
    assert grade("3, 4", "\\boxed{4}\\text{ and }\\boxed{3}")[0] is Verdict.RIGHT
    assert grade("3, 5", "\\boxed{4}\\text{ and }\\boxed{3}")[0] is Verdict.WRONG


def test_words_are_read_without_a_box() -> None:
    assert grade("New York", "I think of cities.\nThe answer is New York.")[0] is Verdict.RIGHT
    assert grade("New York", "I think of cities.\nThe answer is Boston.")[0] is Verdict.WRONG


@given(st.text(alphabet="ABCDE", min_size=1, max_size=1), st.permutations("ABCDE"), st.integers(1, 99))
def test_only_the_right_letter_is_paid(right: str, letters: list[str], value: int) -> None:
    for letter in letters:
        for form in (f"{letter}. {value}", f"\\textbf{{({letter})}}\\ {value}", f"\\text{{({letter})}}"):
            assert (grade(right, f"\\boxed{{{form}}}")[0] is Verdict.RIGHT) == (letter == right)


def as_latex(value: Fraction, base: int) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}} \\cdot {base}^{{-{base * 20}}}"


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6), st.integers(2, 9), st.integers(2, 9))
def test_exact_constants_are_the_same_only_where_their_values_are(
    first: Fraction, second: Fraction, one: int, other: int
) -> None:
    left, right = as_latex(first, one), as_latex(second, other)
    same = first * Fraction(1, one ** (one * 20)) == second * Fraction(1, other ** (other * 20))
    assert (compare(left, right) is True) == same
    assert compare(left, left) is True


@given(st.integers(0, 200), st.integers(0, 200))
def test_binomials_and_factorials_have_their_values(n: int, k: int) -> None:
    assert exact_value(f"\\binom{{{n}}}{{{k}}}") == math.comb(n, k)
    if k <= n:
        assert exact_value(f"\\frac{{{n}!}}{{{k}!({n - k})!}}") == math.comb(n, k)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", Fraction(-4)),
        ("2^{-3}", Fraction(1, 8)),
        ("\\frac12", Fraction(1, 2)),
        ("(3)(4)", Fraction(12)),
        ("1.5\\times 10^{3}", Fraction(1500)),
        ("6/2/3", Fraction(1)),
        ("2**10", Fraction(1024)),
    ],
)
def test_values_of_constants(text: str, value: Fraction) -> None:
    assert exact_value(text) == value


@pytest.mark.parametrize(
    "text", ["1/2(3)", "2\\frac{1}{3}", "2^3^2", "7!!", "3 4", "x", "1/0", "0^0", "(-3)!", "", "(1"]
)
def test_what_can_be_read_in_two_ways_has_no_exact_value(text: str) -> None:
    assert exact_value(text) is None


@pytest.mark.parametrize(
    "text", ["9^{9^{9}}", "100000000!", "\\binom{10000000}{5000000}", "(((9!)!)!)!", "2^{99999}" + "*2^{99999}" * 60]
)
def test_huge_constants_are_refused_before_they_are_computed(text: str) -> None:
    with pytest.raises(TooLargeError):
        exact_value(text)


@given(st.text(alphabet="0123456789+-*/^!(){}. ", max_size=40))
def test_exact_reading_fails_in_no_other_way(text: str) -> None:
    try:
        value = exact_value(text)
    except TooLargeError:
        return
    assert value is None or isinstance(value, Fraction)


def test_bases_are_kept() -> None:
    assert based_number("120_5") == based_number("0120_{5}") == ("120", 5)
    assert based_number("128_8") is None
    assert based_number("x_1") is None


@pytest.mark.parametrize(
    "truth",
    [{"target": 5}, True, None, [], "", "  ", float("nan"), float("inf"), ["1", {}], "\\boxed{}", np.bool_(True)],
)
def test_what_is_no_answer_is_an_error(truth: Any) -> None:
    with pytest.raises(TruthError):
        read_truths(truth)
    assert grade(truth, "\\boxed{5}")[0] is Verdict.ERROR


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        (5, "5"),
        (142.0, "142"),
        (1e22, "10^{22}"),
        (1e-05, "0.00001"),
        (np.int64(5), "5"),
        (np.array(["7", "5"]), "5"),
        (["9.6\n"], "9.6"),
        ("A long way.\n#### 5", "5"),
        ("so \\boxed{5}", "5"),
    ],
)
def test_ground_truths_of_every_kind(truth: Any, answer: str) -> None:
    assert grade(truth, f"\\boxed{{{answer}}}")[0] is Verdict.RIGHT
    assert grade(truth, "\\boxed{6}")[0] is Verdict.WRONG


def test_solutions_of_gsm8k_are_right_and_slips_are_wrong(shared_data: Any) -> None:
    import json

    rows = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    for row in map(json.loads, rows):
        answer = row["answer"]
        head, _, value = answer.rpartition("#### ")
        slipped = f"{head}#### {int(value.replace(',', '')) + 1}"
        assert grade(answer, answer)[0] is Verdict.RIGHT
        assert grade(answer, slipped)[0] is Verdict.WRONG
