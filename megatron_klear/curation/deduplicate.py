"""Drop rows whose problem an earlier row has had: the same text in normal form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_klear.config.base import Settings

from .output import Output
from .report import Judged
from .rows import BadRow, Unusable, decode, problem_text, stream_chunks
from .run import Files, Place, Work, carry_out
from .text import exact_key


class DeduplicateSettings(Settings):
    """Keep one row of each problem, of the first file that has it."""


def run_deduplicate(files: Files, settings: DeduplicateSettings) -> dict[str, Any] | None:
    """Drop repeated problems; returns the report, None where all is there already.

    Raises DataError for what cannot be read or written.
    """
    return carry_out(files, "deduplicate", {}, lambda: _Deduplication(files))


@dataclass(frozen=True, slots=True)
class _Deduplication(Work):
    files: Files

    def judge(self, output: Output) -> Iterator[Place]:
        """Judge all rows so that of equal problems the one of the first file stays; about 200 bytes for each kept."""
        files = self.files
        seen: dict[bytes, tuple[int, int]] = {}
        for index, path in enumerate(files.inputs):
            for chunk in stream_chunks(path, files.max_row_bytes):
                for row in decode(chunk, files.max_row_bytes):
                    if isinstance(row, Unusable):
                        yield path, Judged(row.number, reason=row.kind, bad=True, details={"why": row.reason})
                        continue
                    try:
                        key = exact_key(problem_text(row.value))
                    except BadRow as error:
                        yield path, Judged(row.number, reason=error.kind, bad=True, details={"why": str(error)})
                        continue
                    first_file, first_row = seen.setdefault(key, (index, row.number))
                    if (first_file, first_row) == (index, row.number):
                        yield path, Judged(row.number, row.line)
                    else:
                        kept = {"file": str(files.inputs[first_file]), "row": first_row}
                        yield path, Judged(row.number, reason="duplicate", details={"kept": kept})
