"""The part of the settings that the code reward reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["soft", "hard", "released"]
Comparison = Literal["judge", "livecodebench", "tokens"]
SandboxKind = Literal["bubblewrap", "landlock", "remote"]

SPARE_SECONDS = 5.0
"""Of a response's time, for reading its tests, starting the sandbox and comparing."""
RELEASED_TESTS = 16
"""Sampled by the published code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeSettings:
    """How programs are run and what their tests are worth; `[reward.code]` says what the fields mean."""

    kind: Kind = "soft"
    comparison: Comparison = "judge"
    sandbox: SandboxKind = "bubblewrap"
    url: str = ""
    cpu_seconds: float = 6.0
    total_seconds: float = 60.0
    memory_gib: float = 1.0
    max_tests: int = 0
    packages: tuple[str, ...] = ("sortedcontainers",)
    whole_programs: bool = False
    """A response without a fence that is Python as a whole is a program: for predictions kept so, never in a run."""

    @property
    def wrong(self) -> float:
        """The reward where no test is passed."""
        return -1.0 if self.kind == "released" else 0.0

    @property
    def longest_seconds(self) -> float:
        """What grading one response may take; `reward.timeout_seconds` must not be below it."""
        return self.total_seconds + SPARE_SECONDS


def too_short(settings: CodeSettings, timeout_seconds: float) -> str | None:
    """Why a timeout of one response is too short for the code reward, in words; None where it is not."""
    if timeout_seconds >= settings.longest_seconds:
        return None
    return (
        f"reward.timeout_seconds {timeout_seconds:g} is shorter than grading a program may take: its tests have "
        f"reward.code.total_seconds {settings.total_seconds:g}, and {SPARE_SECONDS:g} s are for what is around them. "
        f"Set reward.timeout_seconds to {settings.longest_seconds:g} or more, or lower reward.code.total_seconds"
    )
