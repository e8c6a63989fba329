"""What ranks run, with transformer-engine's layers on the emulated extension or with Megatron's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from emulated_card import EmulatedCard

from megatron_klear.config.base import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, SFTConfig
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.mcore import engine as engine_module
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import NLL
from megatron_klear.types import Sample
from megatron_klear.verify.layouts import Layout, LayoutResult, measure, ragged_samples

SHAPES = {"qwen3": TinyShape(tied_embeddings=True), "qwen3_moe": TinyShape()}


def tiny(folder: Path, family: str, weights: bool = False) -> SFTConfig:
    """Settings of a tiny model in fp32, which is written into `folder`."""
    write_tiny_model(folder / "model", family, SHAPES[family], weights=weights)
    return SFTConfig(
        output=folder / "run",
        model=ModelConfig(
            path=folder / "model", weights="pretrained" if weights else "random", dtype="fp32", attention="sdpa"
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        data=DataConfig(train=("unused",), max_length=64, tokens_per_microbatch=128),
        checkpoint=CheckpointConfig(asynchronous=False),
    )


def layers(config: SFTConfig, choice: Literal["on", "off"]) -> SFTConfig:
    """With transformer-engine's layers or without."""
    return config.model_copy(update={"model": config.model.model_copy(update={"transformer_engine": choice})})


@dataclass(frozen=True)
class Measured:
    """What a layout computed, the weights it ended with, and what it was computed by."""

    result: LayoutResult
    weights: dict[str, torch.Tensor]
    classes: frozenset[str]
    """Of the model's modules and of its optimizers, `te.` before transformer-engine's."""
    calls: dict[str, int]
    """Calls of each emulated function on this rank; none with Megatron's own layers."""


def measured(config: SFTConfig, layout: Layout, samples: Sequence[Sample], steps: int) -> Measured:
    """On every rank: `verify.layouts.measure`, and what the engine holds when it is closed."""
    kept: dict[str, Any] = {}
    close = Engine.close

    def look(engine: Engine) -> None:
        kept["weights"] = {name: tensor.clone() for name, tensor in engine.hf_weights()}
        modules = [module for chunk in engine.models for module in chunk.modules()]
        optimizers = [getattr(part, "optimizer", None) for part in engine.optimizer.chained_optimizers]
        kept["classes"] = frozenset(_origin(one) for one in (*modules, *optimizers))
        close(engine)

    with mock.patch.object(Engine, "close", look):
        result = measure(config, layout, samples, steps)
    process = sys.modules.get("te_process")
    return Measured(result=result, calls=dict(process.CALLS) if process is not None else {}, **kept)


def measured_unmarked(config: SFTConfig, layout: Layout, samples: Sequence[Sample], steps: int) -> Measured:
    """The same with norms that lost the mark by which Megatron sums their gradients over sequence shards."""
    build = engine_module.build_chunks

    def unmarked(*args: Any) -> Any:
        chunks = build(*args)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.sequence_parallel = False
        return chunks

    with mock.patch.object(engine_module, "build_chunks", unmarked):
        return measured(config, layout, samples, steps)


def _origin(of: object) -> str:
    for parent in type(of).__mro__:
        if parent.__module__.startswith("transformer_engine."):
            return f"te.{parent.__name__}"
    return type(of).__name__


def _rows(engine: Engine) -> list[Any]:
    samples = ragged_samples(engine.architecture.vocab_size, longest=32, count=8)
    weights = loss_weights(np.array([num_predicted(sample) for sample in samples]), "token_mean")
    batches = [pack(samples[i : i + 2], [float(w) for w in weights[i : i + 2]]) for i in range(0, len(samples), 2)]
    return batches[engine.topology.data.rank :: engine.topology.data.size]


def save_after_steps(config: SFTConfig, layout: Layout, path: Path, steps: int) -> list[float]:
    """On every rank: train, save and train on; the losses of three steps behind the save."""
    laid_out = layout.apply(config)
    with world(laid_out.parallel, laid_out.seed) as topology:
        engine = Engine(laid_out, topology)
        for _ in range(steps):
            engine.train_step(_rows(engine), NLL())
        engine.save(path)
        losses = [engine.train_step(_rows(engine), NLL()).loss for _ in range(3)]
        engine.close()
        return losses


def load_and_save_again(config: SFTConfig, layout: Layout, source: Path, target: Path) -> tuple[int, list[float]]:
    """On every rank: load and save; the step that was loaded, and the losses of the next three."""
    laid_out = layout.apply(config)
    with world(laid_out.parallel, laid_out.seed) as topology:
        engine = Engine(laid_out, topology)
        engine.load(source)
        step = engine.step
        engine.save(target)
        losses = [engine.train_step(_rows(engine), NLL()).loss for _ in range(3)]
        engine.close()
        return step, losses


def exported(config: SFTConfig, layout: Layout) -> dict[str, torch.Tensor]:
    """On every rank: load a Hugging Face folder and export it."""
    laid_out = layout.apply(config)
    with world(laid_out.parallel, laid_out.seed) as topology:
        engine = Engine(laid_out, topology)
        assert any(_origin(module) == "te.Linear" for chunk in engine.models for module in chunk.modules())
        return {name: tensor.clone() for name, tensor in engine.hf_weights()}


def stepped_at_share(
    config: SFTConfig, layout: Layout, share: float, steps: int, saved: Path, resume: Path | None = None
) -> tuple[list[float], frozenset[str]]:
    """On every rank, a card emulated: losses of `steps` steps with this share of the optimizer on the host, and a save.

    Also the classes of the optimizers.
    """
    optimizer = config.optimizer.model_copy(update={"cpu_offload": share})
    laid_out = layout.apply(config.model_copy(update={"optimizer": optimizer}))
    with world(laid_out.parallel, laid_out.seed) as topology, EmulatedCard():
        engine = Engine(laid_out, topology)
        if resume is not None:
            engine.load(resume)
        losses = [engine.train_step(_rows(engine), NLL()).loss for _ in range(steps)]
        engine.save(saved)
        parts = engine.optimizer.chained_optimizers
        inner = [part.optimizer for part in parts]
        inner += [sub for one in inner for sub in getattr(one, "sub_optimizers", [])]
        engine.close()
        return losses, frozenset(map(_origin, inner))
