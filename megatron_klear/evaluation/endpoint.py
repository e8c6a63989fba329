"""Responses from servers of OpenAI's chat API: vLLM, SGLang, or a paid one."""

from __future__ import annotations

import asyncio
import json
import os
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_klear.config.evaluation import EndpointConfig
from megatron_klear.errors import UserError

from .benchmarks import Problem
from .protocols import Protocol
from .sampling import Drawn, Wanted
from .store import Response

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_RETRIED = frozenset({408, 409, 425, 429})
_SHOWN = 300


class EndpointError(UserError):
    """A server that refuses requests, answers nonsense, or cannot be reached after all attempts."""


@dataclass(frozen=True, slots=True)
class _Request:
    url: str
    problem: Problem
    number: int


class EndpointSource:
    """Draws each response by a request of its own, several under way at a time."""

    def __init__(self, config: EndpointConfig, thinking: bool | None) -> None:
        self._config, self._thinking = config, thinking
        self._key = os.environ.get(config.api_key_variable, "")

    def draw(self, wanted: Sequence[Wanted], protocol: Protocol, seed: int, drawn: Drawn) -> None:
        """Draw everything; what has come is kept when a request fails for good, which raises EndpointError."""
        urls = [url.rstrip("/") for url in self._config.urls]
        pairs = [(one.problem, number) for one in wanted for number in one.numbers]
        requests = [_Request(urls[i % len(urls)], *pair) for i, pair in enumerate(pairs)]
        try:
            asyncio.run(self._draw(requests, protocol, seed, drawn))
        except* EndpointError as errors:
            raise errors.exceptions[0] from None

    def opening(self, problem: Problem) -> str:
        """Nothing: the server renders the prompt."""
        return ""

    def extension(self) -> str:
        """Not known: the server does not tell."""
        return ""

    def identity(self) -> dict[str, str]:
        """The model's name; its addresses may change."""
        return {"model": self._config.model}

    async def _draw(self, requests: Sequence[_Request], protocol: Protocol, seed: int, drawn: Drawn) -> None:
        waiting = iter(requests)
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_seconds)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        connector = aiohttp.TCPConnector(limit=self._config.concurrency)
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):

            async def work() -> None:
                for request in waiting:
                    drawn([await self._ask(session, request, protocol, seed)])

            for _ in range(min(self._config.concurrency, len(requests))):
                group.create_task(work())

    async def _ask(self, session: aiohttp.ClientSession, request: _Request, protocol: Protocol, seed: int) -> Response:
        body = self._body(request, protocol, seed)
        pause = _FIRST_PAUSE_SECONDS
        for attempt in range(1, self._config.attempts + 1):
            try:
                async with session.post(f"{request.url}/chat/completions", json=body) as answer:
                    content = await answer.read()
                    if answer.status == 200:
                        return _response(content, request)
                    words = f"status {answer.status}: {content[:_SHOWN].decode(errors='replace')}"
                    if answer.status not in _RETRIED and answer.status < 500:
                        raise EndpointError(f"{request.url} refuses {request.problem.place}: {words}")
                    pause = _asked_pause(answer.headers.get("Retry-After", ""), pause)
            except (aiohttp.ClientError, TimeoutError) as error:
                words = f"{type(error).__name__} {error}".strip()
            if attempt < self._config.attempts:
                await asyncio.sleep(pause * random.uniform(0.75, 1.25))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise EndpointError(
            f"{request.url} did not answer {request.problem.place} in {self._config.attempts} attempts, at last "
            f"{words}; what has come is kept: start the same command again to go on"
        )

    def _body(self, request: _Request, protocol: Protocol, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [dict(message) for message in request.problem.messages],
            "temperature": protocol.temperature,
            "top_p": protocol.top_p,
            "max_tokens": protocol.max_tokens,
            "seed": _seed(seed, request),
        }
        if self._config.extensions:
            body |= {"top_k": protocol.top_k} if protocol.top_k else {}
            body |= {"repetition_penalty": protocol.repetition_penalty} if protocol.repetition_penalty != 1 else {}
            body |= {"chat_template_kwargs": {"enable_thinking": self._thinking}} if self._thinking is not None else {}
        elif protocol.top_k or protocol.repetition_penalty != 1 or self._thinking is not None:
            raise EndpointError(
                "the protocol or `thinking` needs what OpenAI's own API does not have (top_k, repetition_penalty, "
                "enable_thinking), and endpoint.extensions is false"
            )
        return body


def _seed(seed: int, request: _Request) -> int:
    """A seed of 31 bits for each response, the same whenever it is drawn."""
    return zlib.crc32(f"{seed}/{request.problem.id}/{request.number}".encode()) & 0x7FFFFFFF


def _asked_pause(header: str, pause: float) -> float:
    try:
        return min(max(pause, float(header)), _LONGEST_PAUSE_SECONDS)
    except ValueError:
        return pause


def _response(content: bytes, request: _Request) -> Response:
    """A response out of an answer; thinking that the server took apart is put in front again."""
    try:
        told = json.loads(content)
        choice = told["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        text = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        tokens = int(told["usage"]["completion_tokens"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise EndpointError(
            f"{request.url} answered {request.problem.place} with what is no chat completion ({error!r}): "
            f"{content[:_SHOWN].decode(errors='replace')}"
        ) from None
    if reason not in ("stop", "length"):
        raise EndpointError(f"{request.url} ended its answer to {request.problem.place} for the reason {reason!r}")
    if thought:
        closed = "\n</think>\n\n" if text or reason == "stop" else ""
        text = f"<think>\n{thought}{closed}{text}"
    return Response(problem=request.problem.id, number=request.number, text=text, finish=reason, num_tokens=tokens)
