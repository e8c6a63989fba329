"""A training run that is killed at chosen instants and started again until it is done.

The runs are real ones, `train.sft.run` or `train.rl_run.run` in processes of their own; this process watches what they
leave on the disk and sends SIGKILL. What a run prints goes to a file. A step of reinforcement learning is a rollout
step.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any, Literal, TypeVar

from megatron_klear.config.start import GPPOStart, Start
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.processes import Processes
from megatron_klear.runs import folder as run_folder
from megatron_klear.train import sft

_MOMENTS: tuple[Literal["start", "step", "save"], ...] = ("step", "save", "step", "save", "start")
_POLL_SECONDS = 0.002
_TAIL_BYTES = 8192
_LEAVE_SECONDS = 20.0  # for the other ranks to notice that one was killed

AnyStart = Start | GPPOStart
_Start = TypeVar("_Start", Start, GPPOStart)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """An instant of a run: while it starts, in the step after `step`, or while it saves after `step`."""

    moment: Literal["start", "step", "save"]
    step: int
    share: float
    """How far into the moment, as a share of the time it takes."""
    rank: int | None = None
    """The one rank to kill; None kills all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Killed:
    """What was on the disk right after a kill."""

    kill: Kill
    last_step: int
    """The newest step in metrics.jsonl."""
    checkpoint: int
    """The step of the newest published checkpoint, 0 without one."""
    during_save: bool
    """Whether a checkpoint was half written."""
    damage: tuple[str, ...]
    """What is wrong with published checkpoints; a kill must not cause any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long the phases of the uninterrupted run took."""

    start_seconds: float
    step_seconds: float
    save_seconds: float


def plan_kills(count: int, steps: int, processes: int, seed: int) -> list[Kill]:
    """`count` random instants over a run of `steps`, in order: in a step, in a save, and some while starting.

    With several processes every third kill hits one rank alone.
    """
    random = Random(seed)
    at = sorted(random.randrange(max(steps - 2, 1)) for _ in range(count))
    return [
        Kill(
            moment=_MOMENTS[index % len(_MOMENTS)],
            step=step,
            share=random.random(),
            rank=random.randrange(processes) if processes > 1 and index % 3 == 2 else None,
        )
        for index, step in enumerate(at)
    ]


def run_whole(start: AnyStart) -> Pace:
    """Run to the end without interruption."""
    saves: list[float] = []
    launched = time.monotonic()
    with Processes(start.world_size, _train, start, _log_of(start)) as processes:
        stepping = began = None
        while processes.results(_POLL_SECONDS) is None:
            saving, now = _being_saved(start), time.monotonic()
            if stepping is None and _last_step(start):
                stepping = now
            if saving and began is None:
                began = now
            elif not saving and began is not None:
                saves.append(now - began)
                began = None
    seconds = [float(record["step_seconds"]) for record in read_metrics(start)]
    return Pace(
        start_seconds=(stepping or time.monotonic()) - launched,
        step_seconds=median(seconds),
        save_seconds=fmean(saves) if saves else 0.0,
    )


def run_killed(start: AnyStart, kills: Sequence[Kill], pace: Pace, told: Callable[[str], None]) -> list[Killed]:
    """Run, kill, run again: until every kill was sent, then to the end. `told` hears of each one."""
    happened: list[Killed] = []
    for kill in kills:
        before = _Seen.of(start)
        with Processes(start.world_size, _train, start, _log_of(start)) as processes:
            if not _wait_for(kill, start, before, pace, processes):
                return happened
            processes.kill(kill.rank)
            during_save = bool(_being_saved(start) - before.saving)
            # The others end by themselves over gloo; where they wait in a collective, torchrun would end them.
            processes.wait(_LEAVE_SECONDS)
        happened.append(_inspect(kill, start, during_save))
        told(
            f"kill {len(happened)} of {len(kills)}: after step {happened[-1].last_step}"
            + (", during a save" if happened[-1].during_save else "")
            + ("" if kill.rank is None else f", rank {kill.rank} alone")
        )
    with Processes(start.world_size, _train, start, _log_of(start)) as processes:
        processes.results()
    return happened


