"""The servers of a run: which of them answer, which hold the present weights, and which one gets the next request.

Everything here happens on one event loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_klear.rollout.vllm.client import ServerClient, ServerError, WrongWeights
from megatron_klear.rollout.vllm.member import NO_WEIGHTS, Limits, ManagedServers, Member

_LOG = logging.getLogger(__name__)


class Withdrawn(ServerError):
    """The request was taken back: its server is gone, or what it holds cannot be trusted."""


class NoServer(Exception):
    """No server took the request in time; the message says why."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Waiter:
    place: asyncio.Future[Member]
    tokens: int
    since: float
    deadline: float | None
    avoid: Member | None


class Fleet:
    """Hands out places on servers, the one with the fewest tokens to draw first, and watches over all of them."""

    def __init__(self, clients: Iterable[ServerClient], limits: Limits, *, router: ServerClient | None = None) -> None:
        """With a `router` all requests go to it, and `clients` are those who hold the weights."""
        self.limits = limits
        self.version = NO_WEIGHTS
        self.updating = False
        self.members = [Member(client=client) for client in clients]
        self.router = None if router is None else Member(client=router)
        self.restarted: set[str] = set()
        """Addresses of servers that were started anew; to be emptied by whoever reads it."""
        self.answered: set[str] = set()
        """Addresses that gave a good answer since `hear_of`."""
        self.hung: set[str] = set()
        """Addresses that stopped to give signs of life since `hear_of`."""
        self._waiting: deque[_Waiter] = deque()
        self._last_usable = self._last_alive = self._resumed_at = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._helpers: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to watch; to be called on the loop."""
        watched = [*self.members, *([] if self.router is None else [self.router])]
        self._tasks = [asyncio.ensure_future(self._watch(member)) for member in watched]
        self._tasks.append(asyncio.ensure_future(self._expire_for_ever()))

    def stop(self) -> None:
        """End the watch, and every request under way."""
        for task in [*self._tasks, *self._helpers]:
            task.cancel()
        for member in [*self.members, *self._targets()]:
            _cancel(member)

    @property
    def needs_weights(self) -> bool:
        """Whether a server that answers is without the present weights, which there are."""
        return self.version >= 0 and not self.updating and any(m.alive and not self._current(m) for m in self.members)

    @property
    def can_draw(self) -> bool:
        """Whether a request would find a server, busy or not."""
        return bool(self._usable())

    @property
    def seconds_without_servers(self) -> float:
        """Time since a server was last seen alive; 0 while one is."""
        return 0.0 if self._any_alive() else time.monotonic() - self._last_alive

    async def place(self, tokens: int, *, deadline: float | None, avoid: Member | None, first: bool) -> Member:
        """Wait for room on a server with the present weights, which is then taken until `free`.

        `first` goes before those who wait already. Raises NoServer past the `deadline` (of time.monotonic), and where
        there was no usable server for `deadline_seconds`.
        """
        waiter = _Waiter(
            place=asyncio.get_running_loop().create_future(),
            tokens=tokens,
            since=time.monotonic(),
            deadline=deadline,
            avoid=avoid,
        )
        if first:
            self._waiting.appendleft(waiter)
        else:
            self._waiting.append(waiter)
        self._hand_out()
        try:
            member = await waiter.place
        except asyncio.CancelledError:
            if waiter.place.done() and not waiter.place.cancelled() and waiter.place.exception() is None:
                self.free(waiter.place.result(), tokens)
            raise
        if member in self._usable():
            return member
        # Between the place and this task's turn an update began, or the server was lost.
        self.free(member, tokens)
        return await self.place(tokens, deadline=deadline, avoid=avoid, first=True)

    def free(self, member: Member, tokens: int) -> None:
        """Give a place back."""
        member.requests -= 1
        member.tokens -= tokens
        self._hand_out()

    def succeeded(self, member: Member) -> None:
        """The member answered as it should."""
        member.failures = member.times_aside = 0
        member.progress_at = time.monotonic()
        self.answered.add(member.client.url)

    def stalled(self, member: Member, since: float) -> bool:
        """Whether the member has drawn nothing for `request_seconds`, of requests that it has had since `since`."""
        return not self.updating and time.monotonic() - self.progress_of(member, since) > self.limits.request_seconds

    def progress_of(self, member: Member, since: float) -> float:
        """When the member last made progress, or `since`. Behind a router it may have been any of them."""
        behind = self.members if member is self.router else ()
        return max(since, self._resumed_at, member.progress_at, *(other.progress_at for other in behind))

    @property
    def last_progress(self) -> float:
        """When any of them was last seen to make progress, by time.monotonic."""
        return max((member.progress_at for member in [*self.members, *self._targets()]), default=0.0)

    async def look_at_load(self, member: Member) -> None:
        """Ask a server what it has computed and can hold."""
        load = await member.client.load(self.limits.health_seconds)
        if load is None:
            return
        if load.tokens != member.computed:
            member.computed, member.progress_at = load.tokens, time.monotonic()
        member.cache_tokens = load.cache_tokens

    def failed(self, member: Member, error: ServerError) -> None:
        """The member did not answer as it should; several times in a row put it aside for a while."""
        member.failures += 1
        if error.status is not None:  # a sign of life, if nothing else
            self._last_alive = time.monotonic()
        if isinstance(error, WrongWeights):
            # With a router it may be any of them.
            suspects = self.members if member is self.router else [member]
            self._help(self._examine(suspects))
            if member is not self.router:
                self.lose(member)
        if member.alive and member.failures >= self.limits.strikes:
            self.put_aside(member, str(error))
        self._hand_out()

    def lose(self, member: Member) -> None:
        """The member's weights are not to be trusted: nothing that it is drawing counts, until the next update."""
        member.version = NO_WEIGHTS
        _cancel(member)
        if self.router is not None:  # who of them the router asked is not known
            _cancel(self.router)

    def came_back(self, url: str) -> None:
        """The server at `url` was started anew."""
        for member in self.members:
            if member.client.url == url.rstrip("/"):
                self.lose(member)
                self.restarted.add(member.client.url)
                self._return(member)

    def hear_of(self, servers: ManagedServers) -> None:
        """Learn which servers came back, and say which answered and which hang."""
        for url in servers.poll():
            self.came_back(url)
        while self.answered:
            servers.answered(self.answered.pop())
        while self.hung:
            servers.restart(self.hung.pop())

    def holders(self) -> list[Member]:
        """Members that answer and hold the present weights."""
        return [member for member in self.members if member.alive and self._current(member)]

    def begin_update(self, version: int) -> list[Member]:
        """No more requests until `end_update`; returns the servers that answer."""
        self.updating, self.version = True, version
        return [member for member in self.members if member.alive]

    def end_update(self, holders: Sequence[Member]) -> None:
        """`holders` hold the new weights, and nobody else does."""
        for member in self.members:
            if member in holders:
                member.version = self.version
            else:
                self.lose(member)
        self.updating = False
        self._resumed_at = time.monotonic()
        self._hand_out()

    def forget_weights(self) -> None:
        """No server holds weights until the next update (they sleep)."""
        self.version = NO_WEIGHTS

    def _current(self, member: Member) -> bool:
        return self.version >= 0 and member.version == self.version and not member.asleep

    def _any_alive(self) -> bool:
        return any(member.alive for member in self.members) and (self.router is None or self.router.alive)

    def _targets(self) -> Sequence[Member]:
        return self.members if self.router is None else [self.router]

    def _usable(self) -> list[Member]:
        """Where a request may go now, full or not."""
        if self.updating:
            return []
        if self.router is None:
            return self.holders()
        ready = [self._current(member) for member in self.members if member.alive]
        return [self.router] if self.router.alive and ready and all(ready) else []

    def _hand_out(self) -> None:
        limit = self.limits.requests_per_server * (1 if self.router is None else len(self.members))
        usable = self._usable()
        while self._waiting:
            waiter = self._waiting[0]
            free = [member for member in usable if member.requests < limit and self._holds(member, waiter.tokens)]
            if not waiter.place.done() and not free:
                return
            self._waiting.popleft()
            if waiter.place.done():  # its task was cancelled
                continue
            others = [member for member in free if member is not waiter.avoid]
            member = min(others or free, key=lambda member: member.tokens)
            member.requests += 1
            member.tokens += waiter.tokens
            waiter.place.set_result(member)

    def _holds(self, member: Member, tokens: int) -> bool:
        """Whether the member's cache has room for so many more tokens; what has none would only wait there."""
        behind = self.members if member is self.router else [member]
        sizes = [one.cache_tokens for one in behind]
        if not member.requests or None in sizes:
            return True
        return member.tokens + tokens <= sum(size for size in sizes if size is not None)

    async def _expire_for_ever(self) -> None:
        while True:
            now = time.monotonic()
            if self._usable() or self.updating:
                self._last_usable = now
            if self._any_alive():
                self._last_alive = now
            for waiter in list(self._waiting):
                stalled = now - max(self._last_usable, waiter.since) > self.limits.deadline_seconds
                late = waiter.deadline is not None and now > waiter.deadline
                if (stalled or late) and not waiter.place.done():
                    waiter.place.set_exception(NoServer(self.states()))
            self._hand_out()
            await asyncio.sleep(self.limits.tick_seconds)

    def states(self) -> str:
        """What every server is up to, in words."""
        states = []
        for member in self.members:
            state = "away" if not member.alive else "busy" if self._current(member) else "without the present weights"
            states.append(f"{member.client.url} is {state}" + (", asleep at least in part" if member.asleep else ""))
        return "; ".join(states)

    async def _watch(self, member: Member) -> None:
        while True:
            await asyncio.sleep(self.limits.tick_seconds)
            if not member.alive and time.monotonic() < member.back_at:
                continue
            if not await member.client.healthy(self.limits.health_seconds):
                member.misses += 1
                if member.alive and member.misses >= self.limits.strikes:
                    self.put_aside(member, "it gives no sign of health")
                    self.hung.add(member.client.url)
                    _cancel(member)  # do not wait for what it was drawing
                continue
            member.misses = 0
            if not member.alive:
                await self._welcome(member)
            elif self._owes_progress(member):
                await self.look_at_load(member)

    def _owes_progress(self, member: Member) -> bool:
        # Only where no answer has shown it for a while: servers take their time to write their metrics.
        busy = member.requests or (self.router is not None and self.router.requests)
        return bool(busy) and time.monotonic() - member.progress_at > self.limits.request_seconds / 4

    async def _welcome(self, member: Member) -> None:
        """Take a server back that answers again; one that was started anew has lost its weights."""
        if member is not self.router:
            await self._examine([member])
        try:
            if member is not self.router and not self.updating:
                await member.client.resume(self.limits.health_seconds)  # it may have gone in the middle of a pause
        except ServerError:
            return
        self._return(member)

    async def _examine(self, members: Sequence[Member]) -> None:
        """Ask servers what they hold: one started anew has lost its weights, and its label says so."""
        for member in members:
            version = member.version
            label = await member.client.weight_version(self.limits.health_seconds)
            if member.version != version:
                continue  # an update ended meanwhile, which the label may be of
            if version == NO_WEIGHTS or label != str(version):
                self.lose(member)
            if label is None or not label.isdigit():
                self.restarted.add(member.client.url)

    def put_aside(self, member: Member, reason: str) -> None:
        """Give the member no requests for a while, and until it gives a sign of health."""
        _LOG.warning("rollout server %s is put aside: %s", member.client.url, reason)
        member.alive = False
        member.times_aside += 1
        wait = self.limits.backoff_seconds * 2 ** min(member.times_aside, 20)
        member.back_at = time.monotonic() + min(wait, self.limits.max_backoff_seconds)

    def _return(self, member: Member) -> None:
        if not member.alive:
            _LOG.warning("rollout server %s answers again", member.client.url)
        member.alive = True
        member.misses = 0
        self._last_alive = time.monotonic()
        # One more failure puts it aside again, for twice as long.
        member.failures = self.limits.strikes - 1
        self._hand_out()

    def _help(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)


def _cancel(member: Member) -> None:
    for attempt in list(member.attempts):
        attempt.cancel()
