"""Weights on their way to the rollout engine, with proof that every tensor arrived."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_klear.data.pack import pack
from megatron_klear.errors import UserError
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.model import DTYPES
from megatron_klear.rollout.engine import RolloutEngine
from megatron_klear.rollout.weights.checksum import checksum
from megatron_klear.types import Sample

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Mean difference of log-probs in nats that rounding alone does not reach, by the coarser of the two precisions."""
PROBE_TOKENS = 64


class WeightsNotArrived(UserError):
    """The rollout engine holds other weights than it was sent."""


def send_weights(engine: Engine, rollouts: RolloutEngine, version: int, *, tolerance: float | None = None) -> None:
    """Give the engine's weights to the rollout engine and prove that they are in use there.

    Checksums of every tensor are compared with those of what every server loaded, and where a server may still sample
    with something else, its log-probs of a fixed row with the engine's; `tolerance` in nats is for that mean
    difference and goes by precision unless given. Collective. Raises WeightsNotArrived, naming server and tensors.
    """
    if rollouts.shares_cards:
        engine.sleep()  # before any server wakes: the card does not hold both
    sent: dict[str, str] = {}
    held = rollouts.load_weights(_noted(engine.hf_weights(), sent, rollouts.dtype), version)
    for holder, checksums in held.items():
        _compare(holder, checksums, sent, version)
    _echo(engine, rollouts, version, tolerance)


def probe_row(vocab_size: int) -> Sample:
    """The fixed row that both sides score: tokens from all over the vocabulary."""
    tokens = np.random.default_rng(20_250_811).integers(0, vocab_size, size=PROBE_TOKENS).astype(np.int32)
    return Sample(tokens=tokens, trained=np.arange(PROBE_TOKENS) > 0)


def _noted(
    weights: Iterator[tuple[str, Tensor]], sent: dict[str, str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        # In the precision held: the engine may keep another than the trainer's.
        sent[name] = checksum(tensor.to(dtype))
        yield name, tensor


def _compare(holder: str, held: dict[str, str], sent: dict[str, str], version: int) -> None:
    missing = sorted(set(sent) ^ set(held))
    wrong = [name for name in sorted(set(sent) & set(held)) if sent[name] != held[name]]
    if missing or wrong:
        named = ", ".join((wrong + missing)[:5])
        raise WeightsNotArrived(
            f"after sync {version} the rollout engine ({holder}) does not hold the trainer's weights: {len(wrong)} "
            f"tensors differ and {len(missing)} are on one side only ({named}). Samples from it would not be of this "
            "policy; python tools/verify.py weights --config RUN.toml looks closer"
        )


def _echo(engine: Engine, rollouts: RolloutEngine, version: int, tolerance: float | None) -> None:
    row = probe_row(engine.architecture.vocab_size)
    answers = rollouts.probe(row.tokens)
    if not answers:
        return
    own = engine.logprobs([pack([row], [1.0])])[0].cpu().numpy()[:-1]
    limit = tolerance or max(TOLERANCES[rollouts.dtype], TOLERANCES[DTYPES[engine.run.model.dtype]])
    for server, values in answers.items():
        difference = float(np.abs(values - own).mean())
        if not difference <= limit:
            raise WeightsNotArrived(
                f"after sync {version} {server} loaded the trainer's tensors but does not sample with them: its "
                f"log-probs of the probe row differ by {difference:.3g} nats on average, limit {limit:g} "
                "(rollout.probe_tolerance). Some of its weights are stale"
            )
