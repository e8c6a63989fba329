"""Optimizer state in host memory: no bit of training is another, and it resumes in any layout and with any share.

The card is emulated (tests/emulated_card.py): what lies where is told by marks, and all of it is computed on the CPU.
"""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_card import EmulatedCard, on_host
from tiny_run import SHAPE, write_run
from tiny_run import start as start_run

from megatron_klear.config.base import SFTConfig
from megatron_klear.config.memory import stage_memory
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.errors import UserError
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.host_optimizer import HostOptimizer, host_bytes
from megatron_klear.mcore.topology import Topology, world
from megatron_klear.rl.losses import NLL
from megatron_klear.types import PackedBatch
from megatron_klear.verify.layouts import Layout, layouts_named, ragged_samples


def own_rows(topology: Topology) -> list[PackedBatch]:
    samples = ragged_samples(SHAPE.vocab_size, longest=32, count=4)
    weights = loss_weights(np.array([num_predicted(sample) for sample in samples]), "token_mean")
    rows = [pack([sample], [float(weight)]) for sample, weight in zip(samples, weights, strict=True)]
    return rows[topology.data.rank :: topology.data.size]


def masters(engine: Engine) -> list[torch.Tensor]:
    """Masters and moments of this rank's shards, in the order of parameters, wherever they lie."""
    found = []
    for part in engine.optimizer.chained_optimizers:
        for model_param in part.model_param_group_index_map:
            values = part._get_main_param_and_optimizer_states(model_param)
            found += [values[name].clone() for name in ("param", "exp_avg", "exp_avg_sq", "step")]
    return found


def result(engine: Engine) -> list[torch.Tensor]:
    return [*masters(engine), *(tensor.clone() for _, tensor in engine.hf_weights())]


def at_share(config: SFTConfig, share: float) -> SFTConfig:
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"cpu_offload": share})})


def trained(config: SFTConfig, layout: Layout, folder: Path, share: float, steps: int, *, resume: Path | None = None):
    """Losses, norms and all state after `steps` steps, saved at `folder`; from a checkpoint where one is given."""
    laid_out = at_share(layout.apply(config), share)
    with (
        world(laid_out.parallel, laid_out.seed) as topology,
        EmulatedCard(),
        closing(Engine(laid_out, topology)) as engine,
    ):
        rows, seen = own_rows(topology), []
        if resume is not None:
            engine.load(resume)
            seen.append(engine.logprobs(rows))
        for _ in range(steps):
            stats = engine.train_step(rows, NLL())
            seen.append([torch.tensor([stats.loss, stats.grad_norm])])
        engine.save(folder)
        engine.finish_save()
        return [tensor for step in seen for tensor in step] + result(engine), host_bytes(engine.optimizer)


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture
def bf16(tmp_path: Path) -> SFTConfig:
    return start_run(write_run(tmp_path), "--model.dtype", "bf16").config


@pytest.mark.parametrize(("name", "share"), [("DP2 overlap", 0.4), ("one process", 1.0)])
def test_a_share_on_the_host_trains_and_resumes_bit_by_bit(tmp_path, ranks, bf16: SFTConfig, name: str, share: float):
    (layout,) = layouts_named([name])

    def run(of: float, label: str, steps: int, resume: str | None = None):
        before = None if resume is None else tmp_path / resume
        return ranks(layout.processes, resumed, bf16, layout, tmp_path / label, of, steps, before)

    whole, offloaded = run(0.0, "whole", 3), run(share, "offloaded", 3)
    run(share, "two", 2)
    again, without, back = (run(of, f"from-{n}", 1, "two") for n, of in enumerate((share, 0.0, 1.0 - share)))
    for rank in range(layout.processes):
        expected, none_there = whole[rank]
        assert none_there == 0
        assert same(offloaded[rank][0], expected)
        for one in (again, without, back):
            values, _ = one[rank]
            rows = len(values) - len(expected) + 4  # log-probs before the step; two steps' loss and norm less
            assert same(values[rows - 2 :], expected[2:])
        assert again[rank][1] == offloaded[rank][1] > 0  # what was loaded is what is stepped, not beside it


