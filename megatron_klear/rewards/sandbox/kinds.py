"""The kinds of sandbox, and whether this machine can have them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from megatron_klear.rewards.base import RewardError

from .command import ENVIRONMENT, bubblewrap_command, landlock_command, landlock_paths, own_user, package_places
from .inside import landlock
from .outcome import Program
from .remedies import remedy
from .slot import Slot
from .zygote import Zygote, plain_environment

_HONEST = Program(source="print(int(input()) + 1)")
_NAMESPACE_PROCESSES = 3
"""Of a slot's user in a program's own namespaces: minder, keeper and test."""
_PLAIN_PROCESSES = 8
"""Of a slot's user without namespaces: zygote, and twice minder, keeper and test, with one to spare."""


def checked(kind: str) -> str:
    """Run a program in a sandbox of that kind and say in words what it was; RewardError with the remedy otherwise."""
    sandbox = opened(kind)
    try:
        (outcome,) = sandbox.run(_HONEST, [b"41\n"])
    finally:
        sandbox.close()
    if outcome.stdout != b"42\n":
        told = f"{outcome.status} {outcome.note} {outcome.stderr.decode(errors='replace')}".strip()
        raise RewardError(f"the sandbox called {kind} starts, and its first program fails ({told}): {remedy(told)}")
    return _version() if kind == "bubblewrap" else f"Landlock, version {landlock.version()}"


def _version() -> str:
    ran = subprocess.run(["bwrap", "--version"], text=True, capture_output=True, timeout=10)
    return ran.stdout.strip() or "bubblewrap of unknown version"


def opened(kind: str, packages: Sequence[str] = ()) -> Slot:
    """A sandbox of that kind. Raises RewardError."""
    user, places = own_user(), package_places(packages)
    if kind == "bubblewrap":
        return Slot(
            lambda: Zygote(lambda control: bubblewrap_command(control, user, places), plain_environment()),
            namespaces=True,
            user_processes=_NAMESPACE_PROCESSES,
        )
    if kind != "landlock":
        raise RewardError(f"no sandbox is called {kind!r}; there are bubblewrap and landlock")
    if (found := landlock.version()) < landlock.NEEDED_VERSION:
        has = f"version {found}" if found else "none, or has it switched off"
        raise RewardError(
            f"the sandbox called landlock needs version {landlock.NEEDED_VERSION} of Landlock (Linux 6.2), and this "
            f"kernel has {has}; use the sandbox called bubblewrap"
        )
    return Slot(
        lambda: Zygote(lambda control: landlock_command(control, user, places), ENVIRONMENT),
        namespaces=False,
        user_processes=_PLAIN_PROCESSES if user else 0,
        **landlock_paths(places),
    )
