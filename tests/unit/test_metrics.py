"""avg@k, pass@k, G-pass@k, maj@k against counting and against lighteval's own cases."""

import itertools
import json
import math
from pathlib import Path

import pytest

from megatron_klear.rewards.base import SCHEMES, RewardSettings
from megatron_klear.rewards.choice import ChoiceReward, read_choice
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.votes import vote_of
from megatron_klear.rewards.worker import Request
from megatron_klear.statistics.figures import figures_of
from megatron_klear.statistics.metrics import avg_at_k, g_pass_at_k, maj_at_k, mg_pass_at_k, pass_at_k, vote
from megatron_klear.types import Verdict

CASES = Path(__file__).resolve().parents[3] / "shared" / "data" / "metric_cases"


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_shares_of_all_subsets(n, c):
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = [sum(subset) for subset in itertools.combinations(right, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(found > 0 for found in subsets) / len(subsets))
        for threshold in (0.0, 0.3, 0.5, 1.0):
            least = max(1, math.ceil(threshold * k))
            expected = sum(found >= least for found in subsets) / len(subsets)
            assert g_pass_at_k(n, c, k, threshold) == pytest.approx(expected)
    assert avg_at_k(right) == pytest.approx(c / n)


def test_pass_at_k_of_many_samples_neither_overflows_nor_loses_figures():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, abs=1e-12)
    assert pass_at_k(10_000, 5_000, 1) == 0.5


def test_votes_are_for_what_an_answer_means():
    answers = ["1/2", None, "0.5", "2", "0.50", "2"]
    votes = vote(answers, lambda a, b: eval(a) == eval(b))
    assert votes == [0, None, 0, 1, 0, 1]
    right = [a in ("1/2", "0.5", "0.50") for a in answers]
    assert maj_at_k(votes, right) == 1.0
    assert maj_at_k(votes[2:4], right[2:4]) == 0.5  # a tie
    assert maj_at_k(votes[2:4], right[2:4], ties="first") == 1.0
    assert maj_at_k([None, None], [False, False]) == 0.0


def test_majorities_of_subsets_are_those_of_all_subsets_on_average():
    votes, right = [0, 0, 1, 2, 1], [True, True, False, False, False]
    subsets = [([votes[i] for i in s], [right[i] for i in s]) for s in itertools.combinations(range(5), 3)]
    expected = sum(maj_at_k(*subset) for subset in subsets) / len(subsets)
    assert maj_at_k(votes, right, 3, draws=4000) == pytest.approx(expected, abs=0.03)
    assert maj_at_k(votes, right, 3) == maj_at_k(votes, right, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: avg_at_k([True], 2),
        lambda: pass_at_k(4, 2, 5),
        lambda: pass_at_k(4, 5, 1),
        lambda: g_pass_at_k(4, 2, 2, 1.5),
        lambda: maj_at_k([0], [True, False]),
        lambda: maj_at_k([], []),
    ],
)
def test_too_few_samples_are_an_error(call):
    with pytest.raises(ValueError, match=r"samples|threshold|verdicts"):
        call()


def lighteval_cases():
    names = (
        "avg_at_k",
        "avg_at_k_math",
        "g_pass_at_k",
        "g_pass_at_k_latex",
        "g_pass_at_k_math",
        "maj_at_k",
        "pass_at_k",
    )
    for name in (*names, "pass_at_k_math"):
        path = CASES / f"{name}.json"
        for case in json.loads(path.read_text())["test_cases"] if path.exists() else ():
            yield pytest.param(name, case, id=f"{name}-{case['name']}")


def right_of(name, case):
    """Verdicts on a case's samples: equal text, or what the reward of the project says of mathematics."""
    gold = case["doc"]["gold_index"]
    choices = [case["doc"]["choices"][gold if isinstance(gold, int) else gold[0]]]  # it takes the first of several
    texts = case["model_response"]["text"]
    if not name.endswith(("_math", "_latex")):
        return texts, [text.strip() in choices for text in texts]
    if name == "g_pass_at_k_math" and choices[0] in ("x^2/2", "n(n+1)/2"):
        return texts, [False] * len(texts)  # lighteval reads numbers alone out of text without dollars
    from megatron_klear.rewards.math import MathReward

    reward = MathReward(SCHEMES["paper"], require_thinking=False)
    boxed = [f"\\boxed{{{text.strip('$')}}}" for text in texts]
    return texts, [reward(text, choices[0].strip("$")).verdict is Verdict.RIGHT for text in boxed]


@pytest.mark.parametrize(("name", "case"), lighteval_cases())
def test_lighteval_gets_the_same(name, case):
    texts, right = right_of(name, case)
    k, n = case["metric_params"]["k"], case["metric_params"].get("n", len(texts))
    c = sum(right[:n])
    for key, expected in case["expected_output"].items():
        if key.startswith("avg@k"):
            got = avg_at_k(right, k)
        elif key.startswith("maj@k"):
            got = maj_at_k(texts, right, k, ties="first")
        elif key.startswith("pass@k"):
            got = pass_at_k(n, c, k)
        elif key.startswith(("mg-", "mmath_", "mlatex_")):
            got = mg_pass_at_k(n, c, k)
        else:
            got = g_pass_at_k(n, c, k, float(key.rpartition("_")[2]))
        assert got == pytest.approx(expected, abs=case["tolerance"]), (key, right)


