"""Responses of a teacher to the prompts of rows: each drawn once, whatever happens in between."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from megatron_klear.config.base import Settings
from megatron_klear.config.evaluation import EndpointConfig
from megatron_klear.data.rows import DataError, Message, read_problem, read_row
from megatron_klear.evaluation.chat_api import ChatClient, EndpointError, RefusedError, ask_all, request_body
from megatron_klear.evaluation.protocols import Protocol

from .response_store import Drawn, ResponseStore, Tokens
from .rows import BadRow, problem_text
from .spending import Ledger
from .text import problem_id

_OF_THE_PROMPT = frozenset({400, 403, 413, 422, 451})
"""A status that says something of one prompt, too long or not wanted; others are about the key or the address."""
_MESSAGE_TOKENS, _PROMPT_TOKENS = 64, 64
"""More than templates put around a message and around a prompt."""
_SENT = ("role", "content", "name")
REFUSED = "refused"


class TeacherConfig(EndpointConfig):
    """`[endpoint]`: servers of OpenAI's API that hold the teacher, what they cost, and a limit on that."""

    max_spend: float | None = Field(default=None, gt=0)
    """Stop before more than this is spent, in the currency of the prices, earlier starts with the same store and model
    included. What is under way counts at its most: every byte of a prompt a token, `sampling.max_tokens` of answer."""
    input_price: float = Field(default=0, ge=0)
    """For a million tokens of prompts."""
    output_price: float = Field(default=0, ge=0)
    """For a million tokens of answers, thinking included."""

    max_refused: PositiveInt = 100
    """Stop where so many prompts are refused and nothing is answered in between, and keep none of these refusals: the
    key or a setting is then more likely to be wrong than the prompts."""

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if self.max_spend is not None and not (self.input_price or self.output_price):
            raise ValueError("endpoint.max_spend needs endpoint.input_price and endpoint.output_price")
        return self


class TeacherSampling(Settings):
    """`[sampling]`: how responses are drawn."""

    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps the whole vocabulary."""
    repetition_penalty: float = Field(default=1, gt=0)
    max_tokens: PositiveInt = 32768
    """Longest response; a longer one is cut and counted as truncated."""
    thinking: bool | None = None
    """What chat templates know as `enable_thinking`; unset leaves it to the template."""
    seed: int = Field(default=0, ge=0)
    """Each response has a seed of its own, made of this one."""

    def protocol(self) -> Protocol:
        """The same as evaluation has it."""
        return Protocol(**self.model_dump(exclude={"thinking", "seed"}))


@dataclass(frozen=True, slots=True)
class Wanted:
    """One response: its key, and what is asked."""

    key: bytes
    messages: tuple[Message, ...]
    problem: str
    sample: int
    place: str

    def at_most(self, max_tokens: int) -> Tokens:
        """Tokens that it uses at most; a token has at least one byte."""
        texts = sum(len(str(message["content"]).encode()) + _MESSAGE_TOKENS for message in self.messages)
        return texts + _PROMPT_TOKENS, max_tokens


def prompt_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages that a row's last answer answers, or all where the user has the last word, as they are sent.

    The row is checked as training does. Raises BadRow where it is of neither form of docs/data.md, uses tools, or does
    not have the user's message there.
    """
    problem_text(row)
    supervised = row.get("messages") is not None or row.get("response") is not None
    try:
        found = read_row(row) if supervised else read_problem(row)
    except DataError as error:
        raise BadRow("wrong_type", str(error)) from None
    messages = list(found.messages)
    if supervised and messages[-1]["role"] != "user":
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        messages = messages[: answers[-1]] if answers else messages
    if row.get("tools") or any("tool_calls" in message or message["role"] == "tool" for message in messages):
        raise BadRow("uses_tools", "the conversation uses tools, which a teacher is not given")
    if not messages or messages[-1]["role"] != "user":
        raise BadRow("wrong_type", "the last message before the answer is not the user's")
    return tuple({name: message[name] for name in _SENT if name in message} for message in messages)


def wanted_of(
    row: Mapping[str, Any], place: str, model: str, sampling: TeacherSampling, samples: int
) -> Iterator[Wanted]:
    """The responses that a row wants, in their order. Raises BadRow as `prompt_of` does, before the first."""
    messages, problem = prompt_of(row), problem_id(problem_text(row))
    for sample in range(samples):
        content = json.dumps([messages, model, sampling.model_dump(), sample], sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:16]
        yield Wanted(key, messages, problem, sample, place)


