"""The training steps that `sft.py` times: the engine's, and transformers loops that pad, pack or go one by one.

The plain loop is what a careful person writes in an afternoon: AutoModelForCausalLM with SDPA, AdamW with two parameter
groups, gradient accumulation with one normaliser over the whole step, clipping. On CUDA it holds fp32 weights and
computes in bf16 by autocast, as the engine keeps fp32 master weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_klear.config.base import DataConfig, ModelConfig, OptimizerConfig, RecomputeConfig, SFTConfig
from megatron_klear.data.pack import num_predicted, pack
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import Topology
from megatron_klear.rl.losses import NLL
from megatron_klear.types import PackedBatch, Sample

Mode = Literal["padded", "packed", "one_by_one"]
MODES: tuple[Mode, ...] = ("padded", "packed", "one_by_one")
LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD = 1e-4, 0.1, 1.0
BETAS = (0.9, 0.95)
IGNORED = -100

StepRows = Sequence[Sequence[Sample]]
"""Samples of one optimizer step, by packed row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all loops share."""

    folder: Path  # config.json
    dtype: Literal["fp32", "bf16"]
    recompute: Literal["none", "selective", "full"]
    tokens_per_row: int
    sequences_per_batch: int  # of the padded loop
    cpu_offload: float = 0.0  # of the engine's optimizer state

    def run_config(self) -> SFTConfig:
        """The engine's settings; nothing is read from or written to `output` and `data`."""
        return SFTConfig(
            output=self.folder / "run",
            model=ModelConfig(path=self.folder, weights="random", dtype=self.dtype),
            optimizer=OptimizerConfig(
                learning_rate=LEARNING_RATE,
                decay="constant",
                weight_decay=WEIGHT_DECAY,
                beta1=BETAS[0],
                beta2=BETAS[1],
                clip_grad=CLIP_GRAD,
                cpu_offload=self.cpu_offload,
            ),
            recompute=RecomputeConfig(granularity=self.recompute),
            data=DataConfig(
                train=("unused",),
                max_length=self.tokens_per_row,
                tokens_per_microbatch=self.tokens_per_row,
                segment_multiple=1,
            ),
        )


class Loop(Protocol):
    """A way to take an optimizer step."""

    def step(self, rows: StepRows) -> float:
        """Train on the samples; their mean loss."""
        ...

    def loss(self, rows: StepRows) -> float:
        """Mean loss over the trained tokens, nothing changed."""
        ...

    def discard(self) -> None:
        """Let go of what a failed step left behind."""
        ...


class EngineLoop:
    """Engine.train_step on packed rows."""

    def __init__(self, settings: Settings, topology: Topology) -> None:
        self.engine = Engine(settings.run_config(), topology)

    def step(self, rows: StepRows) -> float:
        """One optimizer step; packing the rows is part of it."""
        return self.engine.train_step(_pack(rows), NLL()).loss

    def loss(self, rows: StepRows) -> float:
        """Mean loss over the trained tokens."""
        return self.engine.evaluate(_pack(rows), NLL())

    def discard(self) -> None:
        """Free the memory of a failed step."""
        torch.cuda.empty_cache()

    def weights(self) -> dict[str, Tensor]:
        """The model under its Hugging Face names."""
        return {name: tensor.float().clone() for name, tensor in self.engine.hf_weights()}

    def close(self) -> None:
        """End the engine."""
        self.engine.close()


def _pack(rows: StepRows) -> list[PackedBatch]:
    trained = sum(num_predicted(sample) for row in rows for sample in row)
    return [pack(row, [1.0 / trained] * len(row)) for row in rows]


class PlainModel:
    """The transformers model and its optimizer, shared by the plain loops."""

    def __init__(self, settings: Settings, weights: dict[str, Tensor], device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(settings.folder)
        with torch.device(device):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"weights do not fit the transformers model: missing {missing}, unknown {unexpected}")
        self.model.train()
        if settings.recompute != "none":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.device, self.autocast = device, settings.dtype == "bf16"
        self.sequences_per_batch = settings.sequences_per_batch
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=1e-8,
            fused=True,
        )

    def step(self, rows: StepRows, mode: Mode) -> float:
        """One optimizer step over the samples, batched in the given way."""
        total = self.loss(rows, mode, backward=True)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_GRAD)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def loss(self, rows: StepRows, mode: Mode, *, backward: bool = False) -> float:
        """Mean loss over the trained tokens, its gradient accumulated if asked for."""
        samples = [sample for row in rows for sample in row]
        count = torch.tensor(sum(num_predicted(sample) for sample in samples), device=self.device)
        total = torch.zeros((), device=self.device)
        for batch in self._batches(rows, samples, mode):
            inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
            precision = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
            with precision, torch.set_grad_enabled(backward):
                loss = self.model(**inputs, use_cache=False, num_items_in_batch=count).loss
            if backward:
                loss.backward()
            total += loss.detach()
        return float(total)

    def _batches(self, rows: StepRows, samples: list[Sample], mode: Mode) -> list[dict[str, Tensor]]:
        if mode == "packed":
            return [_packed(row) for row in rows]
        size = 1 if mode == "one_by_one" else self.sequences_per_batch
        return [_padded(samples[start : start + size]) for start in range(0, len(samples), size)]


class PlainLoop:
    """The transformers model in one way of batching."""

    def __init__(self, plain: PlainModel, mode: Mode) -> None:
        self.plain, self.mode = plain, mode

    def step(self, rows: StepRows) -> float:
        """One optimizer step, without what the engine's CPU support costs every torch call of the process."""
        with torch._C.DisableTorchFunction():
            return self.plain.step(rows, self.mode)

    def loss(self, rows: StepRows) -> float:
        """Mean loss over the trained tokens."""
        return self.plain.loss(rows, self.mode)

    def discard(self) -> None:
        """Drop half-made gradients and the memory of a failed step."""
        self.plain.optimizer.zero_grad()
        torch.cuda.empty_cache()


def _labels(sample: Sample) -> Tensor:
    """transformers shifts labels itself; the first token of a sequence is predicted by nothing."""
    labels = torch.from_numpy(sample.tokens).long()
    labels[~torch.from_numpy(sample.trained)] = IGNORED
    labels[0] = IGNORED
    return labels


def _padded(samples: Sequence[Sample]) -> dict[str, Tensor]:
    tokens = [torch.from_numpy(sample.tokens).long() for sample in samples]
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
        "labels": torch.nn.utils.rnn.pad_sequence([_labels(s) for s in samples], True, IGNORED),
    }
    if len(samples) > 1:
        ones = [torch.ones(len(token), dtype=torch.long) for token in tokens]
        batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
    return batch


def _packed(row: Sequence[Sample]) -> dict[str, Tensor]:
    """One row whose positions restart: transformers makes the block-diagonal mask from them."""
    return {
        "input_ids": torch.cat([torch.from_numpy(sample.tokens).long() for sample in row])[None],
        "labels": torch.cat([_labels(sample) for sample in row])[None],
        "position_ids": torch.cat([torch.arange(len(sample.tokens)) for sample in row])[None],
    }
