"""Reinforcement learning with GPPO: sample, grade, weigh, train.

`train` is the loop, one rollout step an iteration, and `Step` is what an iteration does. Rank 0 holds the groups; every
rank holds a few numbers of each sample and plans alike, and gets the tokens of the rows it trains on.
"""

from __future__ import annotations

from pathlib import Path

from megatron_klear.config.rl import GPPOConfig
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.engine import Engine
from megatron_klear.runs.folder import checkpoints_of
from megatron_klear.runs.leave import Leaving
from megatron_klear.runs.log import RunLog
from megatron_klear.runs.rollout_files import RolloutWriter
from megatron_klear.train.feed import Feed
from megatron_klear.train.grading import Grader
from megatron_klear.train.guard import SkipGuard
from megatron_klear.train.sampler import Sampler
from megatron_klear.train.step import Step
from megatron_klear.train.validation import Validator


def train(
    config: GPPOConfig,
    engine: Engine,
    sampler: Sampler,
    feed: Feed,
    validator: Validator,
    grader: Grader,
    log: RunLog,
    *,
    start: int = 0,
    kept: RolloutWriter | None = None,
) -> None:
    """`train_steps` that SIGTERM and Ctrl-C end after a step, with a checkpoint. Raises RunLeft then."""
    with Leaving(engine.topology) as leaving:
        train_steps(config, engine, sampler, feed, validator, grader, log, leaving, start=start, kept=kept)


def train_steps(
    config: GPPOConfig,
    engine: Engine,
    sampler: Sampler,
    feed: Feed,
    validator: Validator,
    grader: Grader,
    log: RunLog,
    leaving: Leaving,
    *,
    start: int = 0,
    kept: RolloutWriter | None = None,
) -> None:
    """Run rollout steps `start` to `config.train.steps`. Weights have the number of steps trained as their version.

    `kept`, given on rank 0 where samples are kept, writes them.
    """
    guard = SkipGuard(config.output / "skipped", config.train.max_skipped_steps, engine.topology.rank)
    if start == 0:
        sampler.sync(0)
        validator.report(sampler, grader, log, step=0)
    log.start()
    for number in range(start, config.train.steps):
        step = Step(config, engine, number)
        with log.time("sync"):
            sampler.sync(number)
        groups = step.collect(feed, log)
        with log.time("old_logprobs"):
            updates = step.prepare(groups)
        stats = []
        for batches in updates:
            with log.time("train"):
                stats.append(step.update(batches))
            feed.work()
            guard.observe(stats[-1], batches, log)
        if config.train.keep_rollouts:
            ratios = step.ratios_of(groups)
            if kept is not None:
                kept.write(number + 1, step.all_groups, step.advantage_of, ratios)
        log.step(step.summary(stats, sync_seconds=log.seconds("sync")))
        last = number + 1 == config.train.steps
        if leaving.asked() and not last:
            engine.finish_save()
            if kept is not None:
                kept.flush()
            save(config, engine, feed, number + 1, blocking=True)
            raise leaving.left(number + 1, manifest.step_folder(checkpoints_of(config), number + 1))
        if last or (config.validation.every and (number + 1) % config.validation.every == 0):
            with log.time("validation", outside_step=True):
                sampler.sync(number + 1)
                validator.report(sampler, grader, log, step=number + 1)
                sampler.sleep()  # saving takes the optimizer's state back onto shared cards
        with log.time("save", outside_step=True):
            engine.finish_save(blocking=False)
            if last or (config.checkpoint.save_every and (number + 1) % config.checkpoint.save_every == 0):
                if kept is not None:
                    kept.flush()  # a run that resumes from here does not make this step's samples again
                save(config, engine, feed, number + 1, blocking=last)


def save(config: GPPOConfig, engine: Engine, feed: Feed, rollout_step: int, *, blocking: bool) -> None:
    """Write a checkpoint after a rollout step and let the oldest go."""
    checkpoints = checkpoints_of(config)
    state, files = feed.state_dict(), feed.files()
    extra = {"rollout_step": rollout_step, "feed": state, "files": sorted(files)}
    engine.save(manifest.step_folder(checkpoints, rollout_step), extra, files)
    if blocking:
        engine.finish_save()
    if engine.topology.rank == 0:
        manifest.retire(checkpoints, config.checkpoint.keep, config.checkpoint.keep_every)


def resume(engine: Engine, feed: Feed, checkpoint: Path) -> int:
    """Go on from a checkpoint that `save` wrote; the number of rollout steps done."""
    extra = engine.load(checkpoint)
    feed.load_state_dict(extra["feed"], {name: (checkpoint / name).read_bytes() for name in extra["files"]})
    return int(extra["rollout_step"])
