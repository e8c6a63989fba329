"""Sampling from a part of the vocabulary is refused for training, where ratios would be biased; validation may."""

import pytest
from pydantic import ValidationError

from megatron_klear.config.rl import GPPOConfig

BASE = {"output": "run", "model": {"path": "model"}, "prompts": {"sources": [{"generator": "arithmetic"}]}}


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 50}])
def test_truncated_training_samples_are_refused(sampling: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=r"whole vocabulary.*train with top_p 1 and top_k 0"):
        GPPOConfig(**BASE, sampling=sampling)
    GPPOConfig(**BASE, validation={"sampling": sampling})


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ({"advantage": "rloo"}, "samples_per_prompt to at least 2"),
        ({"advantage": "pass_at_k", "pass_k": 8}, r"pass_k 8 must be below"),
        ({"correction": "masked", "correction_cap": 0.9}, "correction_floor"),
        ({"correction_sequence_bounds": (2.0, 1.0)}, "the smaller first"),
    ],
)
def test_estimators_and_bounds_that_cannot_work_are_refused(algorithm: dict, words: str) -> None:
    samples = 1 if algorithm.get("advantage") == "rloo" else 8
    with pytest.raises(ValidationError, match=words):
        GPPOConfig(**BASE, algorithm=algorithm, sampling={"samples_per_prompt": samples})
