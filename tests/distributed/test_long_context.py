"""Beyond the trained length: trainer, local engine, transformers and vLLM give one log-prob where YaRN extends."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pool import Pool
from test_hf_parity import LAYOUTS, TOLERANCE, largest_difference, packed_row, transformers_logprobs
from vllm_server import SHAPE, running_server

from megatron_klear.config.evaluation import EvaluatedModelConfig
from megatron_klear.config.rl import SamplingConfig
from megatron_klear.data.tiny import write_tiny_model
from megatron_klear.evaluation.sampling import LocalSource
from megatron_klear.models.extend import write_extended
from megatron_klear.rollout.vllm.client import ServerClient, open_session
from megatron_klear.types import PackedBatch, Prompt

TRAINED = 64
LENGTHS = {"1.0x": 64, "1.5x": 96, "2.5x": 160}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 64 positions, and the same extended to 160."""
    folder = tmp_path_factory.mktemp("long")
    plain = write_tiny_model(folder / "plain", "qwen3", replace(SHAPE, max_positions=TRAINED, initializer_range=0.2))
    return plain, write_extended(plain, folder / "extended")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trainer_is_transformers(folders: tuple[Path, Path], ranks: Pool, layout: str, length: str) -> None:
    plain, extended = folders
    batch = packed_row(SHAPE.vocab_size, (LENGTHS[length], 40))
    changed = transformers_logprobs(extended, batch) - transformers_logprobs(plain, batch)
    assert changed.abs().max() > 100 * TOLERANCE, "the extension changes nothing"
    assert largest_difference(ranks, extended, LAYOUTS[layout], batch) < TOLERANCE


def expected_logprobs(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """transformers' log-probs [n - 1] of `tokens` [n] after the first."""
    ids = torch.as_tensor(tokens.astype(np.int64))
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    targets = torch.cat([ids[1:], ids.new_zeros(1)])
    row = PackedBatch(tokens=ids, targets=targets, weights=torch.ones(len(ids)), cu_seqlens=bounds)
    return transformers_logprobs(folder, row)[:-1].numpy()


def test_the_local_engine_is_transformers(folders: tuple[Path, Path]) -> None:
    """What an evaluation draws, decoded token by token with a cache, to the last position."""
    source = LocalSource(EvaluatedModelConfig(path=folders[1], dtype="fp32", device="cpu"), None)
    assert source.extension() == "YaRN 2.5 over 64 positions"
    source._engine._stop = set()  # to the end, whatever is drawn
    tokens = np.arange(20, 28, dtype=np.int32)
    prompt = Prompt(id="p", data_source="x", tokens=tokens, text="", ground_truth=None)
    for length in LENGTHS.values():
        (drawn,) = source._engine.draw([prompt], SamplingConfig(samples_per_prompt=2, max_tokens=length - 8), 0)
        for sample in drawn:
            assert len(sample.tokens) == length
            difference = sample.logprobs[8:] - expected_logprobs(folders[1], sample.tokens)[7:]
            assert np.abs(difference).max() < TOLERANCE


@pytest.mark.vllm
def test_vllm_is_transformers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    longest = LENGTHS["2.5x"]
    tokens = np.random.default_rng(0).integers(20, SHAPE.vocab_size - 20, longest).astype(np.int32)

    async def ask(address: str) -> list[np.ndarray]:
        async with open_session() as session:
            client = ServerClient(address, session=session, api_key=None)
            # The last position is the token that a server must draw.
            return [await client.prompt_logprobs(tokens[: n - 1]) for n in LENGTHS.values()]

    with running_server(tmp_path, model=folders[1], longest_sequence=longest) as server:
        found = asyncio.run(ask(server.address))
    for length, logprobs in zip(LENGTHS.values(), found, strict=True):
        assert np.abs(logprobs - expected_logprobs(folders[1], tokens[: length - 1])).max() < TOLERANCE
