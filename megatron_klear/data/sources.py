"""Data files: which ones a setting names, and their rows in chunks that say where they come from."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.data.rows import ChatRow, DataError, read_row

_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = 512
_SETTLED_SECONDS = 2.0
SUFFIXES = (".jsonl", ".parquet")
"""Of files of rows."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive rows of a file, undecoded: lines of JSON, or one Arrow stream of a Parquet file's rows."""

    path: str
    first: int
    """Line (JSONL) or row (Parquet) number of the first one, counted from 1."""
    lines: list[bytes] | None
    table: bytes = b""
    num_bytes: int = 0
    """Share of the file's size, for progress."""

    def where(self, number: int) -> str:
        """A row's place, as errors name it."""
        by_line = self.lines is not None and not self.path.endswith(".json")
        return f"{self.path}:{number}" if by_line else f"{self.path}: row {number}"


def find_files(pattern: str) -> list[Path]:
    """What a setting's path or glob names, sorted; empty where nothing does.

    A path that exists is that file, and a folder that exists is that folder, brackets and stars in their names
    included: only what follows them is a glob.
    """
    if not glob.has_magic(pattern) or os.path.exists(pattern):
        return [Path(pattern)] if os.path.exists(pattern) else []
    parts = Path(pattern).parts
    literal = max((n for n in range(1, len(parts)) if os.path.isdir(os.path.join(*parts[:n]))), default=0)
    prefix = glob.escape(os.path.join(*parts[:literal])) if literal else ""
    return [Path(name) for name in sorted(glob.glob(os.path.join(prefix, *parts[literal:]), recursive=True))]


def nothing_found(pattern: str) -> str:
    """That `find_files` found nothing, in words."""
    what = f"no file matches {pattern}" if glob.has_magic(pattern) else f"{pattern} does not exist"
    return f"{what} (the current directory is {Path.cwd()})"


def file_problem(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str | None:
    """Why a file cannot be read as rows, in words that name it; None where it can."""
    if path.is_dir():
        return f"{path} is not a file but a folder; name its files, for example '{path}/*.jsonl'"
    if not path.is_file():
        return f"{path} does not exist"
    if path.suffix not in suffixes:
        return f"{path} is neither {' nor '.join(suffixes)}"
    if path.stat().st_size == 0:
        return f"{path} is empty; remove it or write rows to it"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read; check its permissions"
    return None


def resolve_files(patterns: Sequence[str], key: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Files that `patterns` (paths or globs) name, in that order, those of one glob sorted.

    `key` is the setting to name in errors. Raises DataError where one is missing, empty, matches nothing, or has none
    of the suffixes.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = find_files(pattern)
        if not found:
            raise DataError(f"{key}: {nothing_found(pattern)}")
        files += [path for path in found if len(found) == 1 or path.is_file()]
    for path in files:
        if problem := file_problem(path, suffixes):
            raise DataError(f"{key}: {problem}")
    return files


SUPERVISED_COLUMNS = ("messages", "prompt", "response", "tools")


def read_chunks(path: Path, columns: Sequence[str] | None = SUPERVISED_COLUMNS) -> Iterator[Chunk]:
    """Stream a file as chunks of about a megabyte, or of 512 rows; of a Parquet file only `columns`, None for all.

    A file that ends in .gz is unpacked on the way. Raises DataError where it or a Parquet file cannot be read.
    """
    if path.suffix == ".parquet":
        return _parquet_chunks(path, columns)
    return _unpacked_chunks(path) if path.suffix == ".gz" else _jsonl_chunks(path)


def parse_chunk(chunk: Chunk) -> Iterator[tuple[int, ChatRow]]:
    """Rows of a chunk, each with its line or row number.

    Raises DataError with file and line where a row is malformed.
    """
    for number, row in raw_rows(chunk):
        try:
            yield number, read_row(row)
        except DataError as error:
            raise DataError(f"{chunk.where(number)}: {error}") from None


def raw_rows(chunk: Chunk) -> Iterator[tuple[int, object]]:
    """Decoded rows of a chunk before any check of their keys, each with its line or row number.

    Raises DataError with file and line where one is not JSON.
    """
    if chunk.lines is None:
        yield from enumerate(_table_rows(chunk.table), chunk.first)
        return
    for number, line in enumerate(chunk.lines, chunk.first):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{chunk.where(number)}: not valid JSON ({error})") from None
        yield number, row


def file_digest(path: Path, memo: Path) -> str:
    """SHA-256 of a file's content, remembered under the folder `memo` by path, size, times and inode.

    A file written within the last two seconds is not remembered: it could change again within one clock tick.
    """
    before = path.stat()
    identity = (str(path.resolve()), before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino)
    entry = memo / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    try:
        known = entry.read_text()
        if len(known) == 64:
            return known
    except OSError:
        pass
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise DataError(f"{path} changed while it was being read; start again when it is complete")
    if time.time() - max(after.st_mtime, after.st_ctime) > _SETTLED_SECONDS:
        write_atomically(entry, digest.encode())
    return digest


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)  # a cache may be shared; mkstemp's file is its owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _unpacked_chunks(path: Path) -> Iterator[Chunk]:
    try:
        yield from _jsonl_chunks(path, gzip.open)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from None


def _jsonl_chunks(path: Path, opened: Callable[..., Any] = open) -> Iterator[Chunk]:
    lines: list[bytes] = []
    size, first = 0, 1
    with opened(path, "rb") as stream:
        for line in stream:
            if first == 1 and not lines:
                line = line.removeprefix(b"\xef\xbb\xbf")
            lines.append(line)
            size += len(line)
            if size >= _CHUNK_BYTES or len(lines) >= _CHUNK_ROWS:
                yield Chunk(str(path), first, lines, num_bytes=size)
                first, lines, size = first + len(lines), [], 0
    if lines:
        yield Chunk(str(path), first, lines, num_bytes=size)


def _parquet_chunks(path: Path, columns: Sequence[str] | None) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            present = [name for name in file.schema_arrow.names if columns is None or name in columns]
            rows = max(file.metadata.num_rows, 1)
            per_row = path.stat().st_size / rows
            first = 1
            for batch in file.iter_batches(batch_size=_CHUNK_ROWS // 2, columns=present):
                buffer = io.BytesIO()
                with pa.ipc.new_stream(buffer, batch.schema) as writer:
                    writer.write_batch(batch)
                share = round(per_row * batch.num_rows)
                yield Chunk(str(path), first, None, buffer.getvalue(), num_bytes=share)
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None


def _table_rows(table: bytes) -> list[object]:
    import pyarrow as pa

    with pa.ipc.open_stream(table) as reader:
        rows: list[object] = reader.read_all().to_pylist()
    return rows
