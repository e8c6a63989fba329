"""The first minute of an entry script: read settings, look at the model's shape, refuse what cannot work, or plan.

Nothing heavy is imported and nothing is written, so that a mistake shows at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_klear.config.base import SFTConfig
from megatron_klear.config.checks import (
    check_files,
    check_grading,
    check_launch,
    check_layout,
    check_packages,
    check_plan,
    check_prompt_files,
    check_stop_tokens,
    warn_rl_run,
    warn_run,
)
from megatron_klear.config.checks_rollout import check_rollout, lacking_for_rollout
from megatron_klear.config.launch import prepare_environment, smallest_gpu_bytes
from megatron_klear.config.plan import describe_plan
from megatron_klear.config.read import CommandLine, exit_on_bad_input, exit_with, load, parse_command_line
from megatron_klear.models.architecture import Architecture, read_architecture
from megatron_klear.models.shapes import planned_model

if TYPE_CHECKING:
    from megatron_klear.config.rl import GPPOConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A run that nothing speaks against, in a process whose environment is ready for CUDA."""

    config: SFTConfig
    architecture: Architecture
    world_size: int
    warnings: tuple[str, ...]


def start_sft(argv: Sequence[str] | None = None, *, description: str = "") -> Start:
    """What `pretrain_sft.py` begins with; the number of processes is torchrun's WORLD_SIZE, 1 without it.

    Exits with code 2 and every problem found, or with 0 after the plan of a `--dry-run` that has none. A dry run
    prints its plan also where only this machine's files or packages are missing: with `--dry-run=N`, for processes
    elsewhere, these are told and the exit code is 0; with `--dry-run`, for a run here, it is 2.
    """
    command = parse_command_line(SFTConfig, argv, description=description)
    config = command.config
    world_size = command.planned_processes or int(os.environ.get("WORLD_SIZE", "1"))
    architecture, note = _model_of(command)
    planning = check_plan(config, architecture, world_size)
    problems = [*check_packages(config, lambda module: True), *check_launch(os.environ)]
    lacking = check_files(config)
    lacking += [problem for problem in check_packages(config) if problem not in problems]
    warnings = warn_run(config, architecture)
    if command.dry_run and not planning and os.environ.get("RANK", "0") == "0":
        print(note + describe_plan(config, architecture, world_size, device_memory_bytes=smallest_gpu_bytes()))
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    _refuse_or_end(command, [*planning, *problems], lacking)
    warnings += prepare_environment(config.parallel)
    return Start(config=config, architecture=architecture, world_size=world_size, warnings=tuple(warnings))


def _model_of(command: CommandLine[Any]) -> tuple[Architecture, str]:
    """The model's shape, and a line on where a plan has it from if not from the model."""
    folder = command.config.model.path
    with exit_on_bad_input():
        if not command.dry_run:
            return read_architecture(folder), ""
        planned = planned_model(folder)
        return planned.architecture, f"{planned.note}\n\n" if planned.note else ""


def _refuse_or_end(command: CommandLine[Any], problems: list[str], lacking: list[str]) -> None:
    """Exit with 2 where something speaks against the run, with 0 after the plan of a dry run.

    `lacking` is what speaks against it on this machine alone: told, and no reason to refuse, where the plan is for
    processes that were named (`--dry-run=64`), which run elsewhere.
    """
    if problems or (lacking and command.planned_processes is None):
        exit_with([*problems, *lacking])
    if not command.dry_run:
        return
    if lacking and os.environ.get("RANK", "0") == "0":
        print("\nTo run here, this machine lacks", *(f"  - {problem}" for problem in lacking), sep="\n")
    raise SystemExit(0)


def start_with(argv: Sequence[str], *, processes: int | None, files: bool) -> Start:
    """What a tool begins with that trains in processes of its own: `processes` of them, one model replica unless given.

    `files` false does not look for the data. Exits with code 2 and every problem found.
    """
    with exit_on_bad_input():
        config = load(SFTConfig, argv)
        architecture = read_architecture(config.model.path)
    world_size = processes or config.parallel.smallest_world
    problems = [*check_plan(config, architecture, world_size), *check_packages(config)]
    if files:
        problems += check_files(config)
    if problems:
        exit_with(problems)
    warnings = (*warn_run(config, architecture), *prepare_environment(config.parallel))
    return Start(config=config, architecture=architecture, world_size=world_size, warnings=warnings)


@dataclass(frozen=True, kw_only=True, slots=True)
class GPPOStart:
    """A reinforcement-learning run that nothing speaks against."""

    config: GPPOConfig
    architecture: Architecture
    world_size: int
    warnings: tuple[str, ...] = ()


def start_gppo(argv: Sequence[str] | None = None, *, description: str = "") -> GPPOStart:
    """What `train_gppo.py` begins with; exits as `start_sft` does."""
    from megatron_klear.config.plan import describe_rl_plan
    from megatron_klear.config.rl import GPPOConfig

    command = parse_command_line(GPPOConfig, argv, description=description)
    config = command.config
    world_size = command.planned_processes or int(os.environ.get("WORLD_SIZE", "1"))
    architecture, note = _model_of(command)
    planning = [*check_layout(config, architecture, world_size), *check_stop_tokens(config, architecture)]
    gpu_bytes = smallest_gpu_bytes()
    rollout = check_rollout(config, architecture, world_size, gpu_bytes=gpu_bytes)
    problems = [*check_packages(config, lambda module: True), *rollout, *check_launch(os.environ)]
    lacking = [*check_prompt_files(config), *lacking_for_rollout(config), *check_grading(config)]
    problems = [problem for problem in problems if problem not in lacking]
    lacking += [problem for problem in check_packages(config) if problem not in problems]
    warnings = warn_rl_run(config, architecture)
    if command.dry_run and not planning and os.environ.get("RANK", "0") == "0":
        print(note + describe_rl_plan(config, architecture, world_size, device_memory_bytes=gpu_bytes))
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    _refuse_or_end(command, [*planning, *problems], lacking)
    warnings += prepare_environment(config.parallel)
    return GPPOStart(config=config, architecture=architecture, world_size=world_size, warnings=tuple(warnings))
