"""Responses that were recorded elsewhere: by `distill`, by an evaluation, or as rows for SFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_klear.data.rows import DataError, read_row
from megatron_klear.data.sources import Chunk
from megatron_klear.rewards.format import CLOSE, OPEN

from .report import MOST_EXAMPLES
from .rows import BadRow, Row, Unusable, decode, problem_text
from .text import problem_id

_EXPECTED = (
    "expected a line of responses.jsonl, of distill or of an evaluation, a row for SFT, or a row with a problem and "
    "`responses`, a list of texts"
)
_NO_RESPONSE = ("asked", "unused", "made_with")
"""Lines of responses.jsonl about other things."""
_ENDS = ("stop", "length")
_SKIPPED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Response:
    """One response to a problem; `text` is empty where the teacher refused to give one."""

    problem: str
    """`text.problem_id`, or the id that evaluations give a problem."""
    sample: int | None
    """Its number; None is the next one of the problem."""
    text: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    file: int
    line: int
    """Where it starts."""
    number: int
    """Of the responses of the line."""


class RecordedResponses:
    """The responses of JSONL files, by problem, read when they are asked for. Memory: about 150 bytes a response."""

    def __init__(self, files: Sequence[Path], max_row_bytes: int, *, strict: bool) -> None:
        """Read the files once.

        Raises DataError where one is no JSONL, two responses of a problem have one number, or where `strict` and a line
        cannot be used.
        """
        self._files, self._max_row_bytes = list(files), max_row_bytes
        self.counts: Counter[str] = Counter()
        """`responses`, and lines that cannot be used by reason."""
        self.examples: list[dict[str, Any]] = []
        self._places: dict[str, dict[int, _Place]] = {}
        for index, path in enumerate(self._files):
            if path.suffix == ".parquet":
                raise DataError(f"--responses {path}: recorded responses are read from JSONL")
            for place, row in self._lines(path):
                found = _responses(row)
                if isinstance(found, Unusable):
                    if strict:
                        raise DataError(f"--responses {path}:{found.number}: {found.reason}")
                    self.counts[found.kind] += 1
                    if len(self.examples) < MOST_EXAMPLES:
                        self.examples.append({"file": str(path), "row": found.number, "why": found.reason})
                    continue
                for number, response in enumerate(found):
                    self._add(response, _Place(index, place, number), f"{path}:{row.number}")

    def of(self, *problems: str) -> dict[int, Response]:
        """The responses of a problem that goes by several ids, by their numbers."""
        places = {sample: place for name in problems for sample, place in self._places.get(name, {}).items()}
        return {sample: replace(self._read(place), sample=sample) for sample, place in sorted(places.items())}

    def _add(self, response: Response, place: _Place, where: str) -> None:
        places = self._places.setdefault(response.problem, {})
        sample = len(places) if response.sample is None else response.sample
        if sample in places:
            raise DataError(
                f"--responses {where}: a second response number {sample} to the problem {response.problem}; give the "
                "responses of one teacher at a time"
            )
        places[sample] = place
        self.counts["responses"] += 1

    def _lines(self, path: Path) -> Iterator[tuple[int, Row | Unusable]]:
        longest, place, number = self._max_row_bytes + 2, 0, 0
        with path.open("rb") as stream:
            while line := stream.readline(longest):
                number += 1
                for row in decode(Chunk(str(path), number, [line], num_bytes=len(line)), self._max_row_bytes):
                    yield place, row
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_SKIPPED_AT_ONCE)
                place = stream.tell()

    def _read(self, place: _Place) -> Response:
        with self._files[place.file].open("rb") as stream:
            stream.seek(place.line)
            line = stream.readline()
        (row,) = decode(Chunk("", 1, [line], num_bytes=len(line)), self._max_row_bytes)
        found = _responses(row)
        assert not isinstance(found, Unusable)
        return found[place.number]


def _responses(row: Row | Unusable) -> list[Response] | Unusable:
    if isinstance(row, Unusable):
        return row
    try:
        return list(responses_in(row.value))
    except BadRow as error:
        return error.at(row.number)


def responses_in(row: Mapping[str, Any]) -> Iterator[Response]:
    """The responses that a line holds; none where it is about other things. Raises BadRow where it is of no form."""
    if any(name in row for name in _NO_RESPONSE):
        return
    if isinstance(row.get("problem"), str) and "text" in row:
        sample, text = row.get("sample", row.get("number")), row["text"]
        if type(sample) is not int or not isinstance(text, str):
            raise BadRow("wrong_type", f"`sample` or `text` is no number or text; {_EXPECTED}")
        refused = row.get("finish", "stop") not in _ENDS
        yield Response(row["problem"], sample, "" if refused else text, refused)
        return
    if (texts := row.get("responses")) is not None:
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadRow("wrong_type", f"`responses` is no list of texts; {_EXPECTED}")
        problem = problem_id(problem_text(row))
        yield from (Response(problem, None, text) for text in texts)
        return
    yield _of_sft_row(row)


def _of_sft_row(row: Mapping[str, Any]) -> Response:
    try:
        messages = read_row(row).messages
    except DataError as error:
        raise BadRow("wrong_type", f"{error}; {_EXPECTED}") from None
    if messages[-1]["role"] != "assistant":
        raise BadRow("missing_field", f"the last message is not the assistant's; {_EXPECTED}")
    sample, thought = row.get("sample"), messages[-1].get("reasoning_content")
    text = f"{OPEN}\n{thought}\n{CLOSE}\n\n" if thought else ""
    whole = text + messages[-1]["content"]
    return Response(problem_id(problem_text(row)), sample if type(sample) is int else None, whole)
