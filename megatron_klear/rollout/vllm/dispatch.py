"""Draws groups from several servers: retries what fails, continues what was cut short, gives up past the deadline.

Every sample is one request of its own, seeded by the run, the prompt and the sample's number unless told otherwise, so
that asking again gives the same response again, whichever server answers (up to rounding).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_klear.rollout.engine import GroupRequest
from megatron_klear.rollout.vllm.client import Completion, GarbageAnswer, ServerError, WrongWeights
from megatron_klear.rollout.vllm.fleet import Fleet, NoServer, Withdrawn
from megatron_klear.rollout.vllm.member import Member
from megatron_klear.types import Routes, Sample, VersionSpan

_MOST_PUT_OFF = 3
_LATELY = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """A response that has ended; `followed` is what was begun on it there and then."""

    sample: Sample
    text: str
    followed: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What became of a request: all of its responses, or none and why."""

    request: GroupRequest
    responses: list[Whole] | None
    failure: str = ""


class _GaveUp(Exception):
    pass


class _Stalled(ServerError):
    """The server drew nothing for too long; `part` is what it had drawn before, where it still gave it."""

    def __init__(self, url: str, seconds: float, part: Completion | None) -> None:
        super().__init__(url, "", None, f"no token within rollout.request_seconds {seconds:g}")
        self.part = part


@dataclass(kw_only=True, slots=True)
class _Response:
    """A response in the making, of one part or of several."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[npt.NDArray[np.float32]] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    routes: list[Routes] = field(default_factory=list)
    """From the prompt's first token on, where they are asked for."""

    @property
    def tokens_routed(self) -> int:
        """Tokens of prompt and response whose routes are there: each keeps those with which it was first read."""
        return sum(map(len, self.routes))

    def add(self, part: Completion) -> None:
        start = len(self.tokens)
        for span in part.version_spans:
            moved = VersionSpan(span.version, start + span.start, start + span.end)
            if self.spans and self.spans[-1].version == moved.version:
                self.spans[-1] = self.spans[-1]._replace(end=moved.end)
            else:
                self.spans.append(moved)
        self.tokens += part.token_ids.tolist()
        self.logprobs.append(part.logprobs)
        if part.routes is not None:
            self.routes.append(part.routes)


@dataclass(kw_only=True, slots=True)
class _Tries:
    """Attempts at one sample."""

    deadline: float | None = None
    """When to give up, by time.monotonic; put off by tokens that are kept."""
    put_off: int = 0
    failed: int = 0
    unsound: int = 0
    last: str = ""
    avoid: Member | None = None


