"""Jobs, requests and scores as JSON in utf-8, for graders that are no child of this process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .base import RewardSettings
from .code.settings import CodeSettings
from .plain import from_json, to_json
from .truth_store import TruthRef
from .worker import Answer, NoAnswerError, Request, WorkerJob, read_answer


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteJob:
    """What a grader on any node is told at its start."""

    job: WorkerJob
    environment: tuple[str, ...] = ()
    """Names of the variables that grading processes get besides `process.ENVIRONMENT`."""
    variables: dict[str, str]
    """Those of them that are set where the run is; they need not be on the grader's node."""
    paths: tuple[str, ...]
    """Where the run finds modules; a module of [reward.functions] must be there on every node."""
    folder: str
    """Working directory of the run, which a grader takes where it exists."""


def write_job(job: RemoteJob) -> bytes:
    """Raises PlainError where a trial's ground truth has no form as JSON."""
    fields = {name: getattr(job, name) for name in ("variables", "folder")}
    fields |= {"environment": list(job.environment), "paths": list(job.paths)}
    functions = job.job.settings.functions
    settings = asdict(job.job.settings) | {"functions": None if functions is None else dict(functions)}
    worker = {name: getattr(job.job, name) for name in ("timeout_seconds", "memory_bytes")}
    worker |= {"data_sources": list(job.job.data_sources), "trials": [_fields(trial) for trial in job.job.trials]}
    return to_json({**fields, "settings": settings, "worker": worker})


def read_job(content: bytes) -> RemoteJob:
    """What `write_job` wrote."""
    told: dict[str, Any] = from_json(content)
    settings, worker = told.pop("settings"), told.pop("worker")
    packages = tuple(settings["code"]["packages"])
    job = WorkerJob(
        settings=RewardSettings(**settings | {"code": CodeSettings(**settings["code"] | {"packages": packages})}),
        data_sources=tuple(worker.pop("data_sources")),
        trials=tuple(_request(fields) for fields in worker.pop("trials")),
        **worker,
    )
    paths, environment = tuple(told.pop("paths")), tuple(told.pop("environment"))
    return RemoteJob(job=job, paths=paths, environment=environment, **told)


def write_request(request: Request) -> bytes:
    """Raises PlainError where the ground truth or extra_info has no form as JSON."""
    return to_json(_fields(request))


def read_request(content: bytes) -> Request:
    """What `write_request` wrote."""
    return _request(from_json(content))


def read_told(content: object) -> Answer:
    """What a grader answered: a score, READY, or why it cannot begin. Raises NoAnswerError for anything else."""
    if not isinstance(content, bytes):
        raise NoAnswerError(f"no answer of a grader: {type(content).__name__}")
    return read_answer(content)[1]


def _fields(request: Request) -> list[Any]:
    truth = request.ground_truth
    place = [truth.path, truth.offset, truth.length] if isinstance(truth, TruthRef) else None
    return [request.data_source, None if place else truth, request.response, request.extra_info, place]


def _request(fields: list[Any]) -> Request:
    data_source, ground_truth, response, extra_info, place = fields
    return Request(data_source, TruthRef(*place) if place else ground_truth, response, extra_info)
