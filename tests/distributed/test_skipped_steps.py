"""A step whose loss or gradient is not finite changes nothing, is dumped, and ends a run that repeats it."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import SHAPE, metrics, train, write_run
from tiny_run import start as start_run

from megatron_klear.config.base import SFTConfig
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import NLL
from megatron_klear.runs import folder as run_folder
from megatron_klear.train import sft
from megatron_klear.train.guard import TrainingStopped
from megatron_klear.verify.layouts import layouts_named, ragged_samples


class GradientIsNaN:
    """A finite loss whose derivative is not."""

    def __call__(self, logprobs, old_logprobs, advantages):
        return (logprobs * 0).sqrt()

    def coefficients(self):
        return None


class NaNFrom:
    """NLL, but for the gradients of the steps in `bad`."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, logprobs, old_logprobs, advantages):
        self.calls += 1
        return -logprobs * (math.nan if self.calls in self.bad else 1.0)

    def coefficients(self):
        return None


def train_steps(config: SFTConfig, layout, kinds: str) -> tuple[list[tuple[bool, float]], dict[str, torch.Tensor]]:
    """One step per letter: g(ood), w(eight infinite), n(aN gradient)."""
    laid_out = layout.apply(config)
    with world(laid_out.parallel, laid_out.seed) as topology:
        engine = Engine(laid_out, topology)
        samples = ragged_samples(SHAPE.vocab_size, longest=32, count=4)
        weights = loss_weights(np.array([num_predicted(sample) for sample in samples]), "token_mean")
        good = [pack([sample], [float(weight)]) for sample, weight in zip(samples, weights, strict=True)]
        stats = []
        for kind in kinds:
            rows = good[topology.data.rank :: topology.data.size]
            if kind == "w" and topology.data.rank == 0:  # one rank's trouble is everyone's
                rows = [dataclasses.replace(row, weights=row.weights * math.inf) for row in rows]
            step = engine.train_step(rows, GradientIsNaN() if kind == "n" else NLL())
            stats.append((step.skipped, step.loss))
        return stats, {name: tensor.clone() for name, tensor in engine.hf_weights()}


@pytest.fixture(scope="module")
def toml(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("layout", ["one process", "DP2 overlap", "TP2", "PP2"])
def test_a_bad_step_is_as_if_it_never_was(toml, ranks, layout: str):
    config = start_run(toml).config
    (chosen,) = layouts_named([layout])
    with_bad = ranks(chosen.processes, train_steps, config, chosen, "gwgng")
    without = ranks(chosen.processes, train_steps, config, chosen, "ggg")
    for (stats, weights), (_, expected) in zip(with_bad, without, strict=True):
        assert [skipped for skipped, _ in stats] == [False, True, False, True, False]
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)


def train_with(loss, run) -> str:
    sft.NLL = lambda: loss
    try:
        return train(run)
    except TrainingStopped as error:
        return str(error)


def test_a_run_skips_dumps_and_goes_on(toml, ranks, tmp_path):
    run = start_run(toml, "--output", str(tmp_path / "run"), "--train.rows_per_step", "1")
    told = ranks(1, train_with, NaNFrom(2, 3, 5), run)[0]
    records = metrics(run)
    assert [record["skipped"] for record in records] == [False, True, True, False, True, False]
    assert [record["loss"] is None for record in records] == [record["skipped"] for record in records]
    dumps = sorted(path.name for path in (run.config.output / "skipped").iterdir())
    assert dumps == [f"step-{step:08d}-rank-0.pt" for step in (2, 3, 5)]
    kept = torch.load(run.config.output / "skipped" / dumps[0], weights_only=False)
    assert (kept["stats"].step, len(kept["batches"])) == (2, 1)
    assert told.count("was skipped") == 3


def test_a_run_stops_after_so_many_in_a_row_and_keeps_its_checkpoint(toml, ranks, tmp_path):
    run = start_run(
        toml, "--output", str(tmp_path / "run"), "--train.rows_per_step", "1", "--train.max_skipped_steps", "2"
    )
    told = ranks(1, train_with, NaNFrom(3, 4, 5, 6), run)[0]
    assert "2 steps in a row" in told
    assert "optimizer.learning_rate" in told
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]
    checkpoints = run_folder.checkpoints_of(run.config)
    assert manifest.steps(checkpoints) == [2]
    assert manifest.damage(manifest.step_folder(checkpoints, 2)) == []
