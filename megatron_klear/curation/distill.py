"""Draw responses of a teacher to the prompts of rows, and write them as rows for SFT."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, model_validator

from megatron_klear.config.base import Settings
from megatron_klear.data.rows import DataError, read_row
from megatron_klear.rewards.format import CLOSE, OPEN

from .draw import TeacherConfig, TeacherSampling, Wanted, draw, wanted_of
from .grading import GRADES
from .output import Output
from .report import Judged, Report
from .response_store import Drawn, ResponseStore
from .rows import BadRow, Row, Unusable
from .run import Files, Place, Work, carry_out
from .spending import Ledger

STORE = "responses.jsonl"
_CARRIED = ("data_source", "reward_model", "extra_info")
"""Keys of a row that its responses keep, so that they can be graded later."""
_log = logging.getLogger(__name__)


class DistillSettings(Settings):
    """Draw responses of a teacher to the prompts of rows, and write them as rows for SFT."""

    samples: PositiveInt = 16
    """Responses to each prompt."""
    keep_truncated: bool = False
    """Also write responses that were cut at sampling.max_tokens; they are counted in any case."""
    recorded: bool = False
    """Ask nothing: write the rows of what the store has, and count the rest as missing."""
    store: Path | None = None
    """Folder of responses.jsonl, which only grows and is where a command that was stopped goes on; several outputs may
    share one. Unset is the output's folder."""
    endpoint: TeacherConfig = TeacherConfig()
    sampling: TeacherSampling = TeacherSampling()

    @model_validator(mode="after")
    def _check(self) -> DistillSettings:
        if not self.endpoint.model:
            raise ValueError("endpoint.model is not set: the name under which the servers know the teacher")
        if not self.endpoint.urls and not self.recorded:
            raise ValueError("endpoint.urls is not set: where the teacher is served; or pass recorded")
        return self


def run_distill(files: Files, settings: DistillSettings) -> dict[str, Any] | None:
    """Draw what the store lacks and write rows; returns the report, None where all is there already.

    Raises DataError for what cannot be read or written, EndpointError where the teacher cannot be asked, and
    SpendLimitError where that would cost too much.
    """
    path = store_path(files, settings.store)
    named = {
        "samples": settings.samples,
        "keep_truncated": settings.keep_truncated,
        "model": settings.endpoint.model,
        "sampling": settings.sampling.model_dump(),
        **({"recorded": True} if settings.recorded else {}),
    }
    read = {"store": [path]} if settings.recorded else None
    return carry_out(files, "distill", named, lambda: _Distillation(files, settings, path), read=read)


def store_path(files: Files, folder: Path | None) -> Path:
    """Where responses are kept, which is also the folder of grades.

    Raises DataError where the output would take the place of one of them.
    """
    path = (folder or files.output.parent) / STORE
    if files.output.resolve() in (path.resolve(), path.with_name(GRADES).resolve()):
        raise DataError(
            f"--output {files.output} is where responses or grades are kept; choose another name or --store"
        )
    return path


def draw_missing(
    files: Files,
    endpoint: TeacherConfig,
    sampling: TeacherSampling,
    wanted: Iterable[Wanted],
    store: ResponseStore,
) -> None:
    """Draw what the store lacks and tell what was spent. Raises as `draw` does."""
    ledger = Ledger(store, (endpoint.input_price, endpoint.output_price), endpoint.max_spend)
    _log.info("%s: before, %s", store.path, ledger.words())
    try:
        draw(endpoint, sampling, wanted, store, ledger, files.progress)
    finally:
        _log.info("%s: now, %s", store.path, ledger.words())


class _Distillation(Work):
    """Drawing, then a pass over the rows in order, so that the order of arrival leaves no trace."""

    def __init__(self, files: Files, settings: DistillSettings, path: Path) -> None:
        self._files, self._settings, self._path = files, settings, path
        self._finishes: Counter[str] = Counter()
        self._tokens = [0, 0]

    def judge(self, output: Output) -> Iterator[Place]:
        """Rows of all samples of the first prompt, then those of the second, and so on."""
        if self._files.strict:  # before anything is paid for
            yield from (place for place in self._judged(None) if place[1].bad)
        settings = self._settings
        with ResponseStore(self._path, settings.endpoint.model) as store:
            if not settings.recorded:
                draw_missing(self._files, settings.endpoint, settings.sampling, self._wanted(), store)
            yield from self._judged(store)

    def finish(self, report: Report) -> dict[str, Any]:
        """How the responses ended, and their tokens."""
        prompt, completion = self._tokens
        return {
            "teacher": self._settings.endpoint.model,
            "sampling": self._settings.sampling.model_dump(),
            "finishes": dict(sorted(self._finishes.items())),
            "tokens": {"prompt": prompt, "completion": completion},
        }

    def _wanted(self) -> Iterator[Wanted]:
        for _, place, row in self._files.rows():
            if isinstance(row, Row):
                try:
                    yield from self._of(row, place)
                except BadRow:
                    continue  # counted when the rows are written

    def _of(self, row: Row, place: str = "") -> Iterator[Wanted]:
        settings = self._settings
        return wanted_of(row.value, place, settings.endpoint.model, settings.sampling, settings.samples)

    def _judged(self, store: ResponseStore | None) -> Iterator[Place]:
        """Where there is no store, the rows that cannot be used and nothing of the others."""
        for path, _, row in self._files.rows():
            if isinstance(row, Unusable):
                yield path, Judged.unusable(row)
                continue
            try:
                wanted = list(self._of(row))
            except BadRow as error:
                yield path, Judged.unusable(error.at(row.number))
                continue
            if store is not None:
                yield from ((path, self._response(row, one, store.get(one.key))) for one in wanted)

    def _response(self, row: Row, one: Wanted, drawn: Drawn | None) -> Judged:
        if drawn is None:
            return Judged(row.number, reason="missing", details={"sample": one.sample})
        self._finishes[drawn.finish] += 1
        self._tokens[0] += drawn.prompt_tokens
        self._tokens[1] += drawn.completion_tokens
        reason, details = why_none(drawn), {"sample": one.sample}
        if reason and not (reason == "truncated" and self._settings.keep_truncated):
            return Judged(row.number, reason=reason, details={**details, "why": drawn.why or drawn.finish})
        answer = {"role": "assistant", "content": with_thinking_opened(drawn.text)}
        made = {
            "messages": [*one.messages, answer],
            "teacher": drawn.model,
            "sample": one.sample,
            "finish": drawn.finish,
            **{name: row.value[name] for name in _CARRIED if row.value.get(name) is not None},
        }
        try:
            read_row(made)
            return Judged(row.number, json.dumps(made, ensure_ascii=False).encode())
        except (DataError, UnicodeEncodeError) as error:
            return Judged(row.number, reason="unusable", details={**details, "why": str(error)})


def why_none(drawn: Drawn) -> str:
    """Why a response is none to train on: `truncated`, `refused`, `empty`; "" where it is one."""
    if drawn.finish == "length":
        return "truncated"
    if drawn.finish != "stop":
        return "refused"
    return "" if drawn.text.rpartition(CLOSE)[2].strip() else "empty"


def with_thinking_opened(text: str) -> str:
    """The text with `<think>` in front where it closes a thinking that the prompt's template had opened."""
    return f"{OPEN}\n{text}" if CLOSE in text and OPEN not in text.partition(CLOSE)[0] else text
