"""Same numbers in every layout: loss, gradient norm and log-probs against one process, over five optimizer steps.

All layouts are of Qwen3; of the other dense families a few, and all where KLEAR_ALL_LAYOUTS=1 asks for them.
KLEAR_EXPERT_LAYOUTS=1 runs models with experts in all of their layouts, with the router's losses and without.
"""

import os

import pytest

from megatron_klear.config.base import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, SFTConfig
from megatron_klear.config.checks import check_layout
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.models.architecture import read_architecture
from megatron_klear.verify.layouts import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    ONE_PROCESS,
    Layout,
    compare,
    layouts_named,
    measure,
    measure_losses,
    ragged_samples,
)

TOLERANCE = 1e-5
STEPS = 5
LOSSES = ("nll", "gppo")
MODELS = {
    "qwen3": ("qwen3", TinyShape(tied_embeddings=True)),
    "qwen2": ("qwen2", TinyShape(vocab_size=515)),
    "llama": ("llama", TinyShape()),
}
OF_OTHER_FAMILIES = ("full recompute", "TP2 SP", "PP2 VPP2", "CP2", "DP2 overlap", "TP2 PP2 CP2 SP")
if os.environ.get("KLEAR_ALL_LAYOUTS") == "1":
    OF_OTHER_FAMILIES = tuple(layout.name for layout in LAYOUTS)


@pytest.fixture(scope="module", params=list(MODELS))
def case(request, tmp_path_factory, ranks):
    """Settings of a tiny model, its samples, and what one process computes for each loss."""
    family, shape = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder / "model", family, shape, weights=False)
    config = SFTConfig(
        output=folder / "run",
        model=ModelConfig(path=folder / "model", weights="random", dtype="fp32"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        data=DataConfig(train=("unused",), max_length=64, tokens_per_microbatch=128),
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    samples = ragged_samples(shape.vocab_size, longest=64)
    return config, samples, ranks(1, measure_losses, config, ONE_PROCESS, samples, STEPS, LOSSES)[0]


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: layout.name)
def test_layout_gives_the_numbers_of_one_process(request, case, ranks, layout: Layout):
    config, samples, references = case
    if request.node.callspec.params["case"] != "qwen3" and layout.name not in OF_OTHER_FAMILIES:
        pytest.skip("KLEAR_ALL_LAYOUTS=1 runs it")
    of_ranks = ranks(layout.processes, measure_losses, config, layout, samples, STEPS, LOSSES)
    for loss in LOSSES:
        results = [of_rank[loss] for of_rank in of_ranks]
        for result in results:
            assert result.losses == results[0].losses
            assert result.grad_norms == results[0].grad_norms
        found = compare(results[0], references[loss], samples)
        assert found.within(TOLERANCE), (loss, found)


def test_the_gate_sees_a_wrong_gradient(case, ranks):
    """The gate must fail where the steps differ: here by the learning rate."""
    config, samples, references = case
    other = config.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1.1e-3)})
    result = ranks(1, measure, other, ONE_PROCESS, samples, STEPS, "nll")[0]
    assert not compare(result, references["nll"], samples).within(TOLERANCE)


BALANCED = {"moe_aux_loss": 0.1, "moe_z_loss": 0.01}
"""A hundred times what anyone trains with, so that a wrong part of the gradient is seen."""
EXPERT_STEPS = 2
EVERYWHERE = os.environ.get("KLEAR_EXPERT_LAYOUTS") == "1"
IN_SHORT = ("4 sequences a row, full recompute", "EP4", "TP2 SP EP2")


@pytest.fixture(scope="module", params=["qwen3_moe_balanced", "qwen3_moe"] if EVERYWHERE else ["qwen3_moe_balanced"])
def expert_case(request, tmp_path_factory, ranks):
    """Settings of a tiny model with experts, its samples, and what one process computes."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder / "model", "qwen3_moe", TinyShape(vocab_size=515), weights=False)
    losses = BALANCED if request.param == "qwen3_moe_balanced" else {}
    config = SFTConfig(
        output=folder / "run",
        model=ModelConfig(path=folder / "model", weights="random", dtype="fp32", **losses),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        data=DataConfig(train=("unused",), max_length=64, tokens_per_microbatch=128),
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    samples = ragged_samples(515, longest=64)
    return config, samples, ranks(1, measure, config, ONE_PROCESS, samples, EXPERT_STEPS)[0]


@pytest.mark.parametrize(
    "layout", EXPERT_LAYOUTS[1:] if EVERYWHERE else layouts_named(IN_SHORT), ids=lambda layout: layout.name
)
def test_experts_give_the_numbers_of_one_process(expert_case, ranks, layout: Layout):
    config, samples, reference = expert_case
    assert not check_layout(layout.lay_out(config), read_architecture(config.model.path), layout.processes)
    results = ranks(layout.processes, measure, config, layout, samples, EXPERT_STEPS, timeout_seconds=300.0)
    for result in results:
        assert result.losses == results[0].losses
        assert result.grad_norms == results[0].grad_norms
    found = compare(results[0], reference, samples)
    assert found.within(TOLERANCE), found
