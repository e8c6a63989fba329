"""Where a step's graded groups come from.

A feed is asked for the groups of one rollout step after another. `SynchronousFeed` draws them when it is asked, with
the weights just sent; those of `overlap.py` draw while the steps before are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_klear.config.rl import AlgorithmConfig, GPPOConfig, SamplingConfig
from megatron_klear.config.rollout import Rollout
from megatron_klear.data.prompts import PromptStream
from megatron_klear.orchestrator.grading import Grader, Gradings
from megatron_klear.orchestrator.sampler import Sampler
from megatron_klear.rl.advantages import checked_rewards, is_uninformative, penalise_overlong
from megatron_klear.runs.log import RunLog
from megatron_klear.types import Group, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGroups:
    """What a rollout step is given: the groups to train on, and all that were graded for it, those among them."""

    chosen: list[Group] = field(default_factory=list)
    graded: list[Group] = field(default_factory=list)
    num_informative: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)
    """To be logged: `server_retries`, `groups_dropped` (never drawn), `stale_groups` (drawn by too old a policy, their
    prompts drawn again), `surplus_groups` (informative, and more than the step takes)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawSettings:
    """What of a run's settings says which responses are drawn, and which of them a step trains on."""

    algorithm: AlgorithmConfig
    sampling: SamplingConfig
    rollout: Rollout
    steps: int
    """Rollout steps of the whole run."""
    seed: int

    @classmethod
    def by(cls, config: GPPOConfig) -> DrawSettings:
        """Those of a run."""
        return cls(
            algorithm=config.algorithm,
            sampling=config.sampling,
            rollout=config.rollout,
            steps=config.train.steps,
            seed=config.seed,
        )


class Feed(Protocol):
    """Hands out every prompt of the stream once an epoch."""

    def next_step(self, number: int) -> StepGroups:
        """Graded groups of rollout step `number`, counted from 0; the weights of that version were just sent."""
        ...

    def work(self) -> None:
        """Look after what is under way; called while the step trains, returns at once."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts and what is under way, as JSON."""
        ...

    def files(self) -> dict[str, bytes]:
        """What belongs to the state and is too large for JSON, by file name."""
        ...

    def load_state_dict(self, state: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Go on from a saved state, of any feed. Raises DataError where the prompts are not those of then."""
        ...


class Judge:
    """What of a graded group counts: rewards with the penalty on long responses, and whether it teaches anything."""

    def __init__(self, config: DrawSettings) -> None:
        self._config = config

    def penalised(self, group: Group) -> Group:
        """The group with the soft penalty on responses close to the length cap, where one is configured."""
        penalty = self._config.algorithm.overlong_penalty
        if penalty is None:
            return group
        return penalise_overlong(
            group,
            max_tokens=self._config.sampling.max_tokens,
            buffer_tokens=penalty.buffer_tokens,
            factor=penalty.factor,
        )

    @staticmethod
    def is_informative(group: Group) -> bool:
        """Whether its rewards differ. Raises RewardValueError where they cannot be used."""
        return not is_uninformative(checked_rewards(group))

    def is_usable(self, group: Group) -> bool:
        """Whether a step may train on it."""
        return not self._config.algorithm.drop_zero_advantage or self.is_informative(group)


class PromptQueue:
    """The stream, and before it prompts that have to be drawn again."""

    def __init__(self, stream: PromptStream) -> None:
        self._stream = stream
        self._by_id: dict[str, Prompt] = {}
        self.again: list[Prompt] = []

    def take(self, count: int) -> list[Prompt]:
        """The next prompts."""
        first, self.again = self.again[:count], self.again[count:]
        return first + self._stream.take(count - len(first))

    def find(self, prompt_id: str) -> Prompt:
        """A prompt of the stream by its id."""
        if not self._by_id:
            self._by_id = {prompt.id: prompt for prompt in self._stream.all}
        return self._by_id[prompt_id]

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"stream": self._stream.state_dict(), "again": [prompt.id for prompt in self.again]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises DataError where the data would not give the same prompts."""
        self._stream.load_state_dict(state["stream"])
        self.again = [self.find(prompt_id) for prompt_id in state["again"]]


class SynchronousFeed:
    """Draws when it is asked, with the newest weights: every token is of the policy that is trained."""

    def __init__(
        self, config: DrawSettings, sampler: Sampler, prompts: PromptStream, grader: Grader, log: RunLog
    ) -> None:
        self._config, self._sampler, self._grader, self._log = config, sampler, grader, log
        self._prompts, self._judge = PromptQueue(prompts), Judge(config)

    def next_step(self, number: int) -> StepGroups:
        """Sample and grade until there are enough groups with unequal rewards, at most so many rounds."""
        algorithm = self._config.algorithm
        graded: list[Group] = []
        for round_number in range(algorithm.max_generation_rounds):
            graded += self._draw_and_grade(round_seed(self._config, number, round_number))
            usable = [group for group in graded if self._judge.is_usable(group)]
            if len(usable) >= algorithm.prompts_per_step:
                break
        self._sampler.sleep()
        return StepGroups(
            chosen=usable[: algorithm.prompts_per_step],
            graded=graded,
            num_informative=sum(map(self._judge.is_informative, graded)),
            counters=self._sampler.counters()
            | {"stale_groups": 0.0, "surplus_groups": float(max(0, len(usable) - algorithm.prompts_per_step))},
        )

    def _draw_and_grade(self, seed: int) -> list[Group]:
        """A round of groups with their scores. Grading begins as soon as there is something to grade."""
        algorithm = self._config.algorithm
        gradings = Gradings(self._grader)
        with self._log.time("rollout"):
            taken = self._prompts.take(algorithm.generated_prompts or algorithm.prompts_per_step)
            groups = self._sampler.draw(taken, self._config.sampling, seed, ended=gradings.add)
        with self._log.time("reward"):
            return self._penalised(gradings.of(groups).groups)

    def _penalised(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with rewards that can be used, long responses penalised."""
        for group in groups:
            checked_rewards(group)
        return [self._judge.penalised(group) for group in groups]

    def work(self) -> None:
        """Nothing is under way."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts."""
        return {"prompts": self._prompts.state_dict(), "requests": []}

    def files(self) -> dict[str, bytes]:
        """None."""
        return {}

    def load_state_dict(self, state: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Go to a saved position; what another feed had under way is drawn again."""
        self._prompts.load_state_dict(state["prompts"])
        self._prompts.again += redrawn(self._prompts, state["requests"])


def redrawn(prompts: PromptQueue, requests: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The prompts of recorded requests, to be drawn anew."""
    return [prompts.find(str(request["prompt"])) for request in requests]


def round_seed(config: DrawSettings, step: int, round_number: int) -> int:
    """The seed of a round of generation."""
    return config.seed * 1_000_003 + step * 1009 + round_number
