"""The orchestrator: all of a reinforcement-learning run that is not training.

It has the prompts and their ground truths, draws from servers or has the trainer draw, turns tokens into texts, grades,
chooses what a step trains on, keeps the book of what is under way, and writes the rollout files. Training ranks get
`StepNumbers` of a step's samples and the `TokenArrays` of those they train, and no text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_klear.config.checks import check_prompt_tokens
from megatron_klear.config.checks_rollout import Served
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.config.start import GPPOStart
from megatron_klear.data.prompts import PromptStream
from megatron_klear.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_klear.models.architecture import Architecture
from megatron_klear.models.stop_tokens import read_stop_tokens
from megatron_klear.orchestrator.feed import DrawSettings, StepGroups
from megatron_klear.orchestrator.grading import Grader, check_prompts
from megatron_klear.orchestrator.overlap import open_feed
from megatron_klear.orchestrator.sampler import Sampler
from megatron_klear.orchestrator.step_numbers import StepNumbers, TokenArrays
from megatron_klear.orchestrator.trainer import Trainer, TrainersSampler, TrainersWeights, send_weights
from megatron_klear.orchestrator.validation import Validator
from megatron_klear.rewards.ray_node import Head
from megatron_klear.rewards.truth_store import TruthStore
from megatron_klear.rl.versions import version_lag
from megatron_klear.rollout.engine import RolloutEngine
from megatron_klear.runs.log import RunLog
from megatron_klear.runs.rollout_files import RolloutWriter
from megatron_klear.types import Group, Sample, Verdict

if TYPE_CHECKING:
    from megatron_klear.rollout.vllm.open import Access

_GRACE_SECONDS = 60.0
"""For the engine to drop by itself what is past rollout.deadline_seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGiven:
    """What the trainer is told of a rollout step."""

    numbers: StepNumbers
    """Of the samples to train on."""
    metrics: Mapping[str, float]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What was spent on `rollout` and `reward`."""


class StepSamples:
    """The groups that a step trains on, their samples numbered through."""

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self.groups = list(groups)
        self._samples = [sample for group in groups for sample in group.samples]

    def arrays(self, parts: Sequence[Sequence[int]]) -> list[TokenArrays]:
        """The samples of each part, by their numbers."""
        return [TokenArrays.of({number: self._samples[number] for number in part}) for part in parts]

    def by_group(self, values: Mapping[int, Any]) -> dict[int, list[Any]]:
        """What is known of samples by their number, by the identity of their group."""
        numbers = iter(range(len(self._samples)))
        return {id(group): [values[next(numbers)] for _ in group.samples] for group in self.groups}


class Orchestrator:
    """A context; `open` and then the rest. One thread calls it."""

    def __init__(self, start: GPPOStart, trainer: Trainer, tell: Callable[[str], None]) -> None:
        """Read the prompts. `tell` takes news for people.

        Raises UserError (DataError, RewardError) where prompts, ground truths or tokens cannot be used.
        """
        self._config, self._architecture, self._trainer, self._tell = start.config, start.architecture, trainer, tell
        config = start.config
        self._tokenizer = load_tokenizer(config.model.path, config.prompts.chat_template)
        validation = self._stream(validation=True) if config.validation.sources else None
        held_out = [] if validation is None else validation.all
        self._prompts = self._stream(exclude=frozenset(prompt.id for prompt in held_out))
        asked = [*self._prompts.all, *held_out]
        check_prompts(config.reward, asked)
        check_prompt_tokens(config, start.architecture, asked)
        streams = [self._prompts] if validation is None else [self._prompts, validation]
        leave_truths(streams, config.output / "truths")
        held_out = [] if validation is None else validation.all
        self._resources = ExitStack()
        self._validator = Validator(
            config=config.validation, prompts=held_out, kept=self._writer("validation", share=1.0)
        )
        self._kept = self._writer("rollouts", share=config.train.keep_rollouts_share)
        self._log = RunLog()
        self._has_given = False
        self._step = StepSamples()
        self._graded: list[Group] = []

    def __enter__(self) -> Orchestrator:
        """The orchestrator."""
        return self

    def __exit__(self, *_: object) -> None:
        """End servers, grading processes and writers."""
        self._resources.close()

    def warnings(self) -> list[str]:
        """What of the prompts works and is likely not meant."""
        algorithm = self._config.algorithm
        taken, count = algorithm.generated_prompts or algorithm.prompts_per_step, len(self._prompts)
        if count >= taken:
            return []
        return [
            f"prompts.sources hold {count} prompts and a step takes {taken}: some are sampled more than once in a step"
        ]

    def open_grading(self, nodes: int) -> Head | None:
        """Begin to start grading processes; what other nodes of the run join to grade too, if they are to.

        `nodes` are those of the run. Raises UserError where they cannot be started.
        """
        self._grader = self._resources.enter_context(
            Grader(self._config.reward, [*self._prompts.all, *self._validator.prompts], nodes)
        )
        return self._grader.head()

    def open(self) -> Access | None:
        """After `open_grading`, start servers where the run has its own; how the trainer reaches servers, if any.

        Returns when they and the grading processes are ready. Raises UserError where one does not start.
        """
        config = self._config
        rollouts, access = self._open_engine()
        self._resources.enter_context(closing(rollouts))
        self._grader.wait_until_ready()
        limits: dict[str, Any] = {}
        if isinstance(config.rollout, VLLMRolloutConfig):
            limits = {
                "patience_seconds": config.rollout.deadline_seconds + _GRACE_SECONDS,
                "max_dropped_share": config.rollout.max_dropped_share,
                "tell": self._tell,
            }
        if hasattr(rollouts, "follow"):
            rollouts.follow(self._grader.begin_response)
        self._rollouts = rollouts
        self._sampler = Sampler(rollouts, self._send, **limits)
        self._feed = open_feed(DrawSettings.by(config), self._sampler, self._prompts, self._grader, self._log)
        return access

    @property
    def draws_ahead(self) -> bool:
        """Whether there is `work` to do while the trainer trains.

        Not before the first step: a run that resumes has its book still to load.
        """
        rollout = self._config.rollout
        return self._has_given and isinstance(rollout, VLLMRolloutConfig) and rollout.mode != "synchronous"

    def sync(self, version: int) -> None:
        """Have the trainer give its weights to the engine, with proof; `version` is the number of steps trained."""
        self._sampler.sync(version)

    def next_step(self, number: int) -> StepGiven:
        """What rollout step `number` trains on, as soon as it can be had; see `Feed.next_step`."""
        self._step, self._graded = StepSamples(), []  # not held while as much is drawn
        given = self._feed.next_step(number)
        self._step, self._graded = StepSamples(given.chosen), given.graded
        told = StepGiven(
            numbers=StepNumbers.of(given.chosen),
            metrics=sampled_metrics(given, number),
            seconds={phase: self._log.seconds(phase) for phase in ("rollout", "reward")},
        )
        self._log.start()
        self._has_given = True
        return told

    def arrays(self, parts: Sequence[Sequence[int]]) -> list[TokenArrays]:
        """The step's samples that each part names by their numbers."""
        return self._step.arrays(parts)

    def keep(
        self,
        step: int,
        advantages: Sequence[npt.NDArray[np.float64]],
        ratios: Mapping[int, npt.NDArray[np.float32]],
    ) -> None:
        """Write the step's samples behind the training, where samples are kept.

        `advantages` are of each group that was trained on, `ratios` those of its samples' tokens, by their numbers.
        Raises OSError where the step before could not be written.
        """
        if self._kept is not None:
            of_groups = {id(group): values for group, values in zip(self._step.groups, advantages, strict=True)}
            self._kept.write(step, self._graded, of_groups, self._step.by_group(ratios))

    def validate(self, step: int) -> dict[str, float] | None:
        """The validation's numbers with the weights of `step`; None without one."""
        return self._validator.measure(self._sampler, self._grader, step=step)

    def sample(self, prompts: int) -> list[Sample]:
        """Samples of the next few prompts with the run's settings, to be looked at."""
        taken = self._prompts.take(prompts)
        return [
            sample
            for group in self._sampler.draw(taken, self._config.sampling, self._config.seed)
            for sample in group.samples
        ]

    def sleep(self) -> None:
        """Give back memory that only sampling needs."""
        self._rollouts.sleep()

    def work(self) -> None:
        """Look after what is under way."""
        self._feed.work()

    def flush(self, step: int) -> None:
        """Return when what is kept of `step` and of those before it is on disk. Raises OSError where it cannot be."""
        if self._kept is not None:
            self._kept.flush(step)

    def state(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The position in the prompts and what is under way, as JSON and as files of a checkpoint."""
        return self._feed.state_dict(), self._feed.files()

    def load_state(self, state: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Go on from a saved state. Raises DataError where the prompts are not those of then."""
        self._feed.load_state_dict(state, files)

    def _open_engine(self) -> tuple[RolloutEngine, Access | None]:
        return open_engine(self._config, self._architecture, self._tokenizer, self._trainer)

    def _send(self, version: int) -> None:
        send_weights(self._rollouts, self._trainer, version, self._architecture.vocab_size)

    def _stream(self, *, validation: bool = False, exclude: frozenset[str] = frozenset()) -> PromptStream:
        """The problems to train on, without the held-out ones wherever they come from; or those of the validation."""
        config = self._config
        return PromptStream(
            config.validation.sources if validation else config.prompts.sources,
            self._tokenizer,
            max_tokens=config.prompts.max_tokens,
            seed=config.seed + validation,
            thinking=config.prompts.thinking,
            exclude=exclude,
            key="validation.sources" if validation else "prompts.sources",
        )

    def _writer(self, folder: str, share: float) -> RolloutWriter | None:
        """What writes samples into a folder of the run; None where none are kept."""
        of = self._config.train
        if not of.keep_rollouts:
            return None
        path = self._config.output / folder
        writer = RolloutWriter(path, share=share, keep_steps=of.keep_rollouts_steps, form=of.rollout_format)
        return self._resources.enter_context(closing(writer))


def open_engine(
    config: GPPOConfig, architecture: Architecture, tokenizer: ChatTokenizer, trainer: Trainer
) -> tuple[RolloutEngine, Access | None]:
    """The rollout engine that `[rollout]` names, and how the trainer reaches its servers where it has any.

    Raises UserError where a server does not start.
    """
    stop = read_stop_tokens(config.model.path, turn_end=tokenizer.turn_end, tokenizer_eos=tokenizer.eos).ids
    if not isinstance(config.rollout, VLLMRolloutConfig):
        return TrainersSampler(trainer, decode=tokenizer.decode, stop_token_ids=stop), None
    from megatron_klear.rollout.vllm.open import open_vllm  # brings HTTP, which half a second of every start would be

    courier = TrainersWeights(trainer, needs_shared_device=config.rollout.transfer == "cuda_ipc")
    return open_vllm(
        config.rollout,
        Served.by(config, architecture),
        courier,
        decode=tokenizer.decode,
        stop_token_ids=stop,
        logs=config.output / "servers",
    )


def leave_truths(streams: Sequence[PromptStream], folder: Path) -> None:
    """Write all ground truths into `folder` and leave their places in the prompts: what grades reads them there.

    Raises RewardError where one has no form on disk.
    """
    prompts = [prompt for stream in streams for prompt in stream.all]
    store = TruthStore.write(
        folder,
        ((prompt.data_source, prompt.ground_truth, prompt.extra_info) for prompt in prompts),
        place=lambda number: prompts[number].place or prompts[number].id,
    )
    places = iter(store)
    for stream in streams:
        stream.replace(lambda prompt: replace(prompt, ground_truth=next(places), extra_info=None))


def sampled_metrics(given: StepGroups, step: int) -> dict[str, float]:
    """What a rollout step's record says of the groups that were drawn for it."""
    samples = [sample for group in given.graded for sample in group.samples]
    lengths = [int(sample.trained.sum()) for sample in samples]
    rewards = np.concatenate([group.rewards for group in given.graded])
    verdicts = Counter(score.verdict for group in given.graded for score in group.scores or ())
    return {
        "reward_mean": float(rewards.mean()),
        "accuracy": verdicts[Verdict.RIGHT] / max(verdicts.total(), 1),
        "response_length_mean": float(np.mean(lengths)),
        "response_length_max": float(max(lengths)),
        "cut_off_share": float(np.mean([sample.finish == "length" for sample in samples])),
        "zero_advantage_share": 1 - given.num_informative / len(given.graded),
        "rollout_tokens": float(sum(lengths)),
        **{f"verdict/{verdict.value}": float(verdicts[verdict]) for verdict in Verdict},
        **version_lag(given.chosen, step),
        **given.counters,
    }
