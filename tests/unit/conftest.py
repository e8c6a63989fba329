"""Fixtures that several files share."""

import os
from collections.abc import Iterator

import pytest
from fake_vllm import FakeServer
from teacher import Teacher

from megatron_klear.evaluation import chat_api


@pytest.fixture
def teacher(monkeypatch):
    """A teacher that can be asked, with pauses of milliseconds."""
    monkeypatch.setattr(chat_api, "_FIRST_PAUSE_SECONDS", 0.001)
    server = Teacher()
    yield server
    server.close()


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    """Two servers that stand in for vLLM's."""
    with FakeServer() as first, FakeServer() as second:
        yield [first, second]


@pytest.fixture
def light_reward(tmp_path, monkeypatch):
    """A reward whose worker starts at once, and the flags that name it."""
    (tmp_path / "light_reward.py").write_text(
        "def reward(response, ground_truth):\n    return float('Seed' in response)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return "--reward.functions", '{made_up = "light_reward:reward"}'
