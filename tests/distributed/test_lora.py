"""Adapters: the same numbers in every layout, a frozen base without gradients, the update that transformers sees.

KLEAR_LORA_LAYOUTS=1 runs them in all layouts of a dense model.
"""

import os

import numpy as np
import pytest
import torch

from megatron_klear import kernels
from megatron_klear.config.base import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RecomputeConfig,
    SFTConfig,
)
from megatron_klear.config.memory import adapter_parameters
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.mcore.checkpoints.convert import transformers_logits
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.lora import is_adapter
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import read_architecture
from megatron_klear.models.names import expected_tensors
from megatron_klear.models.safetensors_io import SafetensorsWriter
from megatron_klear.rl.losses import NLL
from megatron_klear.verify.layouts import (
    LAYOUTS,
    ONE_PROCESS,
    Layout,
    compare,
    layouts_named,
    measure_losses,
    ragged_samples,
)

TOLERANCE = 1e-5
STEPS = 4
LOSSES = ("nll", "gppo")
ALWAYS = ("full recompute", "TP2 SP", "PP2 VPP2", "CP2", "DP2 overlap")
EVERY_LAYOUT = os.environ.get("KLEAR_LORA_LAYOUTS") == "1"
SHAPE = TinyShape(tied_embeddings=True)


def settings(folder, **changes) -> SFTConfig:
    lora = LoraConfig(rank=4, alpha=8, targets=changes.pop("targets", ("all",)))
    return SFTConfig(
        output=folder / "run",
        model=ModelConfig(path=folder / "model", dtype="fp32", weights=changes.pop("weights", "random")),
        optimizer=OptimizerConfig(learning_rate=1e-2, decay="constant"),
        lora=lora,
        data=DataConfig(train=("unused",), max_length=64, tokens_per_microbatch=128),
        checkpoint=CheckpointConfig(asynchronous=False),
        **changes,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory, ranks):
    """Settings of a tiny model with adapters, samples, and what one process computes for each loss."""
    folder = tmp_path_factory.mktemp("lora")
    write_tiny_model(folder / "model", "qwen3", SHAPE, weights=False)
    config = settings(folder)
    samples = ragged_samples(SHAPE.vocab_size, longest=64)
    return config, samples, ranks(1, measure_losses, config, ONE_PROCESS, samples, STEPS, LOSSES)[0]


@pytest.mark.parametrize(
    "layout", LAYOUTS[1:] if EVERY_LAYOUT else layouts_named(ALWAYS), ids=lambda layout: layout.name
)
def test_layout_gives_the_numbers_of_one_process(case, ranks, layout: Layout):
    config, samples, references = case
    for_all = ranks(layout.processes, measure_losses, config, layout, samples, STEPS, LOSSES)
    for loss in LOSSES:
        assert all(result[loss].losses == for_all[0][loss].losses for result in for_all)
        found = compare(for_all[0][loss], references[loss], samples)
        assert found.within(TOLERANCE), (loss, found)


def test_attention_beside_experts_has_adapters_alike_in_every_layout(tmp_path, ranks):
    write_tiny_model(tmp_path / "model", "qwen3_moe", SHAPE, weights=False)
    config, samples = settings(tmp_path), ragged_samples(SHAPE.vocab_size, longest=64)
    (reference,) = ranks(1, measure_losses, config, ONE_PROCESS, samples, STEPS, ["nll"])
    for layout in layouts_named(["TP2 SP EP2", "EP2 overlap"]):
        found, *_ = ranks(layout.processes, measure_losses, config, layout, samples, STEPS, ["nll"])
        assert compare(found["nll"], reference["nll"], samples).within(TOLERANCE), layout.name
    assert reference["nll"].losses[-1] < reference["nll"].losses[0] - 0.01


def test_the_gate_sees_other_adapters(case, ranks):
    """The gate must fail where the update differs: here by its scale."""
    config, samples, references = case
    other = config.model_copy(update={"lora": LoraConfig(rank=4, alpha=8.8)})
    result = ranks(1, measure_losses, other, ONE_PROCESS, samples, STEPS, ["nll"])[0]
    assert not compare(result["nll"], references["nll"], samples).within(TOLERANCE)


