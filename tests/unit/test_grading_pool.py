"""Grading processes: hostile input costs its own time, dead workers are replaced, nothing is left without a verdict."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klear.rewards.base import RewardError, RewardSettings
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.scoring import ErrorAlarm, Graded, GradingAlarm, score
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Group, Prompt, Sample, Verdict

ROOT = Path(__file__).parents[2]
KINDS = ("spin", "block", "die", "raise", "loud", "forge", "look")
FUNCTIONS = {f"{name}_task": f"test_grading_pool:{name}_reward" for name in KINDS}


def spin_reward(response: str, ground_truth: Any) -> float:
    while response == "spin":
        pass
    return 1.0


def block_reward(response: str, ground_truth: Any) -> float:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as code that holds the interpreter would
    time.sleep(60.0)
    return 1.0


def die_reward(response: str, ground_truth: Any) -> float:
    if response == "die":
        os._exit(3)
    return 1.0


def raise_reward(response: str, ground_truth: Any) -> float:
    raise RuntimeError("the moon is full")


def loud_reward(response: str, ground_truth: Any) -> float:
    print("x" * 10000, flush=True)
    return float(len(response))


FORGED = {
    "garbage": b"\x80\x04K\x01.",
    "another's": b'{"number": 999999, "score": {"reward": 7.0, "verdict": "right", "note": ""}}',
    "a refusal": b'{"number": 0, "refused": "stop the run"}',
    "no verdict": b'{"number": 1, "score": {"reward": 7.0, "verdict": "perfect", "note": ""}}',
    "nested": b"[" * 100_000,
}


def forge_reward(response: str, ground_truth: Any) -> float:
    """Writes among the answers, as code that a model wrote could, on whatever file descriptors there are."""
    size = 1 << 40 if response == "endless" else len(FORGED.get(response, b""))
    for descriptor in range(3, 20) if response != "honest" else ():
        with contextlib.suppress(OSError):
            os.write(descriptor, size.to_bytes(8, "little") + FORGED.get(response, b""))
    return 1.0


def look_reward(response: str, ground_truth: Any) -> float:
    return float(response in os.environ)


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    os.environ |= {"SOME_TOKEN": "secret", "NAMED_KEY": "wanted"}
    settings = RewardSettings(require_thinking=False, functions=FUNCTIONS)
    with GradingPool(["math"], settings, timeout_seconds=3.0, workers=2, environment=["NAMED_KEY"]) as pool:
        pool.wait_until_ready()
        yield pool
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def verdicts(pool: GradingPool, source: str, *responses: str) -> list[Verdict]:
    return [score.verdict for score in pool.grade([Request(source, "18", response) for response in responses])]


def test_answers_come_in_order_whatever_the_length(pool: GradingPool) -> None:
    texts = [f"{'x ' * (200000 if i % 40 == 0 else i)}\\boxed{{{i}}}" for i in range(200)]
    scores = pool.grade([Request("math", str(i - i % 2), text) for i, text in enumerate(texts)])
    assert [score.verdict for score in scores] == [Verdict.WRONG if i % 2 else Verdict.RIGHT for i in range(200)]


def test_endless_python_code_is_a_timeout_without_a_new_process(pool: GradingPool) -> None:
    before = pool.restarts
    assert verdicts(pool, "spin_task", "spin", "fine") == [Verdict.TIMEOUT, Verdict.RIGHT]
    assert pool.restarts == before


def test_code_that_nothing_interrupts_is_killed(pool: GradingPool) -> None:
    before, start = pool.restarts, time.monotonic()
    (score,) = pool.grade([Request("block_task", None, "x")])
    assert (score.verdict, score.reward) == (Verdict.TIMEOUT, -1.0)
    assert pool.restarts == before + 1
    assert time.monotonic() - start < 30
    assert verdicts(pool, "math", "\\boxed{18}") == [Verdict.RIGHT]


def test_dead_worker_is_an_error_and_is_replaced(pool: GradingPool) -> None:
    assert verdicts(pool, "die_task", "die", "live", "die") == [Verdict.ERROR, Verdict.RIGHT, Verdict.ERROR]
    os.kill(pool._workers[0]._process.pid, signal.SIGKILL)
    assert verdicts(pool, "math", *["\\boxed{18}"] * 20).count(Verdict.RIGHT) >= 19


def test_exceptions_and_prints_of_a_reward(pool: GradingPool) -> None:
    (failed,) = pool.grade([Request("raise_task", None, "x")])
    assert (failed.verdict, failed.note) == (Verdict.ERROR, "RuntimeError: the moon is full")
    assert pool.grade([Request("loud_task", None, "xyz")])[0].reward == 3.0


@pytest.mark.parametrize("what", [*FORGED, "endless"])
def test_forged_answers_cost_their_response_alone(pool: GradingPool, what: str) -> None:
    before = pool.restarts
    assert verdicts(pool, "forge_task", what, "honest") == [Verdict.ERROR, Verdict.RIGHT]
    assert pool.restarts == before + 1
    assert verdicts(pool, "math", "\\boxed{18}", "\\boxed{19}") == [Verdict.RIGHT, Verdict.WRONG]


def test_workers_get_the_variables_that_are_named_and_no_others(pool: GradingPool) -> None:
    assert os.environ["SOME_TOKEN"]
    scores = pool.grade([Request("look_task", None, name) for name in ("SOME_TOKEN", "NAMED_KEY", "PATH")])
    assert [score.reward for score in scores] == [0.0, 1.0, 1.0]


def test_no_workers_outlive_the_pool() -> None:
    with GradingPool(["arithmetic"], workers=1) as pool:
        pid = pool._workers[0]._process.pid
        pool.wait_until_ready()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import time; from megatron_klear.rewards.pool import GradingPool; pool = GradingPool(['math'], workers=1); "
        "pool.wait_until_ready(); print(pool._workers[0]._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]:
            return
        time.sleep(0.05)
    pytest.fail("the worker is still there 10 s after its parent was killed")


def test_reward_that_cannot_be_imported_is_named_before_any_grading() -> None:
    with (
        GradingPool(["mine"], RewardSettings(functions={"mine": "no_such:reward"}), workers=1) as pool,
        pytest.raises(RewardError, match="'no_such:reward' cannot be imported"),
    ):
        pool.wait_until_ready()


def group(source: str, texts: list[str], prompt: str = "") -> Group:
    tokens = np.arange(3, dtype=np.int32)
    sample = Sample(tokens=tokens, trained=tokens > 0)
    asked = Prompt(id=f"p-{source}", data_source=source, tokens=tokens[:1], text=prompt, ground_truth="18")
    return Group(prompt=asked, samples=[sample] * len(texts), texts=texts)


def test_groups_are_scored_and_counted(pool: GradingPool) -> None:
    groups = [group("math", ["\\boxed{18}", "\\boxed{3}", "I do not know"]), group("raise_task", ["x"])]
    graded = score(groups, pool)
    assert [g.rewards.tolist() for g in graded.groups] == [[1.0, -1.0, -1.0], [-1.0]]
    assert graded.counts == Counter({Verdict.RIGHT: 1, Verdict.WRONG: 1, Verdict.MALFORMED: 1, Verdict.ERROR: 1})
    assert graded.accuracy == 0.25
    assert groups[0].scores is None
    assert score([], pool).accuracy == 0


def test_alarm_names_what_failed(pool: GradingPool) -> None:
    graded = score([group("math", ["\\boxed{18}"] * 4), group("raise_task", ["x"] * 2)], pool)
    ErrorAlarm(0.4).check(graded)
    with pytest.raises(GradingAlarm, match=r"2 of 6 .*prompt p-raise_task: error: RuntimeError: the moon is full"):
        ErrorAlarm(0.3).check(graded)


def test_one_failure_alone_is_no_alarm_unless_none_is_allowed() -> None:
    graded = Graded(groups=[], counts=Counter({Verdict.TIMEOUT: 1, Verdict.RIGHT: 3}))
    ErrorAlarm(0.05).check(graded)
    with pytest.raises(GradingAlarm, match="1 of 4"):
        ErrorAlarm(0.0).check(graded)


def hostile_expressions(count: int) -> list[str]:
    kinds = [
        lambda k: f"9^{{9^{{9^{{{9 + k}}}}}}}",
        lambda k: "(" * (300 + k) + "x" + ")" * (300 + k),
        lambda k: "\\frac{1}{" * (200 + k) + "2" + "}" * (200 + k),
        lambda k: f"(x+y+z+w)^{{{400 + k}}}",
        lambda k: f"{10**8 + k}!",
        lambda k: "\\sqrt{" * (50 + k) + "2" + "}" * (50 + k),
        lambda k: f"\\sum_{{n=1}}^{{10^{{{9 + k}}}}} n^n",
        lambda k: "1" * (200000 + k),
        lambda k: "x^" * (500 + k) + "x",
        lambda k: f"\\int_0^1 \\sin(\\cos(\\tan(e^{{x^{{x^{{{k + 2}}}}}}}))) dx",
    ]
    return [kinds[index % len(kinds)](index // len(kinds)) for index in range(count)]


def run_grade(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "tools" / "grade.py"), "math", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hostile_expressions_never_hang(tmp_path: Path) -> None:
    rows = [{"gold": "x^2+1", "pred": f"\\boxed{{{text}}}"} for text in hostile_expressions(20)]
    rows += [{"gold": "18", "pred": "\\boxed{18}", "extra": [1]}]
    output = tmp_path / "out.jsonl"
    done = run_grade(
        "--input", str(write_rows(tmp_path / "in.jsonl", rows)), "--output", str(output), "--timeout", "0.5"
    )
    assert done.returncode == 0, done.stderr
    graded = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["gold"] for row in graded] == [row["gold"] for row in rows]
    assert all(row["verdict"] in {"wrong", "malformed", "timeout", "error"} for row in graded[:-1])
    assert sum(row["verdict"] == "timeout" for row in graded) >= 2
    assert (graded[-1]["verdict"], graded[-1]["extra"]) == ("right", [1])
    assert "21 graded" in done.stderr


def test_grade_refuses_bad_input_and_existing_output(tmp_path: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"gold": "1", "pred": "1"}, {"gold": "1"}])
    output = tmp_path / "out.jsonl"
    done = run_grade("--input", str(bad), "--output", str(output))
    assert (done.returncode, output.exists()) == (1, False)
    assert f"{bad}:2: expected an object with `gold`" in done.stderr
    output.write_text("mine")
    good = write_rows(tmp_path / "good.jsonl", [{"gold": "1", "pred": "1"}])
    assert run_grade("--input", str(good), "--output", str(output)).returncode == 1
    assert output.read_text() == "mine"
    assert run_grade("--input", str(good), "--output", str(output), "--force").returncode == 0
    assert json.loads(output.read_text())["verdict"] == "right"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl", "out.jsonl"]
