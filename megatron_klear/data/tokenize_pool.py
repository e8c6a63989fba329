"""Tokenizing in several processes: chunks of rows in, tokens out, in the order of the file.

Workers are fresh interpreters that run this module and talk over pipes. Unlike multiprocessing's they import neither
the entry script nor torch, are safe to start beside CUDA and threads, and end with their parent however it ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_klear.data.rows import DataError
from megatron_klear.data.sources import Chunk, parse_chunk
from megatron_klear.data.template import Turns
from megatron_klear.data.tokenizer import ChatTokenizer, TokenizerSpec

Overlong = Literal["drop", "truncate", "error"]

_LENGTH = struct.Struct("<Q")
_CHUNKS_AHEAD = 3  # per worker: keeps all of them busy while the results of a slow one are awaited


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeJob:
    """What a worker needs to know besides the rows."""

    tokenizer: TokenizerSpec
    turns: Turns
    max_length: int
    overlong: Overlong
    held_out_share: float


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One kept row: where it stands in its file, its tokens [n], and the trained [start, end) of them [k, 2]."""

    number: int
    held_out: bool
    tokens: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]


@dataclass(slots=True)
class TokenizedChunk:
    """What became of the rows of one chunk."""

    path: str
    num_bytes: int
    rows: list[TokenizedRow] = field(default_factory=list)
    read: int = 0
    overlong: int = 0
    untrained: int = 0
    longest: int = 0


def tokenize_chunk(chunk: Chunk, tokenizer: ChatTokenizer, job: TokenizeJob) -> TokenizedChunk:
    """Parse, render and encode the rows of a chunk.

    Raises DataError with file and line for a row that is malformed, or too long where that is an error.
    """
    result = TokenizedChunk(chunk.path, chunk.num_bytes)
    for number, row in parse_chunk(chunk):
        result.read += 1
        try:
            sample = tokenizer.encode_row(row, job.turns)
        except DataError as error:
            raise DataError(f"{chunk.where(number)}: {error}") from None
        tokens, trained = sample.tokens, sample.trained
        result.longest = max(result.longest, len(tokens))
        if len(tokens) > job.max_length:
            result.overlong += 1
            if job.overlong == "error":
                raise DataError(
                    f"{chunk.where(number)}: the row has {len(tokens)} tokens, above data.max_length {job.max_length}; "
                    'raise it, or set data.overlong to "drop" or "truncate"'
                )
            if job.overlong == "drop":
                continue
            tokens, trained = tokens[: job.max_length], trained[: job.max_length]
        if not trained.any():
            result.untrained += 1
            continue
        held_out = job.held_out_share > 0 and row.fraction() < job.held_out_share
        result.rows.append(TokenizedRow(number, held_out, tokens, mask_to_spans(trained)))
    return result


def mask_to_spans(trained: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """The [start, end) pairs [k, 2] of the runs of true in a mask [n]."""
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0))
    return edges.astype(np.int32).reshape(-1, 2)


def tokenize(chunks: Iterable[Chunk], job: TokenizeJob, workers: int) -> Iterator[TokenizedChunk]:
    """Tokenize chunks in `workers` processes (in this one where that is 1), results in the order of `chunks`.

    Raises what `tokenize_chunk` raises, and RuntimeError where a worker dies. No worker outlives the iteration.
    """
    if workers <= 1:
        tokenizer = ChatTokenizer(job.tokenizer)
        yield from (tokenize_chunk(chunk, tokenizer, job) for chunk in chunks)
        return
    pool: list[_Worker] = []
    threads = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    pending: deque[Future[TokenizedChunk]] = deque()

    def on_a_worker(chunk: Chunk) -> TokenizedChunk:
        worker = idle.get()
        try:
            return worker.ask(chunk)
        finally:
            idle.put(worker)

    try:
        for _ in range(workers):
            pool.append(_Worker(job))
            idle.put(pool[-1])
        for chunk in chunks:
            pending.append(threads.submit(on_a_worker, chunk))
            if len(pending) >= workers * _CHUNKS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for worker in pool:
            worker.stop()
        threads.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """A process that tokenizes, seen from its parent."""

    def __init__(self, job: TokenizeJob) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._greeting: TokenizeJob | None = job

    def ask(self, chunk: Chunk) -> TokenizedChunk:
        """Send a chunk and wait for its result."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            if self._greeting is not None:
                _send(stdin, self._greeting)
                self._greeting = None
            _send(stdin, chunk)
            answer = _receive(stdout)
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            raise RuntimeError(
                f"a tokenizing process ended with exit code {code} at {chunk.where(chunk.first)}"
                + ("; it was killed, perhaps for memory: try fewer data.workers" if code == -9 else "")
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, TokenizedChunk)
        return answer

    def stop(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """The worker: reads a job, then chunks, from standard input until it closes; answers on standard output."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not fall among the answers
    try:
        job: TokenizeJob = _receive(requests)
        tokenizer = ChatTokenizer(job.tokenizer)
        while True:
            chunk: Chunk = _receive(requests)
            try:
                _send(answers, tokenize_chunk(chunk, tokenizer, job))
            except DataError as error:
                _send(answers, error)
            except Exception as error:
                kind = type(error).__name__
                _send(answers, RuntimeError(f"{kind} near {chunk.where(chunk.first)}: {error}"))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _send(stream: IO[bytes], value: object) -> None:
    content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    size = _LENGTH.unpack(header)[0]
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)
