"""One server as the run sees it, the limits that hold for all of them, and what starts those of the run's own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from megatron_klear.rollout.vllm.client import Completion, ServerClient

NO_WEIGHTS = -1


class ManagedServers(Protocol):
    """Servers that the run has started itself."""

    def poll(self) -> list[str]:
        """Addresses that came back since the last call, without the present weights."""
        ...

    def notices(self) -> list[str]:
        """What happened to servers since the last call, in words."""
        ...

    def answered(self, address: str) -> None:
        """A good answer came from there."""
        ...

    def restart(self, address: str) -> None:
        """Start it anew: it hangs."""
        ...

    @property
    def starting(self) -> bool:
        """Whether one is on its way up."""
        ...

    def hold(self) -> None:
        """Start none that died, until `release`."""
        ...

    def release(self) -> None:
        """Start those that died again."""
        ...

    def close(self) -> None:
        """End them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long things may take, and how often they may fail."""

    request_seconds: float
    """Longest time that a server which has requests draws no token; however long an answer takes while it does."""
    deadline_seconds: float
    """Longest time that a sample makes no headway over all attempts, and longest time without any server."""
    requests_per_server: int
    """Most requests that one server has at once; fewer where its cache holds fewer."""
    health_seconds: float = 10.0
    """Longest wait for a sign of health."""
    tick_seconds: float = 1.0
    """Time between two looks at a server."""
    backoff_seconds: float = 0.2
    """Wait before the second attempt, doubled for each further one, and time aside of a server that fails."""
    max_backoff_seconds: float = 15.0
    strikes: int = 3
    """Failures in a row, or missed signs of health, that put a server aside."""
    max_unsound: int = 12
    """Attempts of one sample that may end in a refusal or in garbage."""


@dataclass(kw_only=True, slots=True, eq=False)
class Member:
    """One server as the run sees it."""

    client: ServerClient
    version: int = NO_WEIGHTS
    alive: bool = True
    asleep: bool = False
    """Whether weights or cache may have given their memory back: it draws nothing until both are known to be awake."""
    failures: int = 0
    misses: int = 0
    times_aside: int = 0
    back_at: float = 0.0
    requests: int = 0
    tokens: int = 0
    """Expected length, prompts included, of what it is drawing."""
    cache_tokens: int | None = None
    """What its cache holds, where it says."""
    computed: float | None = None
    """Its count of tokens at the last look; None where it does not say."""
    progress_at: float = 0.0
    """When it was last seen to make progress, by time.monotonic."""
    attempts: set[asyncio.Task[Completion]] = field(default_factory=set)
