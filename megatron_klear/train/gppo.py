"""Reinforcement learning with GPPO: sample, grade, weigh, train.

`train` is the loop, one rollout step an iteration, and `Step` is what an iteration does. Every rank holds the same
groups and plans alike; only the rows it trains on are its own.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_klear.config.rl import AlgorithmConfig, GPPOConfig, build_loss
from megatron_klear.data.packing import RowSettings, sequence_work
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.engine import Engine
from megatron_klear.rl.advantages import advantages
from megatron_klear.rl.corrections import correction_metrics, importance_weights, log_ratios, measure_mismatch
from megatron_klear.rl.losses import SequenceLoss
from megatron_klear.rl.versions import version_lag
from megatron_klear.runs.folder import checkpoints_of
from megatron_klear.runs.leave import Leaving
from megatron_klear.runs.log import RunLog
from megatron_klear.runs.rollout_files import RolloutWriter
from megatron_klear.train.feed import Feed
from megatron_klear.train.grading import Grader
from megatron_klear.train.guard import SkipGuard
from megatron_klear.train.sampler import Sampler
from megatron_klear.train.token_ratios import SampleRatios, ratios_by_sample
from megatron_klear.train.updates import cut_into_updates, pack_update
from megatron_klear.train.validation import Validator
from megatron_klear.types import Group, PackedBatch, StepStats, Verdict


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


@dataclass
class Step:
    """One rollout step: what was sampled, what of it is trained on, and the numbers to report."""

    config: GPPOConfig
    engine: Engine
    number: int

    def __post_init__(self) -> None:
        self.all_groups: list[Group] = []
        self.advantage_of: dict[int, npt.NDArray[np.float64]] = {}  # by the identity of the group
        self.num_informative = 0
        self.verdicts: Counter[Verdict] = Counter()
        self.mismatch: dict[str, float] = {}
        self.counters: dict[str, float] = {}
        self.own_ratios: SampleRatios = {}  # of this data rank's samples, in the count of all updates

    def collect(self, feed: Feed, log: RunLog) -> list[Group]:
        """The graded groups to train on."""
        given = feed.next_step(self.number)
        self.all_groups, self.num_informative = given.graded, given.num_informative
        self.verdicts = Counter(score.verdict for group in given.graded for score in group.scores or ())
        self.counters = version_lag(given.chosen, self.number) | dict(given.counters)
        if not given.chosen:
            log.say(f"step {self.number + 1}: every group has equal rewards, there is nothing to learn from; no update")
        return given.chosen

    def prepare(self, groups: Sequence[Group]) -> list[list[PackedBatch]]:
        """This rank's rows of every update, with the old log-probs and the correction of what the sampler saw."""
        config, topology = self.config, self.engine.topology
        of_groups = advantages(groups, config.algorithm.advantage, pass_k=config.algorithm.pass_k)
        self.advantage_of = {id(group): values for group, values in zip(groups, of_groups, strict=True)}
        updates = [
            pack_update(
                update,
                config.algorithm,
                RowSettings(
                    tokens_per_row=config.train.tokens_per_microbatch,
                    segment_multiple=config.train.segment_multiple,
                    rows_per_step=1,
                ),
                sequence_work(self.engine.architecture),
                longest_response=config.sampling.max_tokens,
                data_rank=topology.data.rank,
                data_size=topology.data.size,
            )
            for update in cut_into_updates(groups, of_groups, config.algorithm.prompts_per_update)
        ]
        flat = [batch for update in updates for batch in update]
        if not flat:
            return []
        scored = iter(self._with_logprobs(flat))
        return [[next(scored) for _ in update] for update in updates]

    def update(self, batches: list[PackedBatch]) -> StepStats:
        """One optimizer step. A loss with a sequence's ratio takes a pass of log-probs first."""
        ratios: list[Tensor] | None = [] if self.config.train.keep_rollouts else None
        chosen = build_loss(self.config.loss)
        if isinstance(chosen, SequenceLoss):
            present = self.engine.logprobs(batches, temperature=self._temperature())
            batches = [_against_sequence(chosen, batch, values) for batch, values in zip(batches, present, strict=True)]
            loss = chosen.token_loss()
        else:
            loss = chosen
        stats = self.engine.train_step(
            batches,
            loss,
            temperature=self._temperature(),
            entropy_coefficient=self.config.algorithm.entropy_coefficient,
            kl_coefficient=self.config.algorithm.kl_coefficient,
            kl_estimator=self.config.algorithm.kl_estimator,
            ratios=ratios,
        )
        if ratios is not None:
            self.own_ratios |= ratios_by_sample(batches, ratios)
        return stats

    def ratios_of(self, groups: Sequence[Group]) -> dict[int, list[npt.NDArray[np.float32]]]:
        """Ratios of the samples' tokens, as the loss had them, by the identity of the trained groups. Collective."""
        of_all = {
            number: ratios for own in self.engine.topology.gather(self.own_ratios) for number, ratios in own.items()
        }
        numbers = count()
        return {id(group): [of_all[next(numbers)] for _ in group.samples] for group in groups}

    def summary(self, stats: Sequence[StepStats], *, sync_seconds: float) -> StepStats:
        """The rollout step's record: means over its updates, and what was sampled."""
        trained = max(sum(step.num_trained_tokens for step in stats), 1)
        samples = [sample for group in self.all_groups for sample in group.samples]
        lengths = [int(sample.trained.sum()) for sample in samples]
        rewards = np.concatenate([group.rewards for group in self.all_groups])
        total = max(self.verdicts.total(), 1)
        metrics: dict[str, float] = {
            "reward_mean": float(rewards.mean()),
            "accuracy": self.verdicts[Verdict.RIGHT] / total,
            "response_length_mean": float(np.mean(lengths)),
            "response_length_max": float(max(lengths)),
            "cut_off_share": float(np.mean([sample.finish == "length" for sample in samples])),
            "zero_advantage_share": 1 - self.num_informative / len(self.all_groups),
            "entropy": sum(step.metrics["entropy"] * step.num_trained_tokens for step in stats) / trained,
            "updates": float(len(stats)),
            "rollout_tokens": float(sum(lengths)),
            "sync_seconds": sync_seconds,
        }
        for region in range(1, 6):
            touched = sum(step.metrics.get(f"clip_region_{region}_tokens", 0.0) for step in stats)
            metrics[f"clip_region_{region}"] = touched / trained
        metrics |= {f"verdict/{verdict.value}": float(self.verdicts[verdict]) for verdict in Verdict}
        metrics |= self.counters | (self.mismatch or self._measure([], []))
        return StepStats(
            step=self.number + 1,
            loss=_mean([step.loss for step in stats]),
            grad_norm=_mean([step.grad_norm for step in stats]),
            learning_rate=stats[-1].learning_rate if stats else 0.0,
            num_tokens=sum(step.num_tokens for step in stats),
            num_trained_tokens=sum(step.num_trained_tokens for step in stats),
            num_sequences=sum(step.num_sequences for step in stats),
            skipped=any(step.skipped for step in stats),
            metrics=metrics,
        )

    def _with_logprobs(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        algorithm, temperature = self.config.algorithm, self._temperature()
        if algorithm.old_logprobs == "recompute":
            old = self.engine.logprobs(batches, temperature=temperature)
        else:
            old = [batch.weights * 0 if batch.sampler_logprobs is None else batch.sampler_logprobs for batch in batches]
        self.mismatch = self._measure(old, batches)
        done = [
            dataclasses.replace(_corrected(batch, values, algorithm), old_logprobs=values)
            for batch, values in zip(batches, old, strict=True)
        ]
        if algorithm.kl_coefficient:
            reference = self.engine.reference_logprobs(batches, temperature=temperature)
            done = [
                dataclasses.replace(batch, ref_logprobs=values) for batch, values in zip(done, reference, strict=True)
            ]
        return done

    def _measure(self, old_logprobs: Sequence[Tensor], batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Train/sampler mismatch over the trained tokens of all ranks, and what the correction made of it."""
        rows = [
            _mismatch_row(batch, old, self.config.algorithm)
            for old, batch in zip(old_logprobs, batches, strict=True)
            if batch.sampler_logprobs is not None
        ]
        own = torch.cat([*rows, torch.zeros(0, 4)]).numpy()
        of_all = np.concatenate(self.engine.topology.gather(own))
        trainer, sampler, factor, log_ratio = torch.from_numpy(of_all).unbind(dim=1)
        found = measure_mismatch(trainer, sampler, torch.ones_like(trainer, dtype=torch.bool)).metrics()
        return found | correction_metrics(factor, log_ratio, self.config.algorithm.correction)

    def _temperature(self) -> float:
        """Log-probs are those of the distribution sampled from; greedy sampling has the policy's own."""
        return self.config.sampling.temperature or 1.0


def _against_sequence(loss: SequenceLoss, batch: PackedBatch, logprobs: Tensor) -> PackedBatch:
    assert batch.old_logprobs is not None
    old = loss.sequence_old_logprobs(logprobs, batch.old_logprobs, batch.weights != 0, batch.cu_seqlens)
    return dataclasses.replace(batch, old_logprobs=old)


def _factors(batch: PackedBatch, old_logprobs: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """What each token's policy loss is multiplied by for not being the trainer's own sample."""
    assert batch.sampler_logprobs is not None
    return importance_weights(
        old_logprobs,
        batch.sampler_logprobs,
        algorithm.correction,
        algorithm.correction_cap,
        floor=algorithm.correction_floor,
        sequence_bounds=algorithm.correction_sequence_bounds,
        level=algorithm.correction_level,
        trained=batch.weights != 0,
        cu_seqlens=batch.cu_seqlens,
    )


def _mismatch_row(batch: PackedBatch, old_logprobs: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """Of the row's trained tokens [n, 4]: log-probs of trainer and sampler, the correction, the log-ratio it read."""
    assert batch.sampler_logprobs is not None
    trained = batch.weights != 0
    log_ratio = log_ratios(
        old_logprobs,
        batch.sampler_logprobs,
        algorithm.correction_level,
        trained=trained,
        cu_seqlens=batch.cu_seqlens,
    )
    columns = [old_logprobs, batch.sampler_logprobs, _factors(batch, old_logprobs, algorithm), log_ratio]
    return torch.stack(columns, dim=1)[trained]


def _corrected(batch: PackedBatch, old_logprobs: Tensor, algorithm: AlgorithmConfig) -> PackedBatch:
    """The row with its advantages multiplied by the importance weights of trainer over sampler.

    Every loss of the family is linear in an advantage of one sign, so this weighs the policy term and nothing else: the
    NLL, KL and entropy terms are of the tokens as they are. A masked token has the advantage 0.
    """
    if batch.sampler_logprobs is None or batch.advantages is None or algorithm.correction == "none":
        return batch
    factors = _factors(batch, old_logprobs, algorithm)
    return dataclasses.replace(batch, advantages=torch.where(batch.weights != 0, batch.advantages * factors, 0.0))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
