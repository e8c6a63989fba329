"""Resumed equals uninterrupted: a run against the same run killed at random instants and started again.

Compared are the final checkpoints (every weight and optimizer tensor bitwise, and all state beside them), each step's
record in metrics.jsonl, and the position in the data. Going on in another layout is compared within a tolerance.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_klear.config.base import SFTConfig
from megatron_klear.config.checks import check_plan
from megatron_klear.config.start import Start
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.compare import compare_checkpoints
from megatron_klear.runs import folder as run_folder
from megatron_klear.verify.killed_run import (
    Killed,
    at_output,
    plan_kills,
    read_metrics,
    run_in_layout,
    run_killed,
    run_whole,
)
from megatron_klear.verify.layouts import Layout

_TIMINGS = ("tokens_per_second", "step_seconds", "sync_seconds", "mfu")
_SHOWN = 5  # places named where many differ


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was compared."""

    name: str
    passed: bool | None
    """None where it was not possible."""
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeReport:
    """What came of it. `folder` holds the runs and their logs where a check failed, None where all is removed."""

    kills: tuple[Killed, ...]
    checks: tuple[Check, ...]
    folder: Path | None

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(check.passed is not False for check in self.checks)


def verify_resume(
    start: Start,
    *,
    steps: int,
    kills: int,
    layouts: Sequence[Layout] = (),
    tolerance: float,
    folder: Path | None = None,
    told: Callable[[str], None] = print,
) -> ResumeReport:
    """Train `steps` steps uninterrupted, then with `kills` kills, then from the middle in each of `layouts`.

    The runs lie in a new folder beside the run's own output, which is not touched.
    """
    start.config.output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=folder or start.config.output.parent))
    start = replace(start, config=_settings(start.config, steps))
    whole, killed = at_output(_keeping_all(start), work / "uninterrupted"), at_output(start, work / "killed")
    told(f"running {steps} steps uninterrupted on {start.world_size} processes")
    pace = run_whole(whole)
    planned = plan_kills(kills, steps, start.world_size, start.config.seed)
    happened = run_killed(killed, planned, pace, told)
    checks = [
        _check_kills(happened, kills),
        _check_published(happened),
        *check_state(_final(whole, steps), _final(killed, steps)),
        check_metrics(read_metrics(whole), read_metrics(killed), steps),
    ]
    published = manifest.steps(run_folder.checkpoints_of(whole.config))
    middle = published[(len(published) - 1) // 2]
    for layout in layouts:
        checks.append(_check_layout(whole, layout, middle, work, tolerance, told))
    passed = all(check.passed is not False for check in checks)
    if passed:
        shutil.rmtree(work)
    return ResumeReport(kills=tuple(happened), checks=tuple(checks), folder=None if passed else work)


def _settings(config: SFTConfig, steps: int) -> SFTConfig:
    """The run's settings for `steps` steps, with a few saves among them."""
    every = config.checkpoint.save_every
    if not 0 < every <= steps // 2:
        every = max(1, steps // 4)
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"steps": steps}),
            "checkpoint": config.checkpoint.model_copy(update={"save_every": every, "export_hf": False}),
            "logging": config.logging.model_copy(update={"tensorboard": False, "wandb_project": None}),
            "data": config.data.model_copy(update={"cache": config.data.cache.absolute()}),
        }
    )


def _keeping_all(start: Start) -> Start:
    checkpoint = start.config.checkpoint.model_copy(update={"keep": 10**6})
    return replace(start, config=start.config.model_copy(update={"checkpoint": checkpoint}))


def _final(start: Start, step: int) -> Path:
    return manifest.step_folder(run_folder.checkpoints_of(start.config), step)


def _check_kills(happened: Sequence[Killed], planned: int) -> Check:
    saves = sum(kill.during_save for kill in happened)
    alone = sum(kill.kill.rank is not None for kill in happened)
    return Check(
        name="killed and started again",
        passed=len(happened) == planned,
        detail=f"{len(happened)} times of {planned}, {saves} during a save, {alone} with one rank killed alone",
    )


