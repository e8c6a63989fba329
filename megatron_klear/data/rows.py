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
_TEMPLATE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
"""What templates read of a message. Other keys, such as ids and sources, must not change its text."""
_TRAINED_KEYS = ("weight", "loss", "loss_mask", "train")
"""Whether a turn is trained, as OpenAI and Mistral (weight), ms-swift (loss), and axolotl (train) name it."""


class DataError(UserError, ValueError):
    """Data, a tokenizer or a chat template that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One conversation; every message has a `role` and a `content` text, reasoning is under `reasoning_content`.

    `untrained` are the indices of assistant turns that the row itself takes out of the loss.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()

    def through_last_assistant(self, *, of_all: bool = True) -> tuple[Message, ...]:
        """The messages up to and with the last assistant turn that is trained; none where there is none or it is empty.

        What follows that turn is neither trained nor read by anything trained. Where not `of_all` turns are wanted it
        is the conversation's last assistant turn or none.
        """
        for index in range(len(self.messages) - 1, -1, -1):
            message = self.messages[index]
            if message["role"] != "assistant" or (of_all and index in self.untrained):
                continue
            empty = is_plain(message) and not message["content"].strip()
            return () if empty or index in self.untrained else self.messages[: index + 1]
        return ()

    def fraction(self) -> float:
        """A number in [0, 1) that depends on the row's content alone."""
        text = json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2.0**48


def is_plain(message: Message) -> bool:
    """Whether an assistant's message is its text alone, without separate reasoning or calls of tools."""
    return "reasoning_content" not in message and "tool_calls" not in message


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
    turns = row["messages"] if row.get("messages") is not None else [*before, {}]
    untrained = (index for index, turn in enumerate(turns) if not _is_trained(turn, f"messages[{index}]"))
    return ChatRow(
        tuple(messages),
        tuple(_read_tools(row.get("tools"))),
        frozenset(index for index in untrained if messages[index]["role"] == "assistant"),
    )


def _is_trained(message: dict[str, Any], where: str) -> bool:
    """What a message says of itself; true where it says nothing. Only assistants' messages are ever trained."""
    said = {}
    for key in _TRAINED_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"`{where}.{key}` is {value!r}; a turn is trained (1, true) or not (0, false), and nothing between"
            )
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise DataError(f"`{where}` says of itself both that it is trained and that it is not: {said}")
    return all(said.values())


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
    present = {key: value for key, value in without_nulls(message).items() if key in _MESSAGE_KEYS}
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
    calls = _read_calls(present.pop("tool_calls", None), f"{where}.tool_calls")
    if calls:
        present["tool_calls"] = calls
    _refuse_reserved(content, f"{where}.content")
    return present


def without_nulls(value: Any) -> Any:
    """A JSON value without the keys whose value is null, at every depth.

    Arrow gives every struct of a column the keys of all of them, absent ones as nulls, and cannot tell these from a
    null that was written; so a null means "absent" in JSONL as well, and rows mean the same in both forms.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _read_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects; OpenAI's form has them as JSON text, in which a null stays one."""
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"`{where}` is {_kind(calls)}, expected a list of calls")
    read = []
    for index, call in enumerate(calls):
        inner = call.get("function")
        holder = inner if isinstance(inner, dict) else call
        arguments = holder.get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments) if arguments.strip() else {}
            except json.JSONDecodeError as error:
                raise DataError(f"`{where}[{index}]` has arguments that are not JSON: {error}") from None
            if not isinstance(parsed, dict):
                raise DataError(f"`{where}[{index}]` has arguments that are {_kind(parsed)}, expected an object")
            holder = {**holder, "arguments": parsed}
        read.append({**call, "function": holder} if isinstance(inner, dict) else holder)
    return read


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
    as_text = isinstance(tools, str)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"`tools` is a text that is not JSON: {error}") from None
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("`tools` must be a list of JSON schemas (or that list as JSON text)")
    return tools if as_text else [without_nulls(tool) for tool in tools]


_MESSAGE_KEYS = {*_TEMPLATE_KEYS, *_REASONING_KEYS}


def _refuse_reserved(text: str, where: str) -> None:
    if any(mark in text for mark in RESERVED):
        raise DataError(f"`{where}` holds a Unicode noncharacter (U+FDD0 to U+FDD2), which no text may; remove it")


def _kind(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str | list | dict) and not value:
        return f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__}"
