"""The folder of a run: what lies where, and what is checked before a run goes on in it."""

from __future__ import annotations

from pathlib import Path

from megatron_klear.checks import check_resume
from megatron_klear.config import RunConfig
from megatron_klear.mcore import manifest
from megatron_klear.mcore.topology import Topology
from megatron_klear.settings import SettingsError


def checkpoints_of(config: RunConfig) -> Path:
    """The folder of the run's checkpoints."""
    return config.output / "checkpoints"


def resolved_settings(config: RunConfig) -> Path:
    """The settings that the run in this folder was last started with."""
    return config.output / "config.toml"


def prepare_folder(config: RunConfig, topology: Topology) -> list[str]:
    """Check a run that is there already, make the folder, clear what a kill left half done.

    Returns warnings of settings that changed since.
    """
    resolved = resolved_settings(config)
    warnings: list[str] = []
    if resolved.exists() and manifest.steps(checkpoints_of(config)):
        errors, warnings = check_resume(resolved, config)
        if errors:
            raise SettingsError(errors)
    topology.barrier()
    if topology.rank == 0:
        try:
            config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError([f"output {config.output} cannot be made: {error}; choose another folder"]) from error
        manifest.sweep(checkpoints_of(config))
    topology.barrier()
    return warnings
