"""The router's losses and metrics against transformers' own router, and state of experts through changes of layout."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_hf_parity import packed_row

from megatron_klear.config.base import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
)
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.mcore.checkpoints.compare import compare_checkpoints
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.rows import empty_batch
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import NLL
from megatron_klear.types import PackedBatch, StepStats

LENGTHS = (1, 2, 33, 20)
AUX_LOSS, Z_LOSS = 0.1, 0.03
STEPS = 2
REPLAYED = {
    "one": (ParallelConfig(device="cpu"), "none"),
    "TP2 SP EP2": (ParallelConfig(tensor=2, expert=2, device="cpu"), "selective"),
    "PP2 VPP2": (ParallelConfig(pipeline=2, virtual_pipeline=2, device="cpu"), "full"),
}
RESHARDED = {
    "EP2": ParallelConfig(expert=2, device="cpu"),
    "TP2 SP EP4": ParallelConfig(tensor=2, expert=4, device="cpu"),
    "one": ParallelConfig(device="cpu"),
}


def run_config(folder: Path, parallel: ParallelConfig, **model: object) -> RunConfig:
    return RunConfig(
        output=folder / "run",
        model=ModelConfig(path=folder, dtype="fp32", **model),
        parallel=parallel,
        optimizer=OptimizerConfig(learning_rate=1e-3, decay="constant"),
        checkpoint=CheckpointConfig(asynchronous=False),
    )


def row() -> PackedBatch:
    """Prompts of a third of each sequence are not trained on, and sequences weigh differently."""
    batch = packed_row(512, LENGTHS)
    weights = torch.cat([torch.linspace(1, 2, n) * (torch.arange(n) >= n // 3) for n in LENGTHS])
    weights[batch.cu_seqlens[1:].long() - 1] = 0.0
    batch.weights.copy_(weights / weights.sum())
    return batch


def one_step(run: RunConfig, batch: PackedBatch) -> StepStats:
    with world(run.parallel) as topology:
        return Engine(run, topology).train_step([batch], NLL())


def transformers_step(folder: Path, batch: PackedBatch) -> tuple[float, float, dict[str, float]]:
    """The policy loss, the norm of the whole gradient, and the router's metrics, in the words of docs/layouts.md."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    k, experts = model.config.num_experts_per_tok, model.config.num_local_experts
    policy, aux, z = torch.zeros(()), torch.zeros(()), torch.zeros(())
    bounds = batch.cu_seqlens.tolist()
    entropies, loads = [], torch.zeros(model.config.num_hidden_layers, experts)
    for start, end in pairwise(bounds):
        tokens, targets, weights = (t[start:end] for t in (batch.tokens, batch.targets, batch.weights))
        out = model(tokens[None], output_router_logits=True)
        logprobs = out.logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        policy = policy - (weights * logprobs).sum()
        for layer, logits in enumerate(out.router_logits):
            probabilities = logits.view(-1, experts).softmax(-1)
            chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(k).indices, 1.0)
            aux = aux + weights.sum() * experts / k * (chosen.mean(0) * probabilities.mean(0)).sum()
            z = z + weights.sum() * logits.view(-1, experts).logsumexp(-1).square().mean()
            if weights.any():
                loads[layer] += chosen.sum(0)
                entropies.append(torch.distributions.Categorical(probabilities).entropy())
    (policy + AUX_LOSS * aux + Z_LOSS * z).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    layers = model.config.num_hidden_layers
    metrics = {
        "moe_aux_loss": aux.item() / layers,
        "moe_z_loss": z.item() / layers,
        "moe_router_entropy": torch.cat(entropies).mean().item(),
        "moe_load_max": (loads.amax(1) / loads.mean(1)).mean().item(),
        "moe_load_min": (loads.amin(1) / loads.mean(1)).mean().item(),
    }
    return policy.item(), norm.item(), metrics


