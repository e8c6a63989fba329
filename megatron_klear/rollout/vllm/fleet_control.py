"""What the trainer has all servers do together, from another thread: sleep, wake, pause, take part in a weight sync.

A server that fails in any of it is put aside without weights, and the others go on.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_klear.errors import UserError
from megatron_klear.rollout.vllm.client import Portal, ServerClient, ServerError
from megatron_klear.rollout.vllm.fleet import Fleet
from megatron_klear.rollout.vllm.member import ManagedServers, Member

if TYPE_CHECKING:
    from megatron_klear.rollout.vllm.engine import Courier

Result = TypeVar("Result")

LOOK_SECONDS = 0.2
CONTROL_SECONDS = 120.0
SIGN_OF_LIFE_SECONDS = 20.0
_RESUME_SECONDS = 20.0


class FleetControl:
    """The fleet as the thread sees it that feeds run in."""

    def __init__(self, fleet: Fleet, portal: Portal, servers: ManagedServers | None) -> None:
        """`servers` where the run started them itself."""
        self._fleet, self._portal, self._servers = fleet, portal, servers
        self._held = False
        self._paused: list[Member] = []

    def on_loop(self, function: Callable[[], Result]) -> Result:
        """What `function` returns, called on the fleet's event loop."""

        async def call() -> Result:
            return function()

        return self._portal.run(call())

    def look_after(self) -> None:
        """Hear of servers that came back or hang. Raises UserError where none has answered for too long."""
        fleet = self._fleet
        if self._servers is not None:
            self.on_loop(functools.partial(fleet.hear_of, self._servers))
        if fleet.seconds_without_servers > fleet.limits.deadline_seconds:
            raise UserError(
                f"no rollout server has answered for rollout.deadline_seconds {fleet.limits.deadline_seconds:g}: "
                f"{fleet.states()}"
            )

    def begin(self, version: int, courier: Courier) -> list[Member]:
        """Those who take part in the sync of `version`: awake enough for weights, and paused; perhaps none."""
        self.look_after()
        self.release()
        members = self.on_loop(lambda: self._fleet.begin_update(version))
        self._paused = members
        try:
            while self._fleet.restarted:
                courier.detach(self._fleet.restarted.pop())
            members = self._wake(members, "weights")
            members = self.each(members, lambda client: client.pause("keep", CONTROL_SECONDS))
            self._portal.run(self._look_at_loads(members))
        except BaseException:
            self.end([])
            raise
        if not members:
            self.end([])
        return members

    def end(self, holders: Sequence[Member]) -> list[Member]:
        """Have the servers draw again; what others than `holders` were drawing is taken back before.

        Returns those of the holders that can draw: their cache woke, too.
        """
        ready = self._wake(holders, "kv_cache")
        going = {member.client for member in ready}
        self.on_loop(lambda: self._fleet.end_update(ready))
        # One that does not hear it is told again when it gives a sign of life.
        heard = self.each(
            self._paused,
            lambda client: client.resume(_RESUME_SECONDS if client in going else self._fleet.limits.health_seconds),
        )
        self._paused = []
        return [member for member in ready if member in heard]

    def fall_asleep(self) -> bool:
        """Whether all sleep that can; not yet while a server starts."""
        fleet, servers, until = self._fleet, self._servers, time.monotonic() + SIGN_OF_LIFE_SECONDS
        if all(member.asleep for member in fleet.members):
            return True
        self.on_loop(fleet.forget_weights)
        if servers is not None:
            servers.hold()
            self._held = True
            while servers.starting:
                self.look_after()
                if time.monotonic() > until:
                    return False
                time.sleep(LOOK_SECONDS)
        # Marked before they are asked: one whose answer is lost may sleep all the same, and waking twice does no harm.
        for member in fleet.members:
            member.asleep = True
        slept = self.each(fleet.members, lambda client: client.sleep(2, CONTROL_SECONDS))
        self._restart([member for member in fleet.members if member not in slept])
        return True

    def release(self) -> None:
        """Let servers start again that died while the others slept."""
        if self._held and self._servers is not None:
            self._servers.release()
        self._held = False

    def each(
        self, members: Sequence[Member], call: Callable[[ServerClient], Coroutine[Any, Any, None]]
    ) -> list[Member]:
        """Those of the members whose server did it; the others are put aside, without weights."""

        async def together() -> list[BaseException | None]:
            return await asyncio.gather(*(call(member.client) for member in members), return_exceptions=True)

        outcomes = self._portal.run(together())
        failed: dict[Member, str] = {}
        for member, outcome in zip(members, outcomes, strict=True):
            if isinstance(outcome, ServerError):
                failed[member] = str(outcome)
            elif outcome is not None:
                raise outcome
        self.put_aside(failed)
        return [member for member in members if member not in failed]

    def put_aside(self, members: Mapping[Member, str]) -> None:
        """Leave members out, for the reasons given, until they answer and get weights again."""

        def put() -> None:
            for member, reason in members.items():
                self._fleet.lose(member)
                self._fleet.put_aside(member, reason)

        self.on_loop(put)

    async def _look_at_loads(self, members: Sequence[Member]) -> None:
        await asyncio.gather(*map(self._fleet.look_at_load, members))

    def _wake(self, members: Sequence[Member], part: str) -> list[Member]:
        """Those of the members that are awake to that part.

        One that fails, for want of memory, may be half awake, and vLLM does not put such a server to sleep again: the
        run's own are started anew.
        """
        sleeping = [member for member in members if member.asleep]
        woken = self.each(sleeping, lambda client: client.wake_up([part], CONTROL_SECONDS))
        failed = [member for member in sleeping if member not in woken]
        self._restart(failed)
        if part == "kv_cache":  # the last part
            for member in woken:
                member.asleep = False
        return [member for member in members if member not in failed]

    def _restart(self, members: Sequence[Member]) -> None:
        if self._servers is not None:
            for member in members:
                self._servers.restart(member.client.url)
