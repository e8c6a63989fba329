"""Read what a run left in its folder: numbers of its steps, validation results, settings, and what is missing."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_klear.errors import UserError
from megatron_klear.runs.rollout_files import parse_object

MAX_CONFIG_CHARACTERS = 30_000
EXPECTED = {
    "sft": ("loss", "grad_norm", "learning_rate", "tokens_per_second"),
    "rl": ("reward_mean", "accuracy", "response_length_mean", "entropy", "grad_norm", "clip_region_1", "mismatch_mean"),
}


class ReportError(UserError, ValueError):
    """A report cannot be made of what was given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Values of one metric over the steps that have it; None where the value was not finite."""

    steps: list[int]
    values: list[float | None]

    def finite(self) -> list[tuple[int, float]]:
        """The (step, value) pairs that are numbers."""
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if v is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run's folder, read."""

    name: str
    folder: Path
    kind: Literal["sft", "rl"]
    metrics: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    config_text: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings by dotted key."""
    notes: list[str] = field(default_factory=list)
    """What is missing or was left out, in words for the reader of the page."""

    def names(self) -> list[str]:
        """Every numeric metric of the steps, in order of first appearance."""
        return [name for name in dict.fromkeys(n for r in self.metrics for n in r) if self.curve(name).finite()]

    def curve(self, name: str, *, validation: bool = False) -> Curve:
        """A metric over the steps, or over the validations."""
        records = [r for r in (self.validation if validation else self.metrics) if _is_number(r.get(name, ""))]
        return Curve(steps=[r["step"] for r in records], values=[_finite(r[name]) for r in records])

    @property
    def seconds(self) -> float:
        """Time spent in logged phases and steps; what ran outside of both, such as start-up, is not counted."""
        return sum(_step_seconds(record) for record in self.metrics)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; names are the folders' own, with as much of the path as tells them apart.

    Raises ReportError when there are none, or one is not the folder of a run.
    """
    if not folders:
        raise ReportError("no run was given; name at least one run folder, the `output` of its configuration")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many lines are not JSON objects (a kill may tear the last)."""
    text = path.read_text(encoding="utf-8", errors="replace")
    parsed = [parse_object(line) for line in text.split("\n") if line.strip()]
    return [record for record in parsed if record is not None], parsed.count(None)


def _read_run(folder: Path, name: str) -> Run:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ReportError(
            f"{folder} has no metrics.jsonl{'' if folder.is_dir() else ' (there is no such folder)'}; "
            "name the folder of a run, the `output` of its configuration"
        )
    notes: list[str] = []
    metrics = _steps(path, notes)
    validation_path = folder / "validation.jsonl"
    validation = _steps(validation_path, notes) if validation_path.is_file() else []
    config_text, settings = _read_config(folder / "config.toml", notes)
    is_rl = "algorithm.advantage" in settings or any("reward_mean" in r for r in metrics)
    kind: Literal["sft", "rl"] = "rl" if is_rl or (folder / "rollouts").is_dir() else "sft"
    if not metrics:
        notes.append("metrics.jsonl holds no step yet.")
    if not validation:
        notes.append("There are no validation results (no validation.jsonl, or an empty one).")
    run = Run(
        name=name,
        folder=folder,
        kind=kind,
        metrics=metrics,
        validation=validation,
        config_text=config_text,
        settings=settings,
        notes=notes,
    )
    missing = [metric for metric in EXPECTED[kind] if metrics and not run.curve(metric).steps]
    if missing:
        notes.append(f"metrics.jsonl has no {', '.join(missing)}.")
    skipped = sum(record.get("skipped") is True for record in metrics)
    if skipped:
        notes.append(f"{skipped} steps were skipped because their loss or gradient was not finite.")
    return run


def _steps(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    records, torn = read_lines(path)
    kept = [r for r in records if isinstance(r.get("step"), int)]
    bad = torn + len(records) - len(kept)
    if bad:
        notes.append(f"{bad} of {len(records) + torn} lines of {path.name} are not readable and were left out.")
    return kept


def _read_config(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        notes.append("There is no config.toml, so the settings are not known.")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        settings = dict(_flat(tomllib.loads(text)))
    except tomllib.TOMLDecodeError as error:
        notes.append(f"config.toml is not valid TOML: {error}.")
        settings = {}
    if len(text) > MAX_CONFIG_CHARACTERS:
        notes.append(f"Only the first {MAX_CONFIG_CHARACTERS} characters of config.toml are shown.")
    return text[:MAX_CONFIG_CHARACTERS], settings


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that differ from each other."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ReportError("the same run is named twice; name each run once")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _step_seconds(record: Mapping[str, Any]) -> float:
    """A record's own time; phases count where they are longer, since validation and saving lie outside of the step."""
    numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
    phases = sum(value for name, value in numbers.items() if name.startswith("seconds/"))
    return float(max(numbers.get("step_seconds", 0.0), phases))
