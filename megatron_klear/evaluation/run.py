"""An evaluation from its settings to its table: draw what is missing, grade it, count."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_klear.config.evaluation import BenchmarkConfig, EvaluationConfig
from megatron_klear.config.files import write_text_atomically
from megatron_klear.rewards.base import RewardError, check_sources, check_time, check_truths
from megatron_klear.rewards.format import complete
from megatron_klear.rewards.open import open_pool
from megatron_klear.rewards.owner import OwnedPool
from megatron_klear.rewards.votes import vote_of
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Score

from .benchmarks import KNOWN, OWN, Problem, read_benchmark
from .page import Evaluated, write_page
from .protocols import Protocol, protocol_for
from .sampling import Source, Wanted
from .store import Grade, Key, Lines, Response, StoreError, check_model, digest
from .table import NOT_GRADED, BenchmarkResult, markdown, result_of

_log = logging.getLogger(__name__)
_GRADED_AT_A_TIME = 256
_TOLD_SECONDS = 10.0


def evaluate(config: EvaluationConfig, open_source: Callable[[], Source]) -> list[BenchmarkResult]:
    """Draw, grade and count every benchmark; goes on where the output folder's last evaluation stopped.

    Leaves result.json in each benchmark's folder, table.md and report.html beside them.

    `open_source` loads the model, once something is to be drawn. Raises UserError where problems cannot be read, a
    response cannot be had, or more than `reward.max_error_share` of a benchmark's responses cannot be graded.
    """
    benchmarks = [(benchmark, read_benchmark(benchmark)) for benchmark in config.benchmarks]
    rows = [problem for _, problems in benchmarks for problem in problems]
    check_sources((problem.data_source for problem in rows), config.reward.functions)
    check_time((problem.data_source for problem in rows), config.reward.for_rewards(), config.reward.timeout_seconds)
    check_truths(((p.place, p.data_source, p.ground_truth) for p in rows), config.reward.functions)
    if config.output.exists() and not config.output.is_dir():
        raise StoreError(f"{config.output} is no folder; choose another output")
    source = open_source()
    protocols = [protocol_of(config, benchmark, source.extension()) for benchmark, _ in benchmarks]
    for (_, problems), protocol in zip(benchmarks, protocols, strict=True):
        source.check(problems, protocol)
    for (benchmark, _), protocol in zip(benchmarks, protocols, strict=True):
        responses_made, grades_made = _made_with(config, benchmark, protocol, source)
        Lines.check(config.output / benchmark.name / "responses.jsonl", responses_made, Response)
        Lines.check(config.output / benchmark.name / "grades.jsonl", grades_made, Grade)
    check_model(config.output, source.identity())
    evaluated = []
    for (benchmark, problems), protocol in zip(benchmarks, protocols, strict=True):
        folder = config.output / benchmark.name
        responses_made, grades_made = _made_with(config, benchmark, protocol, source)
        with Lines(folder / "responses.jsonl", responses_made, Response) as lines:
            responses = _draw(config, benchmark, problems, protocol, source, lines)
        with Lines(folder / "grades.jsonl", grades_made, Grade) as lines:
            grades = _grade(config, problems, responses, source, lines, folder)
        result = result_of(benchmark.name, problems, responses, grades, protocol)
        write_text_atomically(folder / "result.json", json.dumps(asdict(result), indent=2) + "\n")
        evaluated.append(Evaluated(result=result, problems=problems, responses=responses, grades=grades))
    results = [one.result for one in evaluated]
    write_text_atomically(config.output / "table.md", markdown(results) + "\n")
    write_page(evaluated, config.output / "report.html", title=f"Evaluation of {source.identity()['model']}")
    return results


def protocol_of(config: EvaluationConfig, benchmark: BenchmarkConfig, extension: str = "") -> Protocol:
    """How a benchmark's responses are drawn; `extension` is how the model's context is extended, in words."""
    return protocol_for(
        config.protocol,
        config.sampling,
        paper_samples=KNOWN.get(benchmark.name, OWN).samples,
        samples=benchmark.samples,
        long=config.long,
        extension=extension,
    )


def _made_with(
    config: EvaluationConfig, benchmark: BenchmarkConfig, protocol: Protocol, source: Source
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a benchmark's responses, and their grades, are to have been made with."""
    responses = {
        **source.identity(),
        "benchmark": benchmark.name,
        "seed": config.seed,
        "sampling": protocol.words(),
        "thinking": config.thinking,
    }
    reward = config.reward.model_dump(mode="json", include={"scheme", "require_thinking", "functions", "code"})
    return responses, {"reward": reward}


