"""What every rank plans a rollout step with, and the token arrays that only the data rank which trains them gets.

Rank 0 has the groups. Of each sample all ranks are told about 20 bytes (length, reward, how it ended), from which they
compute the same advantages, weights and rows; tokens and log-probs go to the ranks that train them, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_klear.data.pack import num_predicted
from megatron_klear.rl.advantages import checked_rewards
from megatron_klear.types import Group, Routes, Sample, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class StepNumbers:
    """Of the samples that a rollout step trains on, group by group: N groups, S samples."""

    sizes: npt.NDArray[np.int32]  # [N] samples of each group
    lengths: npt.NDArray[np.int32]  # [S] tokens, the prompt's among them
    trained: npt.NDArray[np.int32]  # [S] tokens that the loss reads
    rewards: npt.NDArray[np.float64]  # [S]
    correct: npt.NDArray[np.bool_]  # [S]
    overlong: npt.NDArray[np.bool_]  # [S] cut at the length cap

    @classmethod
    def of(cls, groups: Sequence[Group]) -> StepNumbers:
        """Those of graded groups. Raises RewardValueError where a group's rewards cannot be used."""
        rewards = [checked_rewards(group) for group in groups]
        samples = [sample for group in groups for sample in group.samples]
        verdicts = [score.verdict for group in groups for score in group.scores or ()]
        return cls(
            sizes=np.array([len(group.samples) for group in groups], dtype=np.int32),
            lengths=np.array([len(sample.tokens) for sample in samples], dtype=np.int32),
            trained=np.array([num_predicted(sample) for sample in samples], dtype=np.int32),
            rewards=np.concatenate([*rewards, np.zeros(0)]),
            correct=np.array([verdict is Verdict.RIGHT for verdict in verdicts], dtype=np.bool_),
            overlong=np.array([sample.finish == "length" for sample in samples], dtype=np.bool_),
        )

    def by_group(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Values of samples [S], one array a group."""
        return np.split(values, np.cumsum(self.sizes)[:-1]) if len(self.sizes) else []

    @property
    def nbytes(self) -> int:
        """What every rank receives, but for the envelope."""
        return sum(array.nbytes for array in (self.sizes, self.lengths, self.trained, self.rewards)) + 2 * len(
            self.lengths
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenArrays:
    """Samples laid end to end as a few arrays, for the way to the rank that trains them: 9 bytes a token.

    Where routes are replayed also a byte for every layer and expert that a token went through, two above 256 experts.
    """

    numbers: npt.NDArray[np.int32]  # [S] of the samples, as the step counts them
    lengths: npt.NDArray[np.int32]  # [S]
    tokens: npt.NDArray[np.int32]  # [tokens of all]
    trained: npt.NDArray[np.bool_]  # [tokens of all]
    logprobs: npt.NDArray[np.float32] | None  # [tokens of all]; None where the sampler gave none
    routes: Routes | None = None  # [tokens of all - S, layers, chosen]; see Sample

    @classmethod
    def of(cls, samples: Mapping[int, Sample]) -> TokenArrays:
        """Those of samples by their numbers. Raises ValueError where some have log-probs or routes and others none."""
        logprobs = [sample.logprobs for sample in samples.values()]
        given = [values for values in logprobs if values is not None]
        if given and len(given) != len(logprobs):
            raise ValueError("some samples have the sampler's log-probs and others have none")
        routes = [sample.routes for sample in samples.values() if sample.routes is not None]
        if routes and len(routes) != len(logprobs):
            raise ValueError("some samples have the sampler's routes and others have none")
        return cls(
            numbers=np.array(list(samples), dtype=np.int32),
            lengths=np.array([len(sample.tokens) for sample in samples.values()], dtype=np.int32),
            tokens=np.concatenate([np.zeros(0, np.int32), *(sample.tokens for sample in samples.values())]),
            trained=np.concatenate([np.zeros(0, np.bool_), *(sample.trained for sample in samples.values())]),
            logprobs=np.concatenate(given) if given else None,
            routes=np.concatenate(routes) if routes else None,
        )

    def samples(self) -> dict[int, Sample]:
        """The samples by their numbers, as far as training reads them."""
        return dict(self._each())

    def _each(self) -> Iterator[tuple[int, Sample]]:
        ends = np.cumsum(self.lengths)
        bounds = zip(self.numbers.tolist(), (ends - self.lengths).tolist(), ends.tolist(), strict=True)
        for place, (number, start, end) in enumerate(bounds):
            yield (
                number,
                Sample(
                    tokens=self.tokens[start:end],
                    trained=self.trained[start:end],
                    logprobs=None if self.logprobs is None else self.logprobs[start:end],
                    # One less for each sample before: last tokens have none.
                    routes=None if self.routes is None else self.routes[start - place : end - place - 1],
                ),
            )
