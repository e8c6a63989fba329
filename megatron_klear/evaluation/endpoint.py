"""Responses from servers of OpenAI's chat API: vLLM, SGLang, or a paid one."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

from megatron_klear.config.evaluation import EndpointConfig

from .benchmarks import Problem
from .chat_api import ChatClient, EndpointError, ask_all, request_body
from .protocols import Protocol
from .sampling import Drawn, Wanted
from .store import Response

__all__ = ["EndpointError", "EndpointSource"]


class EndpointSource:
    """Draws each response by a request of its own, several under way at a time."""

    def __init__(self, config: EndpointConfig, thinking: bool | None) -> None:
        self._config, self._thinking = config, thinking

    def check(self, problems: Sequence[Problem], protocol: Protocol) -> None:
        """Nothing: the server says what it refuses."""

    def draw(self, wanted: Sequence[Wanted], protocol: Protocol, seed: int, drawn: Drawn) -> None:
        """Draw everything; what has come is kept when a request fails for good, which raises EndpointError."""

        async def ask(client: ChatClient, request: tuple[Problem, int]) -> None:
            problem, number = request
            body = request_body(
                self._config, problem.messages, protocol, seed=_seed(seed, problem, number), thinking=self._thinking
            )
            found = await client.ask(body, problem.place)
            if found.finish not in ("stop", "length"):
                raise EndpointError(f"the answer to {problem.place} ended for the reason {found.finish!r}")
            finish: Literal["stop", "length"] = "stop" if found.finish == "stop" else "length"
            tokens = found.completion_tokens
            drawn([Response(problem=problem.id, number=number, text=found.text, finish=finish, num_tokens=tokens)])

        ask_all(self._config, [(one.problem, number) for one in wanted for number in one.numbers], ask)

    def opening(self, problem: Problem) -> str:
        """Nothing: the server renders the prompt."""
        return ""

    def extension(self) -> str:
        """Not known: the server does not tell."""
        return ""

    def identity(self) -> dict[str, str]:
        """The model's name; its addresses may change."""
        return {"model": self._config.model}


def _seed(seed: int, problem: Problem, number: int) -> int:
    """A seed of 31 bits for each response, the same whenever it is drawn."""
    return zlib.crc32(f"{seed}/{problem.id}/{number}".encode()) & 0x7FFFFFFF
