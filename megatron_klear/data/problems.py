"""Where problems come from: files of the Klear/verl form, or a generator that makes them from a seed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_klear.data.rows import DataError, ProblemRow, read_problem

from .arithmetic import INSTRUCTION, arithmetic_rows
from .sources import raw_rows, read_chunks, resolve_files

_COLUMNS = ("prompt", "data_source", "reward_model", "extra_info")
_REASONING_GYM = "reasoning_gym"
_TYPES = {int: (int, "a whole number"), float: (int | float, "a number"), str: (str, "a text")}
"""What a setting of the arithmetic generator may be, by the type of its default."""


class ProblemSource(Protocol):
    """One entry of `prompts.sources`: files, or a generator with its settings and how many problems it makes."""

    @property
    def files(self) -> Sequence[str]: ...

    @property
    def generator(self) -> str | None: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def count(self) -> int: ...

    @property
    def weight(self) -> float: ...


def read_problems(source: ProblemSource, key: str, seed: int) -> Iterator[tuple[str, ProblemRow]]:
    """Problems of a source, each with its place as errors name it.

    `key` is the setting to name in errors; `seed` makes a generator's problems where its settings give none.
    Raises DataError where a file, row, generator or one of its settings is wrong.
    """
    if source.generator is None:
        yield from _from_files(source.files, f"{key}.files")
        return
    name, _, task = source.generator.partition(":")
    settings = {"seed": seed, **source.settings}
    if name == "arithmetic" and not task:
        rows = _arithmetic(source.count, settings, f"{key}.settings")
    elif name == _REASONING_GYM and task:
        rows = _reasoning_gym(task, source.count, settings, key)
    else:
        raise DataError(f"{key}.generator {source.generator!r} is unknown: arithmetic, or {_REASONING_GYM}:TASK")
    for number, row in enumerate(rows, 1):
        yield f"{source.generator} problem {number}", read_problem(row)


def _from_files(patterns: Sequence[str], key: str) -> Iterator[tuple[str, ProblemRow]]:
    for path in resolve_files(patterns, key):
        for chunk in read_chunks(path, _COLUMNS):
            for number, row in raw_rows(chunk):
                where = chunk.where(number)
                try:
                    problem = read_problem(row)
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None
                yield where, problem


def _arithmetic(count: int, settings: Mapping[str, Any], key: str) -> Iterator[dict[str, Any]]:
    known = {name: p.default for name, p in inspect.signature(arithmetic_rows).parameters.items() if name != "count"}
    for name, value in settings.items():
        if name not in known:
            raise DataError(f"{key}.{name} is unknown: the arithmetic generator has {', '.join(known)}")
        types, expected = _TYPES[type(known[name])]
        if not isinstance(value, types) or isinstance(value, bool):
            raise DataError(f"{key}.{name} is {value!r}, expected {expected}")
    try:
        yield from arithmetic_rows(count, **settings)
    except ValueError as error:
        raise DataError(f"{key}: {error}") from None


def _reasoning_gym(task: str, count: int, settings: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """Problems of one reasoning-gym task; its entry travels as ground truth, for the task's own scoring.

    `threshold` among the settings is the score from which an answer is right (default 1).
    """
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            f"{key}.generator {_REASONING_GYM}:{task} needs the package reasoning-gym: pip install reasoning-gym"
        ) from None
    threshold = settings.pop("threshold", 1.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise DataError(f"{key}.settings.threshold is {threshold!r}, expected a number above 0, at most 1")
    try:
        dataset = reasoning_gym.create_dataset(task, size=count, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"{key}: reasoning-gym refuses {task} with {settings}: {error}") from None
    for entry in dataset:
        yield {
            "prompt": entry["question"] + INSTRUCTION,
            "data_source": f"{_REASONING_GYM}/{task}",
            "reward_model": {"ground_truth": {"task": task, "threshold": threshold, "entry": entry}},
        }
