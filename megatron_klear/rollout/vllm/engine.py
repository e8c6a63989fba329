"""Rollouts from vLLM servers, over HTTP: no vLLM, and no torch, in this process."""

from __future__ import annotations

import atexit
import contextlib
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_klear.errors import UserError
from megatron_klear.rollout.engine import Checksums, FinishedGroup, GroupRequest, text_of, told_apart
from megatron_klear.rollout.vllm.client import Portal, ServerClient, open_session
from megatron_klear.rollout.vllm.dispatch import Dispatcher, Drawn, Whole
from megatron_klear.rollout.vllm.fleet import Fleet
from megatron_klear.rollout.vllm.fleet_control import CONTROL_SECONDS, LOOK_SECONDS, FleetControl
from megatron_klear.rollout.vllm.member import Limits, ManagedServers, Member
from megatron_klear.rollout.vllm.routes import RouteForm
from megatron_klear.rollout.weights.update import TransferFailed
from megatron_klear.types import Group, Prompt, Sample

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from megatron_klear.config.rl import SamplingConfig
    from megatron_klear.config.rollout import VLLMRolloutConfig

_FRUITLESS_UPDATES = 5


class WeightsNeeded(UserError):
    """Servers answer, and none of them holds the present weights: they have to be sent again."""


class Courier(Protocol):
    """Brings the trainer's weights to servers; it attaches to those that are new."""

    @property
    def needs_shared_device(self) -> bool:
        """Whether servers run on the trainer's own cards, in turns with it."""
        ...

    def detach(self, url: str) -> None:
        """Forget a server that went away."""
        ...

    def send(self, version: int, servers: Sequence[ServerClient], portal: Portal) -> Checksums:
        """Give the servers the trainer's weights; checksums of what they hold. Raises TransferFailed."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class VLLMEngine:
    """BackgroundRollouts on vLLM servers."""

    def __init__(
        self,
        config: VLLMRolloutConfig,
        addresses: Sequence[str],
        courier: Courier,
        *,
        decode: Callable[[Sequence[int]], str],
        stop_token_ids: Iterable[int],
        vocab_size: int,
        routes: RouteForm | None = None,
        model: str | None = None,
        api_key: str | None = None,
        servers: ManagedServers | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Connect to the servers at `addresses`, and watch over `servers` where the run started them itself.

        `decode` turns token ids into text, special tokens included; `stop_token_ids` end a response, besides those of
        the sampling; `routes` is given where those of tokens are asked for, `model` where servers have several;
        `api_key` is for requests. `servers` are taken over: `close` ends them.
        """
        self._config, self._courier, self._servers = config, courier, servers
        self._decode = decode
        self._follow: Callable[[Prompt, str], Any] | None = None
        self._stop = frozenset(stop_token_ids)
        self._finished: queue.SimpleQueue[Future[Drawn]] = queue.SimpleQueue()
        self._in_flight = self._fruitless = 0
        self._closed = False
        self._limits = limits or Limits(
            request_seconds=config.request_seconds,
            deadline_seconds=config.deadline_seconds,
            requests_per_server=config.server.max_sequences,
        )
        self._portal = Portal()
        self._fleet, self._dispatcher = self._portal.run(
            self._connect(
                addresses,
                lambda session, url: ServerClient(
                    url, session=session, api_key=api_key, vocab_size=vocab_size, routes=routes, model=model
                ),
            )
        )
        self._control = FleetControl(self._fleet, self._portal, servers)
        atexit.register(self.close)

    @property
    def in_flight(self) -> int:
        """Requests submitted and not taken yet."""
        return self._in_flight

    def notices(self) -> list[str]:
        """What happened to servers that the run started since the last call, in words."""
        return self._servers.notices() if self._servers is not None else []

    @property
    def last_progress(self) -> float:
        """When a server was last seen to draw, by time.monotonic."""
        return self._fleet.last_progress

    @property
    def needs_weights(self) -> bool:
        """Whether a server that answers is without the present weights."""
        return self._fleet.needs_weights

    def load_weights(self, version: int) -> Checksums:
        """Send the weights to every server that answers; see RolloutEngine.

        A server that fails gets no requests until a later call, and `needs_weights` tells when it answers again. Where
        none took them that is all of them, and the checksums are empty. Raises UserError where no server answers within
        `deadline_seconds`, or none takes the weights time and again.
        """
        return self._send(version, self._prepare(version))

    def probe(self, tokens: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.float32]]:
        """Log-probs of the tokens from every server that holds the present weights."""
        found: dict[str, npt.NDArray[np.float32]] = {}

        async def ask(client: ServerClient) -> None:
            found[client.url] = await client.prompt_logprobs(tokens, CONTROL_SECONDS)

        self._control.each(self._fleet.holders(), ask)
        return found

    def follow(self, begin: Callable[[Prompt, str], Any]) -> None:
        """Have something begun on every response as soon as it is whole; see BackgroundRollouts."""
        self._follow = begin

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Queue requests."""
        for request in requests:
            self._portal.start(self._dispatcher.draw(request)).add_done_callback(self._finished.put)
            self._in_flight += 1

    def take(self, timeout_seconds: float) -> list[FinishedGroup]:
        """Requests that ended; see BackgroundRollouts. Raises UserError where no server has answered for
        `deadline_seconds`, or the run's own servers do not come up any more.
        """
        until = time.monotonic() + timeout_seconds
        found: list[FinishedGroup] = []
        while not found:
            self._control.look_after()
            seconds = min(LOOK_SECONDS, until - time.monotonic()) if self._in_flight else 0
            with contextlib.suppress(queue.Empty):
                found.append(self._as_finished(self._finished.get(timeout=max(0.0, seconds))))
            if time.monotonic() >= until or not self._in_flight:
                break
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._as_finished(self._finished.get_nowait()))
        self._in_flight -= len(found)
        return found

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[Group]:
        """Draw the responses; see RolloutEngine. Requests submitted otherwise stay as they are.

        Raises UserError where more than `max_dropped_share` of the groups were dropped, where no server is left, and
        WeightsNeeded where none holds the present weights; `orchestrator.sampler.Sampler` sends them again.
        """
        if self._fleet.version < 0:
            raise RuntimeError("the rollout engine has no weights yet: call load_weights first")
        requests = [GroupRequest(prompt=prompt, sampling=sampling, seed=seed) for prompt in told_apart(prompts)]
        drawing = [self._portal.start(self._dispatcher.draw(request)) for request in requests]
        try:
            while True:
                self._control.look_after()
                if not wait(drawing, timeout=LOOK_SECONDS).not_done:
                    return self._groups(drawing)
                if self._fleet.needs_weights and not self._fleet.can_draw:
                    raise WeightsNeeded("no rollout server holds the present weights: they have to be sent again")
        finally:
            for future in drawing:
                future.cancel()

    def counters(self) -> dict[str, float]:
        """Attempts that failed and groups that were dropped since the last call."""
        return self._control.on_loop(self._dispatcher.take_counters)

    @property
    def shares_cards(self) -> bool:
        """Whether servers run on the trainer's own cards."""
        return self._courier.needs_shared_device

    def sleep(self) -> None:
        """Have servers on the trainer's own cards give back weights and cache; others go on.

        Of the run's own servers, one that is starting is waited for, one that does not do it is ended, and one that
        dies in its sleep is down until the next weights. Raises UserError where servers die for good.
        """
        if self._courier.needs_shared_device:
            while not self._control.fall_asleep():
                pass

    def close(self) -> None:
        """End requests, connections, and the servers that the run started. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            with contextlib.suppress(TimeoutError):
                self._portal.run(self._disconnect(), 20)
            self._portal.close()
            self._courier.close()
        finally:
            if self._servers is not None:
                self._servers.close()

    async def _connect(
        self, addresses: Sequence[str], client: Callable[[ClientSession, str], ServerClient]
    ) -> tuple[Fleet, Dispatcher]:
        self._session = session = open_session(len(addresses) * self._limits.requests_per_server)
        clients = [client(session, url) for url in addresses]
        router = None if self._config.router is None else client(session, self._config.router)
        fleet = Fleet(clients, self._limits, router=router)
        fleet.start()
        return fleet, Dispatcher(fleet, stop_token_ids=self._stop, whole=self._whole, seeded=self._config.seed_requests)

    async def _disconnect(self) -> None:
        self._fleet.stop()
        await self._session.close()

    def _prepare(self, version: int) -> list[Member]:
        """Who takes part in a sync, as soon as somebody can."""
        until = time.monotonic() + self._limits.deadline_seconds
        while True:
            members = self._control.begin(version, self._courier)
            if members:
                return members
            if time.monotonic() > until:
                raise UserError(
                    f"no rollout server took part in sync {version} within rollout.deadline_seconds "
                    f"{self._limits.deadline_seconds:g}: {self._fleet.states()}"
                )
            time.sleep(LOOK_SECONDS)

    def _send(self, version: int, members: Sequence[Member]) -> Checksums:
        checksums: Checksums = {}
        failure: TransferFailed | None = None
        try:
            checksums = self._courier.send(version, [member.client for member in members], self._portal)
        except TransferFailed as error:
            checksums, failure = error.checksums, error
        finally:
            why = failure.failures if failure is not None else {}
            told = {holder.partition(" ")[0] for holder in checksums}
            holders = [member for member in members if member.client.url in told]
            self._control.put_aside(
                {
                    member: f"it did not get all weights: {why.get(member.client.url, 'the update broke off')}"
                    for member in members
                    if member not in holders
                }
            )
            ready = self._control.end(holders)
        self._fruitless = 0 if ready else self._fruitless + 1
        if self._fruitless >= _FRUITLESS_UPDATES:
            raise failure or UserError(
                f"no rollout server draws after sync {version}, tried {_FRUITLESS_UPDATES} times: "
                f"{self._fleet.states()}"
            )
        return checksums

    def _groups(self, drawing: Sequence[Future[Drawn]]) -> list[Group]:
        finished = [self._as_finished(future) for future in drawing]
        failures = [one.failure for one in finished if one.group is None]
        if len(failures) > self._config.max_dropped_share * len(finished):
            raise UserError(
                f"{len(failures)} of {len(finished)} groups were dropped, more than rollout.max_dropped_share "
                f"{self._config.max_dropped_share:g}; the first: {failures[0]}"
            )
        return [one.group for one in finished if one.group is not None]

    def _as_finished(self, future: Future[Drawn]) -> FinishedGroup:
        drawn = future.result()
        if drawn.responses is None:
            return FinishedGroup(request=drawn.request, group=None, failure=drawn.failure)
        group = Group(
            prompt=drawn.request.prompt,
            samples=[response.sample for response in drawn.responses],
            texts=[response.text for response in drawn.responses],
        )
        followed = tuple(response.followed for response in drawn.responses)
        return FinishedGroup(request=drawn.request, group=group, followed=followed if self._follow else ())

    def _whole(self, request: GroupRequest, sample: Sample) -> Whole:
        """A sample with its text, and what follows it; on the portal's thread."""
        stop = self._stop.union(request.sampling.stop_token_ids)
        text = text_of(request.prompt, sample, self._decode, stop)
        followed = self._follow(request.prompt, text) if self._follow is not None else None
        return Whole(sample=sample, text=text, followed=followed)
