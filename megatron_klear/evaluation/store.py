"""Responses and grades on disk: a line each, added as they come, so that an evaluation goes on where it was stopped.

    <output>/<benchmark>/responses.jsonl    the first line says what the others were drawn with
    <output>/<benchmark>/grades.jsonl

A line that a kill cut short is dropped at the next start, and drawn again. A response is known by its problem and its
number, and its seed by both: drawn again it is the same where the sampler keeps its word.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

from megatron_klear.errors import UserError

Key = tuple[str, int]
"""A problem's id and a response's number."""


class StoreError(UserError):
    """A folder that holds the responses of another evaluation, or a damaged file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """What a model said to one problem, once."""

    problem: str
    number: int
    text: str
    finish: Literal["stop", "length"]
    num_tokens: int

    @property
    def key(self) -> Key:
        """Its problem and number."""
        return self.problem, self.number


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """What the reward said of a response; `vote` is the answer in the form that maj@k counts, "" without one."""

    problem: str
    number: int
    reward: float
    verdict: str
    note: str
    vote: str = ""
    of: str = ""
    """Digest of the text that was graded (`digest`): a response drawn anew is graded anew."""

    @property
    def key(self) -> Key:
        """Its response's problem and number."""
        return self.problem, self.number


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def check_model(output: Path, model: Mapping[str, str]) -> None:
    """Raises StoreError where a benchmark in the folder `output` was answered by another model.

    A table, a page and comparisons are of a folder as a whole. What has no first line that could be read is left to
    whoever goes on with it.
    """
    for path in sorted(output.glob("*/responses.jsonl")):
        try:
            with path.open("rb") as stream:
                before = json.loads(stream.readline())["made_with"]
            changed = [key for key in model if before.get(key) != model[key]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if changed:
            told = "; ".join(f"{key} was {before.get(key)} and is {model[key]}" for key in changed)
            raise StoreError(f"{path} is of another model: {told}. Choose another output, or remove {path.parent}")


class Lines:
    """A file of records that only grows; a context manager."""

    def __init__(self, path: Path, identity: Mapping[str, Any], record: type[Response] | type[Grade]) -> None:
        """Open `path`, or begin it with `identity`.

        Raises StoreError where it was begun with another, is damaged, or another process writes to it.
        """
        self._path, self._record = path, record
        self.found: dict[Key, Any] = {}
        """The records that are there, in the order of writing."""
        header = json.dumps({"made_with": identity}, sort_keys=True) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: IO[bytes] = path.open("ab")
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise StoreError(f"{path} cannot be written: {error}; choose another output") from None
        try:
            self._own()
            whole = self._read(header)
            if path.stat().st_size != whole:
                self._stream.truncate(whole)
            if not whole:
                self._write(header)
        except BaseException:
            self._stream.close()
            raise

    @classmethod
    def check(cls, path: Path, identity: Mapping[str, Any], record: type[Response] | type[Grade]) -> None:
        """Raises StoreError where what is there could not be gone on with; makes nothing."""
        if path.exists() or path.parent.is_file():
            cls(path, identity, record).__exit__()

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._stream.close()

    def add(self, records: Iterable[Response | Grade]) -> None:
        """Write records, whole on disk when this returns."""
        lines = []
        for record in records:
            self.found[record.key] = record
            lines.append(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self._write("".join(lines))

    def _own(self) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"{self._path}: another evaluation writes to it; wait for it, or choose another output"
            ) from None

    def _write(self, text: str) -> None:
        self._stream.write(text.encode("utf-8", "surrogatepass"))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _read(self, header: str) -> int:
        """Take in what is there; returns the size of its whole lines."""
        size = 0
        with self._path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    break  # cut short by a kill
                if number == 1:
                    self._check(header, line)
                else:
                    self._take(line, number)
                size += len(line)
        return size

    def _check(self, header: str, line: bytes) -> None:
        try:
            before, now = json.loads(line)["made_with"], json.loads(header)["made_with"]
        except (ValueError, KeyError, TypeError):
            raise StoreError(
                f"{self._path}:1 does not say what it was made with; remove the file, or choose another output"
            ) from None
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if changed:
            told = "; ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in changed[:5])
            raise StoreError(
                f"{self._path} is of another evaluation: {told}. Choose another output, or remove {self._path.parent}"
            )

    def _take(self, line: bytes, number: int) -> None:
        try:
            record = self._record(**json.loads(line.decode("utf-8", "surrogatepass")))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{self._path}:{number} is no {self._record.__name__.lower()}: {error}; remove the line"
            ) from None
        self.found[record.key] = record
