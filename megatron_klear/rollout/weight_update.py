"""One update of the servers' weights through vLLM's phases: start, a request for every bucket, finish, checksums.

A server that fails in a phase drops out and the others go on, so that one lost server costs only itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from megatron_klear.errors import UserError
from megatron_klear.rollout.client import Portal, ServerClient, ServerError
from megatron_klear.rollout.engine import Checksums

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
        """Give up an update that a trainer before left unfinished, and begin."""
        self.each(
            "beginning",
            lambda server: server.rpc("klear_begin_update", [str(self.version)], timeout_seconds=self.timeout_seconds),
        )
        self.each("start_weight_update", lambda server: self._post(server, "/start_weight_update"))

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
        version = str(self.version)
        self.each(
            "finish_weight_update",
            lambda server: self._post(server, "/finish_weight_update", {"weight_version": version}),
        )
        checksums: Checksums = {}
        answers = self.each(
            "checksums",
            lambda server: server.rpc("klear_checksums", [version], timeout_seconds=self.timeout_seconds),
        )
        for url, workers in answers.items():
            for number, held in enumerate(workers):
                checksums[f"{url} worker {number}"] = held
            if not workers:
                self.drop(url, "no worker gave checksums")
        if self.failures:
            raise TransferFailed(self.version, self.failures, checksums)
        return checksums

    def each(self, phase: str, call: Call) -> dict[str, Any]:
        """What `call` returned for every server still in the update; those where it failed drop out."""
        answers = dict(zip(self.alive, self._gather(call), strict=True))
        for url, answer in list(answers.items()):
            if isinstance(answer, Exception):
                told = str(answer) if isinstance(answer, ServerError) else f"{url}: {answer!r}"
                self.drop(url, f"{phase}: {told}")
                del answers[url]
        return answers

    def drop(self, url: str, reason: str) -> None:
        """Leave a server out of the rest of the update."""
        del self.alive[url]
        self.failures[url] = reason

    def drop_all(self, reason: str) -> None:
        """Give the whole update up."""
        for url in list(self.alive):
            self.drop(url, reason)

    def _gather(self, call: Call) -> list[Any]:
        async def together() -> list[Any]:
            return await asyncio.gather(*map(call, self.alive.values()), return_exceptions=True)

        if not self.alive:
            return []
        try:
            return self._portal.run(together(), self.timeout_seconds + _PORTAL_SLACK_SECONDS)
        except TimeoutError as error:
            return [error] * len(self.alive)

    async def _post(self, server: ServerClient, path: str, body: dict[str, Any] | None = None) -> None:
        await server.post(path, body, timeout_seconds=self.timeout_seconds)
