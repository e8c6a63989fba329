"""Responses of a teacher on disk: a file of lines that only grows, each response under a key, drawn once.

    {"asked": key, "model": ..., "at_most": [prompt tokens, completion tokens]}    before every attempt
    {"unused": key}                                                                the server made no answer
    {"key": key, "model": ..., "problem": ..., "sample": ..., "finish": ..., "text": ..., ...}

An attempt without a later line of its own may have been paid for, which is how a limit on spending outlives a kill. A
line that a kill cut short is dropped at the next start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .lines import LineFile

Tokens = tuple[int, int]
"""Of prompts and of completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What a teacher said to one prompt, once; `key` and `problem` are 32 hexadecimal digits."""

    key: str
    model: str
    problem: str
    sample: int
    finish: str
    """`stop`, `length`, or why there is no answer: `refused`, `content_filter`, or the server's other word."""
    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    why: str = ""
    """What the server said to a prompt that it refused."""


class ResponseStore(LineFile):
    """The responses of a file, read when they are asked for; a context manager.

    Memory: about 150 bytes a response. Raises StoreError where the file is damaged or another process has it open.
    """

    def __init__(self, path: Path, model: str) -> None:
        """Open or begin `path`; what is told of spending is that of `model`."""
        super().__init__(path)
        self._model = model
        self.used: Tokens = (0, 0)
        """Of all answers of the model, as the server counted them."""
        self._open: dict[str, list[Tokens]] = defaultdict(list)
        self.answers = 0
        """Of the model; refusals are none."""
        self._places: dict[bytes, int] = {}
        self.load(self._read)

    def __contains__(self, key: bytes) -> bool:
        """Whether there is a response, or a refusal, under the key."""
        return key in self._places

    def get(self, key: bytes) -> Drawn | None:
        """What is under the key, read from disk."""
        place = self._places.get(key)
        return None if place is None else Drawn(**self.read(place))

    def unanswered(self) -> list[Tokens]:
        """The most that each attempt of the model could use that was begun and of which nothing is known."""
        return [at_most for attempts in self._open.values() for at_most in attempts]

    def asked(self, key: bytes, at_most: Tokens) -> None:
        """Note that an attempt begins."""
        self._open[key.hex()].append(at_most)
        self.add([{"asked": key.hex(), "model": self._model, "at_most": at_most}])

    def unused(self, key: bytes) -> None:
        """Note that the last attempt brought nothing that the server counts."""
        self._close(key.hex())
        self.add([{"unused": key.hex()}])

    def keep(self, drawn: Drawn) -> None:
        """Write a response, whole on disk when this returns."""
        (place,) = self.add([asdict(drawn)], to_disk=True)
        self._take(drawn, place)

    def _read(self, place: int, content: Mapping[str, Any]) -> None:
        if "asked" in content:
            if content["model"] == self._model:
                prompt, completion = content["at_most"]
                self._open[str(content["asked"])].append((int(prompt), int(completion)))
        elif "unused" in content:
            self._close(str(content["unused"]))
        else:
            self._take(Drawn(**content), place)

    def _take(self, drawn: Drawn, place: int) -> None:
        self._places.setdefault(bytes.fromhex(drawn.key), place)
        if drawn.model != self._model:
            return
        if drawn.finish != "refused":
            self._close(drawn.key)
            self.answers += 1
        self.used = self.used[0] + drawn.prompt_tokens, self.used[1] + drawn.completion_tokens

    def _close(self, key: str) -> None:
        """The last attempt of a key is known of."""
        if attempts := self._open.get(key):
            attempts.pop()
            if not attempts:
                del self._open[key]
