"""One rollout step with rollouts made by hand, on as many ranks as its layout takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_klear.config.rl import GPPOConfig
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.orchestrator.orchestrator import StepSamples
from megatron_klear.orchestrator.step_numbers import StepNumbers
from megatron_klear.rl.advantages import keep_informative
from megatron_klear.train.step import Step
from megatron_klear.types import Group, PackedBatch, StepStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a rollout step came to, the same on every rank; weights on the first rank alone."""

    stats: list[StepStats]
    mismatch: dict[str, float]
    weights: dict[str, Tensor]
    ratios: Tensor
    """Largest |log ratio| of this rank's trained tokens before each update."""
    token_ratios: list[list[NDArray[np.float32]]]
    """As the updates' losses had them, of every sample of the groups trained on; on the first rank alone."""


def take_step(config: GPPOConfig, groups: Sequence[Group], repeats: int = 1) -> Outcome:
    """Train on the groups as the loop does: to be called on every rank of the layout."""
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        if config.algorithm.kl_coefficient:
            engine.keep_reference(config.algorithm.reference)
        stats, ratios = [], []
        for number in range(repeats):
            step, chosen = Step(config, engine, number), StepSamples(keep_informative(groups))
            for batches in step.prepare(StepNumbers.of(chosen.groups), chosen.arrays):
                ratios.append(_largest_log_ratio(engine, batches, config.sampling.temperature))
                stats.append(step.update(batches))
        of_samples = step.ratios()
        weights = {name: tensor.clone() for name, tensor in engine.hf_weights()}
        engine.close()
    kept = weights if topology.rank == 0 else {}
    return Outcome(
        stats=stats,
        mismatch=step.mismatch,
        weights=kept,
        ratios=torch.tensor(ratios),
        token_ratios=list(chosen.by_group(of_samples).values()) if topology.rank == 0 else [],
    )


def _largest_log_ratio(engine: Engine, batches: Sequence[PackedBatch], temperature: float) -> float:
    present = engine.logprobs(batches, temperature=temperature)
    differences = [
        (values - batch.old_logprobs)[batch.weights != 0].abs().max().item() if batch.num_trained else 0.0
        for values, batch in zip(present, batches, strict=True)
        if batch.old_logprobs is not None
    ]
    return max(differences, default=0.0)


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor's norm over all tensors."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)
