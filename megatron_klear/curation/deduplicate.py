"""Drop rows whose problem an earlier row has had: the same text in normal form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .report import Judged
from .rows import BadRow, Unusable, decode, problem_text, stream_chunks
from .text import exact_key

Place = tuple[Path, Judged]


def deduplicate(files: list[Path], max_row_bytes: int) -> Iterator[Place]:
    """Judge all rows in order, so that of equal problems the one of the first file stays.

    Holds about 200 bytes of memory for each problem that is kept. Raises DataError where a file cannot be read.
    """
    seen: dict[bytes, tuple[int, int]] = {}
    for index, path in enumerate(files):
        for chunk in stream_chunks(path, max_row_bytes):
            for row in decode(chunk, max_row_bytes):
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
                    kept = {"file": str(files[first_file]), "row": first_row}
                    yield path, Judged(row.number, reason="duplicate", details={"kept": kept})
