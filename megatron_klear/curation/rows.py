"""Rows as curation streams them: undecoded lines with the problem's text, and those that cannot be used, with why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.data.rows import EXPECTED, EXPECTED_PROBLEM, DataError, read_problem, read_row
from megatron_klear.data.sources import SUFFIXES, Chunk, read_chunks, resolve_files

from .json_list import begins_a_list, list_elements

_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = 512
_SKIPPED_AT_ONCE = 1 << 20
_MOST_REASON = 400
_MOST_LEVELS = 100
"""Far above what data has, and far below where Python stops, in JSON, in pickles and in what reads ground truths."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BENCHMARK_KEYS = ("question_content", "problem", "question", "prompt", "text", "messages")


class BadRow(Exception):
    """A row that cannot be used: `kind` is what the report counts it under, the message says why."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason if len(reason) <= _MOST_REASON else f"{reason[:_MOST_REASON]} ...")
        self.kind = kind

    def at(self, number: int) -> Unusable:
        """The row of that number, as one that is counted and left out."""
        return Unusable(number, self.kind, str(self))


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its line or row number from 1, its JSON without a line end, and its decoded form."""

    number: int
    line: bytes
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Unusable:
    """One row that is counted and left out."""

    number: int
    kind: str
    reason: str


def resolve(patterns: Sequence[str], key: str) -> list[Path]:
    """Files of rows or of benchmarks that paths or globs name: .jsonl, .parquet or .json.

    `key` is the setting to name in errors. Raises DataError where one cannot be read or is none of these.
    """
    return resolve_files(patterns, key, (*SUFFIXES, ".json"))


def stream_chunks(path: Path, max_row_bytes: int) -> Iterator[Chunk]:
    """Stream a file in chunks of at most about a megabyte and one row; a longer line is cut one byte past the bound.

    A .json file is one list, or lines where it does not begin with a bracket. Raises DataError where a Parquet file or
    a list cannot be read.
    """
    if path.suffix == ".parquet":
        return read_chunks(path, None)
    if path.suffix == ".json" and begins_a_list(path):
        return _chunks_of_list(path, max_row_bytes)
    return _bounded_lines(path, max_row_bytes)


def decode(chunk: Chunk, max_row_bytes: int) -> Iterator[Row | Unusable]:
    """Rows of a chunk that are JSON objects, and what is none; blank lines are neither."""
    for number, content in enumerate(_contents(chunk), chunk.first):
        if isinstance(content, bytes) and not content.strip():
            continue
        try:
            line = content.strip() if isinstance(content, bytes) else _as_line(content)
            if len(line) > max_row_bytes:
                raise BadRow("too_large", f"the row is longer than {max_row_bytes} bytes")
            yield Row(number, line, _as_object(line))
        except BadRow as error:
            yield Unusable(number, error.kind, str(error))


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that can be used, and what its user says."""

    row: Row
    text: str


def read_problems(chunk: Chunk, max_row_bytes: int) -> Iterator[Problem | Unusable]:
    """Rows of a chunk with the text of their problem, and what cannot be used."""
    for row in decode(chunk, max_row_bytes):
        if isinstance(row, Unusable):
            yield row
            continue
        try:
            yield Problem(row, problem_text(row.value))
        except BadRow as error:
            yield Unusable(row.number, error.kind, str(error))


def problem_text(row: Mapping[str, Any]) -> str:
    """Return what the user says in a training row, turns joined by line ends; the row is checked as training does.

    Raises BadRow where the row is of neither form of docs/data.md, or its user says nothing.
    """
    present = {key for key, value in row.items() if value is not None}
    supervised = "messages" in present or {"prompt", "response"} <= present
    if not supervised and not {"prompt", "data_source", "reward_model"} <= present:
        keys = ", ".join(sorted(present)) or "none"
        raise BadRow("missing_field", f"the row has the keys {keys}; {EXPECTED}; for RL {EXPECTED_PROBLEM}")
    try:
        messages = (read_row(row) if supervised else read_problem(row)).messages
    except DataError as error:
        raise BadRow("wrong_type", str(error)) from None
    except RecursionError:
        raise BadRow("wrong_type", "the row is nested too deeply") from None
    text = "\n".join(message["content"] for message in messages if message["role"] == "user")
    if not text.strip():
        raise BadRow("missing_field", "no message of the user has a text")
    return text


def benchmark_text(row: Mapping[str, Any]) -> str:
    """Return the problem of a benchmark's row, under the first of its usual keys: a text, or the user's messages.

    Raises BadRow where there is none.
    """
    meta = row.get("meta")
    for holder in (row, meta if isinstance(meta, dict) else {}):
        for key in _BENCHMARK_KEYS:
            value = holder.get(key)
            if isinstance(value, list):
                turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
                value = "\n".join(turn["content"] for turn in turns if isinstance(turn.get("content"), str))
            if isinstance(value, str) and value.strip():
                return value
    raise BadRow("missing_field", f"no problem under any of {', '.join(_BENCHMARK_KEYS)}, nor of `meta`")


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """The value under a name, dots for fields inside. Raises BadRow where there is none, or a list or a table."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, Mapping | list):
        raise BadRow("missing_field", f"the row has no value under {name}")
    return value


