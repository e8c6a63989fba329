"""Supervised rows: what a line of a data file must look like, and the one form the rest of the room reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from megatron_klear.errors import UserError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
EXPECTED = (
    'expected an object with `messages` ([{"role": ..., "content": ...}, ...]), '
    "or with `prompt` (a text or messages) and `response` (a text)"
)
EXPECTED_PROBLEM = (
    'expected an object with `prompt` (a text or [{"role": ..., "content": ...}, ...]), `data_source` (a text) and '
    "`reward_model` with `ground_truth`"
)
RESERVED = ("\ufdd0", "\ufdd1", "\ufdd2")
"""Unicode noncharacters that the template code marks positions with; no text may hold them."""

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class DataError(UserError, ValueError):
    """Data, a tokenizer or a chat template that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One conversation; every message has a `role` and a `content` text, reasoning is under `reasoning_content`."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def through_last_assistant(self) -> tuple[Message, ...]:
        """The messages up to and with the last assistant turn; none where there is no such turn or it is empty.

        What follows that turn is neither trained nor read by anything trained.
        """
        for index in range(len(self.messages) - 1, -1, -1):
            message = self.messages[index]
            if message["role"] == "assistant":
                empty = not message["content"].strip() and set(message) <= {"role", "content"}
                return () if empty else self.messages[: index + 1]
        return ()

    def fraction(self) -> float:
        """A number in [0, 1) that depends on the row's content alone."""
        text = json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2.0**48


def read_row(row: object) -> ChatRow:
    """Check a parsed row and bring it into the one form.

    Raises DataError that says which key is wrong; the caller adds the file and the line.
    """
    if not isinstance(row, dict):
        raise DataError(f"the row is {_kind(row)}; {EXPECTED}")
    if row.get("messages") is not None:
        messages = _read_messages(row["messages"], "messages")
    elif row.get("prompt") is not None and row.get("response") is not None:
        prompt, response = row["prompt"], row["response"]
        if not isinstance(response, str):
            raise DataError(f"`response` is {_kind(response)}; {EXPECTED}")
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*_read_messages(before, "prompt"), {"role": "assistant", "content": response}]
        _refuse_reserved(response, "response")
    else:
        keys = ", ".join(sorted(key for key, value in row.items() if value is not None)) or "none"
        raise DataError(f"the row has the keys {keys}; {EXPECTED}")
    return ChatRow(tuple(messages), tuple(_read_tools(row.get("tools"))))


@dataclass(frozen=True, slots=True)
class ProblemRow:
    """One problem for reinforcement learning: the conversation so far, and what its reward needs."""

    messages: tuple[Message, ...]
    data_source: str
    ground_truth: Any
    extra_info: Any = None


def read_problem(row: object) -> ProblemRow:
    """Check a parsed row of the Klear/verl form: `prompt`, `data_source`, `reward_model.ground_truth`.

    `extra_info` comes along for rewards that ask for it; other keys are left alone.
    Raises DataError that says which key is wrong; the caller adds the file and the line.
    """
    if not isinstance(row, dict):
        raise DataError(f"the row is {_kind(row)}; {EXPECTED_PROBLEM}")
    prompt, data_source, reward = (row.get(key) for key in ("prompt", "data_source", "reward_model"))
    if prompt is None:
        raise DataError(f"`prompt` is missing; {EXPECTED_PROBLEM}")
    messages = _read_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "prompt")
    if messages[-1]["role"] == "assistant":
        raise DataError("`prompt` ends with an assistant's message, so there is nothing to answer; remove that message")
    if not isinstance(data_source, str) or not data_source:
        raise DataError(f"`data_source` is {_kind(data_source)}; {EXPECTED_PROBLEM}")
    if not isinstance(reward, dict) or reward.get("ground_truth") is None:
        raise DataError(f"`reward_model.ground_truth` is missing; {EXPECTED_PROBLEM}")
    return ProblemRow(tuple(messages), data_source, reward["ground_truth"], row.get("extra_info"))


def _read_messages(messages: object, key: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"`{key}` is {_kind(messages)}; {EXPECTED}")
    return [_read_message(message, f"{key}[{index}]") for index, message in enumerate(messages)]


def _read_message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f'`{where}` is {_kind(message)}, expected {{"role": ..., "content": ...}}')
    # Parquet gives every message the union of all keys, absent ones as nulls.
    present = {key: value for key, value in message.items() if value is not None}
    role = present.get("role")
    if role not in ROLES:
        raise DataError(f"`{where}.role` is {role!r}, expected one of {', '.join(ROLES)}")
    content = _read_content(present.get("content"), where, optional="tool_calls" in present)
    present = {**present, "role": role, "content": content}
    for name in _REASONING_KEYS:
        if name in present:
            reasoning = present.pop(name)
            if not isinstance(reasoning, str):
                raise DataError(f"`{where}.{name}` is {_kind(reasoning)}, expected a text")
            if reasoning:
                present.setdefault("reasoning_content", reasoning)
                _refuse_reserved(reasoning, f"{where}.{name}")
    if not present.get("tool_calls", True):
        del present["tool_calls"]
    _refuse_reserved(content, f"{where}.content")
    return present


def _read_content(content: object, where: str, *, optional: bool) -> str:
    """The text of a message; a list of text parts is joined."""
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
        raise DataError(f'`{where}.content` has a part that is not {{"type": "text", "text": ...}}')
    raise DataError(f"`{where}.content` is {_kind(content)}, expected a text")


def _read_tools(tools: object) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"`tools` is a text that is not JSON: {error}") from None
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("`tools` must be a list of JSON schemas (or that list as JSON text)")
    return tools


def _refuse_reserved(text: str, where: str) -> None:
    if any(mark in text for mark in RESERVED):
        raise DataError(f"`{where}` holds a Unicode noncharacter (U+FDD0 to U+FDD2), which no text may; remove it")


def _kind(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str | list | dict) and not value:
        return f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__}"