def batches_of(engine: Engine):
    samples = ragged_samples(engine.architecture.vocab_size, longest=32, count=6)
    weights = loss_weights(np.array([num_predicted(sample) for sample in samples]), "token_mean")
    return [pack(samples, [float(weight) for weight in weights])]


def what_is_trained(config: SFTConfig) -> dict[str, int]:
    """Sizes of what a step reads and writes, and how far the weights moved."""
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        model = engine.models[0]
        base = {name: p.detach().clone() for name, p in model.named_parameters() if not is_adapter(name)}
        engine.train_step(batches_of(engine), NLL())
        moved = sum(not torch.equal(base[name], p) for name, p in model.named_parameters() if name in base)
        with_gradient = [name for name, p in model.named_parameters() if hasattr(p, "main_grad") or p.grad is not None]
        states = [state for part in engine.optimizer.chained_optimizers for state in part.optimizer.state.values()]
        found = {
            "adapters": sum(p.numel() for name, p in model.named_parameters() if is_adapter(name)),
            "base moved": moved,
            "base with gradient": sum(not is_adapter(name) for name in with_gradient),
            "gradients": sum(buffer.grad_data.numel() for chunk in engine.chunks for buffer in chunk.buffers),
            "moments": sum(state["exp_avg"].numel() for state in states),
        }
        engine.close()
        return found


def test_the_base_has_no_gradient_no_optimizer_state_and_stays(case, ranks):
    found = ranks(1, what_is_trained, case[0])[0]
    assert found["adapters"] == adapter_parameters(case[0], read_architecture(case[0].model.path))
    assert found["base moved"] == found["base with gradient"] == 0
    assert found["gradients"] <= found["adapters"] + 4096  # buckets are padded
    assert found["moments"] <= found["adapters"] + 4096


def head_products(config: SFTConfig) -> int:
    """Products that make a gradient of the head in a step."""
    counted: list[int] = []
    whole = kernels.chunks.gemm.add_weight_gradient
    kernels.chunks.gemm.add_weight_gradient = lambda *arguments: (counted.append(1), whole(*arguments))
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        engine.train_step(batches_of(engine), NLL())
        engine.close()
    return len(counted)


def test_a_frozen_head_costs_no_product_of_its_own(case, ranks):
    config = case[0]
    assert ranks(1, head_products, config)[0] == 0
    assert ranks(1, head_products, config.model_copy(update={"lora": None}))[0] > 0


def norms_with(config: SFTConfig, ways: list[str]) -> list[float]:
    """The first gradient norm with each way of recomputation."""
    found = []
    with world(config.parallel, config.seed) as topology:
        for way in ways:
            engine = Engine(config.model_copy(update={"recompute": RecomputeConfig(granularity=way)}), topology)
            found.append(engine.train_step(batches_of(engine), NLL()).grad_norm)
            engine.close()
    return found


def test_adapters_in_recomputed_blocks_alone_get_their_gradient(case, ranks):
    """The first layer's block has no trained input: without one that asks for a gradient torch would make none."""
    config = case[0].model_copy(update={"lora": LoraConfig(rank=4, targets=("down_proj",))})
    plain, *recomputed = ranks(1, norms_with, config, ["none", "selective", "full"])[0]
    assert plain > 0
    assert recomputed == pytest.approx([plain, plain], rel=1e-6)


