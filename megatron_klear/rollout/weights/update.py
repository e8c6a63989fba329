"""One update of the servers' weights through vLLM's phases: start, a request for every bucket, finish, checksums.

A server that fails in a phase drops out and the others go on, so that one lost server costs only itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from megatron_klear.errors import UserError
from megatron_klear.rollout.engine import Checksums
from megatron_klear.rollout.vllm.client import Portal, ServerClient, ServerError

_PORTAL_SLACK_SECONDS = 30.0
Call = Callable[[ServerClient], Coroutine[Any, Any, Any]]


class TransferFailed(UserError):
    """Weights that did not reach every server.

    A server named in `failures` may hold a mixture of two versions and must draw nothing before its next update;
    `checksums` are of the servers that got everything.
    """

    def __init__(self, version: int, failures: dict[str, str], checksums: Checksums) -> None:
        """`failures` says by address in which phase what went wrong."""
        self.version, self.failures, self.checksums = version, failures, checksums
        told = "; ".join(failures.values())
        super().__init__(
            f"the weights of version {version} did not reach {', '.join(failures)}: {told}. What such a server holds "
            "now is undefined; nothing is drawn from it before it has received all weights anew"
        )


class WeightUpdate:
    """The update of `servers` to `version`; to be used from one thread, in the order of its methods."""

    def __init__(
        self, servers: Sequence[ServerClient], portal: Portal, version: int, *, timeout_seconds: float
    ) -> None:
        """`timeout_seconds` bounds every request."""
        self.version, self.timeout_seconds = version, timeout_seconds
        self.alive = {server.url: server for server in servers}
        self.failures: dict[str, str] = {}
        self._portal = portal

    def start(self) -> None:
        """Begin; an update that a trainer before left unfinished is given up."""
        self.announce()
        self.each("start_weight_update", lambda server: self._post(server, "/start_weight_update"))

    def announce(self) -> None:
        """Tell the workers which version comes."""
        self.each("beginning", lambda server: self._rpc(server, "klear_begin_update", str(self.version)))

    def send(self, info: dict[str, Any]) -> None:
        """Have the servers load one bucket; returns when all have."""
        self.each("update_weights", lambda server: self.load(server, info))

    async def load(self, server: ServerClient, info: dict[str, Any]) -> None:
        """Have one server load one bucket."""
        await self._post(server, "/update_weights", {"update_info": info})

    def finish(self) -> Checksums:
        """Put the weights to use; checksums of what every worker received.

        Raises TransferFailed where a server dropped out in this or an earlier phase.
        """
        named = {"weight_version": str(self.version)}
        self.each("finish_weight_update", lambda server: self._post(server, "/finish_weight_update", named))
        return self.prove()

    def prove(self) -> Checksums:
        """Drop what was computed with the old weights; checksums of what workers received. Raises TransferFailed."""
        version = str(self.version)
        self.each("reset_prefix_cache", self._reset_cache)
        answers = self.each("checksums", lambda server: self._rpc(server, "klear_checksums", version))
        checksums: Checksums = {}
        for url, workers in answers.items():
            if workers and all(isinstance(held, dict) for held in workers):
                checksums |= {f"{url} worker {number}": held for number, held in enumerate(workers)}
            else:
                self.drop(url, f"checksums: {url} gave none, but {workers!r:.100}")
        if self.failures:
            raise TransferFailed(self.version, self.failures, checksums)
        return checksums

    def each(self, phase: str, call: Call) -> dict[str, Any]:
        """What `call` returned for every server still in the update; those where it failed drop out."""

        async def together() -> list[Any]:
            return await asyncio.gather(*map(call, self.alive.values()), return_exceptions=True)

        if not self.alive:
            return {}
        try:
            outcomes = self._portal.run(together(), self.timeout_seconds + _PORTAL_SLACK_SECONDS)
        except TimeoutError as error:
            outcomes = [error] * len(self.alive)
        return self.settle(phase, dict(zip(self.alive, outcomes, strict=True)))

    def settle(self, phase: str, outcomes: dict[str, Any]) -> dict[str, Any]:
        """The outcomes that are no exceptions; servers whose outcome is one drop out."""
        for url, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                told = str(outcome) if isinstance(outcome, ServerError) else f"{url}: {outcome!r}"
                self.drop(url, f"{phase}: {told}")
        return {url: outcome for url, outcome in outcomes.items() if url in self.alive}

    def drop(self, url: str, reason: str) -> None:
        """Leave a server out of the rest of the update."""
        self.alive.pop(url, None)
        self.failures.setdefault(url, reason)

    def drop_all(self, reason: str) -> None:
        """Give the whole update up."""
        for url in list(self.alive):
            self.drop(url, reason)

    async def _post(self, server: ServerClient, path: str, body: dict[str, Any] | None = None) -> None:
        await server.post(path, body, timeout_seconds=self.timeout_seconds)

    async def _reset_cache(self, server: ServerClient) -> None:
        """Drop what was computed with the old weights; a pause does it as well, but says nothing about it."""
        path, options = "/reset_prefix_cache", {"reset_running_requests": "true"}
        answer = await server.post(path, params=options, timeout_seconds=self.timeout_seconds)
        if answer != {"success": True}:
            raise ServerError(server.url, path, 200, f"the cache of the old weights is still there: {answer!r:.100}")

    async def _rpc(self, server: ServerClient, method: str, argument: str) -> list[Any]:
        return await server.rpc(method, [argument], timeout_seconds=self.timeout_seconds)
