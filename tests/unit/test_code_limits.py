"""What is too large: in tests an error that is told before grading, in a program's answer wrong, and soon said so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from code_sandbox import fenced, shared_sandbox

from megatron_klear.rewards.base import SCHEMES, RewardSettings
from megatron_klear.rewards.code.forms import FormError, check_form
from megatron_klear.rewards.code.reward import CodeReward
from megatron_klear.rewards.code.settings import CodeSettings, Kind
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.sandbox.values import Opaque, decode, encode
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score, Verdict


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def call(given: Any, wanted: Any) -> dict[str, Any]:
    return {"inputs": [[given]], "outputs": [wanted], "fn_name": "f"}


def graded(program: str, tests: Any) -> Score:
    settings = CodeSettings(cpu_seconds=3.0, total_seconds=20.0)
    return CodeReward(SCHEMES["paper"], settings=settings, sandbox=shared_sandbox())(fenced(program), tests)


TOO_LARGE = {
    "a deep input": (call(nested(100), 1), "input 0 is nested more than 100 deep"),
    "a deep output": (call(1, nested(101)), "output 0 is nested more than 100 deep"),
    "a very deep input": (call(nested(500), 1), "nested"),
    "a deep literal": ("assert f(1) == " + "[" * 102 + "]" * 102, "nested more than 100 deep"),
    "a deep argument in a loop": ("for x in [1, 2]:\n    f(" + "[" * 102 + "]" * 102 + ")\n    assert x", "100 deep"),
    "a sum of many": ("assert f(1) == " + "+".join("1" * 2000), "nested too deep"),
    "a long output": ({"inputs": [""], "outputs": ["x" * ((16 << 20) + 1)]}, "16777217 bytes"),
    "a long value": (call(1, "x" * (8 << 20)), "MiB"),
    "a long argument": (call("x" * (8 << 20), 1), "MiB"),
    "a long value in an assert": ("assert f(1) == [0.5] * 900000", "MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_LARGE)
def test_tests_that_no_program_can_pass_are_told(name: str) -> None:
    tests, words = TOO_LARGE[name]
    with pytest.raises(FormError, match=words):
        check_form(tests)
    score = graded("def f(x):\n    return x", tests)
    assert (score.verdict, score.reward) == (Verdict.ERROR, 0.0)
    assert words in score.note


def test_what_is_just_small_enough_passes() -> None:
    echo = "def f(x):\n    return x"
    assert graded(echo, call(nested(99), nested(99))).reward == 1.0
    assert graded(echo, f"assert f({nested(98)}) == {nested(98)}").reward == 1.0
    text = "x" * (8_000_000)
    assert graded(echo, call(text, text)).reward == 1.0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("x = []\n    for _ in range(150):\n        x = [x]\n    return x", "nested more than 100 deep"),
        ("return 'x' * (9 << 20)", "a value of 9437"),
        ("return 'x' * (20 << 20)", "wrote more than it may"),
    ],
)
def test_a_program_that_gives_too_much_is_wrong_by_name(body: str, words: str) -> None:
    score = graded(f"def f(x):\n    {body}", call(1, "x" * (1 << 19)))
    assert (score.verdict, score.reward) == (Verdict.WRONG, 0.0)
    assert words in score.note


COLLIDING = [["i", f"{number * ((1 << 61) - 1):x}"] for number in range(1, 30_000)]


@pytest.mark.parametrize("value", [["S", COLLIDING], ["F", COLLIDING], ["m", [[key, 0] for key in COLLIDING]]])
def test_keys_that_collide_are_no_value(value: Any) -> None:
    assert isinstance(decode(json.dumps(value).encode()), Opaque)
    assert decode(encode({number * ((1 << 61) - 1) for number in range(60)})) is not None
    assert decode(encode(set(range(-1000, 1000)))) == set(range(-1000, 1000))


def test_colliding_keys_of_a_program_are_wrong_at_once() -> None:
    program = (
        "import json, os\ndef f(x):\n"
        "    keys = [['i', f'{n * ((1 << 61) - 1):x}'] for n in range(1, 60000)]\n"
        "    os.write(3, json.dumps(['S', keys]).encode())\n    os._exit(0)"
    )
    score = graded(program, "assert f(1) == set(range(60000))")
    assert (score.verdict, score.reward) == (Verdict.WRONG, 0.0)


def test_values_with_an_equality_of_their_own_take_no_time_outside() -> None:
    program = (
        "class Evil:\n    def __hash__(self):\n        while True:\n            pass\n    __eq__ = __hash__\n"
        "class Keys(dict):\n    def items(self):\n        while True:\n            pass\n"
        "def f(x):\n    return [Evil(), Keys({1: Evil()})] if x else Keys(a=1)"
    )
    assert graded(program, ["assert f(1) == [1, {1: 2}]", "assert f(0) == {'a': 1}"]).reward == 0.5


@pytest.mark.parametrize(("kind", "value"), [("soft", 0.0), ("hard", 0.0), ("released", -1.0)])
def test_what_the_pool_cannot_grade_is_worth_what_a_wrong_program_is(kind: Kind, value: float) -> None:
    shared_sandbox()
    settings = RewardSettings(code=CodeSettings(kind=kind, cpu_seconds=30.0, total_seconds=30.0))
    tests = {"inputs": [""], "outputs": ["1"]}
    with GradingPool(["code", "math"], settings, timeout_seconds=0.5, workers=1) as pool:
        (late,) = pool.grade([Request("code", tests, fenced("while True:\n    pass"))])
        assert (late.verdict, late.reward) == (Verdict.TIMEOUT, value)
        assert pool.failure(Request("math", "4", "x"), Verdict.ERROR, "").reward == -1.0