def train_and_export(config: SFTConfig, folder) -> tuple[torch.Tensor, float]:
    """Log-probs of a row after a few steps, and by how much the steps moved them; the merged model is in `folder`."""
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        batches = batches_of(engine)
        before = engine.logprobs(batches)[0]
        for _ in range(3):
            engine.train_step(batches, NLL())
        after = engine.logprobs(batches)[0]
        folder.mkdir(exist_ok=True)
        with SafetensorsWriter(folder, expected_tensors(engine.architecture)) as writer:
            for name, tensor in engine.hf_weights():
                writer.write(name, tensor)
        engine.close()
        return after, float((after - before).abs().max())


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3", ("all",)),
        ("qwen2", ("q_proj", "v_proj", "up_proj")),
        pytest.param("llama", ("o_proj", "k_proj"), marks=pytest.mark.slow),
    ],
)
def test_merged_weights_are_the_model_that_was_trained(tmp_path, ranks, family, targets):
    write_tiny_model(tmp_path / "model", family, SHAPE, weights=True)
    config = settings(tmp_path, targets=targets, weights="pretrained", recompute=RecomputeConfig(granularity="full"))
    ours, moved = ranks(1, train_and_export, config, tmp_path / "merged")[0]
    (tmp_path / "merged" / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    batch = pack(ragged_samples(SHAPE.vocab_size, longest=32, count=6), [1.0] * 6)
    logits = transformers_logits(tmp_path / "merged", batch)
    theirs = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    trained = batch.weights != 0
    assert moved > 0.05
    assert float((ours - theirs)[trained].abs().max()) < 1e-5


def drawn(config: SFTConfig, layout: Layout) -> dict[str, torch.Tensor]:
    laid_out = layout.lay_out(config)
    with world(laid_out.parallel, laid_out.seed) as topology:
        engine = Engine(laid_out, topology)
        found = dict(engine.adapter_weights())
        engine.close()
        return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2 PP2 SP", "PP2 VPP2"])
def test_the_start_is_that_of_the_seed_in_every_layout(case, ranks, name):
    config, layout = case[0], layouts_named([name])[0]
    one = ranks(1, drawn, config, ONE_PROCESS)[0]
    for found in ranks(layout.processes, drawn, config, layout):
        assert list(found) == list(one)
        assert all(torch.equal(found[name], one[name]) for name in one)


def test_the_start_is_an_update_of_zero_drawn_from_the_seed(case, ranks):
    config = case[0]
    one = ranks(1, drawn, config, ONE_PROCESS)[0]
    a = {name: tensor for name, tensor in one.items() if "lora_A" in name}
    assert all(0.9 < float(t.abs().max()) * t.shape[1] ** 0.5 <= 1 for t in a.values())
    assert all(not t.any() for name, t in one.items() if name not in a)
    other = ranks(1, drawn, config.model_copy(update={"seed": 7}), ONE_PROCESS)[0]
    assert not any(torch.equal(a[name], other[name]) for name in a)


def reference_of(config: SFTConfig) -> dict[str, object]:
    """Log-probs of the start, of the reference and of the trained model, and what the reference keeps."""
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        batches = batches_of(engine)
        engine.keep_reference()
        start = engine.logprobs(batches)[0]
        engine.train_step(batches, NLL())
        trained = engine.logprobs(batches)[0]
        reference = engine.reference_logprobs(batches)[0]
        again = engine.logprobs(batches)[0]
        kept = len(engine._reference.values)
        engine.close()
    return {"start": start, "trained": trained, "reference": reference, "again": again, "kept": kept}


def test_the_base_is_the_reference_without_a_copy(case, ranks):
    found = ranks(1, reference_of, case[0])[0]
    assert found["kept"] == 0
    assert torch.equal(found["reference"], found["start"])
    assert torch.equal(found["again"], found["trained"])
    assert not torch.equal(found["trained"], found["start"])


@pytest.mark.slow
def test_a_folder_is_the_reference_without_the_adapters(case, tmp_path, ranks):
    write_tiny_model(tmp_path / "other", "qwen3", SHAPE, weights=True)
    found = ranks(1, folder_reference, case[0], tmp_path / "other")[0]
    assert torch.allclose(found["reference"], found["alone"], atol=1e-6)
    assert torch.equal(found["again"], found["trained"])


def folder_reference(config: SFTConfig, folder) -> dict[str, torch.Tensor]:
    """Log-probs of the model in `folder` as a reference, and by itself."""
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        batches = batches_of(engine)
        engine.train_step(batches, NLL())
        trained = engine.logprobs(batches)[0]
        engine.keep_reference(folder)
        reference, again = engine.reference_logprobs(batches)[0], engine.logprobs(batches)[0]
        whole = config.model_copy(update={"lora": None, "model": ModelConfig(path=folder, dtype="fp32")})
        alone = Engine(whole, topology)
        values = alone.logprobs(batches)[0]
        alone.close()
        engine.close()
    return {"reference": reference, "alone": values, "trained": trained, "again": again}
