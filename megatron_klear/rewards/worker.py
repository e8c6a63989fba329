"""The grading process: a fresh interpreter that reads requests from a pipe and answers each with a score.

It imports neither torch nor the entry script. Messages are a length and their bytes: requests are pickles of its
parent; answers are JSON, since code that a reward runs may write them itself, and a pickle would run in the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import resource
import signal
import struct
import sys
from dataclasses import dataclass, replace
from typing import IO, Any

from megatron_klear.types import ProgramResult, Score, Verdict

from .base import Reward, RewardError, RewardSettings, judge, prepare, resolve
from .truth_store import Truth, TruthReadError, TruthRef, read_truth

LENGTH = struct.Struct("<Q")
_ORPHAN_SECONDS = 5  # of computing past the limit, for a worker whose parent is gone and that is not killed with it
_PR_SET_PDEATHSIG = 1
TIMED_OUT = "timed out"


@dataclass(frozen=True, slots=True)
class Request:
    """One response to grade; `response` is complete with what the prompt wrote of its thinking.

    `ground_truth` may be a TruthRef, the place on disk of the ground truth and of the row's extra_info: the grading
    process reads them there. Raises ValueError where extra_info is given besides.
    """

    data_source: str
    ground_truth: Any
    response: str
    extra_info: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.ground_truth, TruthRef) and self.extra_info is not None:
            raise ValueError("extra_info is given, and lies on disk with the ground truth")


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
MAX_ANSWER_BYTES = 1 << 20
_MAX_NOTE = 2000


class _TimeIsUpError(BaseException):
    """Raised into a reward that takes too long; no `except Exception` of a library stops it."""


def pack(value: object) -> bytes:
    """A request as bytes."""
    content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(content)) + content


class NoAnswerError(Exception):
    """What came from a grading process is none of its answers."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A worker cannot begin, and why."""

    words: str


Answer = Score | Refused | str
"""A score, READY, TIMED_OUT, or the words of what went wrong with a response."""


def pack_answer(number: int, answer: Answer) -> bytes:
    """An answer to the request of that number, with its length in front; 0 is the job itself."""
    encoded = answer_json(number, answer)
    return LENGTH.pack(len(encoded)) + encoded


def answer_json(number: int, answer: Answer) -> bytes:
    """An answer to the request of that number as JSON."""
    content: dict[str, Any] = {"number": number}
    if isinstance(answer, Score):
        told: dict[str, Any] = {
            "reward": answer.reward,
            "verdict": answer.verdict.value,
            "note": answer.note[:_MAX_NOTE],
        }
        if answer.vote:
            told["vote"] = answer.vote[:_MAX_NOTE]
        if answer.program is not None:
            told["program"] = [answer.program.status, answer.program.passed, answer.program.total]
        content["score"] = told
    elif isinstance(answer, Refused):
        content["refused"] = answer.words
    else:
        content["words"] = answer
    return json.dumps(content).encode()


def read_answer(content: bytes) -> tuple[int, Answer]:
    """An answer and the number it is for, from bytes whoever wrote them. Raises NoAnswerError where they are none."""
    try:
        told = json.loads(content)
        number = int(told.pop("number"))
        ((kind, value),) = told.items()
        if kind == "score":
            return number, _read_score(value)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NoAnswerError(f"no answer of a grading process: {error}") from None
    if kind == "refused":
        return number, Refused(str(value))
    if kind == "words":
        return number, str(value)
    raise NoAnswerError(f"no answer of a grading process: {kind!r}")


def _read_score(value: Any) -> Score:
    program = None
    if "program" in value:
        status, passed, total = value["program"]
        program = ProgramResult(str(status), int(passed), int(total))
    verdict = Verdict(value["verdict"])
    note, vote = str(value["note"]), str(value.get("vote", ""))
    return Score(reward=float(value["reward"]), verdict=verdict, note=note, program=program, vote=vote)


def serve() -> None:
    """Read a job, then requests, from standard input until it closes; answer on standard output.

    The first answer is READY, or why a reward could not be imported or tried.
    """
    _end_with_parent()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a reward prints must not fall among the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    with contextlib.suppress(EOFError, BrokenPipeError):
        job: WorkerJob = _receive(requests)
        rewards: dict[str, Reward] = {}
        try:
            for data_source in job.data_sources:
                rewards[data_source] = resolve(data_source, job.settings)
                prepare(rewards[data_source])
        except RewardError as error:
            _send(answers, 0, Refused(str(error)))
            return
        limit_memory(job.memory_bytes)
        for trial in job.trials:
            words = _grade_in_time(trial, rewards, job)
            if isinstance(words, str) and words != TIMED_OUT:  # the first call may be slow
                _send(answers, 0, _failed_trial(trial, words))
                return
        _send(answers, 0, READY)
        while True:
            number, request = _receive(requests)
            _send(answers, number, _grade_in_time(request, rewards, job))


def _end_with_parent() -> None:
    """Be killed, on Linux, when the thread that started this process is gone, whatever a reward is at or waits for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _failed_trial(trial: Request, words: str) -> Refused:
    try:
        truth = str(_truth(trial).ground_truth)
    except TruthReadError as error:
        return Refused(str(error))
    return Refused(
        f"the reward of data_source {trial.data_source!r} failed on a made-up response, {trial.response!r}, to a "
        f"problem with the ground truth {truth[:80]!r}: {words}; a reward must judge any text: mend "
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
        truth = _truth(request)
        score = judge(
            rewards[request.data_source],
            request.response,
            truth.ground_truth,
            data_source=request.data_source,
            extra_info=truth.extra_info,
        )
        return replace(score, reward=float(score.reward), verdict=Verdict(score.verdict), note=str(score.note))
    except TruthReadError as error:
        return str(error)
    except SystemExit as error:
        return f"the reward called sys.exit, exit code {error.code}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


def _truth(request: Request) -> Truth:
    """What the reward is given of the problem, read from disk where the request holds a reference."""
    if isinstance(request.ground_truth, TruthRef):
        return read_truth(request.ground_truth, request.data_source)
    return Truth(request.data_source, request.ground_truth, request.extra_info)


def _send(stream: IO[bytes], number: int, answer: Answer) -> None:
    stream.write(pack_answer(number, answer))
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
