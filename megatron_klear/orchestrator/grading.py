"""Grading in a run: groups in, groups with scores out, in worker processes, at once or in the background."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Lock
from types import TracebackType

from megatron_klear.config.rl import RewardConfig
from megatron_klear.rewards.base import check_sources, check_time, check_truths
from megatron_klear.rewards.format import complete
from megatron_klear.rewards.open import open_pool
from megatron_klear.rewards.ray_node import Head
from megatron_klear.rewards.scoring import ErrorAlarm, Graded, request_of, requests_of, with_scores
from megatron_klear.rewards.worker import Request
from megatron_klear.types import Group, Prompt, Score, Verdict

_MADE_UP = "<think>\nThis was made up to try the reward.\n</think>\n\nThe answer is \\boxed{0}."


def check_prompts(config: RewardConfig, prompts: Sequence[Prompt]) -> None:
    """Raise RewardError where a prompt has no reward, too little time for it, or a ground truth that is none."""
    check_sources((prompt.data_source for prompt in prompts), config.functions)
    check_time((prompt.data_source for prompt in prompts), config.for_rewards(), config.timeout_seconds)
    check_truths(((prompt.place, prompt.data_source, prompt.ground_truth) for prompt in prompts), config.functions)


class Grader:
    """Scores groups, their responses one by one; a context, since it holds grading processes."""

    def __init__(self, config: RewardConfig, prompts: Sequence[Prompt], nodes: int = 1) -> None:
        """Start the processes, which try every reward once on a made-up response to the first prompt of its kind.

        `nodes` are the run's: a Ray of its own is ready once as many have joined it.
        Raises RewardError where a prompt's data source has no reward, or what grades is not installed.
        """
        self._alarm = ErrorAlarm(config.max_error_share)
        first = {prompt.data_source: prompt for prompt in reversed(prompts)}
        self._pool = open_pool(
            first,
            config.for_rewards(),
            backend=config.backend,
            ray_address=config.ray_address,
            ray_nodes=1 if config.ray_address else nodes,
            timeout_seconds=config.timeout_seconds,
            workers=config.workers,
            environment=config.environment,
            trials=[
                Request(name, prompt.ground_truth, complete(prompt.text, _MADE_UP), prompt.extra_info)
                for name, prompt in first.items()
            ],
        )

    def head(self) -> Head | None:
        """What the run's other nodes join to grade, as soon as they can; None where there is nothing to join.

        Raises RewardError where a Ray of the run's own does not come up.
        """
        return self._pool.head()

    def wait_until_ready(self) -> None:
        """Return when the rewards are imported and tried. Raises RewardError where one cannot be used."""
        self._pool.wait_until_ready()

    def begin_response(self, prompt: Prompt, text: str) -> Future[Score]:
        """Grade one response in the background, before its group is there; from any thread."""
        return self._pool.submit(request_of(prompt, text))

    def begin(self, groups: Sequence[Group], begun: Sequence[Future[Score]] = ()) -> Future[Graded]:
        """Grade in the background, without the alarm; `check` is for what came of it.

        `begun` are gradings of the groups' responses that are under way already, all of them in order, or none.
        """
        scores = begun or [self._pool.submit(request) for request in requests_of(groups)]
        whole: Future[Graded] = Future()
        whole.set_running_or_notify_cancel()
        left, lock = [len(scores)], Lock()

        def done(_: Future[Score]) -> None:
            with lock:
                left[0] -= 1
                if left[0]:
                    return
            finish()

        def finish() -> None:
            try:
                whole.set_result(with_scores(groups, [score.result() for score in scores]))
            except BaseException as error:
                whole.set_exception(error)

        if not scores:
            finish()
        for score in scores:
            score.add_done_callback(done)
        return whole

    def check(self, graded: Graded) -> None:
        """Raise GradingAlarm when too many could not be graded."""
        self._alarm.check(graded)

    def __enter__(self) -> Grader:
        """The grader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        self._pool.close()


class Gradings:
    """Gradings of groups that come one by one."""

    def __init__(self, grader: Grader) -> None:
        """None yet."""
        self._grader = grader
        self._by_group: dict[int, Future[Graded]] = {}

    def add(self, group: Group, begun: Sequence[Future[Score]] = ()) -> None:
        """Grade a group; `begun` as for `Grader.begin`."""
        self._by_group[id(group)] = self._grader.begin([group], begun)

    def of(self, groups: Sequence[Group]) -> Graded:
        """The groups, which were all added, with scores. Raises GradingAlarm when too many could not be graded."""
        parts = [self._by_group[id(group)].result() for group in groups]
        counts: Counter[Verdict] = sum((part.counts for part in parts), Counter())
        graded = Graded(groups=[group for part in parts for group in part.groups], counts=counts)
        self._grader.check(graded)
        return graded
