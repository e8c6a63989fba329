"""Grading one by one: responses come from any thread at any time, and nothing that waits is left waiting."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.rewards.base import RewardError, RewardSettings
from megatron_klear.rewards.open import AnyPool, open_pool
from megatron_klear.rewards.pool import GradingPool, PoolClosedError
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score, Verdict

GATED = RewardSettings(require_thinking=False, functions={"gated": "test_grading_submit:gated_reward"})


def gated_reward(response: str, ground_truth: Any) -> float:
    """Right once somebody opens the gate, a named pipe; leaves a mark that it was called."""
    Path(f"{ground_truth}.{response}").touch()
    with open(ground_truth) as gate:
        gate.read()
    return 1.0


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    os.mkfifo(tmp_path / "gate")
    return str(tmp_path / "gate")


@pytest.fixture(scope="module")
def pool() -> Iterator[AnyPool]:
    with open_pool(["math"], RewardSettings(require_thinking=False), timeout_seconds=60, workers=2) as pool:
        assert isinstance(pool, GradingPool)
        yield pool


def maths(number: int) -> Request:
    return Request("math", "18", f"\\boxed{{{number}}}")


def test_threads_submit_at_once(pool: AnyPool) -> None:
    found: dict[int, list[Verdict]] = {}

    def submit(first: int) -> None:
        futures = [pool.submit(maths(number)) for number in range(first, first + 20)]
        found[first] = [future.result().verdict for future in futures]

    threads = [threading.Thread(target=submit, args=(first,)) for first in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, verdicts in found.items():
        assert verdicts == [Verdict.RIGHT if n == 18 else Verdict.WRONG for n in range(first, first + 20)]
    assert sorted(found) == [0, 10, 20, 30]


def test_what_follows_an_answer_may_use_the_pool(pool: AnyPool) -> None:
    second: Future[Future[Score]] = Future()
    pool.submit(maths(18)).add_done_callback(lambda _: second.set_result(pool.submit(maths(19))))
    assert second.result().result().verdict is Verdict.WRONG


def test_a_request_that_cannot_be_sent_fails_alone(pool: AnyPool) -> None:
    bad, good = pool.submit(Request("math", lambda: 18, "18")), pool.submit(maths(18))
    assert good.result().verdict is Verdict.RIGHT
    with pytest.raises((AttributeError, TypeError, ValueError), match=r"pickle|lambda"):
        bad.result()


def test_each_answer_comes_when_it_is_there(gate: str) -> None:
    with GradingPool(["gated", "math"], GATED, timeout_seconds=60, workers=2) as pool:
        slow, quick = pool.submit(Request("gated", gate, "slow")), pool.submit(maths(18))
        assert quick.result().verdict is Verdict.RIGHT
        assert not slow.done()
        Path(gate).write_text("open")
        assert slow.result().reward == 1.0


def test_what_is_cancelled_in_the_queue_is_not_graded(gate: str) -> None:
    with GradingPool(["gated", "math"], GATED, timeout_seconds=60, workers=1) as pool:
        first = pool.submit(Request("gated", gate, "first"))
        open(gate, "w").close()  # returns once the worker is at it
        assert first.result().reward == 1.0
        busy, left_out = pool.submit(Request("gated", gate, "busy")), pool.submit(Request("gated", gate, "left out"))
        assert left_out.cancel()
        last = pool.submit(maths(18))
        open(gate, "w").close()
        assert (busy.result().reward, last.result().verdict) == (1.0, Verdict.RIGHT)
    with pytest.raises(CancelledError):
        left_out.result()
    assert sorted(path.name for path in Path(gate).parent.iterdir()) == ["gate", "gate.busy", "gate.first"]


def test_closing_from_another_thread_fails_what_waits(gate: str) -> None:
    pool = GradingPool(["gated", "math"], GATED, timeout_seconds=600, workers=1)
    begun, queued = pool.submit(Request("gated", gate, "x")), pool.submit(maths(18))
    caught: list[type[BaseException]] = []

    def grade() -> None:
        try:
            pool.grade([maths(1)])
        except PoolClosedError as error:
            caught.append(type(error))

    waiting = threading.Thread(target=grade)
    waiting.start()
    writer = os.open(gate, os.O_WRONLY)  # the worker is at the first response, and stays there
    closing = threading.Thread(target=pool.close)
    closing.start()
    for thread in (closing, waiting):
        thread.join()
    os.close(writer)
    for future in (begun, queued, pool.submit(maths(18))):
        with pytest.raises(PoolClosedError):
            future.result()
    assert caught == [PoolClosedError]
    with pytest.raises(PoolClosedError):
        pool.wait_until_ready()
    pool.close()


def test_a_pool_may_be_closed_by_what_follows_an_answer() -> None:
    pool = GradingPool(["math"], RewardSettings(require_thinking=False), workers=1)
    closed = threading.Event()
    first, second = pool.submit(maths(18)), None

    def close(_: Future[Score]) -> None:
        nonlocal second
        second = pool.submit(maths(19))
        pool.close()
        closed.set()

    first.add_done_callback(close)
    assert closed.wait(300)
    assert second is not None
    with pytest.raises(PoolClosedError):
        second.result()


def test_workers_that_cannot_start_are_told_to_everyone() -> None:
    with GradingPool(["mine"], RewardSettings(functions={"mine": "no_such:reward"}), workers=1) as pool:
        futures = [pool.submit(Request("mine", "1", "x")) for _ in range(3)]
        for _ in range(2):
            with pytest.raises(RewardError, match="'no_such:reward' cannot be imported"):
                pool.wait_until_ready()
        for future in [*futures, pool.submit(Request("mine", "1", "x"))]:
            with pytest.raises(RewardError, match="'no_such:reward' cannot be imported"):
                future.result()
        with pytest.raises(RewardError, match="'no_such:reward' cannot be imported"):
            pool.grade([Request("mine", "1", "x")])
