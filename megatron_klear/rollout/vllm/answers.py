"""Reads a rollout server's answers and believes nothing that does not hold together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_klear.types import VersionSpan

_ROUNDING = 1e-4
"""Nats above 0 that rounding gives a log-prob near 0."""
_UNKNOWN = -9999.0
"""What vLLM reports in place of a log-prob that is NaN or that it does not have."""


class Malformed(ValueError):
    """An answer that cannot be right; the message says why."""


class ForeignWeights(Malformed):
    """The answer was drawn with weights that the trainer did not send."""


class Read(NamedTuple):
    """A response as the server reported it."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    finish: Literal["stop", "length", "abort"]
    version_spans: tuple[VersionSpan, ...]
    routed_experts: Any
    """As the server gave them, if it did."""


def read_completion(answer: Any, *, max_tokens: int, vocab_size: int | None, stop: frozenset[int]) -> Read:
    """The one response in an answer of `/inference/v1/generate`. Raises Malformed."""
    choices = _field(answer, "choices", list)
    if len(choices) != 1:
        raise Malformed(f"{len(choices)} responses to a request for one")
    choice = choices[0]
    tokens = _field(choice, "token_ids", list)
    ids = _token_ids(tokens, vocab_size)
    content = _field(_field(choice, "logprobs", dict), "content", list)
    if len(content) != len(tokens):
        raise Malformed(f"{len(content)} log-probs for {len(tokens)} tokens")
    values = []
    for token, entry in zip(tokens, content, strict=True):
        if _field(entry, "token_id", int) != token:
            raise Malformed(f"a log-prob is of token {entry['token_id']} where the response has {token}")
        values.append(entry.get("logprob"))
    finish, stopped = choice.get("finish_reason"), bool(tokens) and tokens[-1] in stop
    if stopped and finish == "abort":
        finish = "stop"  # it was broken off with nothing left to draw
    if finish == "stop":
        if not stopped:
            raise Malformed("a response that says it stopped does not end in a stop token")
    elif finish == "length":
        if stopped:
            raise Malformed("a response that says it reached the length ends in a stop token")
        if len(tokens) != max_tokens:
            raise Malformed(
                f"a response that says it reached the length has {len(tokens)} tokens, not {max_tokens}: is the "
                "server's --max-model-len below prompt and response together?"
            )
    elif finish != "abort":
        raise Malformed(f"finish reason {finish!r}")
    if len(tokens) > max_tokens:
        raise Malformed(f"{len(tokens)} tokens where at most {max_tokens} were asked for")
    if any(token in stop for token in tokens[:-1]):
        raise Malformed("a response goes on after a stop token")
    spans = _spans(choice.get("weight_versions"), len(tokens))
    return Read(ids, _logprobs(values), finish, spans, choice.get("routed_experts"))


def read_prompt_logprobs(answer: Any, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Log-probs [n - 1] of `tokens` after the first in an answer to a request with `prompt_logprobs`."""
    entries = _field(answer, "prompt_logprobs", list)
    if len(entries) != len(tokens):
        raise Malformed(f"{len(entries)} prompt log-probs for {len(tokens)} tokens")
    values = []
    for token, entry in zip(tokens[1:], entries[1:], strict=True):
        values.append(_field(_field({"of a token": entry}, "of a token", dict), str(token), dict).get("logprob"))
    return _logprobs(values)


def _field(table: Any, key: str, kind: type) -> Any:
    value = table.get(key) if isinstance(table, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Malformed(f"no {key} ({kind.__name__}) in the answer, but {value!r:.100}")
    return value


def _token_ids(tokens: list[Any], vocab_size: int | None) -> npt.NDArray[np.int32]:
    bound = np.iinfo(np.int32).max if vocab_size is None else vocab_size
    for token in tokens:
        if type(token) is not int or not 0 <= token < bound:
            raise Malformed(f"{token!r:.100} is no token of the vocabulary")
    return np.array(tokens, dtype=np.int32)


def _logprobs(values: list[Any]) -> npt.NDArray[np.float32]:
    for value in values:
        # NaN fails every comparison.
        if type(value) not in (float, int) or not _UNKNOWN < value <= _ROUNDING:
            raise Malformed(f"{value!r:.100} is no log-prob")
    return np.minimum(np.array(values, dtype=np.float32), np.float32(0))


def _spans(spans: Any, length: int) -> tuple[VersionSpan, ...]:
    """Spans in order and without a gap over `length` tokens; neighbours of one version are joined."""
    if length == 0:
        return ()
    if not isinstance(spans, list):
        raise Malformed(f"no weight_versions in the answer, but {spans!r:.100}")
    found: list[VersionSpan] = []
    for span in spans:
        version, start, end = _version(span), _field(span, "start", int), _field(span, "end", int)
        if start != (found[-1].end if found else 0) or end < start:
            raise Malformed(f"weight versions have a gap or overlap: {spans!r:.200}")
        if found and version < found[-1].version:
            raise Malformed(f"weight versions go back in time: {spans!r:.200}")
        if found and found[-1].version == version:
            found[-1] = found[-1]._replace(end=end)
        elif end > start:
            found.append(VersionSpan(version, start, end))
    if not found or found[-1].end != length:
        raise Malformed(f"weight versions do not cover {length} tokens: {spans!r:.200}")
    return tuple(found)


def _version(span: Any) -> int:
    text = _field(span, "version", str)
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ForeignWeights(f"weight version {text!r:.100} is none that the trainer sent")
    return int(text)
