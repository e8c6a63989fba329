"""The local rollout engine: what it samples, and that its log-probs are the trainer's in every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_klear.config.base import CheckpointConfig, DataConfig, ModelConfig, ParallelConfig, SFTConfig
from megatron_klear.config.rl import SamplingConfig
from megatron_klear.data.pack import num_predicted, pack
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.distributed import exchange
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.model import inverse_frequencies
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import read_architecture
from megatron_klear.rollout.local.decoder import Decoder
from megatron_klear.rollout.local.engine import LocalEngine
from megatron_klear.rollout.weights.checksum import checksum
from megatron_klear.types import Prompt

FAMILIES = {"qwen3": TinyShape(tied_embeddings=True), "qwen2": TinyShape(), "llama": TinyShape()}
EXPERTS = {"qwen3_moe": TinyShape(initializer_range=0.1)}
LAYOUTS = {
    "1": ParallelConfig(),
    "TP2 SP": ParallelConfig(tensor=2),
    "PP2": ParallelConfig(pipeline=2),
    "CP2": ParallelConfig(context=2),
    "TP2 PP2": ParallelConfig(tensor=2, pipeline=2),
}
SHARED_OUT = {"TP2 SP EP2": ParallelConfig(tensor=2, expert=2)}
CASES = [(family, name, parallel) for family in FAMILIES for name, parallel in LAYOUTS.items()]
CASES += [(family, name, parallel) for family in EXPERTS for name, parallel in SHARED_OUT.items()]


def prompts(count: int = 5) -> list[Prompt]:
    generator = np.random.default_rng(0)
    return [
        Prompt(
            id=f"p{index}",
            data_source="test",
            tokens=generator.integers(0, 500, size=int(generator.integers(1, 12))).astype(np.int32),
            text="",
            ground_truth="",
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module", params=[*FAMILIES, *EXPERTS])
def model(request, tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "hf", request.param, (FAMILIES | EXPERTS)[request.param])


def engine_for(model: Path, max_sequences: int = 7) -> LocalEngine:
    architecture = read_architecture(model)
    frequencies, scaling = inverse_frequencies(architecture)
    decoder = Decoder(architecture, frequencies, scaling, torch.float32, torch.device("cpu"))
    return LocalEngine(decoder, stop_token_ids=[3], max_sequences=max_sequences)


def hf_weights(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def test_logprobs_are_those_of_transformers(model: Path):
    from transformers import AutoModelForCausalLM

    engine = engine_for(model)
    engine.load_weights(hf_weights(model).items(), 1)
    drawn = engine.draw(prompts(), SamplingConfig(samples_per_prompt=3, max_tokens=20), seed=5)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for prompt, samples in zip(prompts(), drawn, strict=True):
        for sample in samples:
            tokens = torch.from_numpy(sample.tokens.astype(np.int64))
            with torch.no_grad():
                expected = reference(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
            head = len(prompt.tokens)
            np.testing.assert_allclose(sample.logprobs[head:], expected[head - 1 :].numpy(), atol=1e-4)
            assert sample.finish == ("stop" if sample.tokens[-1] == 3 else "length")


@pytest.mark.parametrize("model", list(FAMILIES), indirect=True)
def test_samples_do_not_depend_on_the_batch(model: Path):
    sampling = SamplingConfig(samples_per_prompt=3, max_tokens=16, temperature=0.8, top_p=0.9, top_k=50)
    alone, together = engine_for(model, max_sequences=1), engine_for(model, max_sequences=64)
    weights = hf_weights(model)
    for engine in (alone, together):
        engine.load_weights(weights.items(), 0)
    first = alone.draw(prompts(), sampling, seed=1)
    second = together.draw(prompts(), sampling, seed=1)
    reordered = together.draw(prompts()[::-1], sampling, seed=1)[::-1]
    for a, b, c in zip(first, second, reordered, strict=True):
        assert [s.tokens.tolist() for s in a] == [s.tokens.tolist() for s in b]
        assert [s.tokens.tolist() for s in a] == [s.tokens.tolist() for s in c]
    other = together.draw(prompts(), sampling, seed=2)
    assert [s.tokens.tolist() for g in other for s in g] != [s.tokens.tolist() for g in second for s in g]


def roll_out_and_rescore(model: Path, parallel: ParallelConfig) -> tuple[float, list[list[int]], bool]:
    """Largest difference of sampler and trainer log-probs after two optimizer steps, the samples, checksums equal."""
    from megatron_klear.rl.losses import NLL

    config = SFTConfig(
        output=model / "run",
        model=ModelConfig(path=model, dtype="fp32"),
        parallel=parallel,
        data=DataConfig(train=("unused",)),
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    with world(parallel) as topology:
        trainer, sampler = Engine(config, topology), engine_for(model)
        sampler.load_weights(trainer.hf_weights(), 0)
        sampling = SamplingConfig(samples_per_prompt=2, max_tokens=12)
        for version in range(1, 3):
            drawn = exchange.tell_all(sampler.draw(prompts(), sampling, seed=version))
            samples = [sample for of_prompt in drawn for sample in of_prompt]
            total = sum(num_predicted(sample) for sample in samples)
            mine = samples[topology.data.rank :: topology.data.size]
            trainer.train_step([pack(mine, [1 / total] * len(mine))], NLL())
            sent = {}

            def watched(sent=sent):
                for name, tensor in trainer.hf_weights():
                    sent[name] = checksum(tensor)
                    yield name, tensor

            held = sampler.load_weights(watched(), version)
        drawn = exchange.tell_all(sampler.draw(prompts(), sampling, seed=9))
        samples = [sample for of_prompt in drawn for sample in of_prompt]
        batch = pack(samples, [1.0] * len(samples))
        difference = (trainer.logprobs([batch])[0] - batch.sampler_logprobs)[batch.weights != 0].abs().max()
        trainer.close()
    return float(difference), [sample.tokens.tolist() for sample in samples], held == {"local": sent}


@pytest.mark.parametrize(
    ("model", "parallel"),
    [pytest.param(family, parallel, id=f"{family}-{name}") for family, name, parallel in CASES],
    indirect=["model"],
)
def test_sampler_and_trainer_agree_in_every_layout(model: Path, ranks, parallel: ParallelConfig):
    results = ranks(parallel.model_size, roll_out_and_rescore, model, parallel)
    alone = ranks(1, roll_out_and_rescore, model, ParallelConfig())[0]
    for difference, samples, arrived in results:
        assert difference < 1e-4
        assert arrived
        assert samples == alone[1]