def resumed(config: SFTConfig, layout: Layout, folder: Path, share: float, steps: int, resume: Path | None):
    return trained(config, layout, folder, share, steps, resume=resume)


def test_offloaded_state_goes_through_other_layouts_bit_by_bit(tmp_path, ranks, bf16: SFTConfig):
    """Saved by two data ranks, loaded and saved by two tensor ranks with another share, and by one; then as it was."""
    dp2, tp2, one = layouts_named(["DP2 overlap", "TP2", "one process"])
    ranks(2, resumed, bf16, dp2, tmp_path / "a", 0.5, 2, None)
    ranks(2, resumed, bf16, tp2, tmp_path / "b", 1.0, 0, tmp_path / "a")
    ranks(1, resumed, bf16, one, tmp_path / "c", 0.3, 0, tmp_path / "b")
    straight = ranks(2, resumed, bf16, dp2, tmp_path / "d", 0.5, 1, tmp_path / "a")
    round_about = ranks(2, resumed, bf16, dp2, tmp_path / "e", 0.5, 1, tmp_path / "c")
    for (ours, _), (theirs, _) in zip(round_about, straight, strict=True):
        assert same(ours, theirs)


def placed(config: SFTConfig, layout: Layout, share: float) -> dict[str, int]:
    """Bytes of optimizer state by side after a step, and how many of the card's are the model's own."""
    laid_out = at_share(layout.apply(config), share)
    with (
        world(laid_out.parallel, laid_out.seed) as topology,
        EmulatedCard(),
        closing(Engine(laid_out, topology)) as engine,
    ):
        first = masters(engine)  # there is state before the first step, so that it can be saved
        engine.train_step(own_rows(topology), NLL())
        sizes = {"host": 0, "card": 0, "first": sum(tensor.nbytes for tensor in first if tensor.numel() > 1)}
        for part in engine.optimizer.chained_optimizers:
            assert isinstance(part.optimizer, HostOptimizer)
            for state in part.optimizer.state.values():
                sides = {on_host(state[name]) for name in ("master_param", "exp_avg", "exp_avg_sq", "step")}
                assert len(sides) == 1
                side = "host" if sides.pop() else "card"
                sizes[side] += sum(state[name].nbytes for name in ("master_param", "exp_avg", "exp_avg_sq"))
        assert sizes["host"] == host_bytes(engine.optimizer)
        return sizes


@pytest.mark.parametrize(("name", "shards"), [("one process", 1), ("DP2", 2)])
def test_bytes_on_card_and_host_are_those_of_the_plan(ranks, bf16: SFTConfig, name: str, shards: int):
    (layout,) = layouts_named([name])
    architecture = start_run(bf16.output.parent / "run.toml", "--model.dtype", "bf16").architecture
    for share in (1.0, 0.5) if shards == 1 else (0.5,):
        run = at_share(bf16, share)
        plan = stage_memory(run, architecture, 0, shards, 128, 1)
        sizes = ranks(layout.processes, placed, bf16, layout, share)
        largest = 12 * architecture.vocab_size * architecture.hidden_size  # whole parameters go, one past the share
        host, card = sum(size["host"] for size in sizes), sum(size["card"] for size in sizes)
        planned_host = plan.host * 12 // 16 * shards  # without the copies of gradients
        assert planned_host <= host <= planned_host + largest * shards
        assert plan.optimizer * shards - largest * shards <= card <= plan.optimizer * shards
        assert host + card == 12 * architecture.num_parameters
        assert sum(size["first"] for size in sizes) == host + card


def test_without_a_card_it_is_refused_before_the_model_is_built(tmp_path, bf16: SFTConfig):
    with world(bf16.parallel, bf16.seed) as topology, pytest.raises(UserError, match=r"cpu_offload = 0.5 .*no GPU"):
        Engine(at_share(bf16, 0.5), topology, architecture=None)
