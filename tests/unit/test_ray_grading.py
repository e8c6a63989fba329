"""Grading through a real Ray on this machine: the verdicts of the local pool, whoever dies meanwhile; then nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_klear.rewards import ray_node
from megatron_klear.rewards.base import RewardError, RewardSettings
from megatron_klear.rewards.open import check_backend, open_pool
from megatron_klear.rewards.owner import PoolClosedError
from megatron_klear.rewards.pool import GradingPool
from megatron_klear.rewards.ray_node import RayNode
from megatron_klear.rewards.ray_pool import RayGradingPool
from megatron_klear.rewards.truth_store import TruthRef, TruthStore
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score, Verdict

ROOT = Path(__file__).parents[2]
KINDS = ("gated", "named", "broken", "pair")
FUNCTIONS = {kind: f"test_ray_grading:{kind}_reward" for kind in KINDS}
SETTINGS = RewardSettings(require_thinking=False, functions=FUNCTIONS)


def gated_reward(response: str, ground_truth: Any) -> float:
    """Right once somebody writes to the gate, a named pipe; tells by another that it waits, and in which process."""
    if response == "wait":
        with open(f"{ground_truth}.told", "w") as told:
            told.write(f"{os.getppid()}")
        with open(ground_truth) as gate:
            gate.read()
    return 1.0


def named_reward(response: str, ground_truth: Any) -> float:
    return float(os.environ.get(response) == ground_truth)


def broken_reward(response: str, ground_truth: Any) -> float:
    raise RuntimeError("the moon is full")


def pair_reward(response: str, ground_truth: Any, extra_info: Any) -> float:
    assert isinstance(ground_truth, tuple)
    return float(response in ground_truth) + extra_info["bonus"]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("NAMED_KEY", "wanted")
        patch.setenv("SOME_TOKEN", "secret")
        yield


@pytest.fixture(scope="module")
def head() -> Iterator[RayNode]:
    """A Ray that is there already; the pools of these tests join it."""
    with RayNode.start(2) as node:
        yield node
        node.check()  # whoever joined it has left it as it was


@pytest.fixture(scope="module")
def pool(head: RayNode) -> Iterator[RayGradingPool]:
    with RayGradingPool(["math"], SETTINGS, address=head.address, timeout_seconds=60, environment=["NAMED_KEY"]) as it:
        it.wait_until_ready()
        yield it


def open_gate(folder: Path) -> str:
    os.mkfifo(folder / "gate")
    os.mkfifo(folder / "gate.told")
    return str(folder / "gate")


def test_the_verdicts_are_those_of_the_local_pool(pool: RayGradingPool, tmp_path: Path) -> None:
    store = TruthStore.write(tmp_path, [("math", ["18", "19"], None), ("pair", ("a", b"b"), {"bonus": 0.25})])
    lost = TruthRef(str(tmp_path / "lost.jsonl"), 0, 3)
    requests = [
        *(Request("math", "18", text) for text in ("\\boxed{18}", "x" * 300_000, "\\boxed{17} \ud800é", "no idea")),
        *(Request("math", truth, "\\boxed{0.5}") for truth in (0.5, ["1/3", "1/2"], {"a": 1}, "")),
        *(Request("pair", ("a", b"b"), "a", {"bonus": 0.5}), Request("pair", ["a"], "a", {"bonus": 0})),
        *(
            Request("broken", "1", "x"),
            Request("named", "wanted", "NAMED_KEY"),
            Request("named", "secret", "SOME_TOKEN"),
        ),
        *(Request("math", store[0], "\\boxed{19}"), Request("pair", store[1], "a"), Request("math", lost, "x")),
    ]
    with GradingPool(["math"], SETTINGS, timeout_seconds=60, workers=1, environment=["NAMED_KEY"]) as local:
        expected = local.grade(requests)
    assert pool.grade(requests) == expected
    assert len({score.verdict for score in expected}) == 4
    assert [score.reward for score in expected[-5:-3]] == [1.0, 0.0]


def test_a_value_that_json_does_not_hold_fails_alone(pool: RayGradingPool) -> None:
    bad, good = pool.submit(Request("math", {1, 2}, "1")), pool.submit(Request("math", "1", "1"))
    with pytest.raises(ValueError, match="which JSON does not hold"):
        bad.result()
    assert good.result().verdict is Verdict.RIGHT
    with pytest.raises(RewardError, match="cannot be told to another node"):
        RayGradingPool(["math"], address="nowhere:1", trials=[Request("math", {1}, "1")])


def test_what_a_killed_grader_was_at_is_graded_by_another(pool: RayGradingPool, tmp_path: Path) -> None:
    gate, before = open_gate(tmp_path), pool.restarts
    waiting = pool.submit(Request("gated", gate, "wait"))
    others = [pool.submit(Request("gated", gate, "pass")) for _ in range(10)]
    first = int(Path(f"{gate}.told").read_text())
    assert "GradingActor" in psutil.Process(first).name() + " ".join(psutil.Process(first).cmdline())
    os.kill(first, signal.SIGKILL)
    assert int(Path(f"{gate}.told").read_text()) != first
    Path(gate).write_text("open")
    assert [future.result().verdict for future in (waiting, *others)] == [Verdict.RIGHT] * 11
    assert pool.restarts == before + 1
    pool.wait_until_ready()


def test_a_response_whose_graders_die_again_and_again_is_an_error(pool: RayGradingPool, tmp_path: Path) -> None:
    gate = open_gate(tmp_path)
    waiting = pool.submit(Request("gated", gate, "wait"))
    for _ in range(3):
        os.kill(int(Path(f"{gate}.told").read_text()), signal.SIGKILL)
    score: Score = waiting.result()
    assert (score.verdict, score.reward) == (Verdict.ERROR, -1.0)
    assert score.note.startswith("its grader was lost 3 times; the last: ActorDiedError")
    assert pool.grade([Request("math", "18", "18")])[0].verdict is Verdict.RIGHT


def test_one_process_reaches_one_ray(pool: RayGradingPool, head: RayNode) -> None:
    with (
        RayGradingPool(["math"], SETTINGS, address=head.address) as second,
        pytest.raises(RewardError, match="connected to a Ray already"),
    ):
        second.wait_until_ready()
    assert pool.grade([Request("math", "18", "18")])[0].verdict is Verdict.RIGHT


def test_a_joined_ray_is_left_without_graders(pool: RayGradingPool, head: RayNode, tmp_path: Path) -> None:
    """The last test of the shared pool: it is closed here, with a response under way."""
    pool.wait_until_ready()
    gate = open_gate(tmp_path)
    waiting = pool.submit(Request("gated", gate, "wait"))
    assert int(Path(f"{gate}.told").read_text())
    supervised = psutil.Process(head.supervisor)
    graders = [p for p in supervised.children(recursive=True) if "GradingActor" in p.name() + "".join(p.cmdline())]
    workers = [worker for grader in graders for worker in grader.children()]
    assert len(graders) == len(workers) == 2
    pool.close()
    for future in (waiting, pool.submit(Request("math", "18", "18"))):
        with pytest.raises(PoolClosedError):
            future.result()
    gone, left = psutil.wait_procs([*graders, *workers], timeout=60)
    assert not left, gone
    head.check()


def test_rewards_that_cannot_be_used_are_told_by_the_graders(pool: RayGradingPool, head: RayNode) -> None:
    pool.close()
    settings = RewardSettings(functions={"mine": "no_such:reward"})
    with (
        RayGradingPool(["mine"], settings, address=head.address, workers=1) as broken,
        pytest.raises(RewardError, match=r"'no_such:reward' cannot be imported .* \(on node "),
    ):
        broken.wait_until_ready()


KILLED = """
import sys, time
from megatron_klear.rewards.base import RewardSettings
from megatron_klear.rewards.open import open_pool
from megatron_klear.rewards.worker import Request
pool = open_pool(["math"], RewardSettings(require_thinking=False), backend="ray", workers=1, timeout_seconds=60)
pool.wait_until_ready()
print(pool.grade([Request("math", "18", "18")])[0].verdict.value, pool._node.supervisor, pool._node._folder, flush=True)
sys.stdin.read()
"""


def test_a_ray_of_the_runs_own_ends_with_a_killed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says nothing meanwhile. The folder that it leaves goes with the next start."""
    command = [sys.executable, "-c", KILLED]
    run = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    verdict, supervisor, folder = run.stdout.readline().split()
    assert verdict == "right"
    below = [psutil.Process(int(supervisor)), *psutil.Process(int(supervisor)).children(recursive=True)]
    assert len(below) > 6
    run.kill()
    assert run.communicate() == ("", "")
    _, left = psutil.wait_procs(below, timeout=60)
    assert not left
    monkeypatch.setattr(ray_node, "_JUST_MADE_SECONDS", -1.0)
    ray_node._sweep()
    assert not Path(folder).exists()


def test_ray_that_is_absent_or_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, pool: RayGradingPool) -> None:
    pool.close()
    for address, words in {"127.0.0.1:9": "Connection refused", "node-1": "not the form host:port"}.items():
        with (
            RayGradingPool(["math"], SETTINGS, address=address) as unreachable,
            pytest.raises(RewardError, match=rf"no Ray answers at reward\.ray_address '{address}' \(.*{words}"),
        ):
            unreachable.wait_until_ready()
    monkeypatch.setattr(ray_node, "find_spec", lambda name: None)
    for check in (lambda: check_backend("ray"), lambda: open_pool(["math"], SETTINGS, backend="ray")):
        with pytest.raises(RewardError, match=r'pip install "megatron-klear\[ray\]"'):
            check()
    check_backend("local")
