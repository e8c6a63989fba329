"""Reinforcement learning with GPPO: sample, grade, weigh, train.

`train` is the loop, one rollout step an iteration, and `Step` is what an iteration does. Every rank holds the same
groups and plans alike; only the rows it trains on are its own.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_klear.data.packing import RowSettings, sequence_work
from megatron_klear.data.prompts import PromptStream
from megatron_klear.mcore import manifest
from megatron_klear.mcore.engine import Engine
from megatron_klear.rl.advantages import advantages, keep_informative, penalise_overlong
from megatron_klear.rl.corrections import importance_weights, measure_mismatch
from megatron_klear.rl.losses import SequenceLoss
from megatron_klear.rl_config import AlgorithmConfig, GPPOConfig, build_loss
from megatron_klear.rollout.engine import RolloutEngine
from megatron_klear.train.arrival import send_weights
from megatron_klear.train.grading import Grader
from megatron_klear.train.guard import SkipGuard
from megatron_klear.train.log import RunLog
from megatron_klear.train.rollout_files import write_rollouts
from megatron_klear.train.run_folder import checkpoints_of
from megatron_klear.train.updates import cut_into_updates, pack_update
from megatron_klear.train.validation import Validator
from megatron_klear.types import Group, PackedBatch, StepStats, Verdict


def train(
    config: GPPOConfig,
    engine: Engine,
    rollouts: RolloutEngine,
    prompts: PromptStream,
    grader: Grader,
    validator: Validator,
    log: RunLog,
    *,
    start: int = 0,
) -> None:
    """Run rollout steps `start` to `config.train.steps`."""
    guard = SkipGuard(config.output / "skipped", config.train.max_skipped_steps, engine.topology.rank)
    if start == 0:
        send_weights(engine, rollouts, version=0)
        validator.report(rollouts, grader, log, step=0)
    log.start()
    for number in range(start, config.train.steps):
        step = Step(config, engine, number)
        with log.time("sync"):
            send_weights(engine, rollouts, version=engine.step)
        groups = step.collect(rollouts, prompts, grader, log)
        rollouts.sleep()
        with log.time("old_logprobs"):
            updates = step.prepare(groups)
        stats = []
        for batches in updates:
            with log.time("train"):
                stats.append(step.update(batches))
            guard.observe(stats[-1], batches, log)
        if config.train.keep_rollouts and engine.topology.rank == 0:
            write_rollouts(config.output / "rollouts", number + 1, step.all_groups, step.advantage_of)
        log.step(step.summary(stats))
        last = number + 1 == config.train.steps
        if last or (config.validation.every and (number + 1) % config.validation.every == 0):
            with log.time("validation", outside_step=True):
                send_weights(engine, rollouts, version=engine.step)
                validator.report(rollouts, grader, log, step=number + 1)
        with log.time("save", outside_step=True):
            engine.finish_save(blocking=False)
            if last or (config.checkpoint.save_every and (number + 1) % config.checkpoint.save_every == 0):
                save(config, engine, prompts, number + 1, blocking=last)


def save(config: GPPOConfig, engine: Engine, prompts: PromptStream, rollout_step: int, *, blocking: bool) -> None:
    """Write a checkpoint after a rollout step and let the oldest go."""
    checkpoints = checkpoints_of(config)
    extra = {"rollout_step": rollout_step, "prompts": prompts.state_dict()}
    engine.save(manifest.step_folder(checkpoints, rollout_step), extra)
    if blocking:
        engine.finish_save()
    if engine.topology.rank == 0:
        manifest.retire(checkpoints, config.checkpoint.keep, config.checkpoint.keep_every)


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

    def collect(self, rollouts: RolloutEngine, prompts: PromptStream, grader: Grader, log: RunLog) -> list[Group]:
        """Sample and grade until there are enough groups with unequal rewards, at most so many rounds."""
        algorithm = self.config.algorithm
        chosen: list[Group] = []
        for round_number in range(algorithm.max_generation_rounds):
            with log.time("rollout"):
                taken = prompts.take(algorithm.generated_prompts or algorithm.prompts_per_step)
                seed = self.config.seed * 1_000_003 + self.number * 1009 + round_number
                groups = rollouts.generate(taken, self.config.sampling, seed)
            with log.time("reward"):
                graded = grader.grade(groups)
            self.verdicts += graded.counts
            groups = [self._penalised(group) for group in graded.groups]
            self.all_groups += groups
            informative = keep_informative(groups)
            self.num_informative += len(informative)
            chosen += informative if algorithm.drop_zero_advantage else groups
            if len(chosen) >= algorithm.prompts_per_step:
                break
        if not chosen:
            log.say(f"step {self.number + 1}: every group has equal rewards, there is nothing to learn from; no update")
        return chosen[: algorithm.prompts_per_step]

    def prepare(self, groups: Sequence[Group]) -> list[list[PackedBatch]]:
        """This rank's rows of every update, with the old log-probs and the correction of what the sampler saw."""
        config, topology = self.config, self.engine.topology
        of_groups = advantages(groups, config.algorithm.advantage)
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
        chosen = build_loss(self.config.loss)
        if isinstance(chosen, SequenceLoss):
            present = self.engine.logprobs(batches, temperature=self._temperature())
            batches = [_against_sequence(chosen, batch, values) for batch, values in zip(batches, present, strict=True)]
            loss = chosen.token_loss()
        else:
            loss = chosen
        return self.engine.train_step(
            batches,
            loss,
            temperature=self._temperature(),
            entropy_coefficient=self.config.algorithm.entropy_coefficient,
            kl_coefficient=self.config.algorithm.kl_coefficient,
        )

    def summary(self, stats: Sequence[StepStats]) -> StepStats:
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
            "entropy": _mean([step.metrics["entropy"] for step in stats]),
            "updates": float(len(stats)),
            "rollout_tokens": float(sum(lengths)),
        }
        for region in range(1, 6):
            touched = sum(step.metrics.get(f"clip_region_{region}_tokens", 0.0) for step in stats)
            metrics[f"clip_region_{region}"] = touched / trained
        metrics |= {f"verdict/{verdict.value}": float(self.verdicts[verdict]) for verdict in Verdict}
        metrics |= self.mismatch or self._measure([], [])
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

    def _penalised(self, group: Group) -> Group:
        """The group with the soft penalty on responses close to the length cap, where one is configured."""
        penalty = self.config.algorithm.overlong_penalty
        if penalty is None:
            return group
        return penalise_overlong(
            group,
            max_tokens=self.config.sampling.max_tokens,
            buffer_tokens=penalty.buffer_tokens,
            factor=penalty.factor,
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
        """Train/sampler mismatch over the trained tokens of all ranks."""
        pairs = [
            torch.stack([old, batch.sampler_logprobs], dim=1)[batch.weights != 0]
            for old, batch in zip(old_logprobs, batches, strict=True)
            if batch.sampler_logprobs is not None
        ]
        own = torch.cat([*pairs, torch.zeros(0, 2)]).numpy()
        trainer, sampler = torch.from_numpy(self.engine.topology.gather_arrays(own)).unbind(dim=1)
        found = measure_mismatch(trainer, sampler, torch.ones_like(trainer, dtype=torch.bool)).metrics()
        algorithm = self.config.algorithm
        weights = importance_weights(trainer, sampler, algorithm.correction, algorithm.correction_cap)
        changed = (weights - (trainer - sampler).exp()).abs() > 1e-6
        touched = float(changed.float().mean()) if len(changed) and algorithm.correction != "none" else 0.0
        return found | {"correction_clipped_share": touched}

    def _temperature(self) -> float:
        """Log-probs are those of the distribution sampled from; greedy sampling has the policy's own."""
        return self.config.sampling.temperature or 1.0


def _against_sequence(loss: SequenceLoss, batch: PackedBatch, logprobs: Tensor) -> PackedBatch:
    assert batch.old_logprobs is not None
    old = loss.sequence_old_logprobs(logprobs, batch.old_logprobs, batch.weights != 0, batch.cu_seqlens)
    return dataclasses.replace(batch, old_logprobs=old)


def _corrected(batch: PackedBatch, old_logprobs: Tensor, algorithm: AlgorithmConfig) -> PackedBatch:
    """The row with its policy weights multiplied by the importance weights of trainer over sampler."""
    if batch.sampler_logprobs is None or algorithm.correction == "none":
        return batch
    factors = importance_weights(old_logprobs, batch.sampler_logprobs, algorithm.correction, algorithm.correction_cap)
    return dataclasses.replace(batch, weights=torch.where(batch.weights != 0, batch.weights * factors, 0.0))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
