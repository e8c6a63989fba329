"""Grades of responses by the rewards of training, kept so that a command that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_klear.config.base import Settings
from megatron_klear.config.rl import CodeRewardConfig
from megatron_klear.rewards.answers import normalise, read_answer
from megatron_klear.rewards.base import RewardError, RewardSettings, check_sources, check_time, check_truths
from megatron_klear.rewards.code.settings import CodeSettings
from megatron_klear.rewards.format import split_thinking
from megatron_klear.rewards.open import open_pool
from megatron_klear.rewards.owner import OwnedPool
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score, Verdict

from .lines import LineFile
from .rows import BadRow

GRADES = "grades.jsonl"
_FEWEST_JUDGED = 256
"""Before so many are graded, a few that failed say nothing of their share."""


class GradingConfig(Settings):
    """`[reward]`: how responses are graded, by the rewards of training. Thinking is cut off where there is some."""

    timeout_seconds: float = Field(default=65.0, gt=0)
    """For one response, with all tests of a program."""
    max_error_share: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of the responses cannot be graded, or not in time."""
    environment: tuple[str, ...] = ()
    """Names of environment variables that rewards of your own need."""
    functions: dict[str, str] = Field(default_factory=dict)
    """Rewards by data_source: your own by dotted path, `"my_task" = "my_module:reward"`, or a built-in by its name,
    `"my/set" = "math"`."""
    code: CodeRewardConfig = CodeRewardConfig()

    def for_rewards(self, *, programs: bool = False) -> RewardSettings:
        """The part that rewards themselves read; `programs` where responses are programs as a whole."""
        code = CodeSettings(**self.code.model_dump(), whole_programs=programs)
        return RewardSettings(require_thinking=False, functions=self.functions, code=code)

    def identity(self) -> dict[str, Any]:
        """What grades depend on."""
        return self.model_dump(mode="json", include={"functions": True, "code": True})

    def open_pool(self, data_sources: set[str], workers: int, *, programs: bool = False) -> OwnedPool:
        """Grading processes; a context manager. Raises RewardError where they would not have enough time."""
        settings = self.for_rewards(programs=programs)
        check_time(data_sources, settings, self.timeout_seconds)
        return open_pool(
            data_sources,
            settings,
            timeout_seconds=self.timeout_seconds,
            workers=workers,
            environment=self.environment,
        )


@dataclass(frozen=True, slots=True)
class Truth:
    """What a row's responses are graded by."""

    data_source: str
    ground_truth: Any
    extra_info: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """What the reward said of a response."""

    passed: bool
    score: float
    verdict: str
    """Of a program how it ended, else the reward's verdict."""
    answer: str = ""
    """The final answer in normal form, "" of programs."""


def truth_of(row: Mapping[str, Any], functions: Mapping[str, str]) -> Truth:
    """The ground truth of a row, checked.

    Raises BadRow where there is none, no reward fits its data_source, or the reward cannot read it.
    """
    source, reward = row.get("data_source"), row.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    if not isinstance(source, str) or not source or truth is None:
        raise BadRow("missing_field", "the row has no `data_source`, or no `reward_model` with `ground_truth`")
    try:
        check_sources([source], functions)
    except RewardError as error:
        raise BadRow("no_reward", str(error)) from None
    try:
        check_truths([("the row", source, truth)], functions)
    except RewardError as error:
        raise BadRow("bad_truth", str(error)) from None
    return Truth(source, truth, row.get("extra_info"))


class Grader:
    """Grades responses in a pool of processes; what the file of grades has is not graded again."""

    def __init__(
        self, config: GradingConfig, open_pool: Callable[[], OwnedPool], file: LineFile, *, programs: bool = False
    ) -> None:
        """Read the file; the pool is opened once there is something to grade. Raises StoreError where it is damaged."""
        self._config, self._file = config, file
        self._pool = cache(open_pool)
        self._settings = json.dumps([config.identity(), programs], sort_keys=True)
        self._places: dict[bytes, int] = {}
        self.judged = self.failed = 0
        """Responses so far, and those among them that could not be graded."""
        self._first_failure = ""
        file.load(lambda place, content: self._take(bytes.fromhex(content["key"]), place))

    def grade(self, asked: Sequence[tuple[Truth, str]]) -> list[Graded]:
        """Grades in the order of the responses.

        Raises RewardError where more than the settings allow cannot be graded.
        """
        keys = [self._key(truth, text) for truth, text in asked]
        new = {key: one for key, one in zip(keys, asked, strict=True) if key not in self._places}
        requests = [Request(t.data_source, t.ground_truth, text, t.extra_info) for t, text in new.values()]
        found = dict(zip(new, self._pool().grade(requests), strict=True)) if new else {}
        graded = {key: _graded(new[key][1], score) for key, score in found.items()}
        # What could not be graded is tried again by the next command.
        kept = [key for key, score in found.items() if score.verdict not in (Verdict.ERROR, Verdict.TIMEOUT)]
        lines = [{"key": key.hex(), **asdict(graded[key])} for key in kept]
        for key, place in zip(kept, self._file.add(lines), strict=True):
            self._take(key, place)
        failures = [score.note for key in keys if key in found and key not in kept for score in [found[key]]]
        self.judged, self.failed = self.judged + len(keys), self.failed + len(failures)
        self._first_failure = self._first_failure or next(iter(failures), "")
        self.check(of_at_least=_FEWEST_JUDGED)
        return [graded[key] if key in graded else self._read(key) for key in keys]

    def check(self, *, of_at_least: int = 1) -> None:
        """Raise RewardError where more than the settings allow could not be graded."""
        if self.failed > self._config.max_error_share * max(self.judged, of_at_least):
            raise RewardError(
                f"{self.failed} of {self.judged} responses could not be graded, the first: {self._first_failure}; "
                "raise reward.timeout_seconds, mend the reward, or raise reward.max_error_share"
            )

    def _key(self, truth: Truth, text: str) -> bytes:
        content = json.dumps([truth.data_source, truth.ground_truth, truth.extra_info, text], sort_keys=True)
        return hashlib.sha256(f"{self._settings}\n{content}".encode("utf-8", "surrogatepass")).digest()[:16]

    def _take(self, key: bytes, place: int) -> None:
        self._places.setdefault(key, place)

    def _read(self, key: bytes) -> Graded:
        content = self._file.read(self._places[key])
        return Graded(**{name: value for name, value in content.items() if name != "key"})


def open_grades(folder: Path) -> LineFile:
    """The file of grades in a folder."""
    return LineFile(folder / GRADES)


def _graded(text: str, score: Score) -> Graded:
    passed, program = score.verdict is Verdict.RIGHT, score.program
    if program is not None:
        return Graded(passed=passed, score=score.reward, verdict=program.status)
    read = read_answer(split_thinking(text).answer or text)
    answer = normalise(read.text) if read is not None and read.isolated else ""
    return Graded(passed=passed, score=score.reward, verdict=score.verdict.value, answer=answer)
