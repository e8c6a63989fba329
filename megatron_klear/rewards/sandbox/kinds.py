"""The kinds of sandbox, and whether this machine can have them."""

from __future__ import annotations

from megatron_klear.rewards.base import RewardError

from .command import bubblewrap_command, own_user
from .outcome import Sandbox
from .slot import Slot
from .zygote import Zygote, plain_environment


def opened(kind: str) -> Sandbox:
    """A sandbox of that kind. Raises RewardError."""
    if kind != "bubblewrap":
        raise RewardError(f"no sandbox is called {kind!r}")
    user = own_user()

    def start() -> Zygote:
        return Zygote(lambda control: bubblewrap_command(control, user), plain_environment())

    return Slot(start, namespaces=True, own_user=True)
