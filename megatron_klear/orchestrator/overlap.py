"""Groups drawn while earlier steps are trained: one step ahead, or always.

A book has what is under way. A group stays in it from the moment its prompt is taken until a step has trained on it or
reported it as dropped, and the book is what a checkpoint holds: no prompt is lost, and none is used twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any

from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.data.prompts import PromptStream
from megatron_klear.orchestrator.feed import (
    DrawSettings,
    Feed,
    Judge,
    PromptQueue,
    StepGroups,
    SynchronousFeed,
    redrawn,
    round_seed,
)
from megatron_klear.orchestrator.grading import Grader
from megatron_klear.orchestrator.sampler import POLL_SECONDS, Sampler, key_of
from megatron_klear.rewards.scoring import Graded
from megatron_klear.rl.versions import oldest_version
from megatron_klear.rollout.engine import GroupRequest, told_apart
from megatron_klear.runs.group_file import dump_groups, load_groups, with_routes_or_without
from megatron_klear.runs.log import RunLog
from megatron_klear.types import Group, Prompt

GROUPS_FILE = "rollouts.npz"
_GRADING_POLL_SECONDS = 0.02


@dataclass(kw_only=True, slots=True, eq=False)
class Entry:
    """One group in the book: recorded, submitted, drawn, graded."""

    request: GroupRequest
    prompt: Prompt
    """As in the stream; the request's may have an id of its own."""
    step: int | None = None
    """The rollout step it is drawn for, where that is fixed."""
    submitted: int | None = None
    """Version of the weights when it was submitted."""
    group: Group | None = None
    grading: Future[Graded] | None = None

    @property
    def is_graded(self) -> bool:
        """Whether it has its scores."""
        return self.group is not None and self.group.scores is not None

    @property
    def graded_group(self) -> Group:
        """The group with its scores."""
        assert self.group is not None
        return self.group

    @property
    def oldest(self) -> int:
        """The oldest version that drew, or will draw, a token of it."""
        if self.group is not None:
            return oldest_version(self.group)
        assert self.submitted is not None
        return self.submitted


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """What a step is given."""

    chosen: list[Group]
    graded: list[Group]
    failures: list[str]
    stale: int
    surplus: int


