"""Weights of a Hugging Face folder are read from disk by one replica, and every replica has them."""

from pathlib import Path

import pytest
import torch
from pool import Pool

from megatron_klear.config.base import ModelConfig, ParallelConfig, RunConfig
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.mcore import weights as hf
from megatron_klear.mcore.model import build_chunks
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import read_architecture
from megatron_klear.models.safetensors_io import SafetensorsFolder


def read(folder: Path, parallel: ParallelConfig) -> tuple[int, list[torch.Tensor]]:
    """How many tensors this rank read from disk, and its parameters."""
    looked_up = []
    sliced = SafetensorsFolder.sliced

    def counted(self: SafetensorsFolder, name: str):
        looked_up.append(name)
        return sliced(self, name)

    with world(parallel) as topology, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsFolder, "sliced", counted)
        run = RunConfig(output=folder / "run", model=ModelConfig(path=folder, dtype="fp32"), parallel=parallel)
        architecture = read_architecture(folder)
        chunks = build_chunks(architecture, run, topology)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(topology.rank)
        hf.load_hf_weights(chunks, architecture, folder, topology)
        return len(looked_up), [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


@pytest.mark.parametrize(
    ("size", "parallel", "readers"),
    [(2, {}, [0]), (2, {"context": 2}, [0]), (4, {"tensor": 2}, [0, 1]), (4, {"pipeline": 2}, [0, 2])],
)
def test_one_replica_reads(tmp_path: Path, ranks: Pool, size: int, parallel: dict[str, int], readers: list[int]):
    folder = write_tiny_model(tmp_path / "model", "qwen3", TinyShape(num_layers=2))
    found = ranks(size, read, folder, ParallelConfig(**parallel))
    assert [rank for rank, (tensors, _) in enumerate(found) if tensors] == readers
    for reader in readers:
        same = [rank for rank in range(size) if rank not in readers and _replica_of(rank, size, parallel) == reader]
        assert same, "every reader has another replica"
        for rank in same:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[rank][1], found[reader][1], strict=True))


def _replica_of(rank: int, size: int, parallel: dict[str, int]) -> int:
    """The rank whose weights `rank` shares: tensor axis fastest, then data (and context), then pipeline."""
    if "tensor" in parallel:
        return rank % 2
    return rank - rank % (size // parallel.get("pipeline", 1))
