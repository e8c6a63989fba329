"""The stream through Megatron: an epoch is the same on any number of data ranks, its short last step included."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from pool import Pool

from megatron_klear.config.base import ModelConfig, OptimizerConfig, RunConfig
from megatron_klear.data.pack import num_predicted
from megatron_klear.data.packing import RowSettings, sequence_work
from megatron_klear.data.sft import SampleStream
from megatron_klear.data.tiny import TinyShape, tiny_config
from megatron_klear.models.architecture import read_architecture
from megatron_klear.types import Sample

SHAPE = TinyShape(
    hidden_size=16,
    ffn_hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
    tied_embeddings=True,
)


class _Store:
    def __init__(self, lengths: list[int]) -> None:
        generator = np.random.default_rng(0)
        self.samples = [
            Sample(tokens=generator.integers(0, 64, length).astype(np.int32), trained=generator.random(length) < 0.7)
            for length in lengths
        ]
        self.lengths = np.array(lengths)
        self.trained_counts = np.array([num_predicted(sample) for sample in self.samples])

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def _train_epoch(lengths: list[int], aggregation: str, folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of one epoch."""
    from megatron_klear.mcore.engine import Engine
    from megatron_klear.mcore.topology import world
    from megatron_klear.rl.losses import NLL

    run = RunConfig(
        output=folder,
        model=ModelConfig(path=folder, weights="random", dtype="fp32", fused_loss=False),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    with world(run.parallel, run.seed) as topology:
        engine = Engine(run, topology)
        stream = SampleStream(
            _Store(lengths),
            RowSettings(tokens_per_row=32, segment_multiple=4, rows_per_step=4),
            work=sequence_work(read_architecture(folder)),
            aggregation=aggregation,  # type: ignore[arg-type]
            data_rank=topology.data.rank,
            data_size=topology.data.size,
        )
        stats = [engine.train_step(stream.next_step(), NLL()) for _ in range(stream.steps_per_epoch)]
    return [(one.loss, one.grad_norm) for one in stats]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_epoch_is_the_same_on_any_number_of_data_ranks(ranks: Pool, tmp_path: Path, aggregation: str) -> None:
    lengths = [32, 1, 32, 1, *random.Random(0).choices(range(2, 33), k=30), 5]
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen3", SHAPE)))
    (alone,) = ranks(1, _train_epoch, lengths, aggregation, tmp_path)
    assert len(alone) >= 4
    for world_size in (2, 4):
        for found in ranks(world_size, _train_epoch, lengths, aggregation, tmp_path):
            np.testing.assert_allclose(found, alone, rtol=1e-5)
