"""What a response is worth, and the whole path: a pool, its workers, their sandboxes, and programs that cheat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from code_sandbox import fenced, shared_sandbox

from megatron_klear.config.rl import CodeRewardConfig, RewardConfig
from megatron_klear.orchestrator.grading import check_prompts
from megatron_klear.rewards.base import SCHEMES, RewardError, RewardSettings, check_time, find, resolve
from megatron_klear.rewards.code.forms import read_problem
from megatron_klear.rewards.code.judge import sampled
from megatron_klear.rewards.code.reward import CodeReward
from megatron_klear.rewards.code.settings import CodeSettings, SandboxKind
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.wire import RemoteJob, read_job, write_job
from megatron_klear.rewards.worker import Request, WorkerJob, answer_json, read_answer
from megatron_klear.types import ProgramResult, Prompt, Score, Verdict

SQUARES = {"inputs": [f"{n}\n" for n in range(4)], "outputs": [f"{n * n}\n" for n in range(4)]}
RIGHT = "print(int(input()) ** 2)"
HALF = "n = int(input())\nprint(n * n if n < 2 else 0)"  # right on 2 of 4
CHECK = {"functional": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\ncheck(f)"}


def reward(scheme: str = "paper", *, thinking: bool = True, **settings: Any) -> CodeReward:
    told = CodeSettings(**{"cpu_seconds": 1.0, "total_seconds": 20.0} | settings)
    return CodeReward(SCHEMES[scheme], require_thinking=thinking, settings=told, sandbox=shared_sandbox())  # type: ignore[index]


@pytest.mark.parametrize(
    ("kind", "right", "half", "wrong"), [("soft", 1.0, 0.5, 0.0), ("hard", 1.0, 0.0, 0.0), ("released", 1.0, 0.0, -1.0)]
)
def test_what_passed_tests_are_worth(kind: str, right: float, half: float, wrong: float) -> None:
    judged = reward(kind=kind)
    assert judged(fenced(RIGHT), SQUARES).reward == right
    score = judged(fenced(HALF), SQUARES)
    assert (score.reward, score.verdict) == (half, Verdict.WRONG)
    assert judged(fenced("print(-1)"), SQUARES).reward == wrong
    malformed = judged("<think>\n</think>\nprint(1)", SQUARES)
    assert (malformed.reward, malformed.verdict) == (wrong, Verdict.MALFORMED)
    assert malformed.program == ProgramResult("malformed", 0, 4)


def test_the_released_code_gives_all_or_nothing_for_tests_in_python() -> None:
    program = "def f(x):\n    return 4"
    assert reward(kind="soft")(fenced(program), CHECK).reward == 0.5
    assert reward(kind="released")(fenced(program), CHECK).reward == -1.0
    assert reward(kind="released")(fenced("def f(x):\n    return x * x"), CHECK).reward == 1.0


def test_of_many_tests_the_released_code_draws_sixteen_always_the_same() -> None:
    truth = {"inputs": [f"{n}\n" for n in range(40)], "outputs": [f"{n % 2}" for n in range(40)]}
    problem = read_problem(truth)
    drawn = sampled(problem, 16, "print(1)")
    assert len(drawn.tests) == 16
    assert drawn.tests == sampled(read_problem(truth), 16, "print(1)").tests
    assert drawn.tests != sampled(problem, 16, "print(0)").tests
    assert set(drawn.tests) <= set(problem.tests)
    scores = {reward(kind="released")(fenced("print(1)"), truth) for _ in range(2)}
    (score,) = scores
    assert score.program is not None
    assert score.program.total == 16
    assert score.reward == 2 * score.program.passed / 16 - 1
    assert reward(max_tests=8)(fenced("print(1)"), truth).program.total == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", ["paper", "released"])
def test_a_broken_thinking_format_has_the_schemes_values(scheme: str) -> None:
    judged, block = reward(scheme), f"```python\n{RIGHT}\n```"
    values = SCHEMES[scheme]  # type: ignore[index]
    assert judged(f"<think>so {block}", SQUARES).reward == values.not_closed
    assert judged(f"so</think>{block}", SQUARES).reward == values.not_opened
    assert judged(f"<think>so</think>{block}</think>{block}", SQUARES).reward == values.malformed
    assert judged(f"<think>```python\nx\n```</think>{block}", SQUARES).reward == 1.0
    assert reward(scheme, thinking=False)(block, SQUARES).reward == 1.0
    cut = reward(scheme, thinking=False)(f"<think>so {block}", SQUARES)
    assert (cut.reward, cut.verdict) == (0.0, Verdict.MALFORMED), "what is thought aloud is no answer"


def test_a_program_is_only_sought_after_the_thinking() -> None:
    score = reward()(f"<think>\n```python\n{RIGHT}\n```\n</think>\nDone.", SQUARES)
    assert (score.reward, score.verdict) == (0.0, Verdict.MALFORMED)


ENDS = {
    "passed": (RIGHT, 4),
    "failed": (HALF, 2),
    "timeout": ("n = int(input())\nwhile n == 3:\n    pass\nprint(n * n)", 3),
    "memory": ("n = int(input())\nx = [0] * (10**10 if n == 3 else 1)\nprint(n * n)", 3),
    "crashed": ("n = int(input())\nprint(n * n + 0 // (3 - n))", 3),
    "contained": ("import os\nn = int(input())\nif n == 3:\n    os.fork()\nprint(n * n)", 3),
}


@pytest.mark.parametrize("status", ENDS)
def test_whatever_a_program_does_is_its_own_doing(status: str) -> None:
    program, passed = ENDS[status]
    score = reward()(fenced(program), SQUARES)
    assert score.program == ProgramResult(status, passed, 4), score.note
    assert score.note.startswith(f"{status}, {passed} of 4 tests passed")
    assert score.verdict is (Verdict.RIGHT if status == "passed" else Verdict.WRONG)
    assert score.reward == passed / 4


def test_all_tests_of_a_program_share_its_time() -> None:
    told = CodeSettings(cpu_seconds=5.0, total_seconds=1.0)
    judged = CodeReward(SCHEMES["paper"], settings=told, sandbox=shared_sandbox())
    score = judged(fenced("while True:\n    pass"), SQUARES)
    assert score.program == ProgramResult("timeout", 0, 4)
    late = "n = int(input())\nif n == 0:\n    print(1 / 0)\nwhile n == 3:\n    pass\nprint(n * n)"
    assert judged(fenced(late), SQUARES).program == ProgramResult("crashed", 2, 4)
    checks = "\n".join(f"for x in [{n}]:\n    assert f(x) == x" for n in range(4))
    score = judged(fenced("def f(x):\n    while True:\n        pass"), {"functional": checks})
    assert score.program == ProgramResult("timeout", 0, 4)


def test_a_ground_truth_that_is_none_is_an_error() -> None:
    score = reward()(fenced(RIGHT), {"answer": 4})
    assert score.verdict is Verdict.ERROR
    assert "'answer'" in score.note


CODE = [
    "code", "coder1_longcot", "coder1_longcot_v2", "livecodebench", "LiveCodeBench/code_generation_lite", "humaneval",
    "openai/openai_humaneval/humaneval", "evalplus/humanevalplus", "mbpp", "google-research-datasets/mbpp", "leetcode",
    "newfacade/LeetCodeDataset", "codeforces", "open-r1/codeforces", "code_contests", "deepmind/code_contests",
    "codecontests", "taco", "BAAI/TACO", "apps", "codeparrot/apps", "kodcode", "KodCode/KodCode-V1", "primeintellect",
    "deepcoder", "agentica-org/DeepCoder-Preview-Dataset", "Kwai-Klear/KlearReasoner-CodeSub-15K", "lcbv5",
]  # fmt: skip


@pytest.mark.parametrize("source", CODE)
def test_usual_names_run_as_they_are(source: str) -> None:
    assert find(source) == find("code")


def test_maths_keeps_its_names() -> None:
    for source in ("PrimeIntellect/NuminaMath-QwQ-CoT-5M", "Kwai-Klear/KlearReasoner-MathSub-30K", "math/code"):
        assert find(source) == find("math")


def test_the_settings_reach_the_reward() -> None:
    config = RewardConfig(timeout_seconds=40, code=CodeRewardConfig(kind="hard", total_seconds=30, packages=("a",)))
    found = resolve("code", config.for_rewards())
    assert isinstance(found, CodeReward)
    assert found.settings == CodeSettings(kind="hard", total_seconds=30.0, packages=("a",))


def test_the_settings_reach_graders_on_other_nodes() -> None:
    settings = RewardSettings(code=CodeSettings(kind="hard", packages=("a", "b")))
    worker = WorkerJob(settings=settings, data_sources=("code",), timeout_seconds=70.0, memory_bytes=1)
    job = RemoteJob(job=worker, variables={}, paths=(), folder="/")
    assert read_job(write_job(job)) == job
    score = Score(reward=0.5, verdict=Verdict.WRONG, program=ProgramResult("failed", 1, 2))
    assert read_answer(answer_json(3, score)) == (3, score)


def test_a_time_too_short_for_all_tests_is_told_before_a_run() -> None:
    with pytest.raises(ValueError, match=r"reward\.timeout_seconds 5 is shorter .* Set reward\.timeout_seconds to 65"):
        RewardConfig(code=CodeRewardConfig(kind="hard"))
    assert RewardConfig(timeout_seconds=65, code=CodeRewardConfig()).code.total_seconds == 60
    check_time(["math"], RewardSettings(), 5.0)
    with pytest.raises(RewardError, match=r"data_source 'taco' is of code: reward\.timeout_seconds 5 "):
        check_time(["math", "taco"], RewardSettings(), 5.0)
    prompt = Prompt(id="a", data_source="taco", tokens=None, text="", ground_truth=SQUARES)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="is of code"):
        check_prompts(RewardConfig(), [prompt])
    check_prompts(RewardConfig(timeout_seconds=65), [prompt])


HACKS = {
    "an exit code": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "equal to everything": "class A:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A()",
    "an int equal to everything": (
        "class A(int):\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A(7)"
    ),
    "patched built-ins": (
        "import builtins\nbuiltins.abs = abs = lambda *_: 0\nbuiltins.all = all = lambda *_: True\n"
        "builtins.len = len = lambda *_: 2\nbuiltins.isinstance = isinstance = lambda *_: True\ndef f(x):\n    return 7"
    ),
    "patched modules": (
        "import math, unittest, sys\nmath.isclose = lambda *a, **k: True\n"
        "unittest.TestResult.wasSuccessful = lambda s: True\nisclose = lambda *a, **k: True\ndef f(x):\n    return 7"
    ),
    "an assertion that is none": (
        "import builtins\nclass AssertionError(Exception):\n    pass\nbuiltins.AssertionError = AssertionError\n"
        "def f(x):\n    raise SystemExit(0)"
    ),
    "a look at who calls": (
        "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    found = []\n    while frame:\n"
        "        found.append(str(frame.f_locals) + str(frame.f_globals))\n        frame = frame.f_back\n"
        "    found += [str(one) for one in gc.get_objects() if isinstance(one, (list, tuple, dict))]\n"
        "    return 4444 if any(' 444' + '4' in text or '[444' + '4' in text for text in found) else 7"
    ),
    "writing into every descriptor": (
        "import os\nfor n in range(3, 64):\n    try:\n        os.write(n, b'{\"status\": \"done\"}4444')\n"
        "    except OSError:\n        pass\ndef f(x):\n    return 7"
    ),
    "a name of the test's": (
        "def is_same_list(*_):\n    return True\ncandidate = check = lambda *_: True\ndef f(x):\n    return 7"
    ),
    "the end of a loop": "def f(x):\n    raise StopIteration",
    "only its own words": "print('passed, 4 of 4 tests passed')\ndef f(x):\n    print('1 passed')\n    return 'right'",
}  # fmt: skip
TARGETS: dict[str, Any] = {
    "stdin": {"inputs": ["1\n"], "outputs": ["4444\n"]},
    "call": {"inputs": [[1]], "outputs": [4444], "fn_name": "f"},
    "split": {
        "functional": "def check(candidate):\n    assert candidate(1) == 4444\n    assert not candidate(2)\ncheck(f)"
    },
    "distance": ["assert abs(f(1) - 4444) < 1e-3", "assert math.isclose(f(1), 4444)"],
    "check": "for x in [1, 2]:\n    assert abs(f(x) - 4444) < 1e-3\n    assert isinstance(f(x), int)",
    "check of many": "assert len(f(1)) == 2 and f(1)[0] == 4444",
    "all": "assert all(f(x) == 4444 for x in range(3))",
    "pytest": (
        "import pytest\nfrom solution import f\n@pytest.mark.parametrize('x', [1, 2])\ndef test_a(x):\n"
        "    assert f(x) == 4444\ndef test_b():\n    with pytest.raises(ValueError):\n        f(-1)"
    ),
    "unittest": (
        "import unittest\nfrom solution import f\nclass TestF(unittest.TestCase):\n    def test_a(self):\n"
        "        self.assertAlmostEqual(f(1), 4444)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_no_hack_is_rewarded(target: str) -> None:
    judged = reward(cpu_seconds=0.4)
    for name, program in HACKS.items():
        score = judged(fenced(program), TARGETS[target])
        assert score.reward == 0.0, f"{name}: {score.note}"
        assert score.verdict is Verdict.WRONG, f"{name}: {score.note}"
    honest = {"stdin": "print(4444)"}.get(
        target, "def f(x):\n    if x < 0:\n        raise ValueError\n    return 4444 if x != 9 else 0"
    )
    if target == "check of many":
        honest = "def f(x):\n    return [4444, 1]"
    if target == "split":
        honest = "def f(x):\n    return 4444 if x == 1 else 0"
    score = reward()(fenced(honest), TARGETS[target])
    assert score.reward == 1.0, score.note


SETTINGS = RewardSettings(code=CodeSettings(cpu_seconds=1.0, total_seconds=20.0))


def test_a_pool_grades_programs_while_a_worker_is_killed(tmp_path: Path) -> None:
    shared_sandbox()
    programs = [
        RIGHT,
        HALF,
        "while True:\n    pass",
        "import os\nos.kill(0, 9)\nos.kill(1, 9)",
        "print(1",
        *[RIGHT] * 15,
    ]
    wanted = [1.0, 0.5, 0.0, 0.0, 0.0, *[1.0] * 15]
    with GradingPool(["code", "math"], SETTINGS, timeout_seconds=25.0, workers=2) as pool:
        pool.wait_until_ready()
        futures = [pool.submit(Request("code", SQUARES, fenced(program))) for program in programs]
        maths = pool.submit(Request("math", "4", "<think>a</think>\\boxed{4}"))
        assert futures[0].result().reward == 1.0
        worker = psutil.Process(pool._workers[0]._process.pid)
        sandboxed = worker.children(recursive=True)
        worker.kill()
        scores = [future.result() for future in futures]
        died = [score for score in scores if score.verdict is Verdict.ERROR]
        assert len(died) <= 1
        assert pool.restarts == 1
        assert maths.result().reward == 1.0 or not died
        for score, value in zip(scores, wanted, strict=True):
            assert score in died or (score.reward == value and score.program is not None), score
        assert sandboxed
        assert psutil.wait_procs(sandboxed, timeout=60)[1] == [], "a sandbox ends with its worker"
        again = pool.grade([Request("code", CHECK, fenced("def f(x):\n    return x * x"))] * 4)
        assert [score.program for score in again] == [ProgramResult("passed", 2, 2)] * 4


def test_workers_limits_are_not_those_of_programs() -> None:
    """A worker's own limit on memory is below what a program is given here."""
    shared_sandbox()
    settings = RewardSettings(code=CodeSettings(cpu_seconds=2.0, total_seconds=20.0, memory_gib=6.0))
    program = "import mmap\nx = mmap.mmap(-1, 5 << 30)\nprint(int(input()) ** 2)"
    with GradingPool(["code"], settings, timeout_seconds=25.0, workers=1, memory_bytes=4 << 30) as pool:
        (score,) = pool.grade([Request("code", SQUARES, fenced(program))])
        assert score.program == ProgramResult("passed", 4, 4), score.note


def test_a_machine_without_a_sandbox_is_told_before_the_first_response(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        GradingPool(["code"], SETTINGS, timeout_seconds=25.0, workers=1) as pool,
        pytest.raises(RewardError, match="bwrap"),
    ):
        pool.wait_until_ready()


def test_the_kinds_of_sandbox_are_named_alike() -> None:
    from typing import get_args

    from megatron_klear.rewards.sandbox import Kind

    assert get_args(SandboxKind) == (*get_args(Kind), "remote")
    assert json.loads(CodeRewardConfig().model_dump_json())["sandbox"] == "bubblewrap"
