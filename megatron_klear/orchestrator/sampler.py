"""The rollout engine as feeds see it: weights go there, groups come back, and a server that dies is let in again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from megatron_klear.config.rl import SamplingConfig
from megatron_klear.errors import UserError
from megatron_klear.rollout.engine import BackgroundRollouts, FinishedGroup, GroupRequest, RolloutEngine, told_apart
from megatron_klear.types import Group, Prompt

POLL_SECONDS = 1.0
_SHOWN = 3

Result = TypeVar("Result")


class Sampler:
    """A rollout engine together with the way that weights get there."""

    def __init__(
        self,
        rollouts: RolloutEngine,
        send: Callable[[int], None],
        *,
        patience_seconds: float = float("inf"),
        max_dropped_share: float = 0.0,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`send` brings the trainer's present weights to the engine under a version; `tell` takes news for people.

        A run stops when nothing that was asked for ended or grew for `patience_seconds`, or when more than
        `max_dropped_share` of what was asked for together was dropped.
        """
        self._rollouts, self._send = rollouts, send
        self._patience, self._max_dropped_share = patience_seconds, max_dropped_share
        self._tell = tell
        self._others: list[FinishedGroup] = []  # ended while something else was waited for
        self._dropped = 0
        self._last_news = time.monotonic()
        self.version = -1
        """Of the weights that the engine was given last."""

    @property
    def background(self) -> BackgroundRollouts | None:
        """The engine where it draws in the background, None where it does not."""
        return cast(BackgroundRollouts, self._rollouts) if hasattr(self._rollouts, "submit") else None

    def sync(self, version: int) -> None:
        """Give the engine the trainer's weights; `version` is the number of rollout steps trained."""
        self._send(version)
        if version != self.version:  # servers given the same weights again have done nothing yet that is news
            self._last_news = time.monotonic()
        self.version = version

    def draw(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seed: int,
        *,
        ended: Callable[[Group, Sequence[Any]], None] = lambda *_: None,
    ) -> list[Group]:
        """Groups of the prompts, in order; those that could not be had within the deadline are left out.

        `ended` is told of each group as soon as it is there, and of what followed its responses.
        Raises UserError where too many could not be had.
        """
        if self.background is None:
            groups = self._rollouts.generate(prompts, sampling, seed)
            for group in groups:
                ended(group, ())
            return groups
        requests = [GroupRequest(prompt=prompt, sampling=sampling, seed=seed) for prompt in told_apart(prompts)]
        by_key: dict[tuple[str, int], FinishedGroup] = {}
        self.submit(requests)

        def advance() -> list[FinishedGroup] | None:
            wanted = {key_of(request) for request in requests}
            for finished in self._ended(POLL_SECONDS):
                if key_of(finished.request) in wanted:
                    by_key[key_of(finished.request)] = finished
                    if finished.group is not None:
                        ended(finished.group, finished.followed)
                else:
                    self._others.append(finished)
            if len(by_key) == len(requests):
                return [by_key[key_of(request)] for request in requests]
            self.check_lost()
            return None

        finished = self.until(advance)
        self.check_dropped([one.failure for one in finished if one.group is None], len(finished))
        return [one.group for one in finished if one.group is not None]

    def until(self, advance: Callable[[], Result | None]) -> Result:
        """Call `advance`, which may wait about a second at a time, until it returns something.

        Meanwhile servers that come back are given the weights of the present version.
        """
        while (result := advance()) is None:
            if self.background is not None and self.background.needs_weights:
                self.sync(self.version)
        return result

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Queue requests of background drawing."""
        assert self.background is not None
        if not self.background.in_flight:
            self._last_news = time.monotonic()
        self.background.submit(requests)

    def take(self, timeout_seconds: float) -> list[FinishedGroup]:
        """Requests that ended since the last call, waiting at most so long for the first of them."""
        finished, self._others = self._others, []
        return finished + self._ended(0.0 if finished else timeout_seconds)

    @property
    def in_flight(self) -> int:
        """Requests submitted and not taken yet."""
        return len(self._others) + (self.background.in_flight if self.background is not None else 0)

    def counters(self) -> dict[str, float]:
        """What happened since the last call, to be logged."""
        counters = dict(self._rollouts.counters())
        if self.background is not None:
            counters["groups_dropped"] = float(self._dropped)
        self._dropped = 0
        return counters

    def sleep(self) -> None:
        """Give back memory that only sampling needs."""
        self._rollouts.sleep()

    def check_dropped(self, failures: Sequence[str], total: int) -> None:
        """Raise UserError where more than the allowed share of `total` groups failed, or all; one of several may."""
        allowed = max(self._max_dropped_share * total, 1.0) if self._max_dropped_share else 0.0
        if not failures or (len(failures) <= allowed and len(failures) < total):
            return
        reasons = "; ".join(f"{reason} ({count})" for reason, count in Counter(failures).most_common(_SHOWN))
        raise UserError(
            f"{len(failures)} of {total} groups could not be drawn and were dropped, above rollout.max_dropped_share "
            f"{self._max_dropped_share:g}: {reasons}. Look at the servers' logs, raise rollout.deadline_seconds, or "
            "allow more"
        )

    def check_lost(self) -> None:
        """Raise UserError where the engine has nothing under way, for a caller that waits for something."""
        if not self.in_flight:
            raise UserError("the rollout engine ended fewer requests than it was given: some would never come")

    def _ended(self, timeout_seconds: float) -> list[FinishedGroup]:
        assert self.background is not None
        for notice in self.background.notices():
            self._tell(f"rollout {notice}")
        waiting = self.background.in_flight
        finished = self.background.take(timeout_seconds)
        now = time.monotonic()
        if finished or not waiting:
            self._last_news = now
        elif (quiet := now - max(self._last_news, self.background.last_progress)) > self._patience:
            raise UserError(
                f"no rollout ended or grew in {quiet:.0f} s, with {waiting} groups under way: the servers hang; their "
                "logs say more"
            )
        self._dropped += sum(one.group is None for one in finished)
        return finished


def key_of(request: GroupRequest) -> tuple[str, int]:
    """What tells requests under way from each other."""
    return request.prompt.id, request.seed