class OverlapFeed(ABC):
    """A feed whose groups are drawn in the background."""

    mode: str

    def __init__(
        self, config: DrawSettings, sampler: Sampler, prompts: PromptStream, grader: Grader, log: RunLog
    ) -> None:
        self._config, self._sampler, self._grader, self._log = config, sampler, grader, log
        self._prompts, self._judge = PromptQueue(prompts), Judge(config)
        self._entries: list[Entry] = []
        self._failures: list[str] = []
        self._stale = 0
        self._step = 0
        self._is_training = False  # whether the step was given its groups
        self._counts: Counter[str] = Counter()  # what a mode has to remember beside the book
        self._error: Exception | None = None

    def next_step(self, number: int) -> StepGroups:
        """Graded groups of the step, as soon as it can have them."""
        self._step, self._is_training = number, False
        with self._log.time("rollout"):
            choice = self._sampler.until(self._advance)
        counters = self._sampler.counters()
        given = self._checked(choice, counters)
        self._is_training = True
        return given

    def work(self) -> None:
        """Grade what was drawn meanwhile and ask for more; an error waits for the next step."""
        if self._error is None:
            try:
                self._progress(0.0)
                self._order()
                self._submit()
            except Exception as error:
                self._error = error

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts and the book."""
        self.work()
        return {
            "mode": self.mode,
            "prompts": self._prompts.state_dict(),
            "requests": [
                {
                    "prompt": entry.prompt.id,
                    "id": entry.request.prompt.id,
                    "seed": entry.request.seed,
                    "step": entry.step,
                    "drawn": entry.group is not None,
                }
                for entry in self._entries
            ],
            "failures": list(self._failures),
            "stale": self._stale,
            "counts": dict(self._counts),
        }

    def files(self) -> dict[str, bytes]:
        """The groups that are drawn already."""
        drawn = [entry.group for entry in self._entries if entry.group is not None]
        return {GROUPS_FILE: dump_groups(drawn)} if drawn else {}

    def load_state_dict(self, state: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Go on from a saved state: drawn groups are kept, others asked for again; of another mode, all of them."""
        self._prompts.load_state_dict(state["prompts"])
        if state.get("mode") != self.mode:
            self._prompts.again += redrawn(self._prompts, state["requests"])
            return
        self._failures, self._stale = list(state["failures"]), int(state["stale"])
        self._counts = Counter(state["counts"])
        for record in state["requests"]:
            prompt = self._prompts.find(record["prompt"])
            asked = replace(prompt, id=record["id"])
            self._enter(prompt, asked, int(record["seed"]), record["step"])
        drawn = [entry for entry, record in zip(self._entries, state["requests"], strict=True) if record["drawn"]]
        asked_for = {entry.request.prompt.id: entry.request.prompt for entry in drawn}
        groups = load_groups(files[GROUPS_FILE], asked_for.__getitem__) if drawn else []
        replayed = self._config.algorithm.router_replay == "sampler"
        for entry, saved in zip(drawn, groups, strict=True):
            group = with_routes_or_without(saved, replayed)
            if group is None:
                continue  # drawn before the run replayed routes: asked for again
            entry.group = group
            if group.scores is None:
                entry.grading = self._grader.begin([group])

    @abstractmethod
    def _order(self) -> None:
        """Enter what may be asked for now."""

    @abstractmethod
    def _choose(self) -> _Choice | None:
        """What the step takes, once it can have it; leaves the book."""

    def _advance(self) -> _Choice | None:
        if self._error is not None:
            raise self._error
        self._progress(0.0)
        self._order()
        self._submit()
        choice = self._choose()
        if choice is None:
            self._progress(POLL_SECONDS)
        return choice

    def _enter(self, prompt: Prompt, asked: Prompt, seed: int, step: int | None) -> None:
        request = GroupRequest(prompt=asked, sampling=self._config.sampling, seed=seed)
        self._entries.append(Entry(request=request, prompt=prompt, step=step))

    def _submit(self) -> None:
        recorded = [entry for entry in self._entries if entry.submitted is None and entry.group is None]
        if recorded:
            self._sampler.submit([entry.request for entry in recorded])
        for entry in recorded:
            entry.submitted = self._sampler.version

    def _progress(self, timeout_seconds: float) -> None:
        """Take what was drawn and graded, waiting at most so long for the first of it."""
        grading = [entry.grading for entry in self._entries if entry.grading is not None]
        if self._sampler.in_flight:
            finished = self._sampler.take(min(timeout_seconds, _GRADING_POLL_SECONDS) if grading else timeout_seconds)
            by_key = {key_of(entry.request): entry for entry in self._entries}
            for one in finished:
                entry = by_key[key_of(one.request)]
                if one.group is None:
                    self._failures.append(one.failure)
                    self._entries.remove(entry)
                else:
                    entry.group, entry.grading = one.group, self._grader.begin([one.group], one.followed)
        elif grading:
            wait(grading, timeout_seconds, FIRST_COMPLETED)
        elif any(entry.submitted is not None and entry.group is None for entry in self._entries):
            self._sampler.check_lost()
        for entry in self._entries:
            if entry.grading is not None and entry.grading.done():
                entry.group = self._judge.penalised(entry.grading.result().groups[0])
                entry.grading = None

    def _checked(self, choice: _Choice, counters: Mapping[str, float]) -> StepGroups:
        """What the step is given, unless too much of it was dropped or could not be graded."""
        self._sampler.check_dropped(choice.failures, len(choice.graded) + len(choice.failures))
        verdicts = Counter(score.verdict for group in choice.graded for score in group.scores or ())
        self._grader.check(Graded(groups=choice.graded, counts=verdicts))
        return StepGroups(
            chosen=choice.chosen,
            graded=choice.graded,
            num_informative=sum(map(self._judge.is_informative, choice.graded)),
            counters={**counters, "stale_groups": float(choice.stale), "surplus_groups": float(choice.surplus)},
        )

    def _given(self, chosen: Sequence[Entry], reported: Sequence[Entry], surplus: int = 0) -> _Choice:
        """Strike entries off the book, reported as trained on or as dropped."""
        gone = {id(entry) for entry in reported}
        self._entries = [entry for entry in self._entries if id(entry) not in gone]
        choice = _Choice(
            chosen=[entry.graded_group for entry in chosen],
            graded=[entry.graded_group for entry in reported],
            failures=self._failures,
            stale=self._stale,
            surplus=surplus,
        )
        self._failures, self._stale = [], 0
        return choice


class OneStepOff(OverlapFeed):
    """Step k + 1 is asked for when step k begins, and drawn while it trains.

    Seeds, rounds and the choice among the groups are those of `SynchronousFeed`. What is not finished when step k + 1
    begins goes on with the new weights.
    """

    mode = "one_step_off"

    def _order(self) -> None:
        for step in (self._step, self._step + 1):
            if step < self._config.steps and not self._counts[str(step)]:
                self._order_round(step, 0)

    def _order_round(self, step: int, round_number: int) -> None:
        algorithm = self._config.algorithm
        taken = self._prompts.take(algorithm.generated_prompts or algorithm.prompts_per_step)
        for prompt, asked in zip(taken, told_apart(taken), strict=True):
            self._enter(prompt, asked, round_seed(self._config, step, round_number), step)
        self._counts[str(step)] = round_number + 1

    def _choose(self) -> _Choice | None:
        algorithm = self._config.algorithm
        mine = [entry for entry in self._entries if entry.step == self._step]
        if not all(entry.is_graded for entry in mine):
            return None
        usable = [entry for entry in mine if self._judge.is_usable(entry.graded_group)]
        rounds = self._counts[str(self._step)]
        if len(usable) < algorithm.prompts_per_step and rounds < algorithm.max_generation_rounds:
            self._order_round(self._step, rounds)
            return None
        chosen = usable[: algorithm.prompts_per_step]
        return self._given(chosen, mine, len(usable) - len(chosen))