def _chunks_of_list(path: Path, max_row_bytes: int) -> Iterator[Chunk]:
    lines: list[bytes] = []
    size, first = 0, 1
    for element in list_elements(path, max_row_bytes):
        lines.append(element)
        size += len(element)
        if size >= _CHUNK_BYTES or len(lines) >= _CHUNK_ROWS:
            yield Chunk(str(path), first, lines, num_bytes=size)
            first, lines, size = first + len(lines), [], 0
    if lines:
        yield Chunk(str(path), first, lines, num_bytes=size)


def _bounded_lines(path: Path, max_row_bytes: int) -> Iterator[Chunk]:
    lines: list[bytes] = []
    size, first, longest = 0, 1, max_row_bytes + 2
    with path.open("rb") as stream:
        while line := stream.readline(longest):
            size += len(line)
            complete = line.endswith(b"\n") or len(line) < longest
            while not complete:
                skipped = stream.readline(_SKIPPED_AT_ONCE)
                size += len(skipped)
                complete = not skipped or skipped.endswith(b"\n")
            lines.append(line.removeprefix(b"\xef\xbb\xbf") if first == 1 and not lines else line)
            if size >= _CHUNK_BYTES or len(lines) >= _CHUNK_ROWS:
                yield Chunk(str(path), first, lines, num_bytes=size)
                first, lines, size = first + len(lines), [], 0
    if lines:
        yield Chunk(str(path), first, lines, num_bytes=size)


def _contents(chunk: Chunk) -> Iterator[bytes | dict[str, Any] | BadRow]:
    """Lines of a JSONL chunk; rows of a Parquet chunk one by one, as one that is not UTF-8 must not cost the others."""
    if chunk.lines is not None:
        yield from chunk.lines
        return
    import pyarrow as pa

    with pa.ipc.open_stream(chunk.table) as reader:
        table = reader.read_all()
    try:
        yield from table.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for index in range(table.num_rows):
        try:
            yield table.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield BadRow("bad_encoding", f"not UTF-8 ({error})")


def _as_line(row: dict[str, Any] | BadRow) -> bytes:
    if isinstance(row, BadRow):
        raise row
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadRow("wrong_type", f"a value that JSON has no form for ({error})") from None


def _as_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode(), parse_constant=_refuse_constant)
        if _SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise BadRow("bad_encoding", f"not UTF-8 ({error})") from None
    except (ValueError, RecursionError) as error:
        raise BadRow("malformed_json", f"not valid JSON ({error})") from None
    if line.count(b"[") + line.count(b"{") > _MOST_LEVELS and not _is_shallow(row, _MOST_LEVELS):
        raise BadRow("wrong_type", f"the row is nested in more than {_MOST_LEVELS} levels")
    if not isinstance(row, dict):
        raise BadRow("wrong_type", f"the row is of type {type(row).__name__}, expected an object")
    return row


def _is_shallow(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner if isinstance(one, dict | list))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
