"""What the runs of an ablation found, and what that says of its claims."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_klear.config.ablation import AblationConfig, Claim
from megatron_klear.runs.held_out import held_out
from megatron_klear.statistics.significance import Interval, mean_interval, seed_interval

from .plan import AblationError, ArmRun, Preparation

Verdict = Literal["confirmed", "contradicted", "not settled"]
_NO_WIDTH = 1e-9
_MEANS = ("entropy", "grad_norm", "response_length_mean", "zero_advantage_share")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One arm with one seed."""

    arm: str
    seed: int
    curve: dict[int, float]
    """Held-out accuracy by step; of an evaluation the one figure, over all of its problems, at step 0."""
    of_problems: dict[str, float]
    """What counts (`measure`), by problem."""
    metrics: dict[str, float]
    """Means over the steps of training: clipped shares, entropy and the like."""

    commands: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The mean over problems."""
        return float(np.mean(list(self.of_problems.values())))


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A claim after the runs: the difference of two arms, better minus than."""

    claim: Claim
    verdict: Verdict
    over_seeds: Interval | None
    """Of the mean over seeds (Student's t), each seed a pair; the verdict is by this one."""
    over_problems: Interval
    """Of the mean over problems (bootstrap), seeds averaged: for these very seeds."""
    of_seeds: tuple[float, ...]


def read_outcome(one: ArmRun, measure: Literal["end", "mean"]) -> Outcome:
    """What a run's folders hold. Raises AblationError where the result is not there, or is damaged."""
    try:
        return _outcome(one, measure)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise AblationError(
            f"the result in {one.result} is damaged: {error!r}; remove {one.folder}, and the run is made again"
        ) from error


def _outcome(one: ArmRun, measure: Literal["end", "mean"]) -> Outcome:
    results = sorted(one.result.glob("*/result.json"))
    if results:
        contents = [json.loads(path.read_text()) for path in results]
        problems = {
            f"{content['name']}/{name}": count / content["samples"]
            for content in contents
            for name, count in content["right"].items()
        }
        return Outcome(
            arm=one.arm,
            seed=one.seed,
            curve={0: float(np.mean(list(problems.values())))},
            of_problems=problems,
            metrics={},
            commands=tuple(one.commands()),
        )
    validations = held_out(one.result)
    if not validations:
        raise AblationError(
            f"{one.result} has neither a validation nor an evaluation; remove {one.folder}, and the run is made again"
        )
    first, *later = sorted(validations)
    counted = later[-1:] if measure == "end" else later
    if not counted:
        raise AblationError(f"{one.result} has one validation, the one before training")
    names = validations[first]
    return Outcome(
        arm=one.arm,
        seed=one.seed,
        curve={step: float(np.mean(list(validations[step].values()))) for step in sorted(validations)},
        of_problems={name: float(np.mean([validations[step][name] for step in counted])) for name in names},
        metrics=_means(one.result / "metrics.jsonl"),
        commands=tuple(one.commands()),
    )


