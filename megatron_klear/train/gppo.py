"""Reinforcement learning with GPPO: sample, grade, weigh, train.

`train` is the loop, one rollout step an iteration, and `Step` is what an iteration does. The orchestrator has the
groups; every rank has a few numbers of each sample and plans alike, and gets the tokens of the rows it trains on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_klear.config.rl import GPPOConfig
from megatron_klear.distributed import exchange
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.engine import Engine
from megatron_klear.runs.folder import checkpoints_of
from megatron_klear.runs.leave import Leaving
from megatron_klear.runs.log import RunLog
from megatron_klear.train.guard import SkipGuard
from megatron_klear.train.rollouts import Rollouts
from megatron_klear.train.step import Step


def train(config: GPPOConfig, engine: Engine, rollouts: Rollouts, log: RunLog, *, start: int = 0) -> None:
    """`train_steps` that SIGTERM and Ctrl-C end after a step, with a checkpoint. Raises RunLeft then."""
    with Leaving(engine.topology) as leaving:
        train_steps(config, engine, rollouts, log, leaving, start=start)


def train_steps(
    config: GPPOConfig, engine: Engine, rollouts: Rollouts, log: RunLog, leaving: Leaving, *, start: int = 0
) -> None:
    """Run rollout steps `start` to `config.train.steps`. Weights have the number of steps trained as their version."""
    guard = SkipGuard(config.output / "skipped", config.train.max_skipped_steps, engine.topology.rank)
    if start == 0:
        rollouts.sync(0)
        _validate(rollouts, log, 0)
    log.start()
    for number in range(start, config.train.steps):
        step = Step(config, engine, number)
        with log.time("sync"):
            rollouts.sync(number)
        numbers = step.collect(rollouts, log)
        with log.time("old_logprobs"):
            updates = step.prepare(numbers, rollouts.arrays)
        stats = []
        for batches in updates:
            with log.time("train"):
                stats.append(step.update(batches))
            guard.observe(stats[-1], batches, log)
        with log.time("save", outside_step=True):
            engine.finish_save(blocking=False)  # its step's samples, handed over a step ago, are on disk by now
        if config.train.keep_rollouts:
            with log.time("orchestrator"):
                rollouts.keep(number + 1, step.advantages, step.ratios())
        log.step(step.summary(stats, sync_seconds=log.seconds("sync")))
        last = number + 1 == config.train.steps
        if leaving.asked() and not last:
            save(config, engine, rollouts, number + 1, blocking=True)
            raise leaving.left(number + 1, manifest.step_folder(checkpoints_of(config), number + 1))
        if last or (config.validation.every and (number + 1) % config.validation.every == 0):
            with log.time("validation", outside_step=True):
                rollouts.sync(number + 1)
                _validate(rollouts, log, number + 1)
                rollouts.sleep()  # saving takes the optimizer's state back onto shared cards
        if last or (config.checkpoint.save_every and (number + 1) % config.checkpoint.save_every == 0):
            with log.time("save", outside_step=True):
                save(config, engine, rollouts, number + 1, blocking=last)


def _validate(rollouts: Rollouts, log: RunLog, step: int) -> None:
    found = rollouts.validate(step)
    if found is not None:
        log.validation(step, found)


def save(config: GPPOConfig, engine: Engine, rollouts: Rollouts, rollout_step: int, *, blocking: bool) -> None:
    """Write a checkpoint after a rollout step and let the oldest go.

    It appears once the step's samples are on disk: a run that resumes from it does not make them again.
    """
    checkpoints = checkpoints_of(config)
    state, files = rollouts.state()
    extra = {"rollout_step": rollout_step, "feed": state, "files": sorted(files)}
    ready = partial(rollouts.flush, rollout_step) if config.train.keep_rollouts else lambda: None
    engine.save(manifest.step_folder(checkpoints, rollout_step), extra, files, ready)
    if blocking:
        engine.finish_save()
    if engine.topology.rank == 0:
        manifest.retire(checkpoints, config.checkpoint.keep, config.checkpoint.keep_every)


def resume(engine: Engine, rollouts: Rollouts, checkpoint: Path) -> int:
    """Go on from a checkpoint that `save` wrote; the number of rollout steps done."""
    extra = engine.load(checkpoint)
    files = {name: (checkpoint / name).read_bytes() for name in extra["files"]} if exchange.is_first() else {}
    rollouts.load_state(extra["feed"], files)
    return int(extra["rollout_step"])
