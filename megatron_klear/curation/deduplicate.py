"""Drop rows whose problem an earlier row has had: the same text in normal form, or nearly the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megatron_klear.config.base import Settings
from megatron_klear.data.sources import Chunk

from .near import BANDS, SHINGLE_WORDS, NearIndex, require_rensa, rows_of_band, sketches
from .output import Output
from .report import SHOWN_CHARACTERS, Judged
from .rows import Problem, Unusable, read_problems, stream_chunks
from .run import Files, Place, Work, carry_out
from .text import exact_key


class DeduplicateSettings(Settings):
    """Keep one row of each problem, of the first file that has it."""

    near: bool = False
    """Also drop problems that are nearly the same as one that is kept."""
    min_jaccard: float = Field(default=0.7, gt=0, le=1)
    """near: share of their 5-word runs that two problems have in common, at least."""

    @model_validator(mode="after")
    def _check(self) -> DeduplicateSettings:
        if not self.near and "min_jaccard" in self.model_fields_set:
            raise ValueError("min_jaccard goes with near")
        return self


def run_deduplicate(files: Files, settings: DeduplicateSettings) -> dict[str, Any] | None:
    """Drop repeated problems; returns the report, None where all is there already.

    Raises DataError for what cannot be read or written.
    """
    named: dict[str, Any] = {}
    if settings.near:
        require_rensa()
        sketch = {"shingle_words": SHINGLE_WORDS, "bands": BANDS, "rows": rows_of_band(settings.min_jaccard)}
        named = {"near": True, "min_jaccard": settings.min_jaccard, **sketch}
    return carry_out(files, "deduplicate", named, lambda: _Deduplication(files, settings))


@dataclass(frozen=True, slots=True)
class _Deduplication(Work):
    """Of equal problems the one of the first file stays.

    Memory: about 200 bytes for each that is kept; with near ones besides about 2 KB and its text.
    """

    files: Files
    settings: DeduplicateSettings

    def judge(self, output: Output) -> Iterator[Place]:
        """Judge all rows in order."""
        files, near = self.files, None
        if self.settings.near:
            near = NearIndex(self.settings.min_jaccard)
        seen: dict[bytes, tuple[Path, int]] = {}
        places: list[tuple[Path, int]] = []
        """Of the problems in `near`."""
        chunks = ((path, chunk) for path in files.inputs for chunk in stream_chunks(path, files.max_row_bytes))
        for (path, _), read in files.map(_Reader(files.max_row_bytes, self.settings), chunks):
            for row in read:
                if isinstance(row, Unusable):
                    yield path, Judged.unusable(row)
                    continue
                first = seen.setdefault(row.key, (path, row.number))
                if first != (path, row.number):
                    yield path, _dropped(row, "duplicate", first)
                elif near is None:
                    yield path, Judged(row.number, row.line)
                elif nearest := near.nearest(row.text, row.sketch):
                    yield path, _dropped(row, "near_duplicate", places[nearest[0]], jaccard=round(nearest[1], 4))
                else:
                    near.add(row.text, row.sketch)
                    places.append(first)
                    yield path, Judged(row.number, row.line)


@dataclass(frozen=True, slots=True)
class _Keyed:
    number: int
    line: bytes
    key: bytes
    text: str
    sketch: Any
    """None where near duplicates are not asked for."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """What a worker does with a chunk."""

    max_row_bytes: int
    settings: DeduplicateSettings

    def __call__(self, task: tuple[Path, Chunk]) -> list[_Keyed | Unusable]:
        rows = list(read_problems(task[1], self.max_row_bytes))
        texts = [row.text for row in rows if isinstance(row, Problem)]
        found = iter(sketches(texts, self.settings.min_jaccard) if self.settings.near else [None] * len(texts))
        return [
            _Keyed(row.row.number, row.row.line, exact_key(row.text), row.text, next(found))
            if isinstance(row, Problem)
            else row
            for row in rows
        ]


def _dropped(row: _Keyed, reason: str, kept: tuple[Path, int], **more: float) -> Judged:
    details = {"kept": {"file": str(kept[0]), "row": kept[1]}, "problem": row.text[:SHOWN_CHARACTERS], **more}
    return Judged(row.number, reason=reason, details=details)
