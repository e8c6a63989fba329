"""What crosses between rank 0 and the orchestrator, and what each hears of the other's end."""

import fcntl
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_klear.errors import UserError
from megatron_klear.orchestrator.link import Link, LinkClosedError, told
from megatron_klear.orchestrator.process import CALLS, spawn
from megatron_klear.orchestrator.step_numbers import TokenArrays
from megatron_klear.rl.advantages import RewardValueError
from megatron_klear.train.rollouts import OrchestratorLost, Rollouts
from megatron_klear.types import Sample


@pytest.fixture
def links():
    ours, theirs = socket.socketpair()
    yield Link(ours), Link(theirs)
    ours.close()
    theirs.close()


def test_arrays_cross_as_they_are(links):
    tokens = np.arange(3_000_000, dtype=np.int32)  # more than a socket holds at once
    sample = Sample(tokens=tokens, trained=tokens % 2 == 0, logprobs=tokens.astype(np.float32))
    sender = threading.Thread(target=links[0].send, args=(TokenArrays.of({7: sample}),))
    sender.start()
    found = links[1].receive(10)
    sender.join()
    (number, got), *rest = found.samples().items()
    assert (number, rest) == (7, [])
    np.testing.assert_array_equal(got.tokens, tokens)
    assert got.logprobs.dtype == np.float32
    assert len(pickle.dumps(found, pickle.HIGHEST_PROTOCOL)) < 9 * len(tokens) + 1000


def test_no_message_is_none_and_a_closed_end_is_told(links):
    assert links[0].receive(0) is None
    links[1].close()
    with pytest.raises(LinkClosedError):
        links[0].receive(10)


def test_both_ends_may_send_at_once(links):
    news = "a server is gone " * 1_000_000  # more than a socket holds
    ratios = {7: np.arange(3_000_000, dtype=np.float32), 8: np.ones(3, np.float32)}
    found = [None, None]

    def talk(end, message):
        links[end].send(message)
        found[end] = links[end].receive(10)

    ends = [threading.Thread(target=talk, args=(n, m), daemon=True) for n, m in enumerate([("keep", ratios), news])]
    for end in ends:
        end.start()
    for end in ends:
        end.join(20)
    assert found[0] == news
    name, got = found[1]
    assert (name, list(got)) == ("keep", [7, 8])
    np.testing.assert_array_equal(got[7], ratios[7])


def test_a_descriptor_may_have_any_number():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], min(2000, limits[1])), limits[1]))
    ends = socket.socketpair()
    high = [socket.socket(fileno=fcntl.fcntl(end, fcntl.F_DUPFD, 1500)) for end in ends]
    try:
        Link(high[0]).send("a word")
        assert Link(high[1]).receive(10) == "a word"
        assert Link(high[1]).receive(0) is None
    finally:
        for end in (*ends, *high):
            end.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class OnlyHere(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def test_errors_cross_as_themselves_or_in_words():
    assert type(told(RewardValueError("no reward"), "")) is RewardValueError
    ours = told(OnlyHere(1, 2), "Traceback")
    assert type(ours) is RuntimeError
    assert "OnlyHere('1 2')" in str(ours)
    assert "Traceback" in str(ours)
    assert "Traceback" in told(KeyError("a"), "Traceback").__notes__[0]


def test_calls_are_methods_and_nothing_else_can_be_called():
    from megatron_klear.orchestrator.orchestrator import Orchestrator

    assert all(callable(getattr(Orchestrator, name)) for name in CALLS)


@pytest.mark.parametrize("how", ["lifeline", "link"])
def test_it_is_gone_when_rank_0_is(how: str):
    spawned = spawn()
    try:
        if how == "link":
            spawned.link.close()
        else:
            spawned.lifeline.close()
        assert spawned.process.wait(60) == 0
    finally:
        spawned.process.kill()


def test_its_death_ends_a_call_in_words():
    rollouts = Rollouts(SimpleNamespace(config=SimpleNamespace(reward=None)))
    rollouts._spawned.process.send_signal(signal.SIGKILL)
    with pytest.raises(OrchestratorLost, match=r"was ended by signal 9 \(SIGKILL\)"):
        rollouts.read_prompts()
    rollouts.close()


def test_it_ends_in_the_middle_of_a_call_though_forks_hold_both_ends(monkeypatch):
    rollouts = Rollouts(SimpleNamespace(config=SimpleNamespace(reward=None)))
    spawned = rollouts._spawned
    held = os.dup(spawned.lifeline.fileno())
    monkeypatch.setattr(spawned.link, "send", lambda _: None)  # a call does not read that the run is over
    monkeypatch.setattr(spawned.link, "close", lambda: None)
    rollouts._begin("next_step", (0,))
    began = time.monotonic()
    rollouts.close()
    assert time.monotonic() - began < 30
    os.close(held)


def test_its_death_is_told_again_by_every_later_call():
    rollouts = Rollouts(SimpleNamespace(config=SimpleNamespace(reward=None)))
    rollouts._spawned.process.send_signal(signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(OrchestratorLost, match=r"was ended by signal 9 \(SIGKILL\)"):
            rollouts.sleep()
    rollouts.close()


def test_a_call_that_cannot_be_pickled_is_not_under_way():
    with Rollouts(SimpleNamespace(config=SimpleNamespace(reward=None))) as rollouts:
        with pytest.raises(AttributeError, match="no attribute 'architecture'"):
            rollouts.read_prompts()
        with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
            rollouts.arrays(lambda: None)
        with pytest.raises(IndexError):  # the orchestrator's own answer: it has not read its prompts
            rollouts.sleep()


LONG_STEP = """
import os, signal, time
from types import SimpleNamespace
from megatron_klear.train.rollouts import Rollouts
rollouts = Rollouts(SimpleNamespace(config=SimpleNamespace(reward=None)))
os.kill(rollouts._spawned.process.pid, signal.SIGTERM)
time.sleep(100)
"""


def test_its_death_ends_a_long_step():
    run = subprocess.run([sys.executable, "-c", LONG_STEP], env=os.environ, capture_output=True, text=True, timeout=80)
    assert run.returncode == 1
    assert "error (rank 0): the orchestrator's process was ended by signal 15 (SIGTERM)" in run.stderr


def test_what_it_refuses_is_raised_here(tmp_path):
    from tiny_rl_run import start, write_run

    toml = write_run(tmp_path)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with Rollouts(start(toml)) as rollouts, pytest.raises(UserError, match=r"tokenizer\.json"):
        rollouts.read_prompts()
