"""A short row's log-probs, of the model about to be trained and of transformers on the same folder.

Log-probs that differ by more than rounding mean that config.json or weights are read wrongly, and that another model
would be trained than every other program loads.
"""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from megatron_klear.distributed import exchange
from megatron_klear.mcore.checkpoints.convert import transformers_logits
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.lora import adapters_off
from megatron_klear.mcore.model import DTYPES
from megatron_klear.models.architecture import ArchitectureError
from megatron_klear.types import PackedBatch

MAX_PARAMETERS = 2_000_000_000
_MEAN_NATS = {"fp32": 0.01, "bf16": 0.25}
"""Far above rounding, far below what a wrong rotary embedding or a swapped tensor does to a trained model."""
_TOKENS = 64


def compare_with_transformers(engine: Engine) -> str:
    """Compare log-probs of a row of random tokens; returns a line for the log. Collective, for a model not yet trained.

    Rank 0 loads transformers' copy in fp32 into host memory and lets it go again. What `model.compare_logits = "auto"`
    leaves out is told in the line; empty where there is nothing to compare, or the setting is off. Raises
    ArchitectureError on every rank where the mean difference is beyond rounding.
    """
    model = engine.run.model
    if model.weights == "random" or model.checkpoint is not None or model.compare_logits == "off":
        return ""
    reason = exchange.from_first_rank(lambda: _why_not(engine))
    if reason:
        return f"log-probs are not compared with transformers': {reason}"
    batch = _row(engine)
    with adapters_off(engine.models):  # those of lora.adapter are no part of the folder
        ours = engine.logprobs([batch])[0]
    mean = exchange.from_first_rank(lambda: _mean_difference(engine, batch, ours))
    if not mean <= _MEAN_NATS[model.dtype]:
        raise ArchitectureError(
            f"model.path {model.path}: log-probs differ from transformers' on the same folder by {mean:.2g} nats a "
            f"token, more than {model.dtype} rounds ({_MEAN_NATS[model.dtype]:g}): config.json or weights are read "
            'wrongly. Please report this model; model.compare_logits = "off" trains it all the same'
        )
    return f"log-probs are transformers' within {mean:.1e} nats a token"


def _why_not(engine: Engine) -> str:
    model, count = engine.run.model, engine.architecture.num_parameters
    if model.fp8 != "off":
        return "model.fp8 rounds too much to tell"
    if model.compare_logits == "on":
        return ""
    if count > MAX_PARAMETERS:
        return f'{count:,} parameters are above {MAX_PARAMETERS:,}; model.compare_logits = "on" does it all the same'
    available = psutil.virtual_memory().available
    if 8 * count > available:
        return f"{8 * count / 1e9:.0f} GB of host memory are needed and {available / 1e9:.0f} GB are available"
    return ""


def _row(engine: Engine) -> PackedBatch:
    length = min(_TOKENS, engine.architecture.max_positions)
    tokens = torch.randint(engine.architecture.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    weights = torch.full((length,), 1 / (length - 1))
    weights[-1] = 0.0
    return PackedBatch(
        tokens=tokens,
        targets=torch.cat([tokens[1:], torch.zeros(1, dtype=torch.int64)]),
        weights=weights,
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
    )


def _mean_difference(engine: Engine, batch: PackedBatch, ours: Tensor) -> float:
    """Of the row's log-probs to transformers', whose weights are rounded as the trainer's are."""
    logits = transformers_logits(engine.run.model.path, batch, DTYPES[engine.run.model.dtype])
    theirs = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return float((ours - theirs)[:-1].abs().mean())
