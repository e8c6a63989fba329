"""Rollouts made by hand, and the settings of a tiny run to train on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_klear.config.rl import GPPOConfig
from megatron_klear.types import Group, Prompt, Sample, Score, Verdict, route_type

Overrides = dict[str, dict[str, Any]]


def gppo_config(model: Path, tables: Overrides | None = None) -> GPPOConfig:
    """Settings of a tiny run; `tables` overrides keys of its tables."""
    base: Overrides = {
        "model": {"path": model, "weights": "random", "dtype": "fp32"},
        "optimizer": {"learning_rate": 1e-3, "decay": "constant", "epsilon": 1e-6},
        "checkpoint": {"asynchronous": False},
        "prompts": {"sources": [{"generator": "arithmetic"}], "max_tokens": 16},
        "sampling": {"samples_per_prompt": 4, "max_tokens": 32},
        "algorithm": {"prompts_per_step": 4, "prompts_per_update": 2},
        "train": {"steps": 1, "tokens_per_microbatch": 96, "segment_multiple": 8},
    }
    for name, values in (tables or {}).items():
        base[name] = base.get(name, {}) | values
    return GPPOConfig.model_validate({"output": model.parent / "run", **base})


def score(reward: float) -> Score:
    """A score whose verdict is right where the reward is above 0."""
    return Score(reward=reward, verdict=Verdict.RIGHT if reward > 0 else Verdict.WRONG)


def sample(prompt: Prompt, response: Sequence[int], finish: str = "stop", logprob: float = -6.0) -> Sample:
    """A sample of these response tokens, each drawn at about `logprob`."""
    tokens = np.concatenate([prompt.tokens, np.asarray(response, dtype=np.int32)])
    trained = np.arange(len(tokens)) >= len(prompt.tokens)
    spread = np.sin(tokens * 1.7 + np.arange(len(tokens))) * 0.5
    logprobs = np.where(trained, logprob + spread, 0).astype(np.float32)
    return Sample(tokens=tokens, trained=trained, logprobs=logprobs, finish="length" if finish == "length" else "stop")


def with_routes(made: Sample, experts: int = 8, layers: int = 4, chosen: int = 2, seed: int = 0) -> Sample:
    """The sample as though its sampler had sent every token anywhere."""
    generator = np.random.default_rng([seed, *made.tokens.tolist()])
    anywhere = generator.random((len(made.tokens) - 1, layers, experts)).argsort(-1)[..., :chosen]
    return replace(made, routes=anywhere.astype(route_type(experts)))


def fixed_groups(groups: int = 4, samples: int = 4, vocab_size: int = 512, seed: int = 0) -> list[Group]:
    """Groups of ragged responses with mixed rewards; every response of one token or more."""
    generator = np.random.default_rng(seed)
    made = []
    for index in range(groups):
        tokens = generator.integers(0, vocab_size, size=int(generator.integers(2, 16))).astype(np.int32)
        prompt = Prompt(id=f"p{index}", data_source="arithmetic", tokens=tokens, text="", ground_truth="1")
        lengths = [1, 32, *generator.integers(2, 32, size=samples).tolist()][:samples]
        drawn = [
            sample(prompt, generator.integers(0, vocab_size, size=n), "length" if n == 32 else "stop") for n in lengths
        ]
        rewards = [1.0 if number % (index + 2) == 0 else -1.0 for number in range(samples)]
        made.append(Group(prompt=prompt, samples=drawn, texts=[""] * samples, scores=[score(r) for r in rewards]))
    return made
