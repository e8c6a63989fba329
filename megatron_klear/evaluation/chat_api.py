"""Requests to servers of OpenAI's chat API: several under way at a time, each tried again where that helps."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar
from typing import Protocol as Interface

import aiohttp

from megatron_klear.config.evaluation import EndpointConfig
from megatron_klear.errors import UserError

from .protocols import Protocol

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_RETRIED = frozenset({408, 409, 425, 429})
_MAYBE_SERVED = frozenset({502, 504, 524})
"""A gateway's words: the server behind it may have answered, and counted it."""
_SHOWN = 300
_MINUTE_SECONDS = 60.0
C = TypeVar("C")


class EndpointError(UserError):
    """A server that refuses requests, answers nonsense, or cannot be reached after all attempts."""


class RefusedError(EndpointError):
    """A server refuses a request, and would again."""

    def __init__(self, server: str, place: str, status: int, said: str) -> None:
        """`said` is the server's own words, without its address."""
        super().__init__(f"{server} refuses {place}: {said}")
        self.status, self.said = status, said


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer; thinking that the server took apart is in front of `text` again.

    `finish` is the server's reason, `stop`, `length` or another.
    """

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


class Meter(Interface):
    """Is told of every attempt of a request, which may cost something whether or not an answer comes."""

    async def begin(self) -> None:
        """Before an attempt, which begins when this returns; what it raises ends the request."""
        ...

    def unused(self) -> None:
        """After an attempt that brought no answer because the server made none.

        After one that brought none though the server may have made it, nothing is told.
        """
        ...


class Pacer:
    """Spreads requests evenly, so that no more than so many begin in a minute."""

    def __init__(self, per_minute: int | None) -> None:
        self._gap_seconds = _MINUTE_SECONDS / per_minute if per_minute else 0.0
        self._next = 0.0

    def delay_seconds(self, now: float) -> float:
        """How long the request that asks at the time `now` has to wait."""
        start = max(now, self._next)
        self._next = start + self._gap_seconds
        return start - now


class ChatClient:
    """Asks the servers of an endpoint; an asynchronous context manager."""

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self._urls = [url.rstrip("/") for url in config.urls]
        self._pacer = Pacer(config.max_requests_per_minute)
        self._turn = 0
        self.stopping = False
        """Set where another request has failed for good: no further attempt is begun, those under way end."""

    async def __aenter__(self) -> Self:
        """Open the connections."""
        key = os.environ.get(self._config.api_key_variable, "")
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_seconds),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            connector=aiohttp.TCPConnector(limit=self._config.concurrency),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        await self._session.close()

    async def ask(self, body: Mapping[str, Any], place: str, meter: Meter | None = None) -> Completion:
        """The answer to a request, after as many attempts as the settings allow; `place` names it in errors.

        Raises RefusedError where the server refuses it, EndpointError where no attempt brings a completion.
        """
        url = self._urls[self._turn % len(self._urls)]
        self._turn += 1
        pause, words = _FIRST_PAUSE_SECONDS, ""
        for attempt in range(1, self._config.attempts + 1):
            if meter:
                await meter.begin()
            if delay := self._pacer.delay_seconds(time.monotonic()):
                await asyncio.sleep(delay)
            if self.stopping:  # since this one began to wait
                if meter:
                    meter.unused()
                break
            outcome = await self._attempt(url, body, place)
            if isinstance(outcome, Completion):
                return outcome
            words = outcome.words
            if meter and not outcome.maybe_served:
                meter.unused()
            if outcome.refusal is not None:
                raise outcome.refusal
            if attempt < self._config.attempts:
                pause = max(pause, outcome.asked_pause_seconds)
                await asyncio.sleep(pause * random.uniform(0.75, 1.25))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise EndpointError(
            f"{url} did not answer {place} in {attempt} attempts, at last {words}; what has come is kept: start the "
            "same command again to go on"
        )

    async def _attempt(self, url: str, body: Mapping[str, Any], place: str) -> Completion | _Failure:
        try:
            async with self._session.post(f"{url}/chat/completions", json=body) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            words = f"{type(error).__name__} {error}".strip()
            return _Failure(words, maybe_served=not isinstance(error, aiohttp.ClientConnectorError))
        if answer.status == 200:
            return read_completion(content, f"{url} answered {place}")
        words = f"status {answer.status}: {content[:_SHOWN].decode(errors='replace')}"
        if answer.status not in _RETRIED and answer.status < 500:
            return _Failure(words, refusal=RefusedError(url, place, answer.status, words))
        return _Failure(
            words,
            maybe_served=answer.status in _MAYBE_SERVED,
            asked_pause_seconds=_asked_pause_seconds(answer.headers.get("Retry-After", "")),
        )


def ask_all(config: EndpointConfig, requests: Iterable[C], ask: Callable[[ChatClient, C], Awaitable[None]]) -> None:
    """Have `ask` deal with every request, as many at a time as the settings say.

    `requests` is read as workers become free. Where one fails with a UserError no other is begun, those under way may
    end, since a server counts them, and the error is raised. Others are raised at once.
    """
    failed: list[UserError] = []

    async def run() -> None:
        waiting = iter(requests)
        async with ChatClient(config) as client, asyncio.TaskGroup() as group:

            async def work() -> None:
                try:
                    for request in waiting:
                        if failed:
                            return
                        await ask(client, request)
                except UserError as error:
                    failed.append(error)
                    client.stopping = True

            for _ in range(config.concurrency):
                group.create_task(work())

    asyncio.run(run())
    if failed:
        raise failed[0]


def request_body(
    config: EndpointConfig,
    messages: Sequence[Mapping[str, Any]],
    protocol: Protocol,
    *,
    seed: int,
    thinking: bool | None,
) -> dict[str, Any]:
    """What is sent for one response.

    Raises EndpointError where the settings ask for what the endpoint does not understand.
    """
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [dict(message) for message in messages],
        "temperature": protocol.temperature,
        "top_p": protocol.top_p,
        "max_tokens": protocol.max_tokens,
        "seed": seed,
    }
    if config.extensions:
        body |= {"top_k": protocol.top_k} if protocol.top_k else {}
        body |= {"repetition_penalty": protocol.repetition_penalty} if protocol.repetition_penalty != 1 else {}
        body |= {"chat_template_kwargs": {"enable_thinking": thinking}} if thinking is not None else {}
    elif protocol.top_k or protocol.repetition_penalty != 1 or thinking is not None:
        raise EndpointError(
            "the sampling or `thinking` needs what OpenAI's own API does not have (top_k, repetition_penalty, "
            "enable_thinking), and endpoint.extensions is false"
        )
    return body


def read_completion(content: bytes, said: str) -> Completion:
    """A completion out of the body of an answer; `said` is "URL answered PLACE", for errors.

    Raises EndpointError where it is none.
    """
    try:
        told = json.loads(content)
        choice = told["choices"][0]
        message, reason, usage = choice["message"], choice["finish_reason"], told["usage"]
        text = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        tokens = int(usage.get("prompt_tokens") or 0), int(usage["completion_tokens"])
        if not isinstance(text, str) or not isinstance(thought, str):
            raise TypeError("its content is no text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise EndpointError(
            f"{said} with what is no chat completion ({error!r}): {content[:_SHOWN].decode(errors='replace')}"
        ) from None
    if thought:
        closed = "\n</think>\n\n" if text or reason == "stop" else ""
        text = f"<think>\n{thought}{closed}{text}"
    return Completion(text=text, finish=str(reason), prompt_tokens=tokens[0], completion_tokens=tokens[1])


@dataclass(frozen=True, slots=True)
class _Failure:
    """An attempt without a completion, and why."""

    words: str
    maybe_served: bool = False
    asked_pause_seconds: float = 0.0
    refusal: RefusedError | None = None


def _asked_pause_seconds(header: str) -> float:
    try:
        return min(max(0.0, float(header)), _LONGEST_PAUSE_SECONDS)
    except ValueError:
        return 0.0
