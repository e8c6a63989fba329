"""Known benchmarks: what their files look like, how they are asked, what others reached on them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.config.evaluation import BenchmarkConfig
from megatron_klear.data.prompts import problem_id
from megatron_klear.data.rows import DataError, Message
from megatron_klear.data.sources import find_files, nothing_found, raw_rows, read_chunks

from . import readers


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem of a benchmark; `id` depends on the problem alone."""

    id: str
    messages: tuple[Message, ...]
    data_source: str
    ground_truth: Any
    extra_info: Any = None
    place: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A figure to stand beside: whose, how much, and how it was drawn."""

    model: str
    score: float
    protocol: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """What is known of a benchmark by its name."""

    read: readers.Reader
    samples: int = 1
    """Responses to each problem in the paper."""
    since: str = ""
    until: str = ""
    """Contests that the name stands for, where the settings say nothing else."""
    what: str = ""
    published: Sequence[Published] = ()

    @property
    def has_dates(self) -> bool:
        """Whether `since` and `until` choose among its rows."""
        return self.read is readers.livecodebench

    @property
    def has_subsets(self) -> bool:
        """Whether `subset` does."""
        return self.read not in (readers.livecodebench, readers.own, readers.humaneval, readers.mbpp)


def read_benchmark(config: BenchmarkConfig) -> list[Problem]:
    """The problems of a benchmark, in the order of its files; equal ones are told apart by `#2`.

    Raises DataError with file and row where one cannot be read, and where none is left.
    """
    known = KNOWN.get(config.name, OWN)
    for key, there in (("subset", known.has_subsets), ("since", known.has_dates), ("until", known.has_dates)):
        if getattr(config, key) and not there:
            raise DataError(
                f"benchmark {config.name}: its rows have nothing that `{key}` could choose by; leave it out"
            )
    config = config.model_copy(update={"since": config.since or known.since, "until": config.until or known.until})
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for place, row in _rows(config):
        try:
            found = known.read(_an_object(row), config)
        except DataError as error:
            unknown = "" if config.name in KNOWN else f"; {config.name} is no benchmark that is known by name"
            near = difflib.get_close_matches(config.name.lower(), KNOWN, n=1)
            meant = f", did you mean {near[0]}?" if unknown and near else ""
            raise DataError(f"{place}: {error}{unknown}{meant}") from None
        if found is None:
            continue
        name = problem_id(found)
        seen[name] = seen.get(name, 0) + 1
        problems.append(
            Problem(
                id=name if seen[name] == 1 else f"{name}#{seen[name]}",
                messages=found.messages,
                data_source=found.data_source,
                ground_truth=found.ground_truth,
                extra_info=found.extra_info,
                place=place,
            )
        )
        if config.limit is not None and len(problems) == config.limit:
            break
    if not problems:
        raise DataError(f"benchmark {config.name}: no problem is left of {', '.join(config.files)}")
    return problems


def _rows(config: BenchmarkConfig) -> Iterator[tuple[str, object]]:
    if not config.files:
        raise DataError(f"benchmark {config.name}: `files` is empty; name the file that holds its problems")
    for pattern in config.files:
        paths = find_files(pattern)
        if not paths:
            raise DataError(f"benchmark {config.name}: {nothing_found(pattern)}")
        for path in paths:
            yield from _rows_of(path)


def _rows_of(path: Path) -> Iterator[tuple[str, object]]:
    if path.suffix == ".json":
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        if not isinstance(entries, list):
            raise DataError(f"{path}: expected a list of problems")
        yield from ((f"{path}: entry {number}", entry) for number, entry in enumerate(entries, 1))
        return
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise DataError(f"{path} is neither .jsonl, .jsonl.gz, .json nor .parquet")
    for chunk in read_chunks(path, None):
        yield from ((chunk.where(number), row) for number, row in raw_rows(chunk))


def _an_object(row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError("the row is no object")
    return row


OWN = Benchmark(read=readers.own, what="rows with `prompt`, `data_source` and `reward_model.ground_truth`")
_KLEAR = "avg@64, temperature 0.6, top_p 0.95"
_KLEAR_CODE = "avg@8, temperature 0.6, top_p 0.95"
_QWEN = "as Qwen publishes it: temperature 0.6, top_p 0.95, top_k 20"


def _scores(
    sft: float, at_32k: float, at_64k: float, qwen3: float, protocol: str, *, measured_by_klear: bool = False
) -> tuple[Published, ...]:
    """Table 1 of arXiv 2508.07629."""
    return (
        Published(model="Klear-Reasoner-8B-SFT", score=sft, protocol=f"{protocol}, 32K"),
        Published(model="Klear-Reasoner-8B", score=at_32k, protocol=f"{protocol}, 32K"),
        Published(model="Klear-Reasoner-8B", score=at_64k, protocol=f"{protocol}, 64K by YaRN 2.5"),
        Published(model="Qwen3-8B", score=qwen3, protocol="measured by Klear" if measured_by_klear else _QWEN),
    )


KNOWN: dict[str, Benchmark] = {
    "aime24": Benchmark(
        read=readers.maths("aime24"),
        samples=64,
        what="AIME 2024, 30 problems",
        published=_scores(75.6, 83.2, 90.5, 76.0, _KLEAR),
    ),
    "aime25": Benchmark(
        read=readers.maths("aime25"),
        samples=64,
        what="AIME 2025, 30 problems",
        published=_scores(70.1, 75.6, 83.2, 67.3, _KLEAR),
    ),
    "hmmt_feb_2025": Benchmark(
        read=readers.maths("hmmt_feb_2025"),
        samples=64,
        what="HMMT of February 2025, 30 problems",
        published=_scores(57.6, 60.3, 70.8, 44.7, _KLEAR, measured_by_klear=True),
    ),
    "math500": Benchmark(read=readers.maths("math-500"), samples=4, what="MATH-500"),
    "amc": Benchmark(read=readers.maths("amc"), samples=16, what="AMC 12 of 2022 and 2023"),
    "minerva": Benchmark(read=readers.maths("minerva"), samples=4, what="Minerva's OCW courses"),
    "gsm8k": Benchmark(read=readers.maths("gsm8k"), samples=1, what="GSM8K, `question` and `answer` with ####"),
    "humaneval": Benchmark(read=readers.humaneval, samples=1, what="HumanEval's own rows"),
    "mbpp": Benchmark(read=readers.mbpp, samples=1, what="MBPP's own rows"),
    "livecodebench_v5": Benchmark(
        read=readers.livecodebench,
        samples=8,
        what="LiveCodeBench's own rows, contests of 2024-08-01 to 2025-01-31",
        since="2024-08-01",
        until="2025-02-01",
        published=_scores(58.5, 61.6, 66.0, 57.5, _KLEAR_CODE),
    ),
    "livecodebench_v6": Benchmark(
        read=readers.livecodebench,
        samples=8,
        what="LiveCodeBench's own rows, contests of 2025-02-01 to 2025-04-30",
        since="2025-02-01",
        until="2025-05-01",
        published=_scores(49.6, 53.1, 58.1, 48.4, _KLEAR_CODE, measured_by_klear=True),
    ),
}
"""By name. Scores are percentages."""
