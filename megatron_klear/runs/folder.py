"""The folder of a run: what lies where, and what is checked before a run goes on in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_klear.config.base import RunConfig
from megatron_klear.config.checks import check_resume
from megatron_klear.config.read import SettingsError
from megatron_klear.distributed import exchange
from megatron_klear.errors import RunLeft, UserError, told_at_once
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import Topology
from megatron_klear.runs.owner import owned

_ALL_ENDED_SECONDS = 4.0
"""For the other ranks to come to the same error."""


def checkpoints_of(config: RunConfig) -> Path:
    """The folder of the run's checkpoints."""
    return config.output / "checkpoints"


def resolved_settings(config: RunConfig) -> Path:
    """The settings that the run in this folder was last started with."""
    return config.output / "config.toml"


@contextmanager
def prepare_folder(config: RunConfig, topology: Topology) -> Iterator[list[str]]:
    """Check a run that is there already, make the folder, hold it for this run, clear what a kill left half done.

    Yields warnings of settings that changed since. Raises FolderInUse on every rank where another run is in there.
    """
    resolved = resolved_settings(config)
    warnings: list[str] = []
    if resolved.exists() and manifest.steps(checkpoints_of(config)):
        errors, warnings = check_resume(resolved, config)
        if errors:
            raise SettingsError(errors)
    with ExitStack() as stack:
        refusal: list[UserError | None] = [None]
        if topology.rank == 0:
            try:
                _make(config)
                stack.enter_context(owned(config.output))
                manifest.sweep(checkpoints_of(config))
            except UserError as error:
                refusal = [error]
        told = exchange.tell_all(refusal[0])
        if told is not None:
            raise told
        yield warnings


@contextmanager
def publishing(engine: Engine) -> Iterator[None]:
    """Publish the checkpoint that is being written when the block ends, also when an error ends it on every rank.

    The error is told first. An error of some ranks alone leaves the checkpoint unpublished, since publishing takes all
    of them, and the others may wait in another collective.
    """
    try:
        with told_at_once():
            yield
    except BaseException as error:
        if not isinstance(error, RunLeft):
            exchange.tell_failed()
        if _all_ended(engine.topology):
            with suppress(Exception):  # the error that ended the run is the one to know
                engine.close()
        raise
    engine.close()


def _all_ended(topology: Topology) -> bool:
    """Whether every rank comes here within a few seconds; asked of the store, so that no collective is needed."""
    if topology.size == 1:
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        if store.add("klear/ended", 1) == topology.size:
            store.set("klear/all_ended", "1")
        store.wait(["klear/all_ended"], timedelta(seconds=_ALL_ENDED_SECONDS))
    except (RuntimeError, ValueError):
        return False
    return True


def _make(config: RunConfig) -> None:
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError([f"output {config.output} cannot be made: {error}; choose another folder"]) from error