def _check_published(happened: Sequence[Killed]) -> Check:
    damage = sorted({problem for kill in happened for problem in kill.damage})
    return Check(
        name="checkpoints whole after each kill",
        passed=not damage,
        detail="all files have the hashes of the manifest" if not damage else _some(damage),
    )


def check_state(whole: Path, killed: Path) -> list[Check]:
    """Two checkpoints, bitwise: their tensors, and what lies beside them."""
    found = compare_checkpoints(whole, killed)
    tensors = found.unequal_tensors
    return [
        Check(
            name="weights and optimizer tensors",
            passed=not tensors,
            detail=f"{found.num_tensors} bitwise equal, {found.num_optimizer_tensors} of them the optimizer's"
            if not tensors
            else f"{_some(tensors)}; largest relative difference {found.largest:.1e} in {found.largest_in}",
        ),
        Check(
            name="generators, schedule, data position",
            passed=not found.unequal_state,
            detail="equal" if not found.unequal_state else _some(found.unequal_state),
        ),
    ]


def check_metrics(whole: list[dict[str, Any]], killed: list[dict[str, Any]], steps: int) -> Check:
    """Each step once, and computed from the same tokens with the same result."""
    problems = []
    for name, records in (("uninterrupted", whole), ("killed", killed)):
        numbers = [record["step"] for record in records]
        if numbers != list(range(1, steps + 1)):
            problems.append(f"steps of the {name} run in metrics.jsonl are {numbers}")
    for a, b in zip(whole, killed, strict=False):
        if _without_timings(a) != _without_timings(b):
            differing = [key for key, value in _without_timings(a).items() if b.get(key) != value]
            problems.append(f"step {a['step']} differs in {', '.join(differing)}")
    return Check(
        name="metrics of every step",
        passed=not problems,
        detail=f"steps 1 to {steps} once each, all equal" if not problems else _some(problems),
    )


def _check_layout(
    whole: Start, layout: Layout, middle: int, work: Path, tolerance: float, told: Callable[[str], None]
) -> Check:
    """From the uninterrupted run's checkpoint of step `middle` on in another layout."""
    name = f"from step {middle} on in {layout.name}"
    laid_out = layout.lay_out(whole.config)
    problems = check_plan(laid_out, whole.architecture, layout.processes)
    if laid_out.data.segment_multiple % laid_out.parallel.row_multiple:
        problems.append(f"data.segment_multiple must be a multiple of {laid_out.parallel.row_multiple}")
    if problems:
        return Check(name=name, passed=None, detail=f"not possible: {problems[0]}")
    told(f"{name} on {layout.processes} processes")
    folder = work / layout.name.replace(" ", "-").replace(",", "")
    other = at_output(replace(whole, config=laid_out, world_size=layout.processes), folder)
    run_in_layout(other, _final(whole, middle))
    expected = {record["step"]: record for record in read_metrics(whole)}
    records = read_metrics(other)
    steps = len(expected)
    if [record["step"] for record in records] != list(range(middle + 1, steps + 1)):
        return Check(name=name, passed=False, detail="metrics.jsonl does not hold the remaining steps once each")
    differences = {
        key: max(_relative(record[key], expected[record["step"]][key]) for record in records)
        for key in ("loss", "grad_norm", "num_tokens", "num_trained_tokens")
    }
    found = compare_checkpoints(_final(whole, steps), _final(other, steps))
    return Check(
        name=name,
        passed=max(differences.values()) <= tolerance,
        detail=", ".join(f"{key} {value:.1e}" for key, value in differences.items() if key in ("loss", "grad_norm"))
        + f" relative (tolerance {tolerance:g}); final state {found.largest:.1e}",
    )


def _without_timings(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _TIMINGS and not key.startswith("seconds/")}


def _relative(found: float | None, expected: float | None) -> float:
    if found is None or expected is None:  # a step that was skipped for a number that is not finite
        return 0.0 if found is expected else math.inf
    return abs(found - expected) / max(abs(expected), 1e-30)


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