def _draw(
    config: EvaluationConfig,
    benchmark: BenchmarkConfig,
    problems: Sequence[Problem],
    protocol: Protocol,
    source: Source,
    lines: Lines,
) -> dict[Key, Response]:
    """Every response to every problem, those that are there and those that were missing."""
    wanted = []
    for problem in problems:
        missing = tuple(n for n in range(protocol.samples) if (problem.id, n) not in lines.found)
        if missing:
            wanted.append(Wanted(problem=problem, numbers=missing))
    total = sum(len(one.numbers) for one in wanted)
    with _progress(benchmark.name, "responses", total) as more:

        def drawn(responses: Sequence[Response]) -> None:
            lines.add(responses)
            more(len(responses))

        if wanted:
            source.draw(wanted, protocol, config.seed, drawn)
    asked = {(problem.id, n) for problem in problems for n in range(protocol.samples)}
    return {key: response for key, response in lines.found.items() if key in asked}


def _grade(
    config: EvaluationConfig,
    problems: Sequence[Problem],
    responses: dict[Key, Response],
    source: Source,
    lines: Lines,
    folder: Path,
) -> dict[Key, Grade]:
    """A grade for every response; those that are there already are kept, but for failures to grade."""
    by_id = {problem.id: problem for problem in problems}
    of = {key: digest(response.text) for key, response in responses.items()}
    kept = {key for key, grade in lines.found.items() if grade.of == of.get(key) and grade.verdict not in NOT_GRADED}
    left = [one for key, one in responses.items() if key not in kept]
    with _progress(folder.name, "grades", len(left)) as more:
        if left:
            with _pool(config, problems) as pool:
                for start in range(0, len(left), _GRADED_AT_A_TIME):
                    chunk = left[start : start + _GRADED_AT_A_TIME]
                    texts = [complete(source.opening(by_id[one.problem]), one.text) for one in chunk]
                    scores = pool.grade(
                        [_request(by_id[one.problem], text) for one, text in zip(chunk, texts, strict=True)]
                    )
                    lines.add(_grades(chunk, texts, scores))
                    more(len(chunk))
    grades = {key: grade for key, grade in lines.found.items() if key in responses}
    _check_errors(config, grades, folder)
    return grades


def _pool(config: EvaluationConfig, problems: Sequence[Problem]) -> OwnedPool:
    reward = config.reward
    return open_pool(
        {problem.data_source for problem in problems},
        reward.for_rewards(),
        backend=reward.backend,
        ray_address=reward.ray_address,
        timeout_seconds=reward.timeout_seconds,
        workers=reward.workers,
        environment=reward.environment,
    )


def _request(problem: Problem, text: str) -> Request:
    return Request(problem.data_source, problem.ground_truth, text, problem.extra_info)


def _grades(responses: Sequence[Response], texts: Sequence[str], scores: Sequence[Score]) -> Iterator[Grade]:
    for response, text, score in zip(responses, texts, scores, strict=True):
        yield Grade(
            problem=response.problem,
            number=response.number,
            reward=score.reward,
            verdict=score.verdict.value,
            note=score.note,
            vote=vote_of(text, score),
            of=digest(response.text),
        )


def _check_errors(config: EvaluationConfig, grades: dict[Key, Grade], folder: Path) -> None:
    failed = [grade for grade in grades.values() if grade.verdict in NOT_GRADED]
    if len(failed) > config.reward.max_error_share * len(grades):
        raise RewardError(
            f"{len(failed)} of {len(grades)} responses of {folder.name} could not be graded, for example "
            f"{failed[0].problem} number {failed[0].number}: {failed[0].verdict} {failed[0].note}; raise "
            "reward.timeout_seconds or mend the reward, and start the same command again"
        )


@contextmanager
def _progress(name: str, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Says how far it is, every ten seconds and at the end; nothing where there is nothing to do."""
    done, start, told = 0, time.monotonic(), time.monotonic()

    def more(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if now - told >= _TOLD_SECONDS:
            told = now
            left = (total - done) * (now - start) / done
            _log.info("%s: %d of %d %s, about %d s to go", name, done, total, what, left)

    yield more
    if total:
        _log.info("%s: %d %s in %.0f s", name, total, what, time.monotonic() - start)
