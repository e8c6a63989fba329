"""The grading process: a fresh interpreter that reads requests from a pipe and answers each with a score.

It imports neither torch nor the entry script. Messages are a length and a pickle.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from typing import IO, Any

from megatron_klear.types import Score, Verdict

from .base import Reward, RewardError, RewardSettings, judge, resolve

LENGTH = struct.Struct("<Q")
_ORPHAN_SECONDS = 5  # of computing past the limit: only a worker whose parent is gone lives to see it
TIMED_OUT = "timed out"


@dataclass(frozen=True, slots=True)
class Request:
    """One response to grade; `response` is complete with what the prompt wrote of its thinking."""

    data_source: str
    ground_truth: Any
    response: str
    extra_info: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerJob:
    """What a worker is told at its start."""

    settings: RewardSettings
    data_sources: tuple[str, ...]
    """Whose rewards to import before it says that it is ready."""
    timeout_seconds: float
    memory_bytes: int
    trials: tuple[Request, ...] = ()
    """Made-up responses, which every reward must be able to judge before the worker is ready."""


READY = "ready"


class _TimeIsUpError(BaseException):
    """Raised into a reward that takes too long; no `except Exception` of a library stops it."""


def pack(value: object) -> bytes:
    """A message as bytes."""
    content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(content)) + content


def serve() -> None:
    """Read a job, then requests, from standard input until it closes; answer on standard output.

    The first answer is READY, or the RewardError that a reward could not be imported for.
    """
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a reward prints must not fall among the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    with contextlib.suppress(EOFError, BrokenPipeError):
        job: WorkerJob = _receive(requests)
        rewards: dict[str, Reward] = {}
        try:
            for data_source in job.data_sources:
                rewards[data_source] = resolve(data_source, job.settings)
        except RewardError as error:
            _send(answers, error)
            return
        limit_memory(job.memory_bytes)
        for trial in job.trials:
            words = _grade_in_time(trial, rewards, job)
            if isinstance(words, str) and words != TIMED_OUT:  # the first call may be slow
                _send(answers, _failed_trial(trial, words))
                return
        _send(answers, READY)
        while True:
            request: Request = _receive(requests)
            _send(answers, _grade_in_time(request, rewards, job))


def _failed_trial(trial: Request, words: str) -> RewardError:
    return RewardError(
        f"the reward of data_source {trial.data_source!r} failed on a made-up response, {trial.response!r}, to a "
        f"problem with the ground truth {str(trial.ground_truth)[:80]!r}: {words}; a reward must judge any text: mend "
        "it, or the row that it cannot use"
    )


def limit_memory(memory_bytes: int) -> None:
    """Make allocations beyond this address space fail in this process, where the platform has such a limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _grade_in_time(request: Request, rewards: dict[str, Reward], job: WorkerJob) -> Score | str:
    """Grade under two clocks of the worker's own, besides the parent's that kills it.

    The first raises an exception, which spares a new process where Python code is running. One multiplication of large
    integers can hold the interpreter for hours, so that no exception gets in: then the parent's kill ends it, or the
    kernel's limit on computing time where the parent is gone.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime + job.timeout_seconds) + _ORPHAN_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        signal.signal(signal.SIGALRM, _raise_time_is_up)
        signal.setitimer(signal.ITIMER_REAL, job.timeout_seconds)
        try:
            return _grade(request, rewards, job.settings)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeIsUpError:
        return TIMED_OUT


def _raise_time_is_up(*_: object) -> None:
    raise _TimeIsUpError


def _grade(request: Request, rewards: dict[str, Reward], settings: RewardSettings) -> Score | str:
    """A score, or the words of what went wrong."""
    try:
        if request.data_source not in rewards:
            rewards[request.data_source] = resolve(request.data_source, settings)
        score = judge(
            rewards[request.data_source],
            request.response,
            request.ground_truth,
            data_source=request.data_source,
            extra_info=request.extra_info,
        )
        return Score(reward=float(score.reward), verdict=Verdict(score.verdict), note=str(score.note))
    except SystemExit as error:
        return f"the reward called sys.exit, exit code {error.code}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


def _send(stream: IO[bytes], value: object) -> None:
    stream.write(pack(value))
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        raise EOFError
    (size,) = LENGTH.unpack(header)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)