def run_in_layout(start: AnyStart, earlier: Path) -> None:
    """Go on from a copy of the checkpoint folder `earlier` in the layout of `start`, to the end."""
    checkpoints = run_folder.checkpoints_of(start.config)
    checkpoints.mkdir(parents=True)
    shutil.copytree(earlier, checkpoints / earlier.name)
    run_whole(start)


def at_output(start: _Start, output: Path) -> _Start:
    """The same run in another folder."""
    return replace(start, config=start.config.model_copy(update={"output": output}))


def read_metrics(start: AnyStart) -> list[dict[str, Any]]:
    """Every record of the run's metrics.jsonl."""
    return [json.loads(line) for line in (start.config.output / "metrics.jsonl").read_text().splitlines()]


def _train(start: AnyStart, log: Path) -> None:
    """What each process runs."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if isinstance(start, GPPOStart):
        from megatron_klear.train import rl_run

        rl_run.run(start)
    else:
        sft.run(start)


def _log_of(start: AnyStart) -> Path:
    return start.config.output.with_suffix(".log")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What an earlier run left on the disk, to tell it from what this one writes."""

    metrics: tuple[int, int]
    saving: frozenset[str]

    @classmethod
    def of(cls, start: AnyStart) -> _Seen:
        return cls(metrics=_metrics_version(start), saving=_being_saved(start))


def _wait_for(kill: Kill, start: AnyStart, before: _Seen, pace: Pace, processes: Processes) -> bool:
    """Wait for the instant; false where the run is done before it.

    The pace is that of another run, and a machine is faster at one time than at another: a run that is a step further
    than it should be killed at is killed at once.
    """

    def overdue() -> bool:
        stepped = _metrics_version(start) != before.metrics
        return stepped and (kill.moment == "start" or _last_step(start) > kill.step + 1)

    def reached() -> bool:
        if kill.moment == "start" or overdue():
            return True
        if _metrics_version(start) == before.metrics or _last_step(start) < kill.step:
            return False
        return kill.moment == "step" or bool(_being_saved(start) - before.saving)

    while not reached():
        if processes.results(_POLL_SECONDS) is not None:
            return False
    lengths = {"start": pace.start_seconds, "step": pace.step_seconds, "save": pace.save_seconds}
    until = time.monotonic() + kill.share * lengths[kill.moment]
    while (left := until - time.monotonic()) > 0 and not overdue():
        if processes.results(min(left, _POLL_SECONDS)) is not None:
            return False
    return processes.results(0.0) is None


def _inspect(kill: Kill, start: AnyStart, during_save: bool) -> Killed:
    checkpoints = run_folder.checkpoints_of(start.config)
    published = manifest.steps(checkpoints)
    damage = [problem for step in published for problem in manifest.damage(manifest.step_folder(checkpoints, step))]
    return Killed(
        kill=kill,
        last_step=_last_step(start),
        checkpoint=published[-1] if published else 0,
        during_save=during_save,
        damage=tuple(damage),
    )


def _being_saved(start: AnyStart) -> frozenset[str]:
    """Names of checkpoint folders that are not complete yet."""
    checkpoints = run_folder.checkpoints_of(start.config)
    if not checkpoints.is_dir():
        return frozenset()
    return frozenset(entry.name for entry in os.scandir(checkpoints) if entry.name.startswith(".saving-"))


def _metrics_version(start: AnyStart) -> tuple[int, int]:
    """Changes when metrics.jsonl does."""
    try:
        status = (start.config.output / "metrics.jsonl").stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_size


def _last_step(start: AnyStart) -> int:
    """The step of the last whole line of metrics.jsonl, 0 without one."""
    try:
        with open(start.config.output / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except FileNotFoundError:
        return 0
