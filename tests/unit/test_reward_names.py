"""Which reward a data source gets, how a user's own is called, and what is tried before the first rollout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klear.rewards import base
from megatron_klear.rewards.base import RewardError, RewardSettings, check_truths, find, judge, resolve
from megatron_klear.rewards.own import OwnReward, SignatureError
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score, Verdict

MATHS = [
    "openai/gsm8k", "HuggingFaceH4/MATH-500", "lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "math_dapo",
    "AIME2024", "aime25", "HuggingFaceH4/aime_2024", "Maxwell-Jia/AIME_2024", "numina_olympiads",
    "AI-MO/NuminaMath-CoT", "BytedTsinghua-SIA/DAPO-Math-17k", "math_longcot_math_verify", "GSM8K",
]  # fmt: skip


@pytest.mark.parametrize("source", MATHS)
def test_usual_names_run_as_they_are(source: str) -> None:
    assert find(source) == find("math")
    assert resolve(source, RewardSettings(require_thinking=False))("\\boxed{5}", "5").verdict is Verdict.RIGHT


@pytest.mark.parametrize("source", ["mathematica", "someone/mathematica", "openai/codex", "agsm8k"])
def test_other_names_get_no_reward_or_their_own(source: str) -> None:
    with pytest.raises(RewardError, match=r"\[reward\.functions\]"):
        find(source)


def test_a_name_may_go_on_after_a_built_in_s() -> None:
    assert find("math/code") == find("math_code") == find("math")


@pytest.mark.parametrize("value", ["math", "MATH", "gsm8k", "megatron_klear.rewards.math:MathReward"])
@pytest.mark.parametrize("scheme", ["paper", "released"])
def test_a_built_in_may_stand_for_a_name(value: str, scheme: Any) -> None:
    settings = RewardSettings(functions={"my/Set": value}, scheme=scheme)
    reward = resolve("my/set", settings)
    assert reward("\\boxed{5}", "5").reward == {"paper": -1.0, "released": -0.5}[scheme]
    assert reward("<think>a</think>\\boxed{5}", "5").reward == 1.0


def test_yours_comes_before_a_built_in() -> None:
    assert find("openai/gsm8k", {"openai/gsm8k": "my:reward"}) == ("my:reward", False)
    assert find("openai/gsm8k", {"GSM8K": "my:reward"}) == ("my:reward", False)


def plain(response: str, ground_truth: Any) -> float:
    return float(response == ground_truth)


def informed(response: str, ground_truth: Any, extra_info: Any, *, data_source: str) -> float:
    return float(extra_info["level"]) if data_source == "set" else -1.0


def verl(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> dict[str, Any]:
    return {"score": float(solution_str == ground_truth and data_source == "set" and extra_info["level"] == 3)}


def verl_short(solution_str: str, ground_truth: Any, **kwargs: Any) -> float:
    return float(kwargs["extra_info"]["level"])


@pytest.mark.parametrize(("function", "reward"), [(plain, 1.0), (informed, 3.0), (verl, 1.0), (verl_short, 3.0)])
def test_a_reward_gets_what_it_asks_for(function: Any, reward: float) -> None:
    own = OwnReward(function)
    assert judge(own, "a", "a", data_source="set", extra_info={"level": 3}).reward == reward


def too_many(response: str, ground_truth: Any, tokenizer: Any) -> float:
    return 1.0


async def later(response: str, ground_truth: Any) -> float:
    return 1.0


class Judge:
    def __call__(self, response: str, ground_truth: Any) -> float:
        return 2.0


@pytest.mark.parametrize(
    "function", [too_many, later, Judge, lambda response: 1.0, lambda data_source, extra_info: 1.0]
)
def test_signatures_that_fit_no_call_are_refused(function: Any) -> None:
    with pytest.raises(SignatureError):
        OwnReward(function)


def test_objects_that_can_be_called_are_rewards() -> None:
    assert OwnReward(Judge())("a", "b") == Score(reward=2.0, verdict=Verdict.RIGHT)


@pytest.mark.parametrize("value", [True, np.bool_(True), 1, np.float32(1), np.array(1.0), np.int8(1)])
def test_what_float_takes_is_a_number(value: Any) -> None:
    assert base._Yours(lambda response, truth: value)("a", "b").reward == 1.0


@pytest.mark.parametrize("value", ["1", None, {"a": 1}, [1.0], np.array([1.0, 2.0]), 1j])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="expected a Score or a number"):
        OwnReward(lambda response, truth: value)("a", "b")


def test_ground_truths_are_checked_by_row() -> None:
    rows = [("a.jsonl:1", "openai/gsm8k", "5"), ("a.jsonl:2", "openai/gsm8k", {"a": 1}), ("b:3", "mine", {"a": 1})]
    with pytest.raises(RewardError, match=r"a\.jsonl:2 \(data_source 'openai/gsm8k'\): .*of type dict") as error:
        check_truths(rows, {"mine": "my:reward"})
    assert "b:3" not in str(error.value)
    check_truths([rows[0], rows[2]], {"mine": "my:reward"})


def exits(response: str, ground_truth: Any) -> float:
    raise SystemExit(3)


def picky(response: str, ground_truth: Any) -> float:
    return float(response)


def test_exits_are_told_and_rewards_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    functions = {name: f"test_reward_names:{name}" for name in ("exits", "picky", "informed", "too_many")}
    settings = RewardSettings(functions=functions)
    with GradingPool(["exits"], settings, workers=1) as pool:
        (score,) = pool.grade([Request("exits", "1", "x")])
        assert (score.verdict, pool.restarts) == (Verdict.ERROR, 0)
        assert "exit code 3" in score.note
    with (
        GradingPool(["picky"], settings, workers=1, trials=[Request("picky", "1", "no number")]) as pool,
        pytest.raises(RewardError, match=r"'picky' failed on a made-up response.*could not convert"),
    ):
        pool.wait_until_ready()
    with (
        GradingPool(["too_many"], settings, workers=1) as pool,
        pytest.raises(RewardError, match=r"test_reward_names:too_many.*takes \(response, ground_truth, tokenizer\)"),
    ):
        pool.wait_until_ready()
    with GradingPool(["informed"], settings, workers=1) as pool:
        assert pool.grade([Request("informed", "1", "x", {"level": 3})])[0].reward == -1.0