class Asynchronous(OverlapFeed):
    """Requests are under way at all times; a step takes what was drawn first, the oldest before the newer.

    Groups asked for and not trained yet are at most (max_staleness + 1) * prompts_per_step (AReaL, arXiv 2505.24298,
    Eq. 3), so that each can be trained before it is too old. A step waits for a response only where another step
    could not take it in time: long responses are not left out for being long. A group that is too old all the same is
    dropped and counted, and its prompt drawn again.
    """

    mode = "asynchronous"

    def __init__(
        self, config: DrawSettings, sampler: Sampler, prompts: PromptStream, grader: Grader, log: RunLog
    ) -> None:
        super().__init__(config, sampler, prompts, grader, log)
        assert isinstance(config.rollout, VLLMRolloutConfig)
        self._staleness = config.rollout.max_staleness
        algorithm = config.algorithm
        self._most_looked_at = algorithm.max_generation_rounds * (
            algorithm.generated_prompts or algorithm.prompts_per_step
        )
        self._most_in_flight = config.rollout.max_groups_in_flight or float("inf")

    def _order(self) -> None:
        # A step in training counts whole, however few groups it found: its weights are not there yet.
        steps = min(self._staleness + 1, self._config.steps - self._step) - self._is_training
        size = self._config.algorithm.prompts_per_step
        drawing = sum(entry.group is None for entry in self._entries)
        room = min(
            steps * size - sum(self._takes_room(entry) for entry in self._entries),
            # Groups without a lesson are replaced only as often as a step may look at more.
            self._most_looked_at + max(steps - 1, 0) * size - len(self._entries) - len(self._failures) if steps else 0,
            self._most_in_flight - drawing,
        )
        for _ in range(int(max(0, room))):
            prompt = self._prompts.take(1)[0]
            # A seed of its own each time a prompt comes up: it may be under way twice.
            self._enter(prompt, prompt, round_seed(self._config, self._counts["asked"], 0), None)
            self._counts["asked"] += 1

    def _takes_room(self, entry: Entry) -> bool:
        return not entry.is_graded or self._judge.is_usable(entry.graded_group)

    def _choose(self) -> _Choice | None:
        algorithm = self._config.algorithm
        self._drop_stale()
        graded = [entry for entry in self._entries if entry.is_graded]
        useless = [entry for entry in graded if not self._judge.is_usable(entry.graded_group)]
        usable = sorted((entry for entry in graded if entry not in useless), key=lambda entry: entry.oldest)
        unfinished = [entry for entry in self._entries if not entry.is_graded]
        looked_at = len(graded) + len(self._failures)
        if len(usable) < algorithm.prompts_per_step and looked_at < self._most_looked_at and unfinished:
            return None
        chosen, left = usable[: algorithm.prompts_per_step], usable[algorithm.prompts_per_step :]
        if self._must_wait(chosen, left, unfinished):
            return None
        return self._given(chosen, [*chosen, *useless])

    def _drop_stale(self) -> None:
        too_old = [entry for entry in self._entries if entry.is_graded and entry.oldest < self._step - self._staleness]
        for entry in too_old:
            self._entries.remove(entry)
            self._prompts.again.append(entry.prompt)
        self._stale += len(too_old)

    def _must_wait(self, chosen: Sequence[Entry], left: Sequence[Entry], unfinished: Sequence[Entry]) -> bool:
        """Whether more would be left for the next steps than they can take in time, and waiting can mend it."""
        size = self._config.algorithm.prompts_per_step
        for steps in range(self._staleness + 1):
            last = self._step + steps - self._staleness  # versions up to here can be trained `steps` steps on, no later
            late = [entry for entry in unfinished if entry.oldest <= last]
            due = len(late) + sum(entry.oldest <= last for entry in left)
            can_change = len(chosen) < size or any(entry.oldest > last for entry in chosen)
            if late and can_change and due > steps * size:
                return True
        return False


def open_feed(config: DrawSettings, sampler: Sampler, prompts: PromptStream, grader: Grader, log: RunLog) -> Feed:
    """The feed that `rollout.mode` names; engines that do not draw in the background have the synchronous one."""
    modes: dict[str, Callable[..., Feed]] = {
        "synchronous": SynchronousFeed,
        OneStepOff.mode: OneStepOff,
        Asynchronous.mode: Asynchronous,
    }
    mode = config.rollout.mode if isinstance(config.rollout, VLLMRolloutConfig) else "synchronous"
    return modes[mode](config, sampler, prompts, grader, log)
