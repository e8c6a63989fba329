"""What an iteration of the reinforcement loop does: collect groups, plan, give out rows, score, update, report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_klear.config.rl import AlgorithmConfig, GPPOConfig, build_loss
from megatron_klear.data.packing import RowSettings, sequence_work
from megatron_klear.distributed import exchange
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import Topology
from megatron_klear.orchestrator.step_numbers import StepNumbers, TokenArrays
from megatron_klear.rl.advantages import advantages_of
from megatron_klear.rl.corrections import importance_weights, log_ratios
from megatron_klear.rl.losses import BatchLoss, SequenceLoss
from megatron_klear.rl.mismatch import MismatchSums
from megatron_klear.runs.log import RunLog
from megatron_klear.train.rollouts import Rollouts
from megatron_klear.train.token_ratios import SampleRatios, laid_out, ratios_by_sample, taken_apart
from megatron_klear.train.updates import UpdatePlan, cut_into_updates, pack_rows, plan_update
from megatron_klear.types import PackedBatch, Sample, StepStats, TokenLoss

GiveArrays = Callable[[Sequence[Sequence[int]]], list[TokenArrays]]


@dataclass
class Step:
    """One rollout step: what was sampled, what of it is trained on, and the numbers to report.

    Every rank has the samples' numbers, and the tokens of the rows it trains; the rest is the orchestrator's.
    """

    config: GPPOConfig
    engine: Engine
    number: int

    def __post_init__(self) -> None:
        self.advantages: list[npt.NDArray[np.float64]] = []  # [samples] of each group trained on
        self.sampled: dict[str, float] = {}
        self.mismatch: dict[str, float] = {}
        self.updates = 0
        self.own_ratios: SampleRatios = {}  # of this data rank's samples, in the count of all updates

    def collect(self, rollouts: Rollouts, log: RunLog) -> StepNumbers:
        """The numbers of the samples to train on."""
        start = time.perf_counter()
        numbers, self.sampled, seconds = rollouts.next_step(self.number)
        waited = time.perf_counter() - start
        for phase, spent in {**seconds, "orchestrator": max(0.0, waited - sum(seconds.values()))}.items():
            log.add(phase, spent)
        if exchange.is_first() and not len(numbers.sizes):
            log.say(f"step {self.number + 1}: every group has equal rewards, there is nothing to learn from; no update")
        return numbers

    def prepare(self, numbers: StepNumbers, arrays: GiveArrays) -> list[list[PackedBatch]]:
        """This rank's rows of every update, with the old log-probs and the correction of what the sampler saw.

        `arrays` gives rank 0 the samples of several lists of numbers; collective as `Rollouts.arrays` is.
        """
        config, topology = self.config, self.engine.topology
        of_groups = advantages_of(
            numbers.by_group(numbers.rewards),
            numbers.by_group(numbers.trained.astype(np.int64)),
            config.algorithm.advantage,
            pass_k=config.algorithm.pass_k,
        )
        self.advantages = of_groups
        plans = [
            plan_update(
                update,
                config.algorithm,
                RowSettings(
                    tokens_per_row=config.train.tokens_per_microbatch,
                    segment_multiple=config.train.segment_multiple,
                    rows_per_step=1,
                ),
                sequence_work(self.engine.architecture),
                longest_response=config.sampling.max_tokens,
                data_size=topology.data.size,
            )
            for update in cut_into_updates(numbers, of_groups, config.algorithm.prompts_per_update)
        ]
        if not plans:
            return []
        samples = _give_samples(plans, arrays, topology)
        updates = [pack_rows(plan, topology.data.rank, samples) for plan in plans]
        scored = iter(self._with_logprobs([batch for update in updates for batch in update]))
        return [[next(scored) for _ in update] for update in updates]

    def update(self, batches: list[PackedBatch]) -> StepStats:
        """One optimizer step. A loss with a sequence's ratio takes a pass of log-probs first."""
        ratios: list[Tensor] | None = [] if self.config.train.keep_rollouts else None
        chosen = build_loss(self.config.loss)
        loss: TokenLoss
        if isinstance(chosen, SequenceLoss | BatchLoss):
            present = self.engine.logprobs(batches, temperature=self._temperature())
            batches, loss = self._second_phase(chosen, batches, present), chosen.token_loss()
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

    def _second_phase(
        self, loss: SequenceLoss | BatchLoss, batches: list[PackedBatch], present: Sequence[Tensor]
    ) -> list[PackedBatch]:
        """The rows as the loss's second phase reads them, given the log-probs of the weights about to be updated."""
        self.updates += 1
        if isinstance(loss, BatchLoss):
            salt = self.number * 1009 + self.updates
            return loss.rewrite(batches, present, _DataRanks(self.engine.topology), salt)
        return [_against_sequence(loss, batch, values) for batch, values in zip(batches, present, strict=True)]

    def ratios(self) -> dict[int, npt.NDArray[np.float32]]:
        """Rank 0: ratios of the tokens, as the loss had them, by the number of their sample. Collective."""
        shares = exchange.gather_first(
            laid_out(self.own_ratios), senders=[ranks[0] for ranks in self.engine.topology.replicas]
        )
        return {number: ratios for share in shares for number, ratios in taken_apart(share).items()}

    def summary(self, stats: Sequence[StepStats], *, sync_seconds: float) -> StepStats:
        """The rollout step's record: means over its updates, and what was sampled."""
        trained = max(sum(step.num_trained_tokens for step in stats), 1)
        metrics: dict[str, float] = {
            "entropy": sum(step.metrics["entropy"] * step.num_trained_tokens for step in stats) / trained,
            "updates": float(len(stats)),
            "sync_seconds": sync_seconds,
        }
        for region in range(1, 6):
            touched = sum(step.metrics.get(f"clip_region_{region}_tokens", 0.0) for step in stats)
            metrics[f"clip_region_{region}"] = touched / trained
        for name in stats[0].metrics if stats else ():
            if name.startswith("moe_"):  # an update whose tokens all have weight 0 has no routes to compare
                metrics[name] = _mean([step.metrics[name] for step in stats if name in step.metrics])
        if "moe_route_mismatch" in metrics:  # later updates have moved away from what drew
            metrics["moe_route_mismatch"] = stats[0].metrics["moe_route_mismatch"]
        metrics |= self.sampled | (self.mismatch or self._measure([], []))
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
        if algorithm.router_replay == "old":
            batches = [dataclasses.replace(batch, routes={}) for batch in batches]
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
        own = MismatchSums.total(
            [
                _mismatch_of_row(batch, old, self.config.algorithm)
                for old, batch in zip(old_logprobs, batches, strict=True)
                if batch.sampler_logprobs is not None
            ]
        )
        topology = self.engine.topology
        found = own.over_ranks(
            lambda values: topology.all_reduce(values, topology.data),
            lambda values: topology.all_reduce(values, topology.data, dist.ReduceOp.MAX),
        )
        return found.mismatch().metrics() | found.correction_metrics()

    def _temperature(self) -> float:
        """Log-probs are those of the distribution sampled from; greedy sampling has the policy's own."""
        return self.config.sampling.temperature or 1.0


