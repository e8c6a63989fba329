"""Where programs that a model wrote are run: they can do no harm there, and forge nothing."""

from __future__ import annotations

from typing import Literal

from .outcome import Limits, Outcome, Program, Sandbox, Status

__all__ = ["Kind", "Limits", "Outcome", "Program", "Sandbox", "Status", "open_sandbox"]
Kind = Literal["bubblewrap", "landlock"]


def open_sandbox(kind: Kind = "bubblewrap") -> Sandbox:
    """A sandbox for the thread that calls this; its process starts with the first program.

    Raises RewardError, with the remedy, where this machine cannot have one of that kind.
    """
    from .kinds import opened

    return opened(kind)