def read_known(
    path: Path, planned: Sequence[ArmRun], measure: Literal["end", "mean"], prepared: Sequence[Preparation] = ()
) -> dict[tuple[str, int], Outcome]:
    """Outcomes of an earlier result.json, by arm and seed, of runs that would be made by the very same commands.

    Raises AblationError where the file is no result, has figures of another `measure`, or says that what its runs
    share was made by other commands than `prepared`.
    """
    try:
        content = json.loads(path.read_text())
        if content["measure"] != measure:
            raise AblationError(
                f"{path} has figures by measure {content['measure']!r}, and the recipe is by {measure!r}"
            )
        now = _commands(prepared)
        if other := set(content["prepared"]) ^ set(now):
            raise AblationError(f"what the runs of {path} share was made otherwise: `{min(other)}` is not of both")
        runs = {(run["arm"], run["seed"]): run for run in content["runs"]}
        found = {}
        for one in planned:
            run = runs.get((one.arm, one.seed))
            if run is not None and run["commands"] == one.commands():
                found[one.arm, one.seed] = Outcome(
                    arm=one.arm,
                    seed=one.seed,
                    curve={int(step): value for step, value in run["curve"].items()},
                    of_problems=run["of_problems"],
                    metrics=run["metrics"],
                    commands=tuple(run["commands"]),
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AblationError(f"{path} is no result of an ablation: {error!r}") from None
    return found


def judge(config: AblationConfig, outcomes: Sequence[Outcome]) -> list[Judged]:
    """Every claim, by the seeds that both of its arms have.

    Raises AblationError where there are none, or runs differ in their problems: a difference is over the same ones.
    """
    by = {(outcome.arm, outcome.seed): outcome for outcome in outcomes}
    seeds = sorted({outcome.seed for outcome in outcomes})
    judged = []
    for claim in config.claims:
        pairs = [
            (by[claim.better, seed], by[claim.than, seed])
            for seed in seeds
            if (claim.better, seed) in by and (claim.than, seed) in by
        ]
        if not pairs:
            raise AblationError(f"{claim.better} and {claim.than} have no seed in common")
        names = sorted(pairs[0][0].of_problems)
        for run in (run for pair in pairs for run in pair):
            if apart := set(names) ^ run.of_problems.keys():
                raise AblationError(
                    f"{claim.better} above {claim.than}: runs differ in {len(apart)} held-out problems, for example "
                    f"{min(apart)} ({run.arm}, seed {run.seed}); all arms need the same"
                )
        table = np.array([[a.of_problems[name] - b.of_problems[name] for name in names] for a, b in pairs])
        of_seeds = tuple(float(value) for value in table.mean(1))
        interval = seed_interval(of_seeds)
        judged.append(
            Judged(
                claim=claim,
                verdict=_verdict(interval),
                over_seeds=interval,
                over_problems=mean_interval(table.mean(0)),
                of_seeds=of_seeds,
            )
        )
    return judged


def arm_means(outcomes: Sequence[Outcome]) -> dict[str, Interval | float]:
    """By arm, the mean over seeds with its interval; a bare figure of one seed."""
    found: dict[str, Interval | float] = {}
    for name in dict.fromkeys(outcome.arm for outcome in outcomes):
        values = [outcome.value for outcome in outcomes if outcome.arm == name]
        found[name] = seed_interval(values) or values[0]
    return found


def as_json(
    config: AblationConfig,
    scale: str,
    outcomes: Sequence[Outcome],
    judged: Sequence[Judged],
    prepared: Sequence[Preparation] = (),
) -> dict[str, Any]:
    """Everything, so that figures can be counted again."""
    return {
        "title": config.title,
        "scale": scale,
        "measure": config.measure,
        "prepared": _commands(prepared),
        "claims": [
            {
                "better": one.claim.better,
                "than": one.claim.than,
                "paper": one.claim.paper,
                "verdict": one.verdict,
                "over_seeds": None if one.over_seeds is None else _rounded(one.over_seeds),
                "over_problems": _rounded(one.over_problems),
                "of_seeds": [round(value, 4) for value in one.of_seeds],
            }
            for one in judged
        ],
        "runs": [
            {
                "arm": one.arm,
                "seed": one.seed,
                "accuracy": round(one.value, 4),
                "curve": {str(step): round(value, 4) for step, value in one.curve.items()},
                "commands": list(one.commands),
                "metrics": {name: float(f"{value:.4g}") for name, value in one.metrics.items()},
                "of_problems": {name: round(value, 4) for name, value in one.of_problems.items()},
            }
            for one in outcomes
        ],
    }


def _commands(prepared: Sequence[Preparation]) -> list[str]:
    return [shlex.join(one.arguments) for one in prepared]


def _verdict(interval: Interval | None) -> Verdict:
    # Accuracies are counts: seeds that differ by the very same number do not make the next one certain.
    if interval is None or not interval.excludes_zero or interval.high - interval.low < _NO_WIDTH:
        return "not settled"
    return "confirmed" if interval.low > 0 else "contradicted"


def _rounded(interval: Interval) -> list[float]:
    return [round(value, 4) for value in (interval.value, interval.low, interval.high)]


def _means(path: Path) -> dict[str, float]:
    steps: list[Mapping[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in steps[0] if name in _MEANS or name.startswith("clip")]
    found = {}
    for name in names:
        values = [step[name] for step in steps if isinstance(step.get(name), int | float)]
        if values and all(math.isfinite(value) for value in values):
            found[name] = float(np.mean(values))
    return found
