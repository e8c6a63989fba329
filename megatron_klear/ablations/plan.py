"""The commands of an ablation: shared data, then every stage of every arm and seed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.config.ablation import AblationConfig, Arm, Prepared, Scale
from megatron_klear.errors import UserError


class AblationError(UserError):
    """An ablation that cannot be run: an unknown scale, a placeholder that nothing fills, other settings' runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmRun:
    """One arm with one seed: its folder, the arguments of `klear` for each stage, and the folder that counts."""

    arm: str
    seed: int
    folder: Path
    stages: tuple[tuple[str, ...], ...]
    result: Path

    def commands(self) -> list[str]:
        """Its stages, wherever its folder is: what two results of one run have in common."""
        return [shlex.join(stage).replace(str(self.folder), "{run}") for stage in self.stages]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """A command of `klear` and what it makes."""

    creates: Path
    arguments: tuple[str, ...]


def preparations(scale: Scale, arms: tuple[Arm, ...], runs: Path) -> list[Preparation]:
    """What all runs share, in order and each once: a command that speaks of an arm's values is there for each arm.

    Raises AblationError where two commands would make the same.
    """
    found: dict[Path, Preparation] = {}
    for prepared in scale.prepare:
        for arm in arms:
            one = _preparation(prepared, _values(scale, arm, runs), runs)
            if found.setdefault(one.creates, one) != one:
                raise AblationError(
                    f"{one.creates} would be made by two commands: {shlex.join(found[one.creates].arguments)}; "
                    f"{shlex.join(one.arguments)}"
                )
    return list(found.values())


def arm_runs(
    config: AblationConfig, scale: Scale, name: str, runs: Path, seeds: tuple[int, ...], more: tuple[str, ...]
) -> list[ArmRun]:
    """Every arm with every seed, seeds outermost: what is cut short has all arms of the first seeds.

    `more` are flags of the last stage that trains, for all arms alike. Raises AblationError where no stage trains, or
    two runs would have one folder.
    """
    planned: list[ArmRun] = []
    trained = [i for i, stage in enumerate(scale.stages) if stage.command in ("sft", "gppo")]
    if more and not trained:
        raise AblationError(f"no stage trains that could be given {shlex.join(more)}")
    if len(set(seeds)) < len(seeds):
        raise AblationError(f"seeds {', '.join(map(str, seeds))}: each counts once, and one is there twice")
    for seed in seeds:
        for arm in config.arms:
            folder = runs / name / f"{_file_name(arm.name)}_{seed}"
            if clash := [one.arm for one in planned if one.folder == folder]:
                raise AblationError(f"arms {clash[0]!r} and {arm.name!r} would both run in {folder}; rename one")
            values = {**_values(scale, arm, runs), "run": str(folder), "seed": str(seed)}
            stages = []
            for index, stage in enumerate(scale.stages):
                flags = [_filled(flag, values) for flag in stage.flags]
                own = [_filled(word, values) for word in _as_flags(arm.settings.get(stage.command, {}))]
                added = more if trained and index == trained[-1] else ()
                stages.append((stage.command, *flags, *own, *added, "--seed", str(seed)))
            planned.append(
                ArmRun(
                    arm=arm.name,
                    seed=seed,
                    folder=folder,
                    stages=tuple(stages),
                    result=Path(_filled(scale.result, values)),
                )
            )
    return planned


def _values(scale: Scale, arm: Arm, runs: Path) -> dict[str, str]:
    given = {**scale.values, **arm.values}
    return {"runs": str(runs), **{name: _filled(text, {"runs": str(runs)}) for name, text in given.items()}}


def _preparation(prepared: Prepared, values: Mapping[str, str], runs: Path) -> Preparation:
    creates = runs / _filled(prepared.creates, values)
    words = [_filled(word, {**values, "output": str(creates)}) for word in shlex.split(prepared.command)]
    return Preparation(creates=creates, arguments=tuple(words))


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        words.append(f"--{name}")
        values = value if isinstance(value, list) else [value]
        words += [str(one).lower() if isinstance(one, bool) else str(one) for one in values]
    return words


def _filled(text: str, values: Mapping[str, str]) -> str:
    try:
        return text.format_map(values)
    except (KeyError, IndexError, ValueError) as error:
        raise AblationError(f"{text!r}: nothing fills {error}; there are {', '.join(sorted(values))}") from None


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
