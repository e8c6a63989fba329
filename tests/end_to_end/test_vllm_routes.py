"""Routes of a real vLLM server on the CPU, replayed in the trainer, with flips planted in the server's routers."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_server import SHAPE, prompts, running_server

from megatron_klear.config.base import CheckpointConfig, DataConfig, ModelConfig, ParallelConfig, SFTConfig
from megatron_klear.config.rl import SamplingConfig
from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.data.pack import pack
from megatron_klear.data.tiny import write_tiny_model
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.orchestrator.trainer import TrainersWeights, send_weights
from megatron_klear.rollout.engine import GroupRequest
from megatron_klear.rollout.vllm.engine import VLLMEngine
from megatron_klear.rollout.vllm.open import Access
from megatron_klear.rollout.vllm.routes import RouteForm
from megatron_klear.train.weight_sync import ServersWeights
from megatron_klear.types import Sample

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        os.environ.get("KLEAR_VLLM_EXPERTS") != "1", reason="with KLEAR_VLLM_EXPERTS=1, as it starts a server"
    ),
]

SAMPLING = SamplingConfig(samples_per_prompt=3, max_tokens=60, temperature=0.9)
NUDGE = 1e-6


def nudged(weights: Iterator[tuple[str, torch.Tensor]], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, each row of a router moved by next to nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights:
        is_router = name.endswith("mlp.gate.weight")
        yield name, tensor + NUDGE * torch.randn(tensor.shape, generator=generator) if is_router else tensor


def tie_experts(model: Path) -> None:
    """Make the routers of a model like four experts equally well, and as many others."""
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("mlp.gate.weight"):
            weights[name] = tensor[::4].repeat_interleave(4, dim=0).contiguous()
    save_file(dict(nudged(iter(weights.items()), seed=1)), model / "model.safetensors", metadata={"format": "pt"})


@dataclass
class Found:
    """Largest differences of log-probs in nats, and shares of routes that differ."""

    replayed: list[float] = field(default_factory=list)
    free: list[float] = field(default_factory=list)
    flipped: list[float] = field(default_factory=list)
    crossing: int = 0
    """Responses drawn across an update of weights, each with routes of all its tokens."""


def differ(engine: Engine, samples: list[Sample], *, replayed: bool) -> float:
    batch = pack(samples, [1.0] * len(samples))
    batch = batch if replayed else replace(batch, sampler_routes=None)
    own = engine.logprobs([batch], temperature=SAMPLING.temperature)[0]
    return float((own - batch.sampler_logprobs)[batch.weights != 0].abs().max())


def share_flipped(engine: Engine, samples: list[Sample]) -> float:
    """Of tokens and layers, those that the trainer's own routers send elsewhere, without replay in layers before."""
    batch = replace(pack(samples, [1.0] * len(samples)), routes={}, sampler_routes=None)
    engine.logprobs([batch])
    own = torch.stack([batch.routes[layer] for layer in sorted(batch.routes)], dim=1).sort(-1).values
    theirs = pack(samples, [1.0] * len(samples)).sampler_routes.sort(-1).values
    return float((own != theirs).any(-1)[theirs[:, 0, 0] >= 0].float().mean())


def draw_and_replay(model: Path, address: str, rollout: VLLMRolloutConfig, updates: int) -> Found:
    """Send weights with nudged routers, draw, and score with and without the server's routes."""
    found = Found()
    with world(ParallelConfig()) as topology:
        config = SFTConfig(
            output=model.parent / "run",
            model=ModelConfig(path=model, dtype="fp32"),
            data=DataConfig(train=("unused",)),
            checkpoint=CheckpointConfig(asynchronous=False),
        )
        engine = Engine(config, topology)
        whole, seeds = engine.hf_weights, iter(range(2, 100))
        engine.hf_weights = lambda: nudged(whole(), next(seeds))
        sender = ServersWeights(engine, rollout)
        sender.connect(Access(addresses=(address,), api_key=None))
        rollouts = VLLMEngine(
            rollout,
            [address],
            TrainersWeights(sender, needs_shared_device=False),
            decode=lambda ids: " ".join(map(str, ids)),
            stop_token_ids=(3,),
            vocab_size=engine.architecture.vocab_size,
            routes=RouteForm.of(engine.architecture, kept_by_worker=True),
        )

        def send(version: int) -> None:
            send_weights(rollouts, sender, version, engine.architecture.vocab_size)

        for version in range(updates):
            send(version)
            groups = rollouts.generate(prompts(5, 40, 200), SAMPLING, seed=version)
            samples = [sample for group in groups for sample in group.samples]
            found.replayed.append(differ(engine, samples, replayed=True))
            found.free.append(differ(engine, samples, replayed=False))
            found.flipped.append(share_flipped(engine, samples))
        found.crossing = crossing(rollouts, send, updates)
        rollouts.close()
        sender.close()
        engine.close()
    return found


def crossing(rollouts: VLLMEngine, send: Any, version: int) -> int:
    """Responses drawn with two versions of weights, whose routes `pack` takes: all of their tokens."""
    long = SAMPLING.model_copy(update={"max_tokens": 200, "stop_token_ids": ()})
    for seconds in (0.2, 0.1, 0.4, 0.8):
        rollouts.submit([GroupRequest(prompt=prompt, sampling=long, seed=version) for prompt in prompts(5, 40, 200)])
        time.sleep(seconds)
        send(version)
        version += 1
        samples: list[Sample] = []
        while rollouts.in_flight:
            for finished in rollouts.take(60):
                samples += finished.group.samples
        pack(samples, [1.0] * len(samples))
        if any(sample.version_spans for sample in samples):
            break
    return sum(bool(sample.version_spans) for sample in samples)


def test_replayed_routes_of_a_server_give_its_logprobs_despite_planted_flips(ranks, tmp_path):
    shape = replace(SHAPE, expert_ffn_hidden_size=64, initializer_range=0.05)
    model = write_tiny_model(tmp_path / "model", "qwen3_moe", shape)
    tie_experts(model)
    with running_server(tmp_path, shape, model=model, routes=True) as server:
        rollout = server.config.model_copy(
            # The probe's log-probs are not replayed.
            update={"transfer_folder": tmp_path / "transfer", "request_seconds": 120.0, "probe_tolerance": 10.0}
        )
        (found,) = ranks(1, draw_and_replay, model, server.address, rollout, 2, timeout_seconds=300.0)
    assert max(found.replayed) < 1e-4
    assert min(found.free) > 1e-2
    assert min(found.flipped) > 0.3
    assert found.crossing