class Dispatcher:
    """Draws samples over a fleet of servers; to be used on the fleet's loop."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        stop_token_ids: Iterable[int],
        whole: Callable[[GroupRequest, Sample], Whole],
        seeded: bool = True,
    ) -> None:
        """`stop_token_ids` end a response, besides those of the sampling; where not `seeded`, each draw is another.

        `whole` is given each sample as soon as it has ended, whatever becomes of the others of its group.
        """
        self._whole, self._seeded = whole, seeded
        self._fleet, self._stop = fleet, sorted(set(stop_token_ids))
        self._retries = self._dropped = 0
        self._mean_tokens, self._ended = 0.0, 0  # of the responses that ended lately

    async def draw(self, request: GroupRequest) -> Drawn:
        """All samples of a group, or none of them once one was given up."""
        count = request.sampling.samples_per_prompt
        tasks = [asyncio.ensure_future(self._respond(request, number)) for number in range(count)]
        try:
            return Drawn(request=request, responses=list(await asyncio.gather(*tasks)))
        except _GaveUp as error:
            self._dropped += 1
            return Drawn(request=request, responses=None, failure=str(error))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def take_counters(self) -> dict[str, float]:
        """Attempts that failed and groups that were dropped since the last call."""
        counters = {"server_retries": float(self._retries), "groups_dropped": float(self._dropped)}
        self._retries = self._dropped = 0
        return counters

    async def _respond(self, request: GroupRequest, number: int) -> Whole:
        return self._whole(request, await self._sample(request, number))

    async def _sample(self, request: GroupRequest, number: int) -> Sample:
        response, tries = _Response(), _Tries()
        while True:
            part = await self._attempt(request, number, response, tries)
            if part is not None:
                response.add(part)
                full = len(response.tokens) >= request.sampling.max_tokens
                if part.finish != "abort" or full:
                    self._note_length(len(response.tokens))
                    return _as_sample(request.prompt.tokens, response, stopped=part.finish == "stop")
            self._retries += 1
            self._give_up_if_due(request, number, tries)
            if part is None or not part.token_ids.size:
                await self._back_off(tries)

    async def _attempt(
        self, request: GroupRequest, number: int, response: _Response, tries: _Tries
    ) -> Completion | None:
        """One request for the rest of the response; None where it failed."""
        fleet, done = self._fleet, len(response.tokens)
        tokens = self._expected_tokens(request, done)
        try:
            started = tries.deadline is not None
            member = await fleet.place(tokens, deadline=tries.deadline, avoid=tries.avoid, first=started)
        except NoServer as error:
            raise _GaveUp(_told(request, number, tries, str(error))) from None
        tries.deadline = tries.deadline or time.monotonic() + fleet.limits.deadline_seconds
        asked_at, oldest = time.monotonic(), fleet.version
        part: Completion | None
        stalled: _Stalled | None = None
        try:
            part = await self._ask(member, request, number, response)
        except _Stalled as error:
            part, stalled = error.part, error
        except ServerError as error:
            self._note_failure(member, tries, error, asked_at)
            return None
        finally:
            fleet.free(member, tokens)
        try:
            if part is not None:
                self._check_versions(member, part, oldest)
            if stalled is not None and (part is None or not part.token_ids.size or member.computed is not None):
                raise stalled
        except ServerError as error:
            self._note_failure(member, tries, error, asked_at)
            if error is not stalled:
                return None
        else:
            fleet.succeeded(member)
        if part is not None and part.token_ids.size:
            tries.deadline = time.monotonic() + fleet.limits.deadline_seconds
        if part is not None and part.finish == "abort":
            tries.last = f"{member.client.url} broke off after {done + len(part.token_ids)} tokens"
        return part

    def _note_failure(self, member: Member, tries: _Tries, error: ServerError, asked_at: float) -> None:
        tries.failed += 1
        tries.last, tries.avoid = str(error), member
        # A refusal may be the request's fault, and what was taken back is known to be the server's already.
        tries.unsound += error.is_refusal or isinstance(error, GarbageAnswer)
        if not error.is_refusal and not isinstance(error, Withdrawn):
            self._fleet.failed(member, error)
        # Time in which its server drew was not idle; not without end, for it was in vain after all.
        if tries.deadline is not None and tries.put_off < _MOST_PUT_OFF:
            tries.put_off += 1
            tries.deadline += self._fleet.progress_of(member, asked_at) - asked_at

    async def _ask(self, member: Member, request: GroupRequest, number: int, response: _Response) -> Completion:
        """The rest of the response, however long it takes. Raises _Stalled where its server draws nothing."""
        done, limits, since = len(response.tokens), self._fleet.limits, time.monotonic()
        sampling = request.sampling.model_copy(update={"max_tokens": request.sampling.max_tokens - done})
        name = uuid.uuid4().hex
        asking = asyncio.ensure_future(
            member.client.generate(
                [*request.prompt.tokens.tolist(), *response.tokens],
                sampling=sampling,
                seed=sample_seed(request.seed, request.prompt.id, number, done) if self._seeded else None,
                stop_token_ids=self._stop,
                request_id=name,
                routes_from=response.tokens_routed,
            )
        )
        member.attempts.add(asking)
        try:
            while not (await asyncio.wait({asking}, timeout=limits.tick_seconds))[0]:
                if self._fleet.stalled(member, since):
                    raise _Stalled(member.client.url, limits.request_seconds, await self._part(member, name, asking))
            if asking.cancelled():
                raise Withdrawn(member.client.url, "", None, "the server is gone, or what it holds cannot be trusted")
            return asking.result()
        finally:
            member.attempts.discard(asking)
            asking.cancel()

    async def _part(self, member: Member, name: str, asking: asyncio.Task[Completion]) -> Completion | None:
        """What a server that draws no more had drawn: its front often answers where its engine hangs."""
        seconds = self._fleet.limits.health_seconds
        with contextlib.suppress(ServerError):
            await member.client.abort(name, seconds)
            await asyncio.wait({asking}, timeout=seconds)
            if asking.done() and not asking.cancelled():
                return asking.result()
        return None

    def _expected_tokens(self, request: GroupRequest, done: int) -> int:
        """Tokens of the cache that the sample will take: with a response as long as the last ones were."""
        most = request.sampling.max_tokens
        response = min(most, self._mean_tokens) if self._ended else most / 2
        return len(request.prompt.tokens) + max(done, math.ceil(response))

    def _note_length(self, tokens: int) -> None:
        self._ended += 1
        self._mean_tokens += (tokens - self._mean_tokens) / min(self._ended, _LATELY)

    def _check_versions(self, member: Member, part: Completion, oldest: int) -> None:
        for span in part.version_spans:
            if not oldest <= span.version <= self._fleet.version:
                raise WrongWeights(
                    member.client.url,
                    "",
                    200,
                    f"tokens drawn with weights of version {span.version}; it should hold {oldest} to "
                    f"{self._fleet.version}",
                )

    def _give_up_if_due(self, request: GroupRequest, number: int, tries: _Tries) -> None:
        limits = self._fleet.limits
        if tries.deadline is not None and time.monotonic() >= tries.deadline:
            raise _GaveUp(_told(request, number, tries, f"no headway within {limits.deadline_seconds:g} s"))
        if tries.unsound >= limits.max_unsound:
            raise _GaveUp(_told(request, number, tries, f"{tries.unsound} answers that are no use"))

    async def _back_off(self, tries: _Tries) -> None:
        limits = self._fleet.limits
        wait = min(limits.max_backoff_seconds, limits.backoff_seconds * 2 ** min(tries.failed, 20) / 2)
        await asyncio.sleep(wait * random.uniform(0.5, 1.5))  # apart from each other, so as not to come all at once


def sample_seed(seed: int, prompt_id: str, number: int, done: int = 0) -> int:
    """Seed of 63 bits for a sample, or for what follows its first `done` tokens."""
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{number}\0{done}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _told(request: GroupRequest, number: int, tries: _Tries, why: str) -> str:
    last = f"; last: {tries.last}" if tries.last else ""
    return f"prompt {request.prompt.id}, sample {number}: {why} ({tries.failed} attempts failed{last})"


def _as_sample(prompt: npt.NDArray[np.int32], response: _Response, *, stopped: bool) -> Sample:
    head, spans = len(prompt), response.spans
    moved = tuple(VersionSpan(span.version, head + span.start, head + span.end) for span in spans)
    return Sample(
        tokens=np.concatenate([prompt, np.array(response.tokens, dtype=np.int32)]),
        trained=np.arange(head + len(response.tokens)) >= head,
        logprobs=np.concatenate([np.zeros(head, dtype=np.float32), *response.logprobs]),
        policy_version=spans[0].version,
        version_spans=moved if len(spans) > 1 else (),
        finish="stop" if stopped else "length",
        routes=np.concatenate(response.routes) if response.routes else None,
    )
