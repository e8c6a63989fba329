"""Background rollouts without servers: groups come late, out of order, across versions, or not at all."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Future

import numpy as np

from megatron_klear.rewards.scoring import Graded
from megatron_klear.rollout.engine import FinishedGroup, GroupRequest
from megatron_klear.types import Group, Sample, Score, Verdict, VersionSpan


class FakeRollouts:
    """Draws nonsense. A request's tokens are of the versions that were held while it was under way."""

    last_progress = 0.0

    def __init__(
        self, seed: int, *, fail: float = 0.0, lose_weights: float = 0.0, slow: float = 0.5, routes: bool = False
    ) -> None:
        """Shares: of requests that fail, of calls after which a server needs weights, of calls that deliver nothing.

        With `routes` every token has some.
        """
        self._routes = routes
        self._random = random.Random(seed)
        self._fail, self._lose, self._slow = fail, lose_weights, slow
        self._waiting: list[tuple[GroupRequest, int]] = []
        self.version, self.needs_weights = -1, False
        self.happened: list[str] = []
        self.submitted: list[tuple[str, int]] = []
        self.most_in_flight = self.syncs = 0

    def load(self, version: int) -> None:
        """Take weights."""
        assert version >= self.version
        self.version, self.needs_weights = version, False
        self.syncs += 1

    @property
    def in_flight(self) -> int:
        return len(self._waiting)

    def submit(self, requests) -> None:
        assert self.version >= 0
        keys = {(request.prompt.id, request.seed) for request, _ in self._waiting}
        for request in requests:
            assert (request.prompt.id, request.seed) not in keys, "two requests under way cannot be told apart"
            self._waiting.append((request, self.version))
            self.submitted.append((request.prompt.id, request.seed))
        self.most_in_flight = max(self.most_in_flight, len(self._waiting))

    def take(self, timeout_seconds: float) -> list[FinishedGroup]:
        if self._random.random() < self._lose:
            self.needs_weights = True
        if self._random.random() < self._slow:
            return []
        finished = []
        for _ in range(self._random.randint(0, 3)):
            if self._waiting:
                request, first = self._waiting.pop(self._random.randrange(len(self._waiting)))
                finished.append(self._finished(request, first))
        return finished

    def notices(self) -> list[str]:
        told, self.happened = self.happened, []
        return told

    def counters(self) -> dict[str, float]:
        return {"server_retries": 1.0, "groups_dropped": 0.0}

    shares_cards = False

    def sleep(self) -> None:
        assert not self._waiting, "asleep with requests under way"

    def _finished(self, request: GroupRequest, first: int) -> FinishedGroup:
        if self._random.random() < self._fail:
            return FinishedGroup(request=request, group=None, failure=request.prompt.id)
        kind = self._random.choice(["mixed", "mixed", "right", "wrong"])
        texts = ["right", "wrong"] if kind == "mixed" else [kind, kind]
        samples = [self._sample(request, first) for _ in texts]
        return FinishedGroup(request=request, group=Group(prompt=request.prompt, samples=samples, texts=texts))

    def _sample(self, request: GroupRequest, first: int) -> Sample:
        head, length = len(request.prompt.tokens), self._random.randint(1, 8)
        versions = sorted(self._random.randint(first, self.version) for _ in range(length))
        starts = {version: head + versions.index(version) for version in versions}
        spans = tuple(VersionSpan(v, start, start + versions.count(v)) for v, start in sorted(starts.items()))
        tokens = np.concatenate([request.prompt.tokens, np.arange(length, dtype=np.int32)])
        trained = np.arange(len(tokens)) >= head
        return Sample(
            tokens=tokens,
            trained=trained,
            logprobs=np.where(trained, -self._random.random(), 0).astype(np.float32),
            policy_version=versions[0],
            version_spans=spans if len(spans) > 1 else (),
            finish="stop",
            routes=np.ones((len(tokens) - 1, 2, 1), dtype=np.uint8) if self._routes else None,
        )


class FakeGrader:
    """Right is what says so. Grading in the background ends at some later look."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def grade(self, groups) -> Graded:
        graded = []
        for group in groups:
            verdicts = [Verdict.RIGHT if text == "right" else Verdict.WRONG for text in group.texts]
            scores = [Score(reward=1.0 if v is Verdict.RIGHT else -1.0, verdict=v) for v in verdicts]
            graded.append(Group(prompt=group.prompt, samples=group.samples, texts=group.texts, scores=scores))
        return Graded(groups=graded, counts=Counter(s.verdict for g in graded for s in g.scores))

    def begin(self, groups, begun=()) -> Future:
        future = _Slowly(self._random)
        future.set_result(self.grade(groups))
        return future

    def check(self, graded: Graded) -> None:
        assert sum(graded.counts.values()) == sum(len(group.samples) for group in graded.groups)


class _Slowly(Future):
    """A result that is not there at the first look."""

    def __init__(self, choices: random.Random) -> None:
        super().__init__()
        self._choices = choices

    def done(self) -> bool:
        return self._choices.random() < 0.5
