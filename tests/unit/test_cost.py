"""The cost model's counts against what is built and counted: parameters, FLOPs, bytes; and its laws."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from megatron_klear.config.cost import Layout, Traffic, bubble, hardware_flops, memory, step_flops, traffic
from megatron_klear.config.cost_models import DEVICES, PUBLISHED, model_from_config
from megatron_klear.config.cost_seconds import Rollout, cache_bytes_of_token, decode_seconds, rollout_cost, step_cost

TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MOE = TINY | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def built(config: dict, device: str = "meta"):
    settings = {k: v for k, v in config.items() if k != "model_type"}
    hf = transformers.AutoConfig.for_model(config["model_type"], **settings, attn_implementation="eager")
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(hf)


@pytest.mark.parametrize("config", [*PUBLISHED.values(), TINY, MOE], ids=[*PUBLISHED, "tiny", "tiny MoE"])
def test_parameters_are_those_of_the_built_model(config: dict):
    model = model_from_config("m", config)
    assert model.num_parameters == sum(parameter.numel() for parameter in built(config).parameters())


def test_published_sizes():
    """As the models' own cards have them, in billions: (all, of one token)."""
    cards = {"8B": (8.2, 8.2), "32B": (32.8, 32.8), "30B-A3B": (30.5, 3.3), "235B-A22B": (235, 22)}
    for name, (whole, active) in cards.items():
        model = model_from_config(name, PUBLISHED[name])
        assert model.num_parameters / 1e9 == pytest.approx(whole, rel=0.005)
        assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.02)


def test_flops_are_those_that_torch_counts():
    """Matrix products of transformers' model, forward and backward, with scores over the whole row."""
    model, tokens = model_from_config("tiny", TINY), 64
    network = built(TINY, "cpu")
    with FlopCounterMode(display=False) as counter:
        network(torch.arange(tokens)[None] % 101, use_cache=False).logits.sum().backward()
    layout = Layout(row_tokens=tokens)
    assert counter.get_total_flops() == step_flops(model, layout, mean_context=tokens)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputed_flops_are_those_that_torch_counts(granularity: str):
    model, tokens = model_from_config("tiny", TINY), 64
    network = built(TINY, "cpu")
    for layer in network.model.layers:
        part = layer if granularity == "full" else layer.mlp
        part.forward = (lambda f: lambda *a, **k: checkpoint(f, *a, use_reentrant=False, **k))(part.forward)
    # Stopping early would leave out the last product of what is repeated; Megatron repeats it.
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        network(torch.arange(tokens)[None] % 101, use_cache=False).logits.sum().backward()
    layout = Layout(row_tokens=tokens, recompute=granularity)
    assert counter.get_total_flops() == hardware_flops(model, layout, mean_context=tokens)


def test_rings_send_what_they_do():
    part = Traffic(axis="data", kind="all_reduce", what="x", payload=800, ranks=4, span=4)
    assert part.sent == 1200
    assert replace(part, kind="reduce_scatter").sent + replace(part, kind="all_gather").sent == part.sent
    assert replace(part, kind="send").sent == 800


def test_axes_divide_what_they_should():
    model = model_from_config("8B", PUBLISHED["8B"])
    whole = Layout(row_tokens=4096, data=8)
    assert memory(model, replace(whole, tensor=4, data=2)).parameters == pytest.approx(
        memory(model, whole).parameters / 4, rel=1e-3
    )
    assert bubble(Layout(pipeline=4, microbatches=8)) == 3 / 8
    assert bubble(Layout(pipeline=4, virtual_pipeline=3, microbatches=8)) == 1 / 8
    assert traffic(model, Layout(row_tokens=4096)) == []
    more = {part.what: part.payload for part in traffic(model, replace(whole, microbatches=4))}
    assert more == {part.what: part.payload for part in traffic(model, whole)}  # gradients go once a step


def test_experts_are_cut_over_their_ranks():
    model = model_from_config("30B-A3B", PUBLISHED["30B-A3B"])
    sizes = [memory(model, Layout(data=8, expert=expert, row_tokens=4096)) for expert in (1, 8)]
    experts = model.architecture.num_layers * model.expert_parameters(128)
    assert sizes[0].parameters - sizes[1].parameters == 2 * experts * 7 // 8
    assert sizes[0].optimizer == pytest.approx(sizes[1].optimizer, rel=1e-6)  # each expert's state lies once in all
    (sent,) = [part for part in traffic(model, Layout(data=8, expert=8, row_tokens=4096)) if part.axis == "expert"]
    assert sent.payload == 4 * 48 * 4096 * 8 * 2048 * 2
    assert sent.sent == sent.payload * 7 / 8


def test_a_token_is_drawn_no_faster_than_memory_is_read():
    device, dense = DEVICES["H100"], model_from_config("8B", PUBLISHED["8B"])
    rollout = Rollout(sequences=64, prompt_tokens=256, mean_tokens=1024, longest_tokens=4096, tensor=1, servers=8)
    alone = decode_seconds(dense, rollout, device, 1, 0.0)
    assert alone == pytest.approx(2 * dense.num_parameters / (device.memory_bandwidth * device.memory_share), rel=1e-6)
    assert cache_bytes_of_token(dense) == 2 * 36 * 8 * 128 * 2
    crowd = decode_seconds(dense, rollout, device, 4096, 0.0)
    flops = 4096 * 2 * dense.num_parameters
    assert crowd == pytest.approx(flops / (device.peak_flops * device.matrix_share), rel=1e-6)
    moe = model_from_config("30B-A3B", PUBLISHED["30B-A3B"])
    few, many = (decode_seconds(moe, rollout, device, n, 0.0) for n in (1, 512))
    assert few * moe.num_parameters == pytest.approx(many * moe.active_parameters, rel=0.01)  # in the end all are read


def test_a_step_is_its_terms():
    model, device = model_from_config("8B", PUBLISHED["8B"]), DEVICES["H100"]
    one = step_cost(model, Layout(tensor=4, data=2, microbatches=4, recompute="full"), device, 8192)
    assert one.seconds > one.compute > 0
    assert one.bubble == 0
    assert set(one.seconds_of_axis) == {"tensor", "data"}
    halved = step_cost(model, Layout(tensor=4, data=4, microbatches=2, recompute="full"), device, 8192)
    assert halved.compute == pytest.approx(one.compute / 2)
    assert not step_cost(model, Layout(row_tokens=32768), device, 8192).fits
    big = model_from_config("235B", PUBLISHED["235B-A22B"])
    rollout = Rollout(sequences=8, prompt_tokens=1, mean_tokens=2, longest_tokens=3, tensor=1, servers=8)
    with pytest.raises(ValueError, match="do not fit"):
        rollout_cost(big, rollout, device)


def test_the_model_needs_no_torch():
    code = "import sys, megatron_klear.config.cost_seconds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