@dataclass(frozen=True)
class _DataRanks:
    """The data-parallel ranks, as losses over a whole update talk to them."""

    topology: Topology

    def sum(self, values: list[float]) -> list[float]:
        return self.topology.all_reduce(values, self.topology.data)

    def gather(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        return self.topology.gather(values)


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


def _give_samples(plans: Sequence[UpdatePlan], arrays: GiveArrays, topology: Topology) -> dict[int, Sample]:
    """The samples that this data rank trains, from rank 0, by their numbers in the count of all updates."""
    parts = arrays(
        [[number for plan in plans for number in plan.numbers_of(rank)] for rank in range(topology.data.size)]
    )
    return exchange.give_each(parts, topology.replicas).samples()


def _mismatch_of_row(batch: PackedBatch, old_logprobs: Tensor, algorithm: AlgorithmConfig) -> MismatchSums:
    """Of the row's trained tokens."""
    assert batch.sampler_logprobs is not None
    trained = batch.weights != 0
    log_ratio = log_ratios(
        old_logprobs,
        batch.sampler_logprobs,
        algorithm.correction_level,
        trained=trained,
        cu_seqlens=batch.cu_seqlens,
    )
    factors = _factors(batch, old_logprobs, algorithm)
    return MismatchSums.of(
        old_logprobs[trained],
        batch.sampler_logprobs[trained],
        factors[trained],
        log_ratio[trained],
        algorithm.correction,
    )


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
