"""Where programs that a model wrote are run: they can do no harm there, and forge nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .outcome import Limits, Outcome, Program, Sandbox, Status

__all__ = ["Kind", "Limits", "Outcome", "Program", "Sandbox", "Status", "check_sandbox", "open_sandbox"]
Kind = Literal["bubblewrap", "landlock"]


def open_sandbox(kind: Kind = "bubblewrap", packages: Sequence[str] = ()) -> Sandbox:
    """A sandbox for the thread that calls this; its process starts with the first program.

    Programs import Python's library, and of `packages` those that are named: pure Python, installed here.

    Raises RewardError, with the remedy, where this machine cannot have one of that kind.
    """
    from .kinds import opened

    return opened(kind, packages)


def check_sandbox(kind: Kind = "bubblewrap") -> str:
    """Run a program in a sandbox of that kind; what this machine has, in words.

    Raises RewardError, which says in a sentence what is wrong and what mends it.
    """
    from .kinds import checked

    return checked(kind)
