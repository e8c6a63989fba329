"""Accuracy on held-out problems: avg@k, with sampling settings of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_klear.config.rl import ValidationConfig
from megatron_klear.orchestrator.grading import Grader
from megatron_klear.orchestrator.sampler import Sampler
from megatron_klear.runs.rollout_files import RolloutWriter
from megatron_klear.types import Prompt, Verdict

_SEED = 20_250_811


@dataclass(frozen=True, kw_only=True, slots=True)
class Validator:
    """Samples every held-out problem k times and reports how often the answer is right."""

    config: ValidationConfig
    prompts: list[Prompt]
    kept: RolloutWriter | None = None
    """Writes the samples of every validation, None to keep none."""

    def measure(self, sampler: Sampler, grader: Grader, *, step: int) -> dict[str, float] | None:
        """`accuracy` (avg@k), `pass_at_k` (any of the k right) and the like after rollout step `step`.

        None where there are no problems.
        """
        if not self.prompts:
            return None
        graded = grader.grade(sampler.draw(self.prompts, self.config.sampling, _SEED))
        if self.kept is not None:
            self.kept.write(step, graded.groups)
            self.kept.flush()
        right = [[score.verdict is Verdict.RIGHT for score in group.scores or ()] for group in graded.groups]
        lengths = [int(sample.trained.sum()) for group in graded.groups for sample in group.samples]
        return {
            "accuracy": float(np.mean([np.mean(of_prompt) for of_prompt in right])),
            "pass_at_k": float(np.mean([any(of_prompt) for of_prompt in right])),
            "samples_per_prompt": self.config.sampling.samples_per_prompt,
            "num_prompts": len(graded.groups),
            "response_length_mean": float(np.mean(lengths)),
        }