def draw(
    config: TeacherConfig,
    sampling: TeacherSampling,
    wanted: Iterable[Wanted],
    store: ResponseStore,
    ledger: Ledger,
    progress: Callable[[int], None],
) -> None:
    """Draw what the store lacks; what has come is kept when this raises.

    Refusals of prompts are kept as well, once the teacher has answered another. Raises EndpointError where it refuses
    everything or cannot be reached, SpendLimitError where the limit would be exceeded.
    """
    drawing = _Drawing(config, sampling, store, ledger, progress)
    ask_all(config, drawing.missing(wanted), drawing.ask)
    drawing.end()


class _Drawing:
    """The requests of one call of `draw`."""

    def __init__(
        self,
        config: TeacherConfig,
        sampling: TeacherSampling,
        store: ResponseStore,
        ledger: Ledger,
        progress: Callable[[int], None],
    ) -> None:
        self._config, self._sampling, self._protocol = config, sampling, sampling.protocol()
        self._store, self._ledger, self._progress = store, ledger, progress
        self._drawn = 0
        self._answered = False
        self._held: list[tuple[Drawn, RefusedError]] = []
        """Refusals that may be of everything rather than of their prompts."""

    def missing(self, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
        """What is not in the store; of equal prompts the first row's."""
        under_way: set[bytes] = set()
        for one in wanted:
            if one.key not in self._store and one.key not in under_way:
                under_way.add(one.key)
                yield one

    async def ask(self, client: ChatClient, one: Wanted) -> None:
        """Draw one response into the store."""
        body = request_body(
            self._config,
            one.messages,
            self._protocol,
            seed=int.from_bytes(one.key[:4], "big") & 0x7FFFFFFF,
            thinking=self._sampling.thinking,
        )
        meter = _Meter(one, self._protocol.max_tokens, self._ledger)
        of_it = Drawn(
            key=one.key.hex(), model=self._config.model, problem=one.problem, sample=one.sample, finish=REFUSED, text=""
        )
        try:
            found = await client.ask(body, f"{one.place}, sample {one.sample}", meter)
            self._add(
                replace(
                    of_it,
                    finish=found.finish,
                    text=found.text,
                    prompt_tokens=found.prompt_tokens,
                    completion_tokens=found.completion_tokens,
                )
            )
            self._answered = True
            self._keep_refusals()
        except RefusedError as error:
            self._refused(replace(of_it, why=error.said), error)
        finally:
            await meter.end()

    def end(self) -> None:
        """Keep the last refusals. Raises EndpointError where nothing but refusals has come."""
        if self._held and not self._answered:
            self._stop()
        self._keep_refusals()

    def _refused(self, drawn: Drawn, error: RefusedError) -> None:
        if error.status not in _OF_THE_PROMPT:
            raise error
        self._held.append((drawn, error))
        if len({held.problem for held, _ in self._held}) >= self._config.max_refused:
            self._stop()

    def _stop(self) -> None:
        count, first = len(self._held), self._held[0][1]
        self._held.clear()
        raise EndpointError(
            f"{count} requests are refused and nothing is answered in between, so no refusal is kept; {first}. "
            "If the prompts are to blame, raise endpoint.max_refused, or pass --recorded for the rows of what is there"
        )

    def _keep_refusals(self) -> None:
        for drawn, _ in self._held:
            self._add(drawn)
        self._held.clear()

    def _add(self, drawn: Drawn) -> None:
        self._store.keep(drawn)
        self._drawn += 1
        self._progress(self._drawn)


class _Meter:
    """Tells the ledger of the attempts of one request."""

    def __init__(self, one: Wanted, max_tokens: int, ledger: Ledger) -> None:
        self._key, self._at_most, self._ledger = one.key, one.at_most(max_tokens), ledger
        self._begun = False

    async def begin(self) -> None:
        await self.end()
        await self._ledger.reserve(self._key, self._at_most)
        self._begun = True

    def unused(self) -> None:
        self._ledger.store.unused(self._key)

    async def end(self) -> None:
        """The last attempt is over."""
        if self._begun:
            self._begun = False
            await self._ledger.release()
