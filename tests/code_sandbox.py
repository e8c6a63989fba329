"""The sandbox that tests of the code reward share, and programs wrapped as responses."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from megatron_klear.rewards.base import RewardError
from megatron_klear.rewards.sandbox import Sandbox, open_sandbox
from megatron_klear.rewards.sandbox.outcome import Program

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@cache
def shared_sandbox() -> Sandbox:
    """One sandbox for the tests of a process; they are skipped, with its words, where this machine can have none."""
    try:
        sandbox = open_sandbox("bubblewrap", packages=("sortedcontainers",))
        sandbox.run(Program(source="print(1)"), [b""])
    except RewardError as error:
        pytest.skip(f"no sandbox here: {error}")
    return sandbox


def fenced(program: str) -> str:
    """A response with thinking that holds a program."""
    return f"<think>\nHm.\n</think>\n\nSo:\n\n```python\n{program}\n```\n"
