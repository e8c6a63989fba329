"""Weights on their way to the rollout engine, with proof that every tensor arrived."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_klear.checksum import checksum
from megatron_klear.errors import UserError
from megatron_klear.mcore.engine import Engine
from megatron_klear.rollout.engine import RolloutEngine


class WeightsNotArrived(UserError):
    """The rollout engine holds other weights than it was sent."""


def send_weights(engine: Engine, rollouts: RolloutEngine, version: int) -> None:
    """Give the engine's weights to the rollout engine and compare checksums of what was sent and what is held.

    Raises WeightsNotArrived naming the tensors that differ.
    """
    sent: dict[str, Tensor] = {}
    held = rollouts.load_weights(_noted(engine.hf_weights(), sent), version)
    missing = sorted(set(sent) ^ set(held))
    # Compared in the precision held: the engine may keep another than the trainer's.
    wrong = [name for name in sorted(set(sent) & set(held)) if not _same(sent[name], held[name])]
    if missing or wrong:
        named = ", ".join((wrong + missing)[:5])
        raise WeightsNotArrived(
            f"after sync {version} the rollout engine does not hold the trainer's weights: {len(wrong)} tensors differ "
            f"and {len(missing)} are on one side only ({named}). Samples from it would not be of this policy; "
            "python tools/verify.py weights --config RUN.toml looks closer"
        )


def _noted(weights: Iterator[tuple[str, Tensor]], sent: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        sent[name] = tensor
        yield name, tensor


def _same(sent: Tensor, held: str) -> bool:
    dtype: torch.dtype = getattr(torch, held.split(":", 1)[0])
    return checksum(sent.to(dtype)) == held