def choices():
    path = CASES / "gpqa_instruct_metric.json"
    return json.loads(path.read_text())["test_cases"] if path.exists() else []


@pytest.mark.parametrize("case", choices(), ids=lambda case: case["name"])
def test_lighteval_reads_the_same_choices(case):
    reward = ChoiceReward(SCHEMES["paper"], require_thinking=False)
    gold = case["doc"]["choices"][case["doc"]["gold_index"]]
    (text,) = case["model_response"]["text"]
    right = reward(text, gold).verdict is Verdict.RIGHT
    assert right == bool(case["expected_output"]["extractive_match"]), reward(text, gold)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("(B).", "B"),
        ("**Answer:** C", "C"),
        ("**Answer: D**", "D"),
        (r"Thus \boxed{\text{(C)}}", "C"),
        (r"\boxed{B}", "B"),
        ("Answer: A\nNo, wait.\nAnswer: B", "B"),
        ("The answer is A+1", None),
        ("Answer: Because", None),
        ("the answer is a guess", None),
        ("I do not know", None),
        (r"\boxed{\mathbf{C}}", "C"),
        (r"\boxed{ \text{ C } }", "C"),
        (r"\boxed{\text{Option B}}", "B"),
        (r"Answer: \(B\)", "B"),
        ("Answer: Option B", "B"),
        ("**The correct option is (D).**", "D"),
        (r"\boxed{B. 42}", "B"),
        ("Answer: B) 42, C) 43 is wrong", "B"),
        ("Answer: B, A is wrong", "B"),
        ("Answer: A or C", None),
        (r"\boxed{A, C}", None),
        (r"\boxed{\text{A and C}}", None),
        (r"\boxed{A \text{ and } C}", None),
        (r"\boxed{E = mc^2}", None),
        ("Answer: I think it is hard to say", None),
        ("Answer: B\nThe final answer: I'm sure of it", "B"),
        ("Answer: I because of I = U/R", "I"),
        ("The answer is I.", "I"),
        ("Answer: A metal rod", None),
        ("Answer: I only", "I"),
        ("The answer is A because metal conducts", "A"),
        ("Answer: A\nthe others are wrong", "A"),
        ("The answer is B, I think.", "B"),
        ("Answer: B; I am sure of it", "B"),
        ("The answer is B, I\u2019m sure.", "B"),
        ("Answer: B, A metal rod", "B"),
        ("Answer: B, I", None),
        ("The answer is A rather than B.", "A"),
        ("Answer: A rather heavy rod", None),
        ("The answer is A when the rod is hot.", "A"),
        ("The answer is A according to the text.", "A"),
        ("So the answer is A then.", "A"),
        ("The answer is A of course.", "A"),
        ("Answer: I would say that it is hard", None),
        ("Answer: I then add them", None),
    ],
)
def test_a_choice_is_a_capital_that_is_named(text, letter):
    assert read_choice(text) == letter


def test_wrong_choices_vote_by_their_letter():
    """However they are worded: three of C outvote two of B."""
    texts = [
        "Answer: C",
        "The answer is C, since it is.",
        "I think **Answer: (C)** because",
        "Answer: B",
        "So B. Answer: B",
    ]
    with GradingPool({"gpqa"}, RewardSettings(require_thinking=False), timeout_seconds=60, workers=1) as pool:
        scores = pool.grade([Request("gpqa", "B", text) for text in texts])
    votes = [vote_of(text, score) for text, score in zip(texts, scores, strict=True)]
    assert votes == ["=C", "=C", "=C", "right", "right"]
    assert maj_at_k(votes, [score.verdict is Verdict.RIGHT for score in scores]) == 0


@pytest.mark.parametrize(
    ("right", "votes", "majority"),
    [
        ([[True]], [["right"]], 1.0),
        ([[False]], [["=3"]], 0.0),
        ([[True, True], [True, True]], [["right", "right"]] * 2, 1.0),
        ([[True, False]], [["right", None]], 1.0),
        ([[True, False]], [[None, None]], None),  # programs
    ],
)
def test_figures_of_the_smallest_benchmarks(right, votes, majority):
    figures = figures_of(right, votes)
    assert figures.majority == majority
    assert 0 <= figures.low <= figures.accuracy <= figures.high <= 1
    assert figures.high - figures.low > 0.5  # one or two problems say little
    assert (figures.run_to_run is None) == (figures.samples == 1)
    assert figures.pass_at[1] == figures.accuracy


@pytest.mark.parametrize("text", ["\\boxed{" * 10_000, "the answer" + " " * 100_000, "Answer: A" + " " * 100_000])
def test_a_response_that_repeats_itself_is_read_in_no_time(text):
    """Quadratic, the first of them took minutes."""
    assert read_choice(text) in (None, "A")
