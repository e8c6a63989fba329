"""Building a token store: every row tokenized once, written beside its place and moved there when complete."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_klear.data.rows import DataError
from megatron_klear.data.tokenize_pool import TokenizedChunk, TokenizedRow, TokenizeJob, tokenize

from .indexed import IndexedWriter
from .sources import Chunk, read_chunks

ROWS, HELD_OUT = "rows", "held_out"
SUMMARY = "summary.json"
_BYTES_PER_WORKER = 1 << 21  # below this, starting a worker takes longer than its work


@dataclass(slots=True)
class PartSummary:
    """Counts of one part of a store."""

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0


@dataclass(slots=True)
class StoreSummary:
    """What became of every row read: it is a sample, held out, dropped as over-long, or dropped as untrained."""

    read: int = 0
    """Rows in the files."""
    overlong: int = 0
    """Rows above max_length, dropped or truncated as `overlong_action` says."""
    overlong_action: str = "drop"
    untrained: int = 0
    """Rows dropped because no token of theirs is trained."""
    longest: int = 0
    """Tokens of the longest row, before any was dropped or truncated."""
    rows: PartSummary = field(default_factory=PartSummary)
    held_out: PartSummary = field(default_factory=PartSummary)

    def __str__(self) -> str:
        held_out = f", {self.held_out.samples} held out" if self.held_out.samples else ""
        action = "truncated" if self.overlong_action == "truncate" else "dropped"
        return (
            f"{self.read} rows: {self.rows.samples} samples{held_out} with {self.rows.tokens} tokens, "
            f"{self.rows.trained_tokens} of them trained; {self.overlong} over-long {action}, "
            f"{self.untrained} without a trained token dropped; longest {self.longest} tokens"
        )

    @classmethod
    def read_from(cls, folder: Path) -> StoreSummary:
        """The summary kept beside a store."""
        value = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["summary"]
        rows, held_out = PartSummary(**value.pop(ROWS)), PartSummary(**value.pop(HELD_OUT))
        return cls(**value, rows=rows, held_out=held_out)


def build(folder: Path, files: Sequence[Path], job: TokenizeJob, workers: int, description: dict[str, Any]) -> None:
    """Tokenize `files` into the empty `folder`; summary.json, written last, names every file and its size.

    Raises what `pool.tokenize` raises, and DataError where the files hold no row at all.
    """
    total = sum(path.stat().st_size for path in files)
    workers = min(workers or _usable_cores(), max(1, total // _BYTES_PER_WORKER))
    summary = StoreSummary(overlong_action=job.overlong)
    with ExitStack() as stack:
        parts = {ROWS: stack.enter_context(_Part(folder, ROWS))}
        if job.held_out_share:
            parts[HELD_OUT] = stack.enter_context(_Part(folder, HELD_OUT))
        advance = stack.enter_context(_progress(total))
        numbers = {str(path): index for index, path in reversed(list(enumerate(files)))}
        for chunk in tokenize(_all_chunks(files), job, workers):
            _count(summary, chunk)
            for row in chunk.rows:
                parts[HELD_OUT if row.held_out else ROWS].append(row, numbers[chunk.path])
            advance(chunk.num_bytes)
        summary.rows = parts[ROWS].summary
        summary.held_out = parts[HELD_OUT].summary if HELD_OUT in parts else summary.held_out
    if not summary.read:
        raise DataError(f"{', '.join(map(str, files))}: no row at all")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    content = {**description, "summary": asdict(summary), "sizes": sizes}
    (folder / SUMMARY).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        _flush_to_disk(path)
    _flush_to_disk(folder)


def is_complete(folder: Path) -> bool:
    """Whether a store is there and every file has the size it was written with."""
    try:
        sizes = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


class _Part:
    """One set of samples of a store: tokens in IndexedDataset form, the rest as numpy arrays beside them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.summary = PartSummary()
        self._folder, self._name = folder, name
        self._tokens = IndexedWriter(folder / name)
        self._trained: list[int] = []
        self._num_spans: list[int] = [0]
        self._origins: list[tuple[int, int]] = []
        self._spans = (folder / f"{name}.spans").open("wb")

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._spans.close()
        if kind is None:
            self._tokens.close()
            self._save("trained_counts", np.array(self._trained, dtype=np.int32))
            self._save("span_offsets", np.cumsum(self._num_spans, dtype=np.int64))
            self._save("origins", np.array(self._origins, dtype=np.int64).reshape(-1, 2))

    def append(self, row: TokenizedRow, file_number: int) -> None:
        """Add a sample; its origin is the file's number and the line."""
        trained = int((row.spans[:, 1] - row.spans[:, 0]).sum())
        self._tokens.append(row.tokens)
        self._spans.write(np.ascontiguousarray(row.spans, dtype="<i4").data)
        self._trained.append(trained)
        self._num_spans.append(len(row.spans))
        self._origins.append((file_number, row.number))
        self.summary.samples += 1
        self.summary.tokens += len(row.tokens)
        self.summary.trained_tokens += trained

    def _save(self, what: str, array: np.ndarray[Any, Any]) -> None:
        np.save(self._folder / f"{self._name}.{what}.npy", array, allow_pickle=False)


def _count(summary: StoreSummary, chunk: TokenizedChunk) -> None:
    summary.read += chunk.read
    summary.overlong += chunk.overlong
    summary.untrained += chunk.untrained
    summary.longest = max(summary.longest, chunk.longest)


def _all_chunks(files: Iterable[Path]) -> Iterator[Chunk]:
    for path in files:
        yield from read_chunks(path)


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields what to call with the bytes done."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("tokenizing", total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _flush_to_disk(path: Path) -> None:  # as config.files has it, which this room may not import
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