@pytest.mark.parametrize("normalised", [True, False])
def test_the_routers_losses_and_metrics_are_those_of_the_formula(tmp_path, ranks, normalised: bool):
    folder = write_tiny_model(tmp_path / "model", "qwen3_moe", TinyShape(initializer_range=0.1))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "norm_topk_prob": normalised}))
    batch = row()
    loss, norm, metrics = transformers_step(folder, batch)
    balanced = run_config(folder, ParallelConfig(device="cpu"), moe_aux_loss=AUX_LOSS, moe_z_loss=Z_LOSS)
    found = ranks(1, one_step, balanced, batch)[0]
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(norm, rel=1e-5)
    assert {name: found.metrics[name] for name in metrics} == pytest.approx(metrics, rel=1e-5)
    plain = ranks(1, one_step, run_config(folder, ParallelConfig(device="cpu")), batch)[0]
    assert abs(plain.grad_norm - norm) > 1e-2 * norm, "the losses say nothing here: the comparison proves nothing"
    assert plain.metrics.keys() & metrics.keys() == {"moe_router_entropy", "moe_load_max", "moe_load_min"}


def train_on(run: RunConfig, source: Path | None, target: Path, batch: PackedBatch, steps: int) -> list[float]:
    """Load unless there is nothing, save, and then take steps; their gradient norms."""
    with world(run.parallel) as topology:
        engine = Engine(run, topology)
        if source is not None:
            engine.load(source)
        else:
            for _ in range(STEPS):
                engine.train_step([batch], NLL())
        engine.save(target)
        batches = [batch] if topology.data.rank == 0 else []
        norms = [engine.train_step(batches, NLL()).grad_norm for _ in range(steps)]
        engine.close()
        return norms


def test_state_of_experts_survives_changes_of_layout_exactly(tmp_path, ranks):
    folder = write_tiny_model(tmp_path / "model", "qwen3_moe", weights=False)
    batch, path = row(), tmp_path / "written"
    norms = ranks(1, train_on, run_config(folder, RESHARDED["one"], weights="random"), None, path, batch, 1)[0]
    for name, parallel in RESHARDED.items():
        run, target = run_config(folder, parallel, weights="random"), tmp_path / name.replace(" ", "")
        found = ranks(parallel.smallest_world, train_on, run, path, target, batch, 1)
        difference = compare_checkpoints(tmp_path / "written", target)
        assert not difference.unequal_tensors, name
        assert difference.num_optimizer_tensors > 0
        assert found[0] == pytest.approx(norms, rel=1e-5)
        path = target


def replay(run: RunConfig, batch: PackedBatch, replayed: bool) -> tuple[list[StepStats], torch.Tensor]:
    """Log-probs, then steps whose updates move the router; also the log-probs after them."""
    with world(run.parallel) as topology:
        engine = Engine(run, topology)
        if replayed:
            batch = replace(batch, routes={})
        engine.logprobs([batch])
        # A row of another length goes by between the passes of the first.
        batches = [batch, replace(empty_batch(batch), routes={} if replayed else None)]
        stats = [engine.train_step(batches, NLL()) for _ in range(4)]
        return stats, engine.logprobs([batch])[0]


def test_replayed_tokens_go_through_the_experts_of_the_first_pass(tmp_path, ranks):
    folder = write_tiny_model(tmp_path / "model", "qwen3_moe", TinyShape(initializer_range=0.1))
    batch = row()
    real = torch.ones(batch.num_tokens, dtype=torch.bool)
    real[batch.cu_seqlens[1:].long() - 1] = False

    def run(name: str, replayed: bool = True) -> list[tuple[list[StepStats], torch.Tensor]]:
        parallel, granularity = REPLAYED[name]
        config = run_config(folder, parallel)
        fast = OptimizerConfig(learning_rate=1e-2, decay="constant")
        config = config.model_copy(update={"optimizer": fast, "recompute": RecomputeConfig(granularity=granularity)})
        return ranks(parallel.smallest_world, replay, config, batch, replayed)

    stats, logprobs = run("one")[0]
    free_stats, free_logprobs = run("one", replayed=False)[0]
    assert {step.metrics["moe_load_max"] for step in stats} == {stats[0].metrics["moe_load_max"]}
    assert free_stats[0].grad_norm == pytest.approx(stats[0].grad_norm, rel=1e-5)
    assert free_stats[-1].metrics["moe_load_max"] != stats[0].metrics["moe_load_max"], "the router never changed"
    assert (free_logprobs - logprobs)[real].abs().max() > 1e-3
    for name in list(REPLAYED)[1:]:
        found, found_logprobs = run(name)[0]
        assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in stats], rel=1e-4), name
        assert (found_logprobs - logprobs)[real].abs().max() < 1e-3, name
        assert found[-1].metrics["moe_load_max"] == stats[0].metrics["moe_load_max"]
