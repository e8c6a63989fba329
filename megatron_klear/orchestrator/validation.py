"""Accuracy on held-out problems, with sampling settings of its own and the statistics of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_klear.config.rl import ValidationConfig
from megatron_klear.orchestrator.grading import Grader, Gradings
from megatron_klear.orchestrator.sampler import Sampler
from megatron_klear.rewards.format import complete
from megatron_klear.rewards.votes import vote_of
from megatron_klear.runs.rollout_files import RolloutWriter
from megatron_klear.statistics.figures import figures_of
from megatron_klear.types import Group, Prompt, Verdict

_SEED = 20_250_811


@dataclass(frozen=True, kw_only=True, slots=True)
class Validator:
    """Samples every held-out problem k times and reports how often the answer is right."""

    config: ValidationConfig
    prompts: list[Prompt]
    kept: RolloutWriter | None = None
    """Writes the samples of every validation, None to keep none."""

    def measure(self, sampler: Sampler, grader: Grader, *, step: int) -> dict[str, float] | None:
        """`accuracy` (avg@k) with its 95 % interval over problems, pass@k, maj@k and the like after step `step`.

        None where there are no problems.
        """
        if not self.prompts:
            return None
        gradings = Gradings(grader)
        graded = gradings.of(sampler.draw(self.prompts, self.config.sampling, _SEED, ended=gradings.add))
        if self.kept is not None:
            self.kept.write(step, graded.groups)
            self.kept.flush()
        return _values(graded.groups)


def _values(groups: Sequence[Group]) -> dict[str, float]:
    """The figures that an evaluation gives, under the names of metrics."""
    scores = [group.scores or () for group in groups]
    right = [[score.verdict is Verdict.RIGHT for score in of_prompt] for of_prompt in scores]
    votes = [
        [
            vote_of(complete(group.prompt.text, text), score) or None
            for text, score in zip(group.texts, of_prompt, strict=True)
        ]
        for group, of_prompt in zip(groups, scores, strict=True)
    ]
    figures = figures_of(right, votes)
    samples = [sample for group in groups for sample in group.samples]
    verdicts = [score.verdict for of_prompt in scores for score in of_prompt]
    values = {
        "accuracy": figures.accuracy,
        "accuracy_low": figures.low,
        "accuracy_high": figures.high,
        "accuracy_run_to_run": figures.run_to_run,
        "pass_at_k": figures.pass_at[figures.samples],
        "majority_at_k": figures.majority,
        "cut_off_share": float(np.mean([sample.finish == "length" for sample in samples])),
        "malformed_share": verdicts.count(Verdict.MALFORMED) / len(verdicts),
        "samples_per_prompt": figures.samples,
        "num_prompts": figures.num_problems,
        "response_length_mean": float(np.mean([int(sample.trained.sum()) for sample in samples])),
    }
    return {name: value for name, value in values.items() if value is not None}
